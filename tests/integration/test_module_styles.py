"""Modules as larger code bases write them: each trains as it does without the planner, planned where it can be."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from benchmarks.clients import run

STYLES = [module for module in run.modules() if ".styles." in module]
FURTHER = [module for place, module in enumerate(STYLES) if place % 3]  # a file of them takes half a minute
JOBS = [(module, name) for module in STYLES for name in run.jobs_in(module)]

KEPT = {  # what keeps the user's size though it could be planned
    "proximal_policy": "samples are made by the replica's network before it is on the GPU",
}


def styles() -> list[Any]:
    def marks(module: str, name: str) -> list[Any]:
        xfails = [pytest.mark.xfail(reason=KEPT[name])] if name in KEPT else []
        return [*xfails, *([pytest.mark.further] if module in FURTHER else [])]

    return [pytest.param(module, name, id=name, marks=marks(module, name)) for module, name in JOBS]


@cache
def rows(module: str) -> dict[str, Any]:
    """Train the jobs of a module, each without the planner, with it, and with ``apply=False``."""
    return {row["job"]: row for row in run.train(module, run.jobs_in(module))}


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), styles())
def test_a_style_trains_with_the_planned_size_or_its_own(module: str, name: str, nullgpu: Any) -> None:
    assert rows(module)[name]["faults"] == []


def test_there_are_styles_of_many_fields() -> None:
    assert len(JOBS) >= 25
