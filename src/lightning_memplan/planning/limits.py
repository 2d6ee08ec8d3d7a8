"""Bounds on the batch size that a plan may choose."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_memplan.checks import check_count, check_margin
from lightning_memplan.settings import MARGIN
from lightning_memplan.types import Device


@dataclass(frozen=True)
class Limits:
    """Bounds that a planned batch size keeps to.

    ``samples`` is the number of samples that one rank is given, ``ranks`` the number of processes. ``budget`` (bytes)
    stands in for the capacity less the margin. From ``failed`` on no batch size is chosen, but the smallest allowed: an
    earlier run ran out of memory there.

    >>> limits = Limits(max_batch_size=64, samples=50, effective_batch_size=96, ranks=2)
    >>> limits.largest, limits.share
    (50, 48)

    Raises:
        ValueError: a number is out of its range.
    """

    margin: float = MARGIN
    min_batch_size: int = 1
    max_batch_size: int | None = None
    multiple_of: int = 1
    effective_batch_size: int | None = None
    samples: int | None = None
    ranks: int = 1
    budget: int | None = None
    failed: int | None = None

    def __post_init__(self) -> None:
        check_margin(self.margin)
        for name in ("min_batch_size", "multiple_of", "max_batch_size", "effective_batch_size"):
            if (value := getattr(self, name)) is not None:
                check_count(name, value)

    def check(self) -> None:
        """Raise ValueError where no batch size can meet all limits, whatever the dataset and the GPU.

        >>> Limits(min_batch_size=8, max_batch_size=4).check()
        Traceback (most recent call last):
        ...
        ValueError: no batch size is at least 8 and at most 4: min_batch_size is above max_batch_size
        """
        least, most, step = self.min_batch_size, self.max_batch_size, self.multiple_of
        if most is not None and least > most:
            raise ValueError(
                f"no batch size is at least {least} and at most {most}: min_batch_size is above max_batch_size"
            )
        if most is not None and -(-least // step) * step > most:
            raise ValueError(f"no batch size from {least} to {most} is a multiple of {step}: lower multiple_of")
        whole = self.effective_batch_size
        if whole is not None and least > whole:
            raise ValueError(f"min_batch_size={least} is above effective_batch_size={whole}, of which it is a part")

    @property
    def largest(self) -> int | None:
        """Largest batch size that the user and the dataset allow; None where neither says."""
        return min((size for size in (self.max_batch_size, self.samples) if size is not None), default=None)

    @property
    def smallest(self) -> int:
        """Smallest batch size that is allowed.

        >>> Limits(min_batch_size=5, multiple_of=4).smallest, Limits(effective_batch_size=30, multiple_of=2).smallest
        (8, 2)
        """
        step, share = self.multiple_of, self.share
        least = -(-self.min_batch_size // step) * step
        if share is None:
            return least
        return next((size for size in range(least, share + 1, step) if share % size == 0), least)

    @property
    def share(self) -> int | None:
        """Samples that each rank contributes to one optimizer step, where an effective batch size is asked for."""
        return None if self.effective_batch_size is None else self.effective_batch_size // self.ranks

    def budget_of(self, device: Device) -> int:
        """Return the bytes of a device that a plan may reserve."""
        return int(device.capacity * (1 - self.margin)) if self.budget is None else self.budget

    def exactly(self, batch_size: int) -> Limits:
        """Return limits that allow this batch size alone."""
        return replace(self, min_batch_size=batch_size, max_batch_size=batch_size, multiple_of=1, samples=None)
