"""The rules of the replayed allocator, one by one, with the arithmetic beside them; and what holds of every program."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_memplan.memory.allocator import Replay, replay
from lightning_memplan.memory.allocator_settings import AllocatorSettings
from lightning_memplan.memory.events import EMPTY, Stream
from lightning_memplan.memory.heap import Driver, Move

KiB, MiB, GiB = 2**10, 2**20, 2**30
Program = list[tuple[int, int, int]]


def allocate(*sizes: int, stream: int = 0, first: int = 0) -> Program:
    return [(block, size, stream) for block, size in enumerate(sizes, first)]


def free(*blocks: int) -> Program:
    return [(block, -1, 0) for block in blocks]


def taken(program: Program, text: str = "", **arguments: int) -> tuple[int, int]:
    """Bytes allocated and reserved at the end."""
    result = replay(program, settings=AllocatorSettings.from_text(text), **arguments)
    assert result.out_of_memory is None
    return result.allocated, result.reserved


# ---- rounding, pools and segments


@pytest.mark.parametrize(
    ("size", "block", "segment"),
    [
        (0, 0, 0),  # no block at all
        (1, 512, 2 * MiB),  # 512 bytes is the least
        (513, 1024, 2 * MiB),
        (MiB, MiB, 2 * MiB),  # the largest of the small pool
        (MiB + 1, MiB + 512, 20 * MiB),  # 1 MiB + 512 is the least of the large pool; 20 MiB - it is split off
        (10 * MiB - 512, 10 * MiB - 512, 20 * MiB),
        (10 * MiB - 511, 10 * MiB, 10 * MiB),  # rounded it is 10 MiB: a segment of its own
        (11 * MiB, 12 * MiB, 12 * MiB),  # the 1 MiB left over is not more than 1 MiB: not split, and counted
        (11 * MiB - 512, 11 * MiB - 512, 12 * MiB),  # 1 MiB + 512 left over: split
        (GiB + 1, GiB + 512, GiB + 2 * MiB),  # nearly 2 MiB left over: split
    ],
)
def test_a_request_is_rounded_and_gets_its_segment(size: int, block: int, segment: int) -> None:
    assert taken(allocate(size)) == (block, segment)


def test_a_freed_block_is_used_again_by_its_own_stream_only() -> None:
    program = allocate(30 * MiB) + free(0)
    assert taken(program + allocate(30 * MiB, first=1)) == (30 * MiB, 30 * MiB)
    assert taken(program + allocate(30 * MiB, first=1, stream=7)) == (30 * MiB, 60 * MiB)


def test_the_smallest_block_that_is_large_enough_is_used() -> None:
    # Free: 40, 34, 30 MiB. 32 MiB go to the 34 (2 MiB left over: split), 36 to the 40, and 30 to the 30.
    program = allocate(40 * MiB, 34 * MiB, 30 * MiB) + free(0, 1, 2) + allocate(32 * MiB, 36 * MiB, 30 * MiB, first=3)
    assert taken(program) == (98 * MiB, 104 * MiB)


def test_of_equal_blocks_the_one_in_the_oldest_segment_is_used() -> None:
    # Two segments of 20 MiB, each with 8 MiB in use at its start and 12 MiB free behind. 12 MiB go to the first; when
    # both blocks at the start are freed, the first has 8 MiB free and the second all 20: 20 MiB find room.
    program = allocate(8 * MiB, 12 * MiB, 8 * MiB, 12 * MiB) + free(3, 1) + allocate(12 * MiB, first=4) + free(0, 2)
    assert taken(program) == (12 * MiB, 40 * MiB)
    assert taken(program + allocate(20 * MiB, first=5)) == (32 * MiB, 40 * MiB)


def test_before_torch_2_14_the_lowest_address_is_used() -> None:
    # As above, but the driver lays the second segment below the first: the 12 MiB go there. When the 8 MiB at the start
    # of the first are freed, all its 20 are free; by age its 12 would be in use, and 20 MiB need a third segment.
    program = allocate(8 * MiB, 12 * MiB, 8 * MiB, 12 * MiB) + free(3, 1) + allocate(12 * MiB, first=4) + free(0)
    program += allocate(20 * MiB, first=5)
    assert replay(program).reserved == 60 * MiB
    assert replay(program, settings=AllocatorSettings(by_address=True)).reserved == 40 * MiB
    # expandable segments are not laid by cudaMalloc
    expandable = AllocatorSettings(expandable_segments=True)
    assert replay(program, settings=replace(expandable, by_address=True)) == replay(program, settings=expandable)


def test_the_driver_fills_chunks_of_32_mib() -> None:
    driver, top = Driver(), 2**47
    first, second = driver.take(20 * MiB), driver.take(20 * MiB)
    assert (first, second) == (top - 32 * MiB, top - 64 * MiB)  # 12 MiB are left of the first chunk: not enough
    assert driver.take(2 * MiB) == second + 20 * MiB  # both chunks have 12 left: the lower address
    assert driver.take(12 * MiB) == first + 20 * MiB  # 10 are left in the second; the first is full then
    assert driver.take(33 * MiB) == top - 128 * MiB  # two chunks at once, of which 31 are left
    assert driver.take(31 * MiB) == top - 95 * MiB
    # what is given back is joined with what is left on both sides: all 32 MiB of the second chunk
    driver.give_back(second, 20 * MiB)
    driver.give_back(second + 20 * MiB, 2 * MiB)
    assert driver.take(32 * MiB) == second
    driver.give_back(first + 20 * MiB, 12 * MiB)
    driver.give_back(first, 20 * MiB)
    assert driver.take(32 * MiB) == first


def test_neighbours_merge_when_freed() -> None:
    # 6, 6 and 6 MiB of 20 MiB; freed in any order they are one block of 20 MiB again, which 20 MiB then fit into.
    start = allocate(6 * MiB, 6 * MiB, 6 * MiB)
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)):
        assert taken(start + free(*order) + allocate(20 * MiB, first=3)) == (20 * MiB, 20 * MiB)
    # Segments never merge: 20 and 20 MiB free are not 40.
    program = allocate(20 * MiB, 20 * MiB) + free(0, 1) + allocate(40 * MiB, first=2)
    assert taken(program) == (40 * MiB, 80 * MiB)


# ---- a full card


def test_idle_segments_go_back_when_the_card_is_full() -> None:
    # 30 MiB idle, 10 MiB in use; 50 MiB more: 90 MiB at first, 60 MiB once the idle segment is back.
    program = allocate(30 * MiB, 10 * MiB) + free(0) + allocate(50 * MiB, first=2)
    result = replay(program, capacity=89 * MiB)
    assert (result.reserved, result.peak_reserved, result.retries, result.segments) == (60 * MiB, 60 * MiB, 1, 3)
    result = replay(program, capacity=59 * MiB)  # 50 + 10 MiB are too many whatever goes back
    assert (result.out_of_memory, result.reserved, result.retries) == (3, 10 * MiB, 1)
    assert replay(program, capacity=90 * MiB).retries == 0


def test_a_segment_with_a_block_in_use_stays() -> None:
    # 2 MiB of a 20 MiB segment are in use: its other 18 MiB do not go back, and 40 + 20 > 59.
    program = allocate(2 * MiB, 9 * MiB) + free(1) + allocate(40 * MiB, first=2)
    assert replay(program, capacity=59 * MiB).out_of_memory == 3
    assert replay(program, capacity=60 * MiB).out_of_memory is None


def test_a_fraction_limits_what_is_reserved() -> None:
    assert replay(allocate(30 * MiB, 30 * MiB), fraction=59 * MiB).out_of_memory == 1
    assert replay(allocate(30 * MiB, 30 * MiB), fraction=60 * MiB).out_of_memory is None


def test_all_streams_differ() -> None:
    assert len({int(stream) for stream in Stream.__members__.values()}) == len(Stream.__members__)


@pytest.mark.parametrize("stream", Stream)
def test_trials_of_kernels_alone_keep_idle_segments_on_a_full_gpu(stream: Stream) -> None:
    # 3 + 5 MiB in a segment of 20, idle when 40 MiB are requested: 20 + 40 > 50, unless the 20 are given back
    program = [(1, 3 * MiB, stream), (2, 5 * MiB, stream), (1, -1, stream), (2, -1, stream), (3, 40 * MiB, stream)]
    result = replay(program, capacity=50 * MiB)
    kept = stream is Stream.TRIALS
    assert (result.out_of_memory, result.reserved) == ((4, 20 * MiB) if kept else (None, 40 * MiB))


# ---- settings


def test_blocks_over_max_split_size() -> None:
    text = "max_split_size_mb:32"
    # 60 MiB are over it: not split, and not used for 8 MiB. Without it, 8 MiB would be cut from the 60.
    program = allocate(60 * MiB) + free(0) + allocate(8 * MiB, first=1)
    assert taken(program, text) == (8 * MiB, 80 * MiB)
    assert taken(program) == (8 * MiB, 60 * MiB)
    # 44 MiB are over it too, and 60 is less than 44 + 20 MiB: used whole. 40 MiB + 20 is not more than 60: not used.
    assert taken(allocate(60 * MiB) + free(0) + allocate(44 * MiB, first=1), text) == (60 * MiB, 60 * MiB)
    assert taken(allocate(60 * MiB) + free(0) + allocate(40 * MiB, first=1), text) == (40 * MiB, 100 * MiB)


def test_a_request_or_a_block_of_exactly_max_split_size() -> None:
    text = "max_split_size_mb:32"
    # a block of 32 MiB is over it: not used for 8 MiB
    assert taken(allocate(32 * MiB) + free(0) + allocate(8 * MiB, first=1), text) == (8 * MiB, 52 * MiB)
    # a request of 32 MiB is too: it gets a block of 40 MiB, and all of it
    assert taken(allocate(40 * MiB) + free(0) + allocate(32 * MiB, first=1), text) == (40 * MiB, 40 * MiB)
    # 31 MiB get none of over 32, but a segment of 32; without the setting 31 of the 40 are used
    program = allocate(40 * MiB) + free(0) + allocate(31 * MiB - 512, first=1)
    assert taken(program, text) == (31 * MiB - 512, 72 * MiB)
    assert taken(program) == (31 * MiB - 512, 40 * MiB)


def test_idle_blocks_over_max_split_size_go_back_first() -> None:
    # Idle: 4 MiB in 20, and 40, 50 and 100 MiB. 70 MiB do not fit 250 - 210 MiB: the 100, the best fit, goes back.
    program = allocate(4 * MiB, 40 * MiB, 50 * MiB, 100 * MiB) + free(0, 1, 2, 3) + allocate(70 * MiB, first=4)
    result = replay(program, capacity=250 * MiB, settings=AllocatorSettings.from_text("max_split_size_mb:32"))
    assert (result.reserved, result.retries) == ((20 + 40 + 50 + 70) * MiB, 0)
    # 110 MiB: none is that large; from the largest down 100 + 50 are enough.
    program[-1] = (4, 110 * MiB, 0)
    result = replay(program, capacity=250 * MiB, settings=AllocatorSettings.from_text("max_split_size_mb:32"))
    assert (result.reserved, result.retries) == ((20 + 40 + 110) * MiB, 0)
    # Without the setting everything goes back.
    assert replay(program, capacity=250 * MiB).reserved == 110 * MiB


def test_an_idle_block_of_exactly_max_split_size_goes_back_first_too() -> None:
    # Idle are 32 and 40 MiB, and 4 in 20; for 70 MiB on 110 the 40 alone are not enough, and with the 32 they are.
    program = allocate(4 * MiB, 32 * MiB, 40 * MiB) + free(0, 1, 2) + allocate(70 * MiB, first=3)
    result = replay(program, capacity=110 * MiB, settings=AllocatorSettings.from_text("max_split_size_mb:32"))
    assert (result.reserved, result.retries) == ((20 + 70) * MiB, 0)


@pytest.mark.parametrize(
    ("size", "block"),
    [
        (1200, 1536),  # not over 512 · 4: to 512 bytes as ever
        (5000, 5120),  # from 4096 on in steps of 1024
        (1200 * KiB, 1280 * KiB),  # from 1 MiB on in steps of 256 KiB
        (64 * MiB, 64 * MiB),  # a power of two stays
        (65 * MiB, 80 * MiB),  # from 64 MiB on in steps of 16 MiB
    ],
)
def test_roundup_power2_divisions_round_requests_up(size: int, block: int) -> None:
    assert taken(allocate(size), "roundup_power2_divisions:4")[0] == block


def test_roundup_power2_divisions_by_size() -> None:
    text = "roundup_power2_divisions:[64:8,128:2,>:1]"
    # Under 128 MiB 8 divisions: 65 → 72; from 128 MiB on 2: 129 → 192; beyond 256 MiB none: 257 → 258 (not split).
    assert taken(allocate(65 * MiB), text)[0] == 72 * MiB
    assert taken(allocate(129 * MiB), text)[0] == 192 * MiB
    assert taken(allocate(257 * MiB), text)[0] == 258 * MiB


def test_garbage_collection_gives_back_what_was_idle_longest() -> None:
    # 10 MiB in use; idle are 30 MiB, for two searches when 38 MiB are asked for, and 34 MiB, for one. Reserved are 74,
    # 24 over 0.5 · 100 MiB: the 30, older than the average of 1.5, go back, which is enough. 10 + 34 + 38 = 82.
    settings = AllocatorSettings.from_text("garbage_collection_threshold:0.5")
    program = [
        *allocate(30 * MiB, 10 * MiB),
        *free(0),
        *allocate(34 * MiB, first=2),
        *free(2),
        *allocate(38 * MiB, first=3),
    ]
    collected = replay(program, settings=settings, fraction=100 * MiB)
    assert (collected.reserved, collected.retries) == (82 * MiB, 0)
    # Without the setting the fraction is full, and all that is idle goes back. Without a fraction nothing does.
    full = replay(program, fraction=100 * MiB)
    assert (full.reserved, full.retries) == (48 * MiB, 1)
    assert replay(program, settings=settings).reserved == 112 * MiB


def test_garbage_collection_stops_when_enough_is_back() -> None:
    # As above, of 74 MiB exactly 30 over 0.44 · 100: the 30 go back, and the 34 stay.
    settings = AllocatorSettings.from_text("garbage_collection_threshold:0.44")
    program = allocate(30 * MiB, 10 * MiB) + free(0) + allocate(34 * MiB, first=2) + free(2)
    program += allocate(38 * MiB, first=3)
    assert replay(program, settings=settings, fraction=100 * MiB).reserved == (10 + 34 + 38) * MiB


def test_garbage_collection_gives_back_all_blocks_that_are_equally_old() -> None:
    # 30 and 34 MiB were freed at the same time: both are as old as the average, and go back, though 30 were enough.
    settings = AllocatorSettings.from_text("garbage_collection_threshold:0.5")
    program = allocate(30 * MiB, 34 * MiB, 10 * MiB) + free(0, 1) + allocate(38 * MiB, first=3)
    collected = replay(program, settings=settings, fraction=100 * MiB)
    assert (collected.reserved, collected.retries) == (48 * MiB, 0)
    # Over the threshold with nothing idle but 12 MiB, there is no more to give back: 90 in use, and 38 do not fit.
    program = allocate(12 * MiB, 90 * MiB) + free(0) + allocate(38 * MiB, first=3)
    assert replay(program, settings=settings, fraction=110 * MiB).out_of_memory == 3


def test_garbage_collections_clock_is_of_large_requests() -> None:
    # Idle for 3, 2 and 1 large requests when 50 MiB are requested: 34, 36 and 40 MiB. Reserved are 122, with 10 in use
    # and 2 in small blocks: 22 over 0.5 · 200. The average is 2: the 34 and the 36 go back, and 122 - 70 + 50 = 102.
    # If small requests counted, the 34 alone would be older than the average, and enough.
    settings = AllocatorSettings.from_text("garbage_collection_threshold:0.5")
    program = allocate(34 * MiB, 10 * MiB) + free(0) + allocate(*[KiB] * 9, first=100)
    program += allocate(36 * MiB, first=2) + free(2) + allocate(40 * MiB, first=3) + free(3)
    program += allocate(50 * MiB, first=4)
    assert replay(program, settings=settings, fraction=200 * MiB).reserved == 102 * MiB


def test_expandable_segments_grow_by_granules() -> None:
    text = "expandable_segments:True"
    # 3 MiB map 20; 30 MiB more need 33, so 20 more are mapped; a small block has granules of 2 MiB.
    assert taken(allocate(3 * MiB), text) == (3 * MiB, 20 * MiB)
    assert taken(allocate(3 * MiB, 30 * MiB), text) == (33 * MiB, 40 * MiB)
    assert taken(allocate(3 * MiB, 30 * MiB, MiB, 1536 * KiB), text) == (34 * MiB + 1536 * KiB, 42 * MiB)
    # Freed, all of it is one block, to which 140 MiB only add what they lack.
    program = allocate(30 * MiB, 30 * MiB) + free(0, 1) + allocate(140 * MiB, first=2)
    assert taken(program, text) == (140 * MiB, 140 * MiB)
    assert taken(program) == (140 * MiB, 200 * MiB)


def test_expandable_segments_give_back_whole_granules() -> None:
    # 50 MiB idle in the first 60, then 20 MiB in use from 50 to 70: of 80 MiB mapped only granules 0 and 1 are idle.
    # 60 MiB more do not fit 100 MiB; with 40 MiB back, behind the 70 MiB there are 10 mapped: 40 + 60 = 100.
    settings = AllocatorSettings.from_text("expandable_segments:True")
    program = allocate(50 * MiB, 20 * MiB) + free(0) + allocate(60 * MiB, first=2)
    result = replay(program, capacity=100 * MiB, settings=settings, total=GiB)
    assert (result.out_of_memory, result.reserved, result.retries) == (None, 100 * MiB, 1)
    assert replay(program, capacity=99 * MiB, settings=settings, total=GiB).out_of_memory == 3


def test_granules_that_were_given_back_are_mapped_again() -> None:
    # Of 50 and 20 MiB in granules 0 to 3, the 50 are freed: granules 0 and 1 go back, and 10 MiB of granule 2 stay.
    # 30 MiB then lie at the lowest address, for which both are mapped again; 20 more lie behind, up to the 20 in use.
    settings = AllocatorSettings.from_text("expandable_segments:True")
    journal: list[Move] = []
    program = [*allocate(50 * MiB, 20 * MiB), *free(0), (0, EMPTY, 0)]
    assert replay(program, settings=settings).reserved == 40 * MiB
    program += allocate(30 * MiB, first=2)
    assert replay(program, settings=settings, journal=journal).reserved == 80 * MiB
    start = journal[0].address
    assert Move("segment_unmap", start, 40 * MiB) in journal
    assert journal[-2:] == [Move("segment_map", start, 40 * MiB), Move("alloc", start, 30 * MiB)]
    assert replay(program + allocate(20 * MiB, first=3), settings=settings).reserved == 80 * MiB
    # 25 do not lie between them: they are mapped behind the 20, where 10 MiB of granule 3 are free
    assert replay(program + allocate(25 * MiB, first=3), settings=settings).reserved == 100 * MiB


def test_what_is_left_of_a_granule_stays_mapped_on_both_sides() -> None:
    # 10 MiB in use, 50 idle up to 60, 20 in use up to 80: granules 1 and 2 go back, and 10 MiB of granule 0 stay
    settings = AllocatorSettings.from_text("expandable_segments:True")
    program = [*allocate(10 * MiB, 50 * MiB, 20 * MiB), *free(1), (0, EMPTY, 0)]
    assert replay(program, settings=settings).reserved == 40 * MiB
    assert replay(program + allocate(10 * MiB, first=3), settings=settings).reserved == 40 * MiB
    # of 30 MiB 10 lie there, and the 20 behind are mapped again
    assert replay(program + allocate(30 * MiB, first=3), settings=settings).reserved == 60 * MiB


def test_granules_at_the_end_of_what_is_mapped_are_given_back() -> None:
    # 50 MiB in use, then 20 idle up to 70, and 10 that were never asked for: granule 3 goes back, 50 to 60 stay
    settings = AllocatorSettings.from_text("expandable_segments:True")
    program = [*allocate(50 * MiB, 20 * MiB), *free(1), (0, EMPTY, 0)]
    assert replay(program, settings=settings).reserved == 60 * MiB
    # 10 of 25 MiB lie there, for the rest a granule is mapped, and for 145 seven: 10 + 140 = 150
    assert replay(program + allocate(25 * MiB, first=2), settings=settings).reserved == 80 * MiB
    program += allocate(25 * MiB, first=2) + free(2) + allocate(145 * MiB, first=3)
    assert replay(program, settings=settings).reserved == 200 * MiB


def test_addresses_are_of_the_whole_gpu_whatever_is_free_of_it() -> None:
    # 160 MiB are free of a GiB. Behind 60 and 45 MiB, 95 more fit the same segment: when the 60 are given back, 15 of
    # 120 mapped are free there, and 80 are mapped: 60 + 80.
    settings = AllocatorSettings.from_text("expandable_segments:True")
    program = allocate(60 * MiB, 45 * MiB) + free(0) + allocate(95 * MiB, first=2)
    found = replay(program, capacity=160 * MiB, settings=settings, total=GiB)
    assert (found.out_of_memory, found.reserved, found.retries) == (None, 140 * MiB, 1)


def test_a_journal_has_every_move() -> None:
    journal: list[Move] = []
    program = [*allocate(0, 600, 30 * MiB), *free(0, 1), (9, EMPTY, 0), *free(2)]
    replay(program, journal=journal)
    small, large = journal[1].address, journal[3].address
    assert journal == [
        Move("alloc", 0, 0),  # a block of no bytes is nowhere
        Move("segment_alloc", small, 2 * MiB),
        Move("alloc", small, 1024),
        Move("segment_alloc", large, 30 * MiB),
        Move("alloc", large, 30 * MiB),
        Move("free", 0, 0),
        Move("free", small, 1024),
        Move("segment_free", small, 2 * MiB),
        Move("empty", 0, 0),
        Move("free", large, 30 * MiB),
    ]


@pytest.mark.parametrize(
    ("text", "size", "block"),
    [
        ("4", 5 * MiB, 5 * MiB),  # a fourth of 4 MiB is the step
        ("4", 5 * MiB + 1, 6 * MiB),
        ("4", 6 * MiB - 1, 6 * MiB),
        ("4", 512 * 4, 512 * 4),
        ("4", 512 * 5, 512 * 5),  # a fourth of 2 KiB is 512 bytes
        ("8", 512 * 8 - 1, 512 * 8),
        ("[>:8]", 512, 512),  # sizes under 2 MiB have no divisions: multiples of 512
        ("[>:8]", 513, 1024),
        ("[>:8]", MiB + 513, MiB + 1024),
        ("[>:8]", 2 * MiB + 1, 2 * MiB + MiB // 4),
        ("[16384:2,>:8]", 16 * GiB + 1, 24 * GiB),  # halves of 16 GiB ...
        ("[16384:2,>:8]", 32 * GiB + 1, 36 * GiB),  # ... eighths of 32
        ("[16384:2,>:8]", 64 * GiB + 1, 72 * GiB),  # and of all above, though the last interval begins at 32 GiB
    ],
)
def test_a_request_is_rounded_to_parts_of_the_power_of_two_below(text: str, size: int, block: int) -> None:
    assert taken(allocate(size), f"roundup_power2_divisions:{text}")[0] == block


def test_garbage_collection_begins_a_byte_over_the_threshold() -> None:
    # Reserved are 74 MiB, of which the 30 are idle longest: half of 148 MiB is no less, half of 148 MiB - 2 is.
    settings = AllocatorSettings.from_text("garbage_collection_threshold:0.5")
    program = allocate(30 * MiB, 10 * MiB) + free(0) + allocate(34 * MiB, first=2) + free(2)
    program += allocate(38 * MiB, first=3)
    assert replay(program, settings=settings, fraction=148 * MiB).reserved == 112 * MiB
    assert replay(program, settings=settings, fraction=148 * MiB - 2).reserved == 82 * MiB


def test_an_expandable_segment_has_addresses_for_nine_eighths_of_the_gpu() -> None:
    # On a GPU of 160 MiB that is 180. Behind 60 and 45 MiB, 15 of 120 mapped are free, and 60 are not mapped: 75 fit
    # there, once the 60 are given back. 95 open another segment, in which 100 are mapped.
    settings = AllocatorSettings.from_text("expandable_segments:True")
    for size, reserved in ((75, 60 + 60), (95, 60 + 100)):
        program = allocate(60 * MiB, 45 * MiB) + free(0) + allocate(size * MiB, first=2)
        found = replay(program, capacity=160 * MiB, settings=settings)
        assert (found.out_of_memory, found.reserved, found.retries) == (None, reserved * MiB, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("backend:native,pinned_use_background_threads:True", {}),
        (" expandable_segments : True ,", {"expandable_segments": True}),
        ("expandable_segments:False", {}),
        ("max_split_size_mb:20", {"max_split_size": 20 * MiB}),
        ("garbage_collection_threshold:0.8", {"garbage_collection_threshold": 0.8}),
        ("max_non_split_rounding_mb:64", {"max_non_split_rounding": 64 * MiB}),
        ("large_segment_size_mb:32", {"large_segment_size": 32 * MiB}),
        ("per_process_memory_fraction:0.5", {"per_process_memory_fraction": 0.5}),
        ("per_process_memory_fraction:0", {"per_process_memory_fraction": 0.0}),
        ("per_process_memory_fraction:1", {"per_process_memory_fraction": 1.0}),
        ("roundup_power2_divisions:4", {"roundup_power2_divisions": (4,) * 16}),
        # As torch reads them: the first holds below too, what is not named has none, ">" starts after the last named.
        ("roundup_power2_divisions:[64:8,256:4]", {"roundup_power2_divisions": (8,) * 7 + (0, 4) + (0,) * 7}),
        ("roundup_power2_divisions:[512:2,256:4,>:1]", {"roundup_power2_divisions": (2,) * 8 + (4,) + (1,) * 7}),
        ("roundup_power2_divisions:[>:8]", {"roundup_power2_divisions": (0,) + (8,) * 15}),
        ("roundup_power2_divisions:[131072:4]", {"roundup_power2_divisions": (4,) * 16}),
        ("roundup_power2_divisions:[]", {}),
        ("roundup_power2_divisions:1", {"roundup_power2_divisions": (1,) * 16}),
        ("roundup_power2_divisions:[1:4]", {"roundup_power2_divisions": (4,) + (0,) * 15}),
        ("roundup_power2_divisions:[64:0,>:2]", {"roundup_power2_divisions": (0,) * 7 + (2,) * 9}),
    ],
)
def test_settings_are_read_from_text(text: str, expected: dict[str, object]) -> None:
    assert AllocatorSettings.from_text(text) == replace(AllocatorSettings(), **expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_split:1", r"the allocator has no setting 'max_split'; it has backend, expandable_segments, .*"),
        (",max_split_size_mb:100", r"the allocator has no setting ''; it has .*"),
        ("max_split_size_mb", r"the allocator's setting max_split_size_mb has no value: write max_split_size_mb:VALUE"),
        ("max_split_size_mb:19", r"max_split_size_mb is a whole number of MiB, at least 20, and not '19'"),
        (
            "large_segment_size_mb:32,max_split_size_mb:30",
            r"max_split_size_mb is a whole number of MiB, at least 32, and not '30'",
        ),
        ("large_segment_size_mb:10", r"large_segment_size_mb is a whole number of MiB, at least 11, and not '10'"),
        ("max_split_size_mb:big", r"max_split_size_mb is a whole number of MiB, at least 20, and not 'big'"),
        ("expandable_segments:true", r"expandable_segments is True or False, not 'true'"),
        (
            "garbage_collection_threshold:1",
            r"garbage_collection_threshold is a number between 0.0 and 1.0, and not '1'",
        ),
        ("garbage_collection_threshold:0", r"garbage_collection_threshold is a number between .* and not '0'"),
        (
            "max_non_split_rounding_mb:19",
            r"max_non_split_rounding_mb is a whole number of MiB, at least 20, and not '19'",
        ),
        ("roundup_power2_divisions:0", r"roundup_power2_divisions is made of powers of 2, and not of '0'"),
        ("roundup_power2_divisions:[0:1]", r"roundup_power2_divisions is made of powers of 2, and not of '0'"),
        ("garbage_collection_threshold:x", r"garbage_collection_threshold is a number between .* and not 'x'"),
        ("per_process_memory_fraction:2", r"per_process_memory_fraction is a number between 0.0 and 1.0, and not '2'"),
        ("roundup_power2_divisions:3", r"roundup_power2_divisions is made of powers of 2, and not of '3'"),
        ("roundup_power2_divisions:[3:1]", r"roundup_power2_divisions is made of powers of 2, and not of '3'"),
        ("roundup_power2_divisions:[256:x]", r"roundup_power2_divisions is made of powers of 2, and not of 'x'"),
        ("backend:cudaMallocAsync", r"only the allocator backend:native can be replayed, not backend:cudaMallocAsync"),
    ],
)
def test_settings_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        AllocatorSettings.from_text(text)


def test_the_older_variable_is_heard_first() -> None:
    both = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:200", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert AllocatorSettings.from_environment(both) == AllocatorSettings(expandable_segments=True)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        alone = AllocatorSettings.from_environment({name: "expandable_segments:True"})
        assert alone == AllocatorSettings(expandable_segments=True)


# ---- marks, and programs that are none


def test_peaks_between_marks() -> None:
    # 30 MiB; 30 + 40 MiB; after both are freed, 10 MiB in the idle 30 MiB.
    program = allocate(30 * MiB, 40 * MiB) + free(0, 1) + allocate(10 * MiB, first=2)
    result = replay(program, marks=[1, 4])
    assert result.peaks == ((30 * MiB, 30 * MiB), (70 * MiB, 70 * MiB), (10 * MiB, 70 * MiB))
    assert (result.peak_allocated, result.peak_reserved, result.peak_at) == (70 * MiB, 70 * MiB, 1)
    # A replay that stops has no peaks of the intervals that it did not come to.
    assert replay(program, marks=[1, 4], capacity=30 * MiB).peaks == ((30 * MiB, 30 * MiB), (30 * MiB, 30 * MiB))


def test_peaks_of_an_interval_begin_at_what_is_held_then() -> None:
    # 30 MiB are given back before the mark: 12 MiB after it are all that the second interval holds.
    program = [*allocate(30 * MiB), *free(0), (0, EMPTY, 0), *allocate(12 * MiB, first=1)]
    assert replay(program, marks=[3]).peaks == ((30 * MiB, 30 * MiB), (12 * MiB, 12 * MiB))
    # Idle memory is reserved still, and so are blocks in use both.
    assert replay(program[:2], marks=[2]).peaks[1] == (0, 30 * MiB)
    assert replay(program[:1], marks=[1]).peaks[1] == (30 * MiB, 30 * MiB)


def test_a_block_allocated_or_freed_twice_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"^entry 1 allocates block 0, which is allocated already$"):
        replay([(0, 1, 0), (0, 1, 0)])
    with pytest.raises(ValueError, match=r"^entry 2 frees block 0, which is not allocated$"):
        replay([(0, 0, 0), (0, -1, 0), (0, -1, 0)])
    assert replay([]) == Replay(0, 0, 0, 0, 0, None, ((0, 0),), 0, 0)


# ---- what holds of every program

sizes = st.one_of(
    st.integers(0, 2 * MiB),
    st.integers(0, 90 * MiB),
    st.sampled_from([MiB, 10 * MiB, 20 * MiB, 32 * MiB]).flatmap(lambda n: st.integers(n - 513, n + 513)),
)
texts = st.sampled_from(["", "expandable_segments:True", "max_split_size_mb:32", "roundup_power2_divisions:4"])
conditions = settings(max_examples=60, deadline=None)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    program: Program = []
    live: list[int] = []
    for block, (size, stream, freed) in enumerate(
        draw(st.lists(st.tuples(sizes, st.integers(0, 1), st.lists(st.integers(0, 99), max_size=2)), max_size=40))
    ):
        program.append((block, size, stream))
        live.append(block)
        for choice in freed:
            if live:
                program.append((live.pop(choice % len(live)), -1, 0))
    return program


@given(programs(), texts, st.integers(0, 400).map(lambda n: n * MiB))
@conditions
def test_no_more_is_allocated_than_reserved_than_there_is(program: Program, text: str, capacity: int) -> None:
    result = replay(program, capacity, AllocatorSettings.from_text(text))
    assert 0 <= result.allocated <= result.reserved <= result.peak_reserved <= capacity
    assert result.allocated <= result.peak_allocated <= result.peak_reserved


@given(programs(), texts)
@conditions
def test_nothing_is_left_when_all_is_freed(program: Program, text: str) -> None:
    live = {block for block, size, _ in program if size >= 0} - {block for block, size, _ in program if size < 0}
    result = replay(program + free(*live), settings=AllocatorSettings.from_text(text))
    assert result.allocated == 0
    assert result.reserved == result.peak_reserved


@given(programs(), texts, st.integers(0, 400).map(lambda n: n * MiB), st.data())
@conditions
def test_a_beginning_has_no_higher_peak(program: Program, text: str, capacity: int, data: st.DataObject) -> None:
    settings = AllocatorSettings.from_text(text)
    whole = replay(program, capacity, settings)
    part = replay(program[: data.draw(st.integers(0, len(program)))], capacity, settings)
    assert part.peak_allocated <= whole.peak_allocated
    assert part.peak_reserved <= whole.peak_reserved


@given(programs(), texts)
@conditions
def test_what_was_reserved_without_limit_is_enough(program: Program, text: str) -> None:
    settings = AllocatorSettings.from_text(text)
    free_run = replay(program, settings=settings)
    limited = replay(program, free_run.peak_reserved, settings, total=2**50)
    assert limited == free_run
    assert limited.retries == 0


@given(programs(), texts, st.lists(st.integers(0, 80), max_size=3))
@conditions
def test_marks_change_nothing_but_the_peaks_apart(program: Program, text: str, marks: list[int]) -> None:
    marks = sorted(min(mark, len(program)) for mark in marks)
    settings = AllocatorSettings.from_text(text)
    result, whole = replay(program, settings=settings, marks=marks), replay(program, settings=settings)
    assert replace(result, peaks=whole.peaks) == whole
    assert len(result.peaks) == len(marks) + 1
    assert max(allocated for allocated, _ in result.peaks) == whole.peak_allocated
    assert max(reserved for _, reserved in result.peaks) == whole.peak_reserved
