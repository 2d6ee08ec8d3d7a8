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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NULLGPU = ROOT / "tests" / "nullgpu" / "nullgpu"
LIMIT = 120.0  #: seconds for one run
CARD = {"NULLGPU_MEMORY": str(2**31), "NULLGPU_CONTEXT": str(100 * 2**20)}  #: 2 GiB
Runs = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Worker:
    """A program that runs the jobs that it is given by name, each in several ways, and prints a line for each run."""

    module: str
    ways: tuple[str, ...]


JOBS_WORKER = Worker("benchmarks.robustness.worker", ("without", "default", "apply=False"))


def run_again_alone(
    worker: Worker,
    groups: Sequence[Sequence[str]],
    failed: Callable[[str, Runs], str],
    limit: float = LIMIT,
    on_gpu: bool = False,
) -> Iterator[tuple[str, Runs, str]]:
    """Run jobs, several in a process; what fails there is run again in a process of its own, which counts.

    Yield the name of each job, its runs by way, and why it failed among others.
    """
    for group in groups:
        for name, runs in run_jobs(group, limit, on_gpu, worker):
            first = failed(name, runs) if len(group) > 1 else ""
            if first:
                _, runs = next(run_jobs([name], limit, on_gpu, worker))
            yield name, runs, first


def run_jobs(
    names: Sequence[str], limit: float = LIMIT, on_gpu: bool = False, worker: Worker = JOBS_WORKER
) -> Iterator[tuple[str, Runs]]:
    """Yield the runs of each job by way, in order."""
    left = list(names)
    while left:
        process = _Process(worker, left, on_gpu)
        try:
            while left:
                runs = _runs(process, worker.ways, limit)
                died = any("fatal" in each for each in runs.values())
                yield left.pop(0), runs
                if died:
                    break
        finally:
            process.close()


def _runs(process: _Process, ways: Sequence[str], limit: float) -> Runs:
    runs: Runs = {}
    for way in ways:
        try:
            found = process.answer(limit)
        except queue.Empty:
            found = _nothing(f"no answer within {limit:.0f} s")
        if found is None:
            found = _nothing(f"the process died: {process.stderr()[-600:]}")
        runs[way] = found
        if "fatal" in found:
            break
    return {way: runs.get(way) or _nothing("not run") for way in ways}


def _nothing(error: str) -> dict[str, Any]:
    return {"error": error, "epochs": [], "said": [], "validations": 0, "seconds": 0.0, "fatal": True}


class _Process:
    """A process of a worker in a session of its own, so that it ends with all that it has started."""

    def __init__(self, worker: Worker, names: Sequence[str], on_gpu: bool) -> None:
        command = [sys.executable, "-m", worker.module, *names]
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
