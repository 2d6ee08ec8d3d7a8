"""Write down the engine's program of every row, and compare two such files byte for byte.

    python -m benchmarks.accuracy.programs dump old.jsonl                       # before: every row of the suites
    python -m benchmarks.accuracy.programs dump new.jsonl --jobs 2              # after; goes on where it was stopped
    python -m benchmarks.accuracy.programs compare old.jsonl new.jsonl          # what differs; status 1 if any does
    python -m benchmarks.accuracy.programs dump few.jsonl --only resnet         # the rows whose text matches
    python -m benchmarks.accuracy.programs dump few.jsonl --models benchmarks/accuracy/regimes.txt

The suites are the rows of nullgpu.txt, regimes.txt and optimizers.txt (``nullgpu.py``), and as many of the RTX 3090's
tables as stand for all (``rtx3090.py``). Each is traced as there, on the CPU, and nothing is trained. A row is one line
of JSON: all events of its program at the batch sizes that were traced and at two that were not, by every choice of
workspaces, with digests of them and of each phase; notes, and what is predicted at these sizes. Blocks and streams are
numbered in the order in which they first appear, so that how they are numbered does not count. An error is its text.

Lines are the same from run to run, on one machine and with the same packages: what is drawn at random is seeded, the
order of the rows too, and no line has a time. Rows are in a seeded order, so that a part of them stands for all.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import gc
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SUITES = ("nullgpu.txt", "regimes.txt", "optimizers.txt")
RTX3090 = "rtx3090"  #: the suite of tables, beside those of files
SPREAD = 40  #: rows of these tables
UNSEEN = (7, 11)  #: batch sizes of no trace, beside the row's own: the second where that was traced
CHOICES = ("low", "expected", "high")  #: of workspaces
GROUP = 8  #: rows in one process, which spares its start
SEED = 0


# -------------------------------------------------------- what is asked of the package beside its documented functions


def held_by_callbacks(trainer: Any, module: Any) -> int:
    """Bytes that callbacks which average weights hold, as the planner's callback adds them to an estimate."""
    from lightning_memplan.lightning.trainer import averaging_bytes

    return averaging_bytes(trainer, lambda: module)


def structure_of(estimate: Any) -> str:
    """The hash by which history knows runs alike."""
    from lightning_memplan.memory import structure

    return structure.structure_of(estimate)


def programs_of(estimate: Any) -> dict[str, Any]:
    """The programs of an estimate by name: of its step, the lower end of it, those of a single size, other methods'."""
    found = {"program": estimate.program, "least": estimate.least}
    for size, exact in sorted(estimate.exact.items()):
        found |= {f"exact {size}: {name}": program for name, program in programs_of(exact).items()}
    for other in estimate.alternatives:
        found |= {f"{other.method}: {name}": program for name, program in programs_of(other).items()}
    return {name: program for name, program in found.items() if program is not None}


def settled(program: Any) -> Any:
    """The program with its last steps some more times: what is replayed."""
    return program.at_steady_state()


def entries_of(program: Any, batch_size: int, choice: str) -> list[tuple[int, int, int]]:
    """Block, size and stream of every event."""
    return program.at(batch_size, choice)


def label_of(event: Any) -> tuple[Any, ...]:
    """All that an event says beside its block, size and stream."""
    return event.step, event.phase, event.category, event.path, event.op, event.rule


def traits_of(program: Any) -> list[Any]:
    """Return a program's traced batch sizes, the batches of an optimizer's step, and the steps of a cycle."""
    return [list(program.batch_sizes), program.microbatches, program.period]


def rtx3090_program(row: Any) -> Any:
    from benchmarks.accuracy import rtx3090

    return rtx3090.trace_row(row)


def rtx3090_replay(program: Any, batch_size: int) -> Any:
    from benchmarks.accuracy import rtx3090

    return rtx3090.whole_run(program, batch_size, rtx3090.CAPACITY)


# ------------------------------------------------------------------------------------------------- what is written down


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _constant(text: str) -> str:
    """The text without addresses of objects, which no two processes share."""
    return re.sub(r"0x[0-9a-f]{6,}", "0x", text)


def _said(error: BaseException) -> str:
    return _constant(f"{type(error).__name__}: {error}")


def _asked(question: Callable[[], Any]) -> Any:
    """The answer, or the error's text."""
    try:
        return question()
    except Exception as error:  # noqa: BLE001 - it is written down, whatever it is
        return _said(error)


