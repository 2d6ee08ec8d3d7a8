"""Print the operators that have a rule, and are in no case that is compared with the null GPU.

python -m tests.programs.uncovered
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from lightning_memplan.cuda.dispatch import cuda_semantics
from lightning_memplan.cuda.rule_set import Gpu
from lightning_memplan.cuda.rules import rules_for
from tests.programs import cuda_cases, layout_cases


def ruled() -> set[Any]:
    """Every operator that has a rule of any kind."""
    rules = rules_for(Gpu())
    return {op for field in fields(rules) if field.name != "gpu" for op in getattr(rules, field.name)}


def compared() -> set[Any]:
    """Every operator in the traces of all cases."""
    cuda_cases.Recorder = layout_cases.Seeing  # type: ignore[misc]
    with cuda_semantics():
        for run, autocast in cuda_cases.CASES.values():
            cuda_cases._traced(run, autocast, 2)
    for case in layout_cases.CASES.values():
        for rank in case.ranks:
            layout_cases.traced(case, "transposed", "float32", int(rank))
    return layout_cases.SEEN


if __name__ == "__main__":
    print(json.dumps(sorted(str(op) for op in ruled() - compared()), indent=1))
