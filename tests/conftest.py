"""Fixtures for all tests: ``nullgpu`` runs a Python program on a GPU that is not there (see ``nullgpu/README.md``)."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

NULLGPU = Path(__file__).resolve().parent / "nullgpu"
collect_ignore = ["nullgpu"]  # its Python is run, not tested by itself
REQUIRED = "MEMPLAN_REQUIRE_NULLGPU"  # set to 1 where a skipped test would go unseen
TESTS = "MEMPLAN_TESTS"  # set to "all" to run further cases too

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side: their threads would wait for one another
os.environ["MEMPLAN_HISTORY"] = "off"  # no test keeps a record of its runs in the user's home

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def _builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nullgpu_build", NULLGPU / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what uses the null GPU, and run it after everything that does not; leave further cases out."""
    if drawn := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"an address is no name of a test, and differs in each process: {drawn[0]}; set ids=")
    if os.environ.get(TESTS) != "all":
        further = [item for item in items if item.get_closest_marker("further")]
        items[:] = [item for item in items if not item.get_closest_marker("further")]
        config.hook.pytest_deselected(items=further)
    for item in items:
        if "nullgpu" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.nullgpu)
    items.sort(key=lambda item: (item.get_closest_marker("nullgpu") is not None) + 2 * _is_slow(item))


def pytest_collection_finish() -> None:
    """What was imported stays to the end: collecting garbage need not look at it, which takes a third of a second."""
    gc.collect()
    gc.freeze()


def _is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


@pytest.fixture(autouse=True)
def logged() -> Iterator[list[str]]:
    """Warnings of the planner that were logged, since pytest makes errors of them; a test that expects them clears it.

    With ``pytest.warns`` or ``warnings.catch_warnings`` they are warnings, and nothing is logged.
    """
    texts: list[str] = []
    handler, logger = logging.Handler(logging.WARNING), logging.getLogger("lightning_memplan")
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield texts
    logger.removeHandler(handler)
    assert texts == []


@pytest.fixture(scope="session")
def nullgpu() -> Run:
    """``nullgpu([sys.executable, "-c", code], timeout=300, check=True, NULLGPU_MEMORY=2**33)`` → the finished process.

    Skips where a null GPU cannot be built; fails there if MEMPLAN_REQUIRE_NULLGPU=1 is set.
    """
    reason = _builder().obstacle()
    if reason is not None:
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{reason} ({REQUIRED}=1)", pytrace=False)
        pytest.skip(reason)

    def run(
        args: list[str], *, timeout: float = 300, check: bool = True, **env: object
    ) -> subprocess.CompletedProcess[str]:
        ours = ("NULLGPU_", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
        inherited = {k: v for k, v in os.environ.items() if k == "NULLGPU_FOLDER" or not k.startswith(ours)}
        done = subprocess.run(
            [str(NULLGPU / "nullgpu"), *map(str, args)],
            env={**inherited, **{name: str(value) for name, value in env.items()}},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            pytest.fail(
                f"exit status {done.returncode} on the null GPU\n--- stdout\n{done.stdout[-4000:]}"
                f"\n--- stderr\n{done.stderr[-12000:]}",
                pytrace=False,
            )
        return done

    run([sys.executable, "-c", ""])  # builds the library, if it is not there yet
    return run