def events_of(program: Any, sizes: Sequence[int], choices: Sequence[str] = CHOICES) -> list[str]:
    """A line an event: its block, stream and label, and what it takes at each batch size by each choice.

    Fields are set apart by tabs, the block first. A size has one number where all choices agree.
    """
    columns: list[list[Any]] = []
    for size in sizes:
        found = [_asked(lambda n=size, c=choice: entries_of(program, n, c)) for choice in choices]
        if texts := [one for one in found if isinstance(one, str)]:  # it is not known there
            columns.append([texts[0]] * len(program.events))
            continue
        taken = zip(*([size for _, size, _ in one] for one in found), strict=True)
        columns.append([one[0] if len(set(one)) == 1 else "/".join(map(str, one)) for one in taken])
    blocks: dict[int, int] = {}
    streams: dict[int, int] = {}
    lines = []
    for event, *taken in zip(program.events, *columns, strict=True):
        block, stream = blocks.setdefault(event.block, len(blocks)), streams.setdefault(event.stream, len(streams))
        label = _constant("\t".join(map(str, label_of(event)))).replace("\n", " ")
        lines.append("\t".join((str(block), str(stream), label, *map(str, taken))))
    return lines


def described(program: Any, own: int) -> dict[str, Any]:
    """A program: digests of all its events, of each phase's, and of what is replayed; and the events, packed."""
    seen, *rest = traits_of(program)
    unseen = [size for size in (own, *UNSEEN) if size not in seen][:2]
    sizes = sorted({*seen, *unseen, own})
    lines = events_of(program, sizes)
    phases: dict[str, list[str]] = {}
    for event, line in zip(program.events, lines, strict=True):
        phases.setdefault(event.phase, []).append(line)
    longer = settled(program)
    return {
        "digest": _digest("\n".join(lines)),
        "count": len(lines),
        "phases": {phase: [len(of_one), _digest("\n".join(of_one))] for phase, of_one in phases.items()},
        "settled": [len(longer.events), _digest("\n".join(events_of(longer, [own], CHOICES[:1])))],
        "traced": seen,
        "parts, period": rest,
        "sizes": sizes,
        "events": base64.b85encode(zlib.compress("\n".join(lines).encode(), 9)).decode(),
    }


def unpacked(program: Mapping[str, Any]) -> list[str]:
    """The events of a program that was written down."""
    return zlib.decompress(base64.b85decode(program["events"])).decode().split("\n")


def predicted(estimate: Any, size: int) -> dict[str, Any]:
    """Return an estimate's predictions at a batch size."""
    peak = _asked(lambda: estimate.peak(size))
    found = {
        "peak": peak,
        "allocated": _asked(lambda: estimate.peak_allocated(size)),
        "allocated_range": _asked(lambda: list(estimate.allocated_range(size))),
        "reserved_range": _asked(lambda: list(estimate.reserved_range(size))),
        "phase": _asked(lambda: estimate.phase(size)),
        "breakdown": _asked(lambda: list(map(list, estimate.breakdown(size).items()))),
        "steps": _asked(lambda: [[a, r, list(map(list, p.items()))] for a, r, p in estimate.step_peaks(size)]),
        "formula": _asked(lambda: estimate.formula.memory(size)),
    }
    if isinstance(peak, int) and isinstance(found["allocated"], int):  # a card on which the cache is given back
        tight = (peak + found["allocated"]) // 2
        found["tight"] = _asked(lambda: [estimate.fits(size, tight), estimate.peak(size, tight)])
    return found


def of_formula(formula: Any) -> dict[str, Any]:
    of_layer = "path type parameters parameters parameter_bytes gradient_bytes shape feature_bytes".split()
    layers = [tuple(getattr(layer, name) for name in of_layer) for layer in formula.layers]
    names = ("parameter_bytes", "gradient_bytes", "input_bytes", "feature_bytes", "optimizer_bytes")
    return {"layers": [len(layers), _digest(repr(layers))], **{name: getattr(formula, name) for name in names}}


