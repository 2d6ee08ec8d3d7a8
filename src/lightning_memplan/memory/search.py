"""Search for the largest batch size that fits by asking a prediction, never by trying it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd, isqrt
from typing import Literal

LimitedBy = Literal["memory", "max_batch_size", "dataset", "effective_batch_size", "step"]


MEMORY: LimitedBy = "memory"


@dataclass(frozen=True, slots=True)
class SearchResult:
    """``batch_size`` is 0 if the smallest does not fit; ``tried`` counts how often the prediction was asked.

    >>> SearchResult(batch_size=96, limited_by="memory", tried=8).limited_by
    'memory'
    """

    batch_size: int
    limited_by: LimitedBy
    tried: int


@dataclass(frozen=True, slots=True)
class SizeLimits:
    """Batch sizes that are allowed. A search checks the values.

    >>> SizeLimits(max_batch_size=64, dataset_size=48).largest()
    (48, 'dataset')
    """

    min_batch_size: int = 1
    max_batch_size: int | None = None
    dataset_size: int | None = None
    multiple_of: int = 1

    def largest(self) -> tuple[int | None, LimitedBy]:
        """Return the largest batch size that is allowed, and the limit that decides it.

        Raises:
            ValueError: a limit is no positive number.
        """
        _check_positive("min_batch_size", self.min_batch_size)
        _check_positive("multiple_of", self.multiple_of)
        limits: list[tuple[int, LimitedBy]] = []
        if self.dataset_size is not None:
            if self.dataset_size == 0:
                raise ValueError("the dataset has length 0: there is nothing to make a batch of")
            _check_positive("dataset_size", self.dataset_size)
            limits.append((self.dataset_size, "dataset"))
        if self.max_batch_size is not None:
            _check_positive("max_batch_size", self.max_batch_size)
            limits.append((self.max_batch_size, "max_batch_size"))
        return min(limits, key=lambda limit: limit[0]) if limits else (None, MEMORY)


_ANY_SIZE = SizeLimits()


def largest_fitting(
    fits: Callable[[int], bool], limits: SizeLimits = _ANY_SIZE, near: int | None = None
) -> SearchResult:
    """Return the largest allowed batch size for which ``fits`` is true.

    The returned size was itself asked, and so was the next larger one, unless a limit stopped the search. If the answer
    is known to be ``near`` some size, the search begins there.

    >>> largest_fitting(lambda n: n <= 100, SizeLimits(multiple_of=8))
    SearchResult(batch_size=96, limited_by='memory', tried=8)
    >>> largest_fitting(lambda n: n <= 100, SizeLimits(dataset_size=60))
    SearchResult(batch_size=60, limited_by='dataset', tried=7)
    >>> [largest_fitting(lambda n: n <= 1000, near=near).tried for near in (None, 1020)]
    [20, 8]

    Raises:
        ValueError: a limit is no positive number, the limits leave no batch size, or every batch size fits.
    """
    largest, limited_by = limits.largest()
    min_batch_size, multiple_of = limits.min_batch_size, limits.multiple_of
    low = -(-min_batch_size // multiple_of)  # in units of multiple_of from here
    top = None if largest is None else largest // multiple_of
    if top is not None and top < low:
        raise ValueError(
            f"no batch size is at least {min_batch_size}, at most {largest} ({limited_by}) and a multiple of "
            f"{multiple_of}"
        )
    tried = 0

    def ask(unit: int) -> bool:
        nonlocal tried
        tried += 1
        return fits(unit * multiple_of)

    start = low if near is None else max(low, near // multiple_of)
    start = start if top is None else min(start, top)
    good, bad = low - 1, None
    unit, step = start, start if near is None else -(-start // 64)
    while bad is None or (good < low and bad > low):  # go up or down in growing steps
        if ask(unit):
            good = unit
            if good == top:
                return SearchResult(good * multiple_of, limited_by, tried)
            if bad is not None:
                break
            if good > 2**40:
                raise ValueError(
                    "every batch size fits: the prediction does not grow with the batch; name a max_batch_size"
                )
            unit = good + step if top is None else min(good + step, top)
        else:
            bad = unit
            if good >= low:
                break
            unit = max(low, bad - step)
        step *= 2
    if good < low:
        return SearchResult(0, "memory", tried)
    while bad - good > 1:
        middle = (good + bad) // 2
        if ask(middle):
            good = middle
        else:
            bad = middle
    return SearchResult(good * multiple_of, "memory", tried)


def largest_dividing(fits: Callable[[int], bool], whole: int, limits: SizeLimits = _ANY_SIZE) -> SearchResult:
    """Return the largest allowed batch size for which ``fits`` is true and that divides ``whole``.

    The largest allowed size is asked first. If it does not fit, the returned size was itself asked, and so was the next
    larger divisor.

    >>> largest_dividing(lambda n: n <= 100, 512)
    SearchResult(batch_size=64, limited_by='memory', tried=4)
    >>> largest_dividing(lambda n: n <= 1000, 512)
    SearchResult(batch_size=512, limited_by='effective_batch_size', tried=1)

    Raises:
        ValueError: a limit is no positive number, or the limits leave no batch size.
    """
    _check_positive("whole", whole)
    largest, limited_by = limits.largest()
    min_batch_size, multiple_of = limits.min_batch_size, limits.multiple_of
    if largest is None or largest >= whole:
        largest, limited_by = whole, "effective_batch_size"
    divisors = {n for k in range(1, isqrt(whole) + 1) if whole % k == 0 for n in (k, whole // k)}
    sizes = [n for n in sorted(divisors) if min_batch_size <= n <= largest and n % multiple_of == 0]
    if not sizes:
        raise ValueError(
            f"no batch size divides {whole}, is at least {min_batch_size}, at most {largest} ({limited_by}) and a "
            f"multiple of {multiple_of}"
        )
    if fits(sizes[-1]):
        return SearchResult(sizes[-1], limited_by, 1)
    good, bad, tried = -1, len(sizes) - 1, 1
    while bad - good > 1:
        middle = (good + bad) // 2
        tried += 1
        if fits(sizes[middle]):
            good = middle
        else:
            bad = middle
    return SearchResult(sizes[good] if good >= 0 else 0, "memory", tried)


def largest_suited(
    suits: Callable[[int], bool],
    below: int,
    *,
    min_batch_size: int = 1,
    multiple_of: int = 1,
    like: int = 1,
    whole: int | None = None,
) -> int:
    """Return the largest batch size under ``below`` that ``suits``, of the sizes that are asked; 0 if none does.

    The sizes that a step accepts follow no known rule: multiples of a number, its divisors, or no more than so many.
    So ask the largest multiples of 2, of 4, of 8 and so on, then half of the last, half of that, and so on; and the
    same with ``like`` as the unit, a size that is known to suit. Then bisect between the first size that suits and the
    next larger that does not, until no more than a 32nd is open. With a ``whole`` the size divides that.

    >>> largest_suited(lambda n: n % 8 == 0, 549), largest_suited(lambda n: 4096 % n == 0, 549)
    (544, 512)
    >>> largest_suited(lambda n: n <= 100, 549), largest_suited(lambda n: 500 % n == 0, 549, whole=3000)
    (100, 500)
    >>> largest_suited(lambda n: n % 12 == 0, 549, like=60), largest_suited(lambda n: False, 549)
    (540, 0)
    """
    if whole is not None:
        divisors = (n for n in range(below - 1, min_batch_size - 1, -1) if whole % n == 0 and n % multiple_of == 0)
        return next(filter(suits, divisors), 0)
    low, units = -(-min_batch_size // multiple_of), -(-below // multiple_of)  # in units of multiple_of from here
    asked = {low}
    for unit in (1, like // gcd(like, multiple_of)):
        sizes = [unit << k for k in range(units.bit_length())]
        asked.update(sizes, (units - units % size for size in sizes))
    good, bad = 0, units
    for size in sorted(asked, reverse=True):
        if low <= size < units:
            if suits(size * multiple_of):
                good = size
                break
            bad = size
    while good and bad - good > max(1, good // 32):
        middle = (good + bad) // 2
        if suits(middle * multiple_of):
            good = middle
        else:
            bad = middle
    return good * multiple_of


def lacking(predicted: int, reserved: int, missing: int, attempt: int) -> int:
    """Return how many bytes to cut from the budget after a trial ran out of memory.

    The trial was ``predicted`` to reserve so many bytes; it reached ``reserved`` bytes, and the request that failed
    lacked ``missing``. The rest of the step would have lacked more, so cut at least a 32nd of the prediction, twice
    that for each earlier ``attempt``, and at most three quarters.

    >>> lacking(3200, reserved=3100, missing=50, attempt=0), lacking(3200, reserved=2000, missing=50, attempt=0)
    (100, 1200)
    >>> lacking(3200, reserved=3300, missing=50, attempt=1), lacking(3200, reserved=0, missing=1, attempt=0)
    (200, 2400)
    """
    return min(max(missing, predicted - reserved, predicted // 32) << attempt, 3 * predicted // 4)


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is a number of samples, an int of at least 1, not {value!r}")
