"""Mutants of the planning core, killed and left, by folder: what the fast tests would not notice.

    python -m benchmarks.mutation.run                       # 40 mutants of each file
    python -m benchmarks.mutation.run memory --per-file 0   # all mutants of memory/
    python -m benchmarks.mutation.run data --only loaders   # those of one file; --only also takes several

Tests are collected once. Each mutant is a fork of that process, in which the function that was changed takes the code
of the mutant; tests that run this function follow, the fastest first, until one of them fails or takes too long. A
mutant that lives is printed with its change, unless ``equivalent.txt`` argues that no test can tell it from the source.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import pickle
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType

import pytest

from benchmarks.mutation.mutants import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "src/lightning_memplan"
EQUIVALENT = Path(__file__).with_name("equivalent.txt")
#: The source of each folder, and the tests that mirror it
FOLDERS = {
    "memory": (("memory/*.py",), ("tests/unit/memory",)),
    "kernel_sizes": (("cuda/kernel_sizes.py",), ("tests/unit/cuda/test_kernel_sizes.py",)),
    "planning": (("planning/*.py",), ("tests/unit/planning",)),
    "data": (("data/*.py",), ("tests/unit/data",)),
    "monitor": (("monitor/*.py",), ("tests/unit/monitor",)),
}
KILLED, LIVES, NOT_APPLIED = 0, 1, 2
GIB = 2**30


@dataclass
class Tally:
    """Mutants of a file or folder."""

    made: int = 0
    killed: int = 0
    equivalent: int = 0
    left: list[Mutant] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return self.killed + self.equivalent + len(self.left)

    def __iadd__(self, other: Tally) -> Tally:
        self.made += other.made
        self.killed += other.killed
        self.equivalent += other.equivalent
        self.left += other.left
        return self

    def __str__(self) -> str:
        share = (self.killed + self.equivalent) / max(1, self.tried)
        return f"{self.made:6} {self.tried:6} {self.killed:7} {self.equivalent:11} {len(self.left):5} {share:8.1%}"


HEADER = f"{'':34} {'made':>6} {'tried':>6} {'killed':>7} {'equivalent':>11} {'left':>5} {'settled':>8}"


class Runner:
    """A pytest plugin that, in place of running the tests, runs them on one mutant after another."""

    def __init__(self, folders: Sequence[str], only: Sequence[str], per_file: int, seconds: float, seed: int) -> None:
        self.folders, self.only, self.per_file, self.seed = folders, only, per_file or sys.maxsize, seed
        self.longest = seconds  # of all tests of one mutant
        self.failed = False  # of a fork: a test failed
        self.items: list[pytest.Item] = []
        self.seconds: list[float] = []
        self.runs: dict[tuple[str, int], set[int]] = {}  # which tests run the code of a file that begins at a line

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        gc.unfreeze()
        self.functions = _functions()
        self.items = session.items
        self._time_tests()
        equivalent = read_equivalents(EQUIVALENT.read_text())
        tallies = {folder: self._folder(folder, equivalent) for folder in self.folders}
        print(f"\n{HEADER}")
        for folder, tally in tallies.items():
            print(f"{folder:34} {tally}")
        return True

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    def _folder(self, folder: str, equivalent: set[tuple[str, ...]]) -> Tally:
        total = Tally()
        print(f"\n{HEADER}")
        for pattern in FOLDERS[folder][0]:
            for source in sorted((ROOT / PACKAGE).glob(pattern)):
                path = str(source.relative_to(ROOT))
                if not any(text in path for text in self.only):
                    continue
                made, mutants = mutants_of(ROOT, path, self.per_file, self.seed)
                tally = Tally(made)
                for mutant in mutants:
                    self._count(mutant, tally, equivalent)
                print(f"{path.removeprefix(PACKAGE + '/'):34} {tally}", flush=True)
                for mutant in sorted(tally.left, key=lambda mutant: mutant.place.first):
                    print(f"\n{mutant}", flush=True)
                total += tally
        return total

    def _count(self, mutant: Mutant, tally: Tally, equivalent: set[tuple[str, ...]]) -> None:
        changed = _spaced(mutant.before), _spaced(mutant.after)
        key = (mutant.path.removeprefix(PACKAGE + "/"), mutant.place.name, *changed)
        if key in equivalent:
            tally.equivalent += 1
        elif (status := self._status(mutant)) == KILLED:
            tally.killed += 1
        elif status == LIVES:
            tally.left.append(mutant)
        else:
            raise RuntimeError(f"there is no function to change: {mutant}")

    def _status(self, mutant: Mutant) -> int:
        file, place = str(ROOT / mutant.path), mutant.place
        chosen: set[int] = set()
        for (name, line), tests in self.runs.items():
            if place.constant or (name == file and place.first <= line <= place.last):
                chosen |= tests
        order, seconds = [], 0.0
        for index in sorted(chosen, key=lambda index: self.seconds[index]):
            seconds += self.seconds[index]
            if order and seconds > self.longest:
                break
            order.append(index)
        return _fork(lambda: self._try(mutant, order), 3 + 3 * seconds)

    def _try(self, mutant: Mutant, order: Sequence[int]) -> int:
        code = compile(mutant.text, str(ROOT / mutant.path), "exec")
        if mutant.place.constant:
            _set_constant(mutant)
        elif not self._set_function(mutant, code):
            return NOT_APPLIED
        for index, following in zip(order, [*order[1:], None], strict=True):
            item = self.items[index]
            nextitem = None if following is None else self.items[following]
            item.ihook.pytest_runtest_protocol(item=item, nextitem=nextitem)
            if self.failed:
                return KILLED
        return LIVES

    def _set_function(self, mutant: Mutant, code: CodeType) -> bool:
        name = mutant.place.name.rpartition(".")[2]
        lines = range(mutant.place.first, mutant.place.last + 1)
        ours = [f for f in self.functions[str(ROOT / mutant.path)] if f.__code__.co_firstlineno in lines]
        changed = False
        for function in ours:
            for new in _codes(code):
                if (new.co_name, new.co_firstlineno) == (name, function.__code__.co_firstlineno):
                    function.__code__ = new
                    changed = True
        return changed

    def _time_tests(self) -> None:
        """Run every test once, in a fork, and note how long it takes and which functions it runs."""
        with tempfile.NamedTemporaryFile() as file:
            if _fork(lambda: self._note_tests(file.name), 600) != LIVES:
                raise RuntimeError("the tests could not be run without a mutant")
            self.seconds, seen, failures = pickle.loads(Path(file.name).read_bytes())
        for index, places in enumerate(seen):
            if index not in failures:
                for place in places:
                    self.runs.setdefault(place, set()).add(index)
        print(f"{len(self.items)} tests in {sum(self.seconds):.0f} s")
        for index in failures:
            print(f"left out, since it fails without a mutant: {self.items[index].nodeid}")

    def _note_tests(self, file: str) -> int:
        places: set[tuple[str, int]] = set()
        prefix = str(ROOT / PACKAGE)

        def note(frame, event, argument):  # type: ignore[no-untyped-def]
            if event == "call" and frame.f_code.co_filename.startswith(prefix):
                places.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

        seconds, seen, failures = [], [], []
        for index, item in enumerate(self.items):
            places.clear()
            self.failed = False
            sys.setprofile(note)
            threading.setprofile(note)
            began = time.process_time()
            item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
            seconds.append(time.process_time() - began)
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
            seen.append(set(places))
            if self.failed:
                failures.append(index)
        Path(file).write_bytes(pickle.dumps((seconds, seen, failures)))
        return LIVES


def read_equivalents(text: str) -> set[tuple[str, ...]]:
    """Read changes that no test can tell from the source: file and function, ``-`` and ``+`` lines, then the reason."""
    found = set()
    place: list[str] = []
    before = ""
    for line in text.splitlines():
        if line.startswith("- "):
            before = _spaced(line[2:])
        elif line.startswith("+"):
            found.add((*place, before, _spaced(line[2:])))
        elif line and not line.startswith((" ", "#")):
            place = line.split()
    return found


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _functions() -> dict[str, list[FunctionType]]:
    found: dict[str, list[FunctionType]] = defaultdict(list)
    for thing in gc.get_objects():
        if type(thing) is FunctionType:
            found[thing.__code__.co_filename].append(thing)
    return found


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _set_constant(mutant: Mutant) -> None:
    """Give the constant its other value wherever a module of the package has it."""
    module = mutant.path.removeprefix("src/").removesuffix(".py").replace("/", ".")
    namespace = vars(sys.modules[module])
    name, old = mutant.place.name, namespace[mutant.place.name]
    first = mutant.place.first - 1
    lines = mutant.text.splitlines()
    last = first + 1
    while True:  # until the statement is whole
        try:
            statement = compile(
                "\n".join(lines[first:last]), mutant.path, "exec", flags=annotations.compiler_flag, dont_inherit=True
            )
            break
        except SyntaxError:
            last += 1
    exec(statement, namespace)
    for other, loaded in list(sys.modules.items()):
        if other.startswith("lightning_memplan") and vars(loaded).get(name) is old:
            setattr(loaded, name, namespace[name])


def _fork(work: Callable[[], int], seconds: float) -> int:
    """Return the status of ``work``, done in a fork that may take ``seconds`` of processor time and 4 GiB more."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(null, descriptor)
            limit = math.ceil(seconds)
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 4 * GIB
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
            status = work()
        except BaseException:  # noqa: BLE001 - whatever ends a test kills the mutant
            status = KILLED
        os._exit(status)
    ends = time.monotonic() + 60 + 30 * seconds  # a test that waits, even where other processes take most of the time
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > ends:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what its tests started
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else KILLED


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="*", choices=[*FOLDERS, []], help="folders; all of them if there is none")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="files whose path has one of these texts"
    )
    parser.add_argument("--tests", nargs="+", metavar="PATH", help="other tests than those of the folders")
    parser.add_argument("--per-file", type=int, default=40, help="mutants of each file; 0: all of them")
    parser.add_argument("--seconds", type=float, default=5, help="processor time of a mutant's tests, fastest first")
    parser.add_argument("--seed", type=int, default=0, help="which of them")
    options = parser.parse_args(argv)
    folders = options.folder or list(FOLDERS)
    tests = options.tests or [test for folder in folders for test in FOLDERS[folder][1]]
    sources = [
        str(file) for folder in folders for pattern in FOLDERS[folder][0] for file in (ROOT / PACKAGE).glob(pattern)
    ]
    arguments = ["-q", "-s", "-p", "no:cacheprovider", "-m", "not nullgpu and not slow", "--rootdir", str(ROOT)]
    runner = Runner(folders, options.only, options.per_file, options.seconds, options.seed)
    return pytest.main([*arguments, *tests, *sources], plugins=[runner])


if __name__ == "__main__":
    sys.exit(main())