def of_estimate(estimate: Any, own: int, beside: int) -> dict[str, Any]:
    programs = {name: described(program, own) for name, program in programs_of(estimate).items()}
    sizes = programs["program"]["sizes"] if "program" in programs else [own, *UNSEEN]
    return {
        "method": estimate.method,
        "notes": list(map(_constant, estimate.notes)),
        "turns": estimate.loops,
        "beside": beside,
        "allocator": list(dataclasses.astuple(estimate.settings)),
        "structure": _asked(lambda: structure_of(estimate)),
        "formula": of_formula(estimate.formula),
        "programs": programs,
        "predicted": {str(size): predicted(estimate, size) for size in sizes},
    }


# --------------------------------------------------------------------------------------------------- one row of a suite


def _seeded() -> None:
    import numpy
    import torch

    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)


def _trainer(row: Any, module: Any) -> Any:
    """The Trainer of a row whose way of training asks for one, on the CPU: of a card it is asked nothing."""
    import pytorch_lightning as pl

    how: dict[str, Any] = {"precision": row.precision}
    if row.precision == "16-mixed":  # which Lightning has on no CPU
        how = {"plugins": [pl.plugins.precision.MixedPrecision("16-mixed", "cuda")]}
    how |= {"gradient_clip_val": row.clip, "accumulate_grad_batches": row.accumulate}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    how |= {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, **quiet}
    return pl.Trainer(**(how | module.fit_with()))


def _of_network(text: str) -> dict[str, Any]:
    """A row of a file, predicted as ``nullgpu.predict`` does."""
    import lightning_memplan as mp
    from benchmarks.accuracy import networks
    from benchmarks.accuracy.nullgpu import Row

    row, beside = Row.parse(text), 0
    module, sample = networks.build(row.network, row.optimizer)
    how: dict[str, Any] = {"precision": row.precision, "gradient_clip_val": row.clip}
    how["accumulate_grad_batches"] = row.accumulate
    if hasattr(module, "fit_with"):
        trainer = _trainer(row, module)
        how, beside = {"trainer": trainer}, held_by_callbacks(trainer, module)
    _seeded()
    loader = networks.loader(sample, row.batch_size, 1)
    found = mp.estimate(module, loader, method="trace", max_batch_size=row.batch_size, **how)
    return of_estimate(found, row.batch_size, beside)


def _of_table(text: str) -> dict[str, Any]:
    """A row of the RTX 3090's tables, as ``rtx3090.judge`` does."""
    from benchmarks.accuracy import rtx3090

    layout, model, *numbers = text.split()
    row = rtx3090.Row(layout, model, *map(int, numbers))
    program = rtx3090_program(row)
    own = described(program, row.ran)
    formula = _asked(lambda: rtx3090.formula_of(row))
    known = not isinstance(formula, str)

    def replayed(size: int) -> dict[str, Any]:
        found = rtx3090_replay(program, size)
        names = ("peak_allocated", "peak_reserved", "peak_at", "out_of_memory", "retries", "segments")
        memory = formula.memory(size) if known else formula
        return {"peak": found.peak_reserved, **{name: getattr(found, name) for name in names}, "formula": memory}

    return {
        "formula": of_formula(formula) if known else formula,
        "programs": {"program": own},
        "predicted": {str(size): _asked(lambda n=size: replayed(n)) for size in (row.ran, row.failed)},
    }


def record(suite: str, text: str) -> dict[str, Any]:
    """Return the record of a row: its program and predictions, or its error."""
    _seeded()
    try:
        found = _of_table(text) if suite == RTX3090 else _of_network(text)
    except Exception as error:  # noqa: BLE001 - whatever a network raises: the next row is to be run
        found = {"error": _said(error)}
    return {"suite": suite, "row": text, **found}


# ------------------------------------------------------------------------------------------------------------ all rows


class Task(NamedTuple):
    suite: str
    row: str

    @property
    def package(self) -> str:
        """Return the package of the network: each has processes of its own, since one may change how torch works."""
        return RTX3090 if self.suite == RTX3090 else self.row.split(".")[0]


