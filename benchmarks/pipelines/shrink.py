"""Find the smallest pipeline that fails as another does: with as many of its choices made plain as can be."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.pipelines.choose import AXES, Pipeline, mended, parse
from benchmarks.pipelines.supervise import rows_of

ROUNDS = 5


def shrunk(p: Pipeline, outcome: str, limit: float) -> Pipeline:
    """Return a pipeline with fewer choices and the same outcome.

    Try all choices one by one, in one process; then those together that change nothing, or else the first of them.
    """
    for _ in range(ROUNDS):
        fewer = {axis: str(mended(replace(p, **{axis: AXES[axis][0]}))) for axis in p.choices()}
        tried = sorted(set(fewer.values()) - {str(p)})
        same = {row["pipeline"] for row in rows_of(tried, limit) if row["outcome"] == outcome}
        idle = [axis for axis, text in fewer.items() if text in same]
        if not idle:
            break
        together = mended(replace(p, **{axis: AXES[axis][0] for axis in idle}))
        (row,) = rows_of([str(together)], limit)
        p = together if row["outcome"] == outcome else parse(fewer[idle[0]])
    return p
