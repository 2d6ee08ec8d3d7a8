"""Traces that differ in their workspaces, and those of many samples, as traces of which a program can be made."""

from __future__ import annotations

import pytest

from lightning_memplan.memory.alignment import aligned, doubled, expected_to_fit, prime_up_to
from lightning_memplan.memory.events import Event, Trace
from lightning_memplan.memory.program import scale


def trace(size, *events):
    return Trace(size, tuple(Event(block, bytes_) for block, bytes_ in events))


def sizes(traces):
    return [[event.size for event in t.events] for t in traces]


def test_traces_of_the_same_events_stay_as_they_are():
    traces = [trace(2, (0, 20), (1, 7), (1, -1), (0, -1)), trace(3, (0, 30), (1, 9), (1, -1), (0, -1))]
    assert aligned(traces) == traces


def test_workspaces_that_differ_are_taken_as_measured():
    # At 2 samples no workspace, at 3 one of 100 bytes, at 5 one of 40: on lines between; beyond 5 it goes on
    # as from the first to the last, (40 - 0) / (5 - 2) bytes a sample: 40 + 95 · 40 / 3 = 1306 at 100.
    traces = [
        trace(2, (0, 20), (2, 8), (0, -1)),
        trace(3, (0, 30), (1, 100), (1, -1), (2, 8), (0, -1)),
        trace(5, (0, 50), (1, 40), (1, -1), (2, 8), (0, -1)),
    ]
    assert sizes(aligned(traces)) == [[20, 0, -1, 8, -1], [30, 100, -1, 8, -1], [50, 40, -1, 8, -1]]
    program = scale(aligned(traces))
    assert [program.at(n)[1][1] for n in (2, 3, 4, 5, 100)] == [0, 100, 70, 40, 1306]


def test_a_large_batch_decides_what_a_workspace_is_there():
    # 500 bytes at 2 and 3 samples, by an algorithm for few; at 100 samples 200 bytes: they do not grow from there on
    traces = [trace(n, (0, size), (0, -1), (1, n)) for n, size in ((2, 500), (3, 500), (100, 200))]
    assert [scale(aligned(traces)).at(n)[0][1] for n in (3, 100, 1000)] == [500, 200, 200]


def test_several_workspaces_at_one_place_are_one_of_the_largest():
    traces = [
        trace(2, (0, 20), (1, 7), (1, -1), (2, 9), (2, -1), (3, 4), (0, -1)),
        trace(3, (0, 30), (1, 8), (1, -1), (3, 4), (0, -1)),
    ]
    assert sizes(aligned(traces)) == [[20, 9, -1, 4, -1], [30, 8, -1, 4, -1]]
    assert scale(aligned(traces)).at(50)[1][1] == 8  # what falls does not go on falling


def test_workspaces_that_one_size_has_and_another_has_not_stay_as_they_are():
    # a reduction's buffer of 100 bytes and its semaphores of 8, freed in the order in which they were made
    traces = [trace(2, (0, 20), (3, 4)), trace(3, (0, 30), (1, 100), (2, 8), (1, -1), (2, -1), (3, 4))]
    # none at 2 samples, then lines of slope 100 and 8; as one block of 108 they would want another place
    assert sizes(aligned(traces)) == [[20, 0, 0, -1, -1, 4], [30, 100, 8, -1, -1, 4]]
    assert [size for _, size, _ in scale(aligned(traces)).at(5)[1:3]] == [300, 24]


def test_workspaces_within_a_workspace_count_together():
    # nested at 3 samples, one after another at 5: one block of 100 + 8, and of the larger
    traces = [
        trace(2, (0, 20), (3, 4)),
        trace(3, (0, 30), (1, 100), (2, 8), (1, -1), (2, -1), (3, 4)),
        trace(5, (0, 50), (1, 90), (1, -1), (2, 70), (2, -1), (3, 4)),
    ]
    assert sizes(aligned(traces)) == [[20, 0, -1, 4], [30, 108, -1, 4], [50, 90, -1, 4]]


