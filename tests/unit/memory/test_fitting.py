"""The largest batch size on a GPU: the exact bytes within the budget, and workspaces within the whole capacity."""

from __future__ import annotations

import pytest

from lightning_memplan.cuda.cudnn_process import FORWARD, MOVED
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.memory.events import Event, Trace
from lightning_memplan.memory.fitting import largest_on_device, start_near
from lightning_memplan.memory.formula import Formula
from lightning_memplan.memory.program import scale
from lightning_memplan.memory.search import SizeLimits

MiB = 2**20
POINTS = (2, 3, 5)
FORMULA = Formula((), parameter_bytes=1000, gradient_bytes=900, input_bytes=10, feature_bytes=45)


def estimate(weights=10 * MiB, sample=MiB, convolves=False):
    """An estimate of a step with weights and a map of each sample, and of a convolution that may take a workspace."""

    def trace(n):
        rule = ("convolution", 0, 86, FORWARD, 2, 0, MOVED, n, 64, 64, 1, 56, 56, 56, 56, 3, 3, 1, 1, 1, 1, 1, 1)
        workspace = (Event(2, 0, step=1, rule=rule), Event(2, -1, step=1)) if convolves else ()
        return Trace(n, (Event(0, weights, "setup"), Event(1, n * sample, step=1), *workspace))

    return Estimate("trace", FORMULA, scale([trace(n) for n in POINTS]))


PLAIN, CONVOLVES = estimate(), estimate(convolves=True)


def by_trying(found, budget, capacity, sizes, workspaces="expected"):
    """The largest size by asking of every one."""
    return max(n for n in sizes if found.fits(n, budget) and found.fits(n, capacity, workspaces))


@pytest.mark.parametrize(("budget", "capacity"), [(500, 500), (500, 505), (500, 600), (200, 600)])
def test_exact_bytes_fit_the_budget_and_workspaces_the_capacity(budget, capacity):
    budget, capacity = budget * MiB, capacity * MiB
    found = largest_on_device(lambda size: CONVOLVES, budget, capacity)
    assert found.batch_size == by_trying(CONVOLVES, budget, capacity, range(1, 600))
    assert found.limited_by == "memory"
    plain = largest_on_device(lambda size: PLAIN, budget, capacity)
    assert plain.batch_size == by_trying(PLAIN, budget, capacity, range(1, 600))
    assert (found.batch_size < plain.batch_size) == (capacity < 2 * budget)  # a sample's workspace is 0.8 MiB


def test_convolutions_go_without_workspaces_where_these_leave_no_batch_size():
    # the weights fill the GPU but for a segment of 2 MiB: the workspace of two samples, of 1.6 MB, wants one of 20
    found, limits = estimate(sample=8, convolves=True), SizeLimits(min_batch_size=2, max_batch_size=64)
    assert not found.fits(2, 12 * MiB, "expected")
    assert found.fits(64, 12 * MiB, "low")
    result = largest_on_device(lambda size: found, 12 * MiB, 12 * MiB, limits)
    assert (result.batch_size, result.limited_by) == (64, "max_batch_size")
    assert largest_on_device(lambda size: found, 9 * MiB, 9 * MiB, limits).batch_size == 0


def test_each_size_is_asked_of_its_own_estimate():
    # from 64 samples on a sample takes 8 MiB: 10 + 64 · 8 is too much
    larger = estimate(sample=8 * MiB)
    found = largest_on_device(lambda size: larger if size >= 64 else PLAIN, 500 * MiB, 500 * MiB)
    assert found.batch_size == 63
    found = largest_on_device(lambda size: larger if size >= 64 else PLAIN, 500 * MiB, 500 * MiB, share=128)
    assert found.batch_size == 32


def test_limits_and_divisors_are_kept():
    limits = SizeLimits(min_batch_size=20, max_batch_size=99, multiple_of=8)
    assert largest_on_device(lambda size: PLAIN, 500 * MiB, 500 * MiB, limits).batch_size == 96
    assert largest_on_device(lambda size: PLAIN, 500 * MiB, 500 * MiB, limits, share=120).batch_size == 40
    # 10 MiB of weights and 240 of samples; of 480 samples the halves
    assert largest_on_device(lambda size: PLAIN, 300 * MiB, 300 * MiB, share=480).batch_size == 240
    assert largest_on_device(lambda size: PLAIN, 0, 300 * MiB, share=480).batch_size == 0


def test_sizes_that_are_not_allowed_are_not_taken():
    found = largest_on_device(lambda size: PLAIN, 500 * MiB, 500 * MiB, allowed=lambda size: size < 77)
    assert found.batch_size == 76


@pytest.mark.parametrize("found", [PLAIN, CONVOLVES], ids=["plain", "convolves"])
@pytest.mark.parametrize(("budget", "capacity"), [(2**36, 2**36), (2**30, 2**36), (2**36, 2**37)])
def test_a_search_begins_near_its_end(found, budget, capacity):
    # some 65,000 samples, or 1,000: doubling and halving from one sample would ask 33 times, or 21
    assert largest_on_device(lambda size: found, budget, capacity).tried <= 12


def test_a_size_is_near_that_whose_live_bytes_fit():
    assert start_near(PLAIN, 110 * MiB) == 100
    assert start_near(PLAIN, 111 * MiB - 1) == 100
    assert start_near(PLAIN, 110 * MiB, at_most=50) == 50
    assert start_near(PLAIN, 110 * MiB, at_most=500) == 100
    assert start_near(PLAIN, 110 * MiB, at_most=0) == 100  # none is known
    high, expected, low = (start_near(CONVOLVES, 110 * MiB, choice) for choice in ("high", "expected", "low"))
    assert high < expected < low == 100


def test_no_size_is_near_where_nothing_grows():
    assert start_near(estimate(sample=0), 110 * MiB) is None
    assert start_near(Estimate("formula", FORMULA), 110 * MiB) is None
