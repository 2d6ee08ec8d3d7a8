"""Steps that take turns, told by the blocks that they keep from one phase to another."""

from __future__ import annotations

import pytest

from lightning_memplan.memory.cycles import MOST, is_enough, period, shapes, until_all_were_seen
from lightning_memplan.memory.events import Event


def step(number, *sizes, category="activations", freed="backward"):
    made = [Event(block, size, "forward", number, category) for block, size in enumerate(sizes)]
    return [*made, *(Event(event.block, -1, freed, number) for event in made)]


def test_steps_are_alike_that_keep_the_same_blocks():
    first, second, third, fourth = shapes([*step(1, 8, 16), *step(2, 16, 8), *step(3, 8), *step(4, 8, 8)])
    assert first == second  # in whichever order
    assert len({first, third, fourth}) == 3  # one block of 8 bytes is not two


@pytest.mark.parametrize("category", ["other", "workspaces", "communication"])
def test_blocks_that_are_made_once_or_when_others_are_ready_do_not_count(category):
    alone, beside = shapes([*step(1, 8), *step(2, 8), *step(2, 16, category=category)])
    assert alone == beside


def test_blocks_that_a_phase_makes_and_frees_do_not_count():
    alone, beside = shapes([*step(1, 8), *step(2, 8), *step(2, 16, freed="forward")])
    assert alone == beside


def test_blocks_of_another_step_do_not_count():
    # a gradient of the first step that the second one frees, and a block from before
    events = [*step(1, 8), Event(7, 16, "backward", 1, "gradients"), *step(2, 8), Event(7, -1, "forward", 2)]
    first, second = shapes([*events, Event(99, -1, "backward", 2)])
    assert first == second


def test_a_step_that_keeps_nothing_is_a_step():
    first, second, third = shapes([*step(1, 8), Event(9, 4, "forward", 2), *step(3, 8)])
    assert first == third != second == frozenset()
    assert shapes([]) == ()


@pytest.mark.parametrize(
    ("steps", "expected"), [("A", 0), ("AB", 0), ("ABA", 0), ("ABAB", 2), ("ABCA", 0), ("ABCAB", 0), ("ABCABC", 3)]
)
def test_a_cycle_is_seen_twice_whole(steps, expected):
    assert period(steps) == expected


def test_as_many_steps_are_recorded_at_most_as_a_cycle_of_eight_needs():
    # two cycles of eight, and two steps of the next
    cycle = "ABBBBBBB" * 3
    assert is_enough(cycle[:MOST])
    assert not is_enough(cycle[: MOST - 1])
    assert MOST == 2 * 8 + 2


def test_every_kind_of_step_was_there_when_the_last_of_them_was():
    assert until_all_were_seen("AABAC") == 5
