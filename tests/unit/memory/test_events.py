"""Final categories of events, and the order of blocks that die together."""

from __future__ import annotations

import pytest

from lightning_memplan.memory.events import FREE, Event, labelled


def category(made, freed=None, step=1):
    """The category of a block that is made, and freed in a phase (or in the next step's)."""
    events = [made] if freed is None else [made, Event(made.block, FREE, freed, step)]
    return labelled(events)[0].category


@pytest.mark.parametrize(
    ("made_in", "given", "freed", "expected"),
    [
        ("forward", "activations", "forward", "temporaries"),
        ("forward", "activations", "backward", "activations"),
        ("forward", "activations", None, "activations"),
        ("forward", "workspaces", "forward", "workspaces"),
        ("forward", "temporaries", None, "temporaries"),
        ("backward", "temporaries", "backward", "temporaries"),
        ("backward", "temporaries", "optimizer", "gradients"),
        ("backward", "temporaries", None, "gradients"),
        ("backward", "workspaces", "optimizer", "workspaces"),
        ("optimizer", "temporaries", "optimizer", "temporaries"),
        ("optimizer", "temporaries", None, "optimizer"),
        ("optimizer", "optimizer", "optimizer", "temporaries"),
        ("optimizer", "optimizer", None, "optimizer"),
        ("optimizer", "workspaces", None, "workspaces"),
    ],
)
def test_a_block_is_what_it_lives_for(made_in, given, freed, expected):
    assert category(Event(0, 8, made_in, 1, given), freed) == expected


def test_a_block_that_the_same_phase_of_the_next_step_frees_is_kept():
    assert category(Event(0, 8, "forward", 1, "activations"), "forward", step=2) == "activations"
    assert category(Event(0, 8, "backward", 1, "temporaries"), "backward", step=2) == "gradients"


def test_what_is_set_up_stays_what_it_is():
    assert category(Event(0, 8, "backward", 0, "temporaries")) == "temporaries"


def test_blocks_that_die_together_are_in_order_and_all_else_stays():
    made = [Event(block, 8, "forward", 1) for block in (5, 3, 4)]
    frees = [Event(5, FREE, "backward", 1), Event(3, FREE, "backward", 1)]
    assert [event.block for event in labelled([*made, *frees])] == [5, 3, 4, 3, 5]
    # another step, another phase, and a block that is made between are bounds
    later = Event(4, FREE, "backward", 2)
    assert [event.block for event in labelled([*made, frees[0], later])][3:] == [5, 4]
    assert [event.block for event in labelled([*made, frees[0], later._replace(step=1, phase="optimizer")])][3:] == [
        5,
        4,
    ]
    between = Event(6, 8, "backward", 1)
    assert [event.block for event in labelled([*made, frees[0], between, frees[1]])][3:] == [5, 6, 3]


def test_operators_are_text():
    made = [Event(0, 8, op=None), Event(1, 8, op=len), Event(2, 8, op=len), Event(3, 8, op="mm")]  # type: ignore[arg-type]
    assert [event.op for event in labelled(made)] == ["", str(len), str(len), "mm"]