def test_traces_that_differ_in_more_are_not_aligned():
    assert aligned([trace(2, (0, 20)), trace(3, (0, 30), (1, 5), (0, -1), (1, -1))]) is None


@pytest.mark.parametrize(
    ("seen", "at_10"),
    [
        ((20, 30, 50), 100),  # 10 n
        ((64, 144, 400), 1600),  # 16 n²: all pairs of samples
        ((8, 24, 80), 360),  # 4 n (n - 1): all pairs of two samples
        ((0, 0, 60), 160),  # 10 (n - 2) (n - 3) is no tensor's: 60 / 3 = 20 a sample, 60 + 5 · 20
        ((90, 60, 0), 0),  # 150 - 30 n would be less than nothing
        ((512, 1024, 1536), 3242),  # rounded up: 1536 + 5 · (1536 - 512) / 3, rounded down
    ],
)
def test_sizes_that_are_no_tensors_go_on_as_from_the_first_to_the_last(seen, at_10):
    traces = [trace(n, (0, size), (0, -1)) for n, size in zip((2, 3, 5), seen, strict=True)]
    assert sizes(aligned(traces)) == [[size, -1] for size in seen]
    assert scale(aligned(traces)).at(10)[0][1] == at_10


def test_pairs_stay_pairs_where_workspaces_differ():
    # 16 n² beside a workspace that there is at 3 and 5 samples only
    traces = [
        trace(2, (0, 64), (0, -1), (2, 8)),
        trace(3, (0, 144), (0, -1), (2, 12), (1, 7), (1, -1)),
        trace(5, (0, 400), (0, -1), (2, 20), (1, 7), (1, -1)),
    ]
    assert [events[0] for events in sizes(aligned(traces))] == [64, 144, 400]


def test_blocks_are_numbered_anew():
    traces = [trace(2, (7, 20), (5, 1)), trace(3, (4, 30), (9, 1), (9, -1), (3, 1))]
    assert [[event.block for event in t.events] for t in aligned(traces)] == [[0, 1, 1, 2], [0, 1, 1, 2]]


def test_a_prime_number_of_samples_tells_what_grows():
    # at 7 samples: 700 bytes of them, 1000 of weights, a workspace of 64 that few samples have not: it is taken to grow
    large, few = trace(7, (0, 700), (1, 1000), (2, 64), (2, -1)), trace(2, (0, 200), (1, 1000))
    assert [size for _, size, _ in scale([large, doubled(large, [few])]).at(70)] == [7000, 1000, 640, -1]


def test_traces_of_two_workspaces_freed_in_any_order_are_aligned():
    # at 3 samples the first is freed first: on a stack it is freed last, which changes no peak
    traces = [
        trace(2, (0, 20), (1, 7), (2, 9), (2, -1), (1, -1), (3, 4)),
        trace(3, (0, 30), (1, 8), (2, 6), (1, -1), (2, -1), (3, 4)),
    ]
    assert sizes(aligned(traces)) == [[20, 7, 9, -1, -1, 4], [30, 8, 6, -1, -1, 4]]


def test_blocks_that_are_freed_later_are_no_workspaces():
    # block 1 is freed after block 2 was made, at 3 samples before: that is another step
    traces = [trace(2, (0, 20), (1, 7), (2, 9), (1, -1)), trace(3, (0, 30), (1, 8), (1, -1), (2, 9))]
    assert aligned(traces) is None


def test_workspaces_at_two_places_stay_apart():
    traces = [
        trace(2, (0, 20), (3, 4), (5, 6), (5, -1)),
        trace(3, (0, 30), (1, 100), (1, -1), (3, 4)),
    ]
    assert sizes(aligned(traces)) == [[20, 0, -1, 4, 6, -1], [30, 100, -1, 4, 0, -1]]


