"""Train pipelines in this process, each without the planner and with it, and print a JSON line for each run.

``python -m benchmarks.pipelines.worker DESCRIPTION...``, on a GPU or on the null GPU.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.pipelines.training import job_of
from benchmarks.robustness.worker import serve

#: ways to train: without the planner, and with it
WAYS: dict[str, dict[str, Any] | None] = {"without": None, "default": {}}

if __name__ == "__main__":
    serve(map(job_of, sys.argv[1:]), WAYS)
