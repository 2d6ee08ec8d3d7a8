"""Run jobs in processes on the null GPU, and watch them: one that hangs or dies costs its own run alone."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.robustness.worker import WAYS

ROOT = Path(__file__).resolve().parents[2]
NULLGPU = ROOT / "tests" / "nullgpu" / "nullgpu"
LIMIT = 120.0  #: seconds for one run
CARD = {"NULLGPU_MEMORY": str(2**31), "NULLGPU_CONTEXT": str(100 * 2**20)}  #: 2 GiB
Runs = dict[str, dict[str, Any]]


def run_jobs(names: Sequence[str], limit: float = LIMIT, on_gpu: bool = False) -> Iterator[tuple[str, Runs]]:
    """Yield the runs of each job by way, in order."""
    left = list(names)
    while left:
        worker = _Worker(left, on_gpu)
        try:
            while left and (runs := _runs(worker, left[0], limit)) is not None:
                died = any("fatal" in each for each in runs.values())
                yield left.pop(0), runs
                if died:
                    break
        finally:
            worker.close()


def _runs(worker: _Worker, name: str, limit: float) -> Runs:
    runs: Runs = {}
    for way in WAYS:
        try:
            found = worker.answer(limit)
        except queue.Empty:
            found = _nothing(f"no answer within {limit:.0f} s")
        if found is None:
            found = _nothing(f"the process died: {worker.stderr()[-600:]}")
        runs[way] = found
        if "fatal" in found:
            break
    return {way: runs.get(way) or _nothing("not run") for way in WAYS}


def _nothing(error: str) -> dict[str, Any]:
    return {"error": error, "epochs": [], "said": [], "validations": 0, "seconds": 0.0, "fatal": True}


class _Worker:
    """A process of ``worker.py`` in a session of its own, so that it ends with all that it has started."""

    def __init__(self, names: Sequence[str], on_gpu: bool) -> None:
        command = [sys.executable, "-m", "benchmarks.robustness.worker", *names]
        own = os.pathsep.join([str(ROOT), str(ROOT / "src")])
        env = {
            **os.environ,
            **CARD,
            "PYTHONPATH": own,
            "MEMPLAN_HISTORY": "off",
            "MPLBACKEND": "Agg",
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            command if on_gpu else [str(NULLGPU), *command],
            cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._said: list[str] = []
        self._readers = [threading.Thread(target=target) for target in (self._read, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def answer(self, limit: float) -> dict[str, Any] | None:
        """Return what the next run found; None where the process has ended.

        Raises:
            queue.Empty: there is no answer within ``limit`` seconds.
        """
        return self._answers.get(timeout=limit)

    def stderr(self) -> str:
        return "".join(self._said)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            mark, _, rest = line.partition(" ")
            if mark == "RAN":
                self._answers.put(json.loads(rest))
        self._answers.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.append(line)
            del self._said[:-200]

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for reader in self._readers:
            reader.join()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()
