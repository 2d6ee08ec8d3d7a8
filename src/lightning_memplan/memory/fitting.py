"""Find the largest batch size of an estimate that fits on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning_memplan.cuda.workspaces import Choice
from lightning_memplan.memory.search import SearchResult, SizeLimits, largest_dividing, largest_fitting

if TYPE_CHECKING:
    from lightning_memplan.memory.estimate import Estimate

_ANY_SIZE = SizeLimits()


def largest_on_device(
    estimate_at: Callable[[int], Estimate],
    budget: int,
    capacity: int,
    limits: SizeLimits = _ANY_SIZE,
    *,
    share: int | None = None,
    allowed: Callable[[int], bool] = lambda batch_size: True,
) -> SearchResult:
    """Return the largest batch size within ``limits`` that fits on a GPU.

    The bytes that are known exactly must fit in the ``budget``, and together with the expected workspaces of cuDNN in
    all of the GPU's ``capacity``; where that leaves no batch size, convolutions go without workspaces. With a ``share``
    the batch size divides that.

    >>> import torch, lightning_memplan as mp
    >>> est = mp.estimate(torch.nn.Conv2d(16, 32, 3), torch.zeros(4, 16, 64, 64), precision="16-mixed")
    >>> limits = SizeLimits(max_batch_size=9999)
    >>> tight, ample = (largest_on_device(lambda size: est, 2**30, gpu, limits) for gpu in (2**30, 2**32))
    >>> 0 < tight.batch_size < ample.batch_size
    True
    """

    def search(workspaces: Choice) -> SearchResult:
        def fits(batch_size: int) -> bool:
            if not allowed(batch_size):
                return False
            found = estimate_at(batch_size)
            if not found.fits(batch_size, budget):
                return False
            return not found.has_workspaces or found.fits(batch_size, capacity, workspaces)

        if share is not None:
            return largest_dividing(fits, share, limits)
        found = estimate_at(limits.min_batch_size)
        return largest_fitting(fits, limits, near=start_near(found, capacity, workspaces, start_near(found, budget)))

    found = search("expected")
    # without room for the workspaces convolutions still run, by slower algorithms: better than not at all
    return found if found.batch_size else search("low")


def start_near(estimate: Estimate, capacity: int, workspaces: Choice = "low", at_most: int | None = None) -> int | None:
    """Return a batch size near the largest that fits in ``capacity`` bytes, and not below it; None if none is known.

    It is the largest whose live bytes fit, wherever they lie, and that is no larger than ``at_most``.
    """
    if estimate.program is None:
        return None
    try:
        return largest_fitting(
            lambda size: estimate.replayer_at(size).live_bytes_fit(size, capacity, workspaces),
            SizeLimits(max_batch_size=at_most or None),
            near=at_most or None,
        ).batch_size
    except ValueError:  # the estimate does not grow with the batch size
        return None