def test_a_workspace_at_the_end_is_aligned_too():
    traces = [trace(2, (0, 20)), trace(3, (0, 30), (1, 100), (1, -1), (2, 50), (2, -1))]
    assert sizes(aligned(traces)) == [[20, 0, -1, 0, -1], [30, 100, -1, 50, -1]]


def test_a_workspace_of_another_kernel_has_its_rule_nowhere_else():
    # where it is not taken, its own kernel would still ask for memory at other batch sizes
    with_rule = Trace(3, (Event(0, 30), Event(1, 64, rule=("scan", 0, 3, 320)), Event(1, -1)))
    without, _ = aligned([trace(2, (0, 20)), with_rule])
    assert [event.rule for event in without.events] == [(), (), ()]


def test_the_largest_prime_up_to_a_number():
    # by the sieve: every number up to 200 without one that divides it
    primes = [n for n in range(2, 201) if not any(n % k == 0 for k in range(2, n))]
    assert [prime_up_to(n) for n in range(2)] == [0, 0]
    assert [prime_up_to(n) for n in range(2, 201)] == [max(p for p in primes if p <= n) for n in range(2, 201)]


def test_twice_as_many_samples_are_expected():
    found = doubled(trace(7, (0, 700), (1, 7), (1, -1), (2, 0), (0, -1)), [trace(2, (0, 200), (2, 0))])
    assert found.batch_size == 14
    assert sizes([found]) == [[1400, 14, -1, 0, -1]]


def test_a_size_that_few_samples_have_too_does_not_grow_unless_a_prime_number_of_samples_divides_it():
    # a feature map of 1400 bytes at 7 samples (200 each) has by chance a size that weights have with few
    few = [trace(2, (0, 1400), (1, 1000)), trace(3, (0, 1400), (1, 1000))]
    assert sizes([doubled(trace(7, (0, 1400), (1, 1000)), few)]) == [[2800, 1000]]
    # 8 is no prime: its divisors 2 and 4 divide many sizes that do not grow
    assert sizes([doubled(trace(8, (0, 1400), (1, 1000)), few)]) == [[1400, 1000]]
    # a size that only one of the traces of few samples has is one that grows
    assert sizes([doubled(trace(8, (0, 500)), [trace(2, (0, 500)), trace(3, (0, 750))])]) == [[1000]]


MiB = 2**20


@pytest.mark.parametrize(
    ("at_2", "at_4", "capacity", "expected"),
    [
        (2 * MiB, 4 * MiB, 101 * MiB, 101),  # 1 MiB a sample
        (3 * MiB, 5 * MiB, 101 * MiB, 100),  # and 1 MiB of weights
        (3 * MiB, 5 * MiB, 102 * MiB - 1, 100),
        (MiB, MiB, 100 * MiB, 0),  # nothing that grows tells how many fit
        (4 * MiB, 2 * MiB, 100 * MiB, 0),
        (20 * MiB, 30 * MiB, 0, 0),  # 10 of weights, and 5 a sample: not even none fit
        (20 * MiB, 30 * MiB, 15 * MiB, 1),
    ],
)
def test_as_many_samples_are_expected_to_fit_as_all_but_workspaces_leave_room_for(at_2, at_4, capacity, expected):
    workspace = [(7, 50 * MiB), (7, -1)]
    assert expected_to_fit([trace(2, (0, at_2), *workspace), trace(4, (0, at_4))], capacity) == expected
    # traces between the first and the last tell nothing more
    assert expected_to_fit([trace(2, (0, at_2)), trace(3, (0, 1)), trace(4, (0, at_4))], capacity) == expected


def test_a_growth_of_less_than_a_byte_a_sample_is_growth():
    # 512 bytes more in 1022 samples, beside 512: 510 of them at 512 bytes more
    grown = [trace(2, (0, 512)), trace(1024, (0, 1024))]
    assert expected_to_fit(grown, 1024) == 1024


def test_one_trace_tells_not_how_many_fit():
    assert expected_to_fit([trace(2, (0, MiB))], 100 * MiB) == 0