def tasks_of(models: Sequence[Path]) -> list[Task]:
    """All rows of these files, and of the RTX 3090's tables where none is named."""
    tasks = []
    for path in models or [HERE / name for name in SUITES]:
        lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
        tasks += [Task(path.name, line) for line in lines if line]
    if not models:
        from benchmarks.accuracy import rtx3090

        rows = [row for layout in ("nhwc", "nchw") for row in rtx3090.read_rows(layout)]
        spread = [rows[k * len(rows) // SPREAD] for k in range(SPREAD)]
        tasks += [Task(RTX3090, " ".join(map(str, row))) for row in spread]
    return list(dict.fromkeys(tasks))


def groups_of(tasks: Sequence[Task]) -> list[list[Task]]:
    """Rows of one package each, shuffled."""
    draw = random.Random(SEED)
    packages: dict[str, list[Task]] = {}
    for task in draw.sample(list(tasks), len(tasks)):
        packages.setdefault(task.package, []).append(task)
    groups = [own[k : k + GROUP] for own in packages.values() for k in range(0, len(own), GROUP)]
    return draw.sample(groups, len(groups))


def work(tasks: Sequence[Task]) -> None:
    """Record rows, in a process of their own."""
    import logging

    import torch

    import lightning_memplan

    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(f"PACKAGE {lightning_memplan.__file__}", flush=True)
    for task in tasks:
        print("RESULT " + json.dumps(record(*task), ensure_ascii=False), flush=True)
        torch.compiler.reset()
        gc.collect()


def _environment(suite: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    own = {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8",  # the default: monai sets another when it is imported
        "PYTHONPATH": path,
        "PYTHONHASHSEED": str(SEED),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if suite == RTX3090:  # measured with a cuDNN that cannot be asked
        own["MEMPLAN_CUDNN"] = "off"
    return {**os.environ, **own}


def results(tasks: list[Task]) -> Iterator[dict[str, Any]]:
    """Yield the records of rows from worker processes; a row at which a process dies is a failed row."""
    while tasks:
        command = [sys.executable, "-m", "benchmarks.accuracy.programs", "work", *chain.from_iterable(tasks)]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=_environment(tasks[0].suite),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("PACKAGE ") and not Path(line[8:].strip()).is_relative_to(ROOT):
                    process.kill()
                    raise RuntimeError(f"the package that would be recorded is not this one: {line[8:].strip()}")
                if line.startswith("RESULT "):
                    tasks = tasks[1:]
                    yield json.loads(line[7:])
            status = process.wait()
            if tasks:
                errors.seek(0)
                end = errors.read().strip().splitlines()[-1:] or [f"exit status {status}"]
                yield {**tasks[0]._asdict(), "error": f"the process ended: {_constant(end[0])[:200]}"}
                tasks = tasks[1:]


def read(path: Path) -> dict[Task, dict[str, Any]]:
    """The rows of a file; a last line that was cut short is none."""
    rows = {}
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        if line.endswith("\n"):
            found = json.loads(line)
            rows[Task(found["suite"], found["row"])] = found
    return rows


def _whole_lines(path: Path) -> None:
    """Cut off what is left of a line that was not finished."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def dump(out: Path, models: Sequence[Path], only: str, jobs: int) -> None:
    """Append the rows that are not in the file."""
    done = set(read(out))
    _whole_lines(out)
    tasks = [task for task in tasks_of(models) if re.search(only, task.row)]
    groups = [left for group in groups_of(tasks) if (left := [task for task in group if task not in done])]
    whole, lock, began = sum(map(len, groups)), threading.Lock(), time.perf_counter()
    count = 0

    def one(group: list[Task], file: TextIO) -> None:
        nonlocal count
        for found in results(group):
            with lock:
                count += 1
                file.write(json.dumps(found, ensure_ascii=False) + "\n")
                file.flush()
                said = found["error"].splitlines()[0] if "error" in found else f"{events_in(found)} events"
                spent = f"{time.perf_counter() - began:6.0f} s"
                print(f"{count:4} of {whole} {spent}  {found['suite']}  {found['row']}: {said[:150]}", flush=True)

    with out.open("a") as file, ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(one, group, file) for group in groups]:
            future.result()
    print(summary([row for task, row in read(out).items() if task in set(tasks)]))


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a suite, and one a row that failed."""
    counts, failed = Counter(row["suite"] for row in rows), [row for row in rows if "error" in row]
    lines = [f"{suite}: {count} rows" for suite, count in sorted(counts.items())]
    lines.append(f"{len(rows)} rows, {sum(map(events_in, rows))} events, {len(failed)} rows with an error")
    return "\n".join([*lines, *(f"  {row['suite']}  {row['row']}: {row['error'].splitlines()[0]}" for row in failed)])


def events_in(row: Mapping[str, Any]) -> int:
    return sum(program["count"] for program in row.get("programs", {}).values())


# ---------------------------------------------------------------------------------------------------------- comparison


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in nested mappings, by its path."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}" if path else name)
    else:
        yield path, value


def _unlike_events(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield the number of events that differ, apart from the numbers of their blocks, and the first that does."""
    a, b = unpacked(old), unpacked(new)
    rest = [Counter(line.split("\t", 1)[1] for line in lines) for lines in (a, b)]
    gone, more = (rest[0] - rest[1]).total(), (rest[1] - rest[0]).total()
    if a == b:
        return
    what = f"{gone} are gone and {more} are new" if gone or more else "the same in another order, or of other blocks"
    names = {**old["phases"], **new["phases"]}
    phases = [phase for phase in names if old["phases"].get(phase) != new["phases"].get(phase)]
    yield f"{name}: {len(a)} events, now {len(b)}: {what}, in {', '.join(phases)}"
    place = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    for word, lines in (("was", a), ("is ", b)):
        shown = lines[place].replace("\t", " | ") if place < len(lines) else "at its end"
        yield f"  event {place} {word} {shown[:300]}"


def unlike(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the differences of a row, a line each."""
    lines = []
    for name in {**old.get("programs", {}), **new.get("programs", {})}:
        pair = [row.get("programs", {}).get(name) for row in (old, new)]
        if None not in pair:
            lines += _unlike_events(name, *pair)
    events = ("events", "digest", "phases", "count")
    before, after = (dict(_leaves(row)) for row in (old, new))
    for path in {**before, **after}:
        is_told = path.startswith("programs.") and path.split(".")[2:3] and path.split(".")[2] in events
        if before.get(path) == after.get(path) or (is_told and path in before and path in after):
            continue
        was, now = (str(row.get(path, "not there"))[:150] for row in (before, after))
        lines.append(f"{path}: {was}, now {now}")
    return lines


def compare(old: Path, new: Path, only: str, most: int) -> bool:
    """Print what differs, by suite; whether nothing does."""
    before, after = ({t: row for t, row in read(path).items() if re.search(only, t.row)} for path in (old, new))
    alike = True
    for suite in dict.fromkeys(task.suite for task in (*before, *after)):
        both = [task for task in before if task.suite == suite and task in after]
        other = [task for task in both if before[task] != after[task]]
        failed = sum("error" in before[task] for task in both if task not in other)
        missing = [task for task in before if task.suite == suite and task not in after]
        added = [task for task in after if task.suite == suite and task not in before]
        alike &= not other and not missing
        equal = f"{len(both) - len(other)} rows equal (of these {failed} with the same error)"
        print(f"{suite}: {equal}, {len(other)} differ, {len(missing)} missing, {len(added)} only in the new file")
        for task in other:
            lines = unlike(before[task], after[task])
            print(f"  differs: {task.row}", *lines[:most], sep="\n    ")
            if len(lines) > most:
                print(f"    and {len(lines) - most} more")
        for task in missing:
            print(f"  missing: {task.row}")
    return alike


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    dumped = commands.add_parser("dump", help="write down every row that is not in the file yet")
    dumped.add_argument("out", type=Path)
    dumped.add_argument("--models", type=Path, nargs="+", default=[], help="only these files of rows, one a line")
    dumped.add_argument("--only", default="", help="a regular expression: only the rows that it matches")
    dumped.add_argument("--jobs", type=int, default=1, help="processes at a time")
    compared = commands.add_parser("compare", help="what differs between two files; status 1 if anything does")
    compared.add_argument("old", type=Path)
    compared.add_argument("new", type=Path)
    compared.add_argument("--only", default="", help="a regular expression: only the rows that it matches")
    compared.add_argument("--most", type=int, default=20, help="lines that are printed of a row")
    worker = commands.add_parser("work")
    worker.add_argument("rows", nargs="*", help="a suite and a row, in turn")
    arguments = parser.parse_args()
    if arguments.command == "work":
        work([Task(*pair) for pair in zip(arguments.rows[::2], arguments.rows[1::2], strict=True)])
    elif arguments.command == "dump":
        dump(arguments.out, arguments.models, arguments.only, arguments.jobs)
    else:
        sys.exit(0 if compare(arguments.old, arguments.new, arguments.only, arguments.most) else 1)


if __name__ == "__main__":
    main()
