"""Replays of one program: each is made once, goes on to the steady state, and tells phases and steps apart."""

from __future__ import annotations

import pytest

from lightning_memplan.memory.allocator_settings import AllocatorSettings
from lightning_memplan.memory.events import Event, Trace
from lightning_memplan.memory.program import scale
from lightning_memplan.memory.replayer import Replayer
from lightning_memplan.types import Peaks

MiB = 2**20
EXPANDABLE = AllocatorSettings(expandable_segments=True)


def replayer(*events, settings=None, sizes=(2, 3)):
    """Of events whose sizes do not grow with the batch, but for those of activations, given for one sample."""

    def grown(event, n):
        return event._replace(size=n * event.size) if event.category == "activations" and event.size > 0 else event

    program = scale([Trace(n, tuple(grown(event, n) for event in events)) for n in sizes])
    return Replayer(program, settings or AllocatorSettings())


def test_a_phase_that_a_step_has_twice_has_the_higher_of_its_peaks():
    # two microbatches: 30 MiB in the first forward phase, 20 in the second, beside a gradient of 12
    found = replayer(
        Event(0, 30 * MiB, "forward", 1),
        Event(1, 12 * MiB, "backward", 1),
        Event(0, -1, "backward", 1),
        Event(2, 14 * MiB, "forward", 1),
        Event(2, -1, "backward", 1),
    )
    (peaks,) = found.step_peaks(2)
    assert peaks == Peaks(42 * MiB, 42 * MiB, {"forward": 30 * MiB, "backward": 42 * MiB})


def test_what_is_set_up_is_no_step():
    found = replayer(Event(0, 10 * MiB, "setup", 0), Event(1, 20 * MiB, "forward", 1), Event(2, 2 * MiB, "forward", 2))
    assert [peaks.allocated for peaks in found.step_peaks(2)][:2] == [30 * MiB, 32 * MiB]
    assert found.phase_of_peak(2) == "forward"


def test_a_replay_is_made_once_for_each_size_capacity_and_workspaces():
    found = replayer(Event(0, 10 * MiB, "forward", 1, "activations"))
    first = found.replay(2)
    assert found.replay(2) is first
    assert found.replay(2, None, "low") is first
    others = [found.replay(3), found.replay(2, 2**30), found.replay(2, None, "high")]
    assert all(other is not first for other in others)


def test_a_program_of_one_sample_says_nothing_of_more():
    found = replayer(Event(0, 10 * MiB, "forward", 1, "activations"), sizes=(1,))
    assert found.replay(1).peak_allocated == 10 * MiB
    assert found.fits(1, 10 * MiB)
    assert not found.fits(2, 2**40)
    with pytest.raises(ValueError, match="nothing is known of batch size 2: a probe of 2 samples ran out of memory"):
        found.replay(2)


def test_a_replay_fits_where_every_request_is_served():
    found = replayer(Event(0, 30 * MiB, "forward", 1), Event(1, MiB, "forward", 1, "activations"))
    # at 3 samples 3 MiB beside 30: in a segment of 20
    assert not found.fits(3, 33 * MiB)
    assert found.live_bytes_fit(3, 33 * MiB)
    assert not found.live_bytes_fit(3, 33 * MiB - 1)
    assert found.fits(3, 50 * MiB)


def test_blocks_in_use_at_the_peak_have_their_requested_bytes():
    found = replayer(
        Event(0, 700, "forward", 1),
        Event(1, 30 * MiB, "forward", 1),
        Event(1, -1, "forward", 1),
        Event(2, 11 * MiB, "forward", 1, "activations"),
        Event(2, -1, "backward", 1),
    )
    assert [(event.block, size) for event, size in found.live_at_peak(2)] == [(0, 700), (1, 30 * MiB)]
    assert [(event.block, size) for event, size in found.live_at_peak(3)] == [(0, 700), (2, 33 * MiB)]


def test_a_journal_is_of_the_recorded_steps_under_the_programs_settings():
    events = (Event(0, 30 * MiB, "forward", 1), Event(0, -1, "backward", 1), Event(1, 40 * MiB, "forward", 1))
    moves = replayer(*events).journal(2)
    assert [move.action for move in moves] == ["segment_alloc", "alloc", "free", "segment_alloc", "alloc"]
    assert replayer(*events, settings=EXPANDABLE).journal(2)[0].action == "segment_map"
    # on a full GPU the first segment is given back
    assert "segment_free" in [move.action for move in replayer(*events).journal(2, 50 * MiB)]
