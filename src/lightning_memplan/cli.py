"""The command line: ``memplan plan script.py:make --input 3x224x224 --gpu "RTX 3090"``; see docs/command_line.md.

Exit status: 0; 1 where the job does not fit; 2 where that cannot be told: wrong usage, or the job's own error.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Event, Thread
from typing import Any, NoReturn

import torch
from torch import nn

from lightning_memplan.cuda.cudnn import check_named
from lightning_memplan.devices.catalogue import gpu, gpus
from lightning_memplan.devices.detect import detect_devices
from lightning_memplan.errors import DoesNotFitError, MemplanError
from lightning_memplan.lightning.config_file import read_cli_config
from lightning_memplan.lightning.trainer import sharding
from lightning_memplan.monitor.csv_log import read_log
from lightning_memplan.monitor.history import Lesson, history, latest, lesson
from lightning_memplan.planning.api import advise, cards_for, estimate, plan
from lightning_memplan.planning.job import default_device, nccl_allowance, resolve_step
from lightning_memplan.planning.plan import MARGIN, advised_step, plan_estimate
from lightning_memplan.planning.retrace import EstimateCache, retrace_at
from lightning_memplan.report.figures import plot_measurements, plot_timeline
from lightning_memplan.report.plans import (
    advice_table,
    cards_table,
    device_fields,
    devices_table,
    estimate_table,
    plan_fields,
    plan_table,
)
from lightning_memplan.report.runs import history_table, lessons_table, logged_report, run_report
from lightning_memplan.types import Advice, Device, Run
from lightning_memplan.units import MiB, format_bytes, parse_bytes

FITS, DOES_NOT_FIT, CANNOT_TELL = 0, 1, 2


_HELP = "memplan COMMAND --help lists what a command takes: memplan plan train.py:Net --data train.py:Data --gpu T4"


_NO_RUNS = "no runs on record: MemoryPlanner adds one for each fit on a GPU"


class UsageError(ValueError):
    """What was typed is wrong; says what to type."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    >>> main(["gpus", "rtx 3090"])
    card         for training  compute capability
    RTX 3090        23.26 GiB                 8.6
    RTX 3090 Ti     22.94 GiB                 8.6
    0
    """
    args = _parse(argv)
    try:
        with warnings.catch_warnings():
            if not args.debug:
                warnings.simplefilter("ignore")
            check_named()
            return args.run(args)  # type: ignore[no-any-return]
    except DoesNotFitError as error:
        if args.json:
            _say(args, {"fits": False, "needed": error.needed, "available": error.available, "message": str(error)})
        else:
            _say(args, str(error))
        return DOES_NOT_FIT
    except Exception as error:
        if args.debug:
            raise
        known = isinstance(error, (MemplanError, ValueError, TypeError, ModuleNotFoundError))
        text = " ".join(str(error).split()) if known else _described(error)
        print(f"memplan: error: {text}", file=sys.stderr)
        return CANNOT_TELL


# --- commands
def _estimate(args: argparse.Namespace) -> int:
    job, device = _job(args), _device(args, default=False)
    with _working(f"estimating {job.name}"):
        found = job.estimated(device)
    if args.snapshot:
        with _written(args.snapshot):
            found.save_snapshot(args.snapshot, args.batch_size[-1])
    if args.plot:
        with _written(args.plot):
            plot_timeline(found, args.batch_size[-1], device=device).savefig(args.plot)
    rows = [
        {
            "batch_size": size,
            "peak_reserved": found.peak(size),
            "peak_allocated": found.peak_allocated(size),
            "formula": found.formula.memory(size),
            "phase": found.phase(size),
            "breakdown": dict(found.breakdown(size)),
        }
        for size in args.batch_size
    ]
    if args.json:
        _say(args, {"model": job.name, "method": found.method, "estimates": rows, "notes": list(found.notes)})
    else:
        _say(args, estimate_table(job.name, rows, found.notes))
    return FITS


def _plan(args: argparse.Namespace) -> int:
    job, device = _job(args), _device(args)
    with _working(f"planning {job.name}"):
        found = plan(
            job.module,
            job.batch,
            device=device,
            margin=args.margin,
            min_batch_size=args.min_batch_size,
            max_batch_size=args.max_batch_size,
            multiple_of=args.multiple_of,
            effective_batch_size=args.effective_batch_size,
            **job.settings,
        )
    advice = _advised(args, job, device, found.batch_size) if args.advice else None
    if args.json:
        more = {} if advice is None else {"advice": [asdict(item) for item in advice]}
        _say(args, {"model": job.name, "fits": True, **plan_fields(found), **more})
    else:
        _say(args, plan_table(found))
        if advice is not None:
            _say(args, f"\nwhat would take less memory at batch size {found.batch_size}\n{advice_table(advice)}")
    return FITS


def _check(args: argparse.Namespace) -> int:
    job, device, size = _job(args), _device(args), args.batch_size
    with _working(f"checking {job.name}"):
        estimated = job.estimated(device)
        advised, traced, nccl = job.advised(device)
        estimate_at = EstimateCache(lambda _: estimated, lambda found, size, _: traced(found, size), parts=1)
        card = replace(device, context=device.context + nccl)
        only = {"min_batch_size": size, "max_batch_size": size, "nccl": nccl}
        how = {"model": job.name, "advised": advised, "trace": estimate_at.trace}
        found = plan_estimate(estimate_at, card, margin=args.margin, **how, **only)
    if args.json:
        _say(args, {"model": job.name, "fits": True, **plan_fields(found)})
    else:
        needed, budget = format_bytes(found.predicted_peak), format_bytes(found.budget)
        _say(args, f"{job.name} fits on {device.name} at batch size {size}: {needed} of a budget of {budget}")
    return FITS


def _advise(args: argparse.Namespace) -> int:
    job = _job(args)
    found = _advised(args, job, _device(args), args.batch_size)
    _say(args, {"model": job.name, "advice": [asdict(item) for item in found]} if args.json else advice_table(found))
    return FITS


def _advised(args: argparse.Namespace, job: _Job, device: Any, batch_size: int | None) -> tuple[Advice, ...]:
    settings = {name: value for name, value in job.settings.items() if name != "method"}
    limits = {"batch_size": batch_size, "device": device, "margin": args.margin}
    with _working(f"tracing changes to {job.name}"):
        return advise(job.module, job.batch, **limits, **settings)


def _gpus(args: argparse.Namespace) -> int:
    words = " ".join(args.words).lower().split()
    cards = [card for card in gpus() if all(word in card.name.lower() for word in words)]
    if not cards:
        raise UsageError(f"no card of the catalogue has {' '.join(args.words)!r} in its name: memplan gpus lists all")
    if args.target:
        job = _job(args)
        limits = {name: getattr(args, name) for name in ("margin", "min_batch_size", "max_batch_size", "multiple_of")}
        with _working(f"planning {job.name}"):
            found = cards_for(job.module, job.batch, cards=cards, **limits, **job.settings)
        rows = [device_fields(card) | {"batch_size": size} for card, size in found]
        _say(args, rows if args.json else cards_table(found))
        return FITS
    _say(args, [device_fields(card) for card in cards] if args.json else devices_table(cards))
    return FITS


def _devices(args: argparse.Namespace) -> int:
    found = detect_devices()
    if args.json:
        _say(args, [device_fields(device) for device in found])
    else:
        _say(
            args, devices_table(found) if found else "no CUDA device here: name one by --gpu (memplan gpus lists them)"
        )
    return FITS


def _history(args: argparse.Namespace) -> int:
    runs = _runs(args)
    if args.json:
        _say(args, [asdict(run) for run in runs])
    else:
        _say(args, history_table(runs) if runs else _NO_RUNS)
    return FITS


def _report(args: argparse.Namespace) -> int:
    what = " ".join(args.words)
    if what and Path(what).exists():
        return _report_log(args, what)
    if args.plot:
        raise UsageError("--plot draws each step, which the history does not keep: name the folder of a CSVLogger")
    runs = _runs(args)
    words = what.lower().split()
    named = [run for run in runs if all(word in f"{run.model} {run.device}".lower() for word in words)]
    if what and not named:
        raise UsageError(
            f"{what!r} is no folder of a CSVLogger, and no module or card on record is called so: memplan history "
            "lists the runs"
        )
    if not named:
        _say(args, {"run": None, "lessons": []} if args.json else _NO_RUNS)
        return FITS
    last = latest(named)
    taught = list(_lessons(runs, [last, *named]))
    if args.json:
        rows = [
            {"model": run.model, "device": run.device, "precision": run.settings.get("precision"), "runs": count}
            | asdict(each)
            for run, count, each in taught
        ]
        _say(args, {"run": asdict(last), "lessons": rows})
    else:
        _say(args, run_report(last, taught[0][2].text))
        if taught[1:]:
            _say(args, "\n" + lessons_table([(run, count, each.text) for run, count, each in taught[1:]]))
    return FITS


def _lessons(runs: Sequence[Run], named: Sequence[Run]) -> Iterator[tuple[Run, int, Lesson]]:
    """Of runs alike the last one, how many they are, and what they teach; those like the first come first."""
    groups: dict[tuple[str, str], list[Run]] = {(run.device, run.structure): [] for run in named}
    for run in runs:
        groups.get((run.device, run.structure), []).append(run)
    for alike in groups.values():
        last = alike[-1]
        taught = lesson(runs, last.structure, last.device, method=last.method, capacity=last.capacity, prior=MARGIN)
        yield last, sum(run.rank == 0 for run in alike), taught


def _report_log(args: argparse.Namespace, place: str) -> int:
    """What a run's log says of its steps."""
    found = read_log(place)
    if args.plot:
        with _written(args.plot):
            plot_measurements(found.measurements).savefig(args.plot)
    if args.json:
        steps = [step._asdict() for step in found.measurements]
        validations = [peaks._asdict() for peaks in found.validations]
        _say(args, {"folder": str(found.folder), "plan": found.plan, "steps": steps, "validations": validations})
    else:
        _say(args, logged_report(str(found.folder), found.plan, found.measurements, found.validations))
    return FITS


def _runs(args: argparse.Namespace) -> list[Run]:
    if args.file and not Path(args.file).is_file():
        raise UsageError(
            f"there is no file {args.file!r}: without --file it is where MemoryPlanner keeps the history, "
            "$MEMPLAN_HISTORY or its default"
        )
    return history(args.file)


def _completion(args: argparse.Namespace) -> int:
    try:
        import shtab
    except ModuleNotFoundError as error:
        text = "completion needs shtab: pip install 'lightning-memplan[completion]'"
        raise ModuleNotFoundError(text) from error
    _say(args, shtab.complete(args.parser, args.shell))
    return FITS


# --- the job: what is trained, on what, and how
@dataclass(frozen=True)
class _Job:
    module: nn.Module
    batch: Any
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return type(self.module).__name__

    def estimated(self, device: Device | None) -> Any:
        return estimate(self.module, self.batch, device=device, **self.settings)

    def advised(self, device: Device) -> tuple[Any, Any, int]:
        """What advises on the job, what traces it at a batch size, and the bytes of the card that are left to NCCL."""
        given = self.settings
        sampled = {"sample": given["sample"]} if "sample" in given else {}
        source, settings, rest = resolve_step(
            self.module,
            self.batch,
            precision=given.get("precision"),
            optimizer=given.get("optimizer"),
            trainer=None,
            device=device,
            gradient_clip_val=given.get("gradient_clip_val"),
            accumulate_grad_batches=given.get("accumulate_grad_batches", 1),
            devices=given.get("devices", 1),
            strategy=given.get("strategy"),
        )
        advised = advised_step(self.module, source, settings, **rest, **sampled)
        how = {"module": self.module, "source": source, "settings": settings, **rest, **sampled}
        return advised, partial(retrace_at, **how), nccl_allowance(settings, device)


def _job(args: argparse.Namespace) -> _Job:
    """What the arguments name, made; what the user's own code prints goes to standard error."""
    with redirect_stdout(sys.stderr):
        job = _from_config(args) if args.config else _from_target(args)
    if not isinstance(job.module, nn.Module):
        raise UsageError(
            f"{args.target} made {job.module!r}: it must be, or make, a LightningModule or another nn.Module"
        )
    if job.batch is None:
        raise UsageError(
            "nothing says what is trained on: name it by --data package.module:DataModule or --input 3x224x224"
        )
    given = {
        "method": args.method,
        "precision": args.precision,
        "gradient_clip_val": args.gradient_clip_val,
        "accumulate_grad_batches": args.accumulate_grad_batches,
        "optimizer": _optimizer(args),
        "sample": args.sample,
        "devices": args.devices,
        "strategy": _strategy(args, job.module),
    }
    return replace(job, settings=job.settings | {name: value for name, value in given.items() if value is not None})


def _from_target(args: argparse.Namespace) -> _Job:
    if not args.target:
        raise UsageError(
            "nothing to plan: name it as package.module:Name or script.py:name, or by --config config.yaml"
        )
    module = _made(args.target, args.arg, "--arg")
    batch = _made(args.data, args.data_arg, "--data-arg") if args.data else None
    return _Job(module, _plain_batch(args.input, args.labels) if args.input is not None else batch)


def _from_config(args: argparse.Namespace) -> _Job:
    if not Path(args.config).is_file():
        raise UsageError(f"there is no file {args.config!r}: --config is a LightningCLI's YAML")
    model = _named(args.target) if args.target else None
    data = _named(args.data) if args.data else None
    module, datamodule, trainer = read_cli_config(args.config, model, data)
    names = ("precision", "gradient_clip_val", "accumulate_grad_batches", "strategy")
    batch = _plain_batch(args.input, args.labels) if args.input is not None else datamodule
    settings = {name: trainer[name] for name in names if trainer.get(name) not in (None, "auto")}
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes")
    cards = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) and devices > 0 else 1
    return _Job(module, batch, settings | {"devices": cards * (nodes or 1)})


def _named(path: str) -> Any:
    """What ``package.module:Name`` or ``script.py:name`` stands for."""
    place, _, name = path.rpartition(":")
    if not place or not name:
        raise UsageError(f"{path!r} names nothing in a module: write package.module:Name or script.py:name")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else _imported(place)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{place!r} cannot be imported: {_described(error)}") from error
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
            raise UsageError(
                f"{place!r} has no {name!r}: it has {', '.join(public[:8]) or 'nothing that can be called'}"
            )
        found = getattr(found, part)
    return found


def _imported(name: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as ``python -m`` does, and an installed script does not
    return importlib.import_module(name)


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"there is no file {str(path)!r}")
    known = sys.modules.get(path.stem)  # a second run would make other classes of the same names
    if known is not None and Path(getattr(known, "__file__", None) or "").resolve() == path.resolve():
        return known
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # as Python does for a script
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _made(path: str, pairs: Sequence[str], option: str) -> Any:
    """A class or a function called with ``name=value`` arguments; anything else is itself."""
    found = _named(path)
    if isinstance(found, nn.Module) or not callable(found):
        return found
    arguments = dict(_pair(pair, option) for pair in pairs)
    try:
        return found(**arguments)
    except Exception as error:
        raise UsageError(
            f"{path} cannot be made: {_described(error)}; its arguments are {option} name=value"
        ) from error


def _pair(text: str, option: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"{text!r} is no argument: write {option} name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _plain_batch(text: str, labels: str | None) -> Any:
    """Two samples of a shape such as ``3x224x224`` or ``512:int64``, with whole-numbered labels where asked for."""
    shape, _, kind = text.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"{kind!r} is no type of tensor: write --input {shape}:int64, or another of torch's")
    inputs = torch.zeros(2, *_shape(shape, "--input"), dtype=dtype)
    return inputs if labels is None else (inputs, torch.zeros(2, *_shape(labels, "--labels"), dtype=torch.int64))


def _shape(text: str, option: str) -> list[int]:
    parts = text.split("x") if text else []
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"{text!r} is no shape: write one sample's, such as {option} 3x224x224")
    return [int(part) for part in parts]


def _optimizer(args: argparse.Namespace) -> Callable[..., torch.optim.Optimizer] | None:
    if args.optimizer is None:
        return None
    found = getattr(torch.optim, args.optimizer, None)
    if not isinstance(found, type) or not issubclass(found, torch.optim.Optimizer):
        raise UsageError(
            f"torch.optim has no optimizer {args.optimizer!r}: AdamW, SGD, ... (upper and lower case matter)"
        )
    return partial(found, **{"lr": 1e-3, **dict(_pair(pair, "--optimizer-arg") for pair in args.optimizer_arg)})


def _strategy(args: argparse.Namespace, module: nn.Module) -> Any:
    """A strategy's name, or what makes one; with ``--wrap`` FSDP, whose units are layers of these classes."""
    if args.wrap:
        if args.strategy not in (None, "fsdp"):
            raise UsageError(f"--wrap names the units of --strategy fsdp, not of {args.strategy}: leave one out")
        kinds = {type(layer).__name__: type(layer) for layer in module.modules()}
        unknown = [name for name in args.wrap if name not in kinds]
        if unknown:
            near = difflib.get_close_matches(unknown[0], kinds, n=3, cutoff=0.4) or sorted(kinds)[:8]
            raise UsageError(f"{type(module).__name__} has no layer of class {unknown[0]!r}: try {', '.join(near)}")
        return sharding(kinds[name] for name in args.wrap)
    return _made(args.strategy, (), "") if args.strategy and ":" in args.strategy else args.strategy


def _device(args: argparse.Namespace, *, default: bool = True) -> Any:
    if args.memory:
        if (total := parse_bytes(args.memory)) < MiB:
            raise UsageError(f"--memory {args.memory} are {total} bytes: write a unit, such as --memory 24GiB")
        return Device(f"a card of {args.memory}", total=total)
    if args.gpu:
        try:
            return gpu(args.gpu)
        except ValueError as error:
            text = str(error).partition("; gpus()")[0]
            raise UsageError(f"{text}; memplan gpus lists it, and --memory 24GiB stands for any card") from error
    return default_device() if default else None


# --- what is typed
class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(CANNOT_TELL, f"memplan: error: {message}; see {self.prog} --help\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="memplan", description="How much GPU memory a training job takes, without a GPU.", epilog=_HELP
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('lightning-memplan')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="print JSON; sizes are bytes")
        added.add_argument("--debug", action="store_true", help="show warnings, and the whole traceback of an error")
        return added

    added = command("plan", _plan, "the largest batch size that fits")
    _add_job(added)
    _add_limits(added)
    added.add_argument("--effective-batch-size", type=int, metavar="N", help="of an optimizer's step, on all cards")

    added.add_argument("--advice", action="store_true", help="and what would take less memory, as memplan advise")

    added = command("check", _check, "whether a batch size fits: exit status 0, or 1 where it does not")
    _add_job(added)
    added.add_argument("--batch-size", type=int, required=True, metavar="N")

    added = command("estimate", _estimate, "what training takes at given batch sizes")
    _add_job(added)
    added.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 64], metavar="N", help="(default: 1 8 64)")
    _of_files(added.add_argument("--snapshot", metavar="FILE", help="write the last size's for pytorch.org/memory_viz"))
    _of_files(added.add_argument("--plot", metavar="FILE.png", help="draw a step at the last size"))

    added = command("advise", _advise, "what would take less memory, by a trace of each change")
    _add_job(added)
    added.add_argument("--batch-size", type=int, metavar="N", help="(default: the largest that fits)")

    added = command("gpus", _gpus, "the cards that can be named; with --for, the largest batch size of each")
    added.add_argument("words", nargs="*", help="words of the cards' names")
    _add_job(added, option="--for")
    _add_limits(added)

    command("devices", _devices, "the GPUs of this machine")
    for name, run, text in (
        ("history", _history, "earlier runs on a GPU: predicted and actual peak"),
        ("report", _report, "a run, predicted against actual, and what earlier runs teach the next plan"),
    ):
        added = command(name, run, text)
        _of_files(added.add_argument("--file", metavar="FILE", help="(default: where MemoryPlanner keeps it)"))
        if run is _report:
            what = "a CSVLogger's folder; or words of a module's or card's name (default: the last run on record)"
            _of_files(added.add_argument("words", nargs="*", metavar="RUN", help=what))
            _of_files(added.add_argument("--plot", metavar="FILE.png", help="draw each step of a CSVLogger's folder"))
    added = command("completion", _completion, "what a shell reads to complete memplan's words")
    added.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    added.set_defaults(parser=parser)
    return parser.parse_args(argv)


def _add_job(parser: argparse.ArgumentParser, option: str | None = None) -> None:
    """What names a job: its target by position, or by an option."""
    job = parser.add_argument_group("the job")
    place: dict[str, Any] = {"nargs": "?", "metavar": "TARGET"} if option is None else {"dest": "target"}
    what = "what makes the module: package.module:Name or script.py:name"
    _of_files(job.add_argument(option or "target", help=what, **place))
    job.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="an argument of it")
    _of_files(job.add_argument("--data", metavar="TARGET", help="what makes its datamodule, loader or batch"))
    job.add_argument("--data-arg", action="append", default=[], metavar="NAME=VALUE", help="an argument of it")
    job.add_argument("--input", metavar="SHAPE", help="in place of --data, one sample: 3x224x224, 512:int64")
    job.add_argument("--labels", nargs="?", const="", metavar="SHAPE", help="with --input, whole-numbered labels")
    job.add_argument("--sample", choices=("first", "largest"), help="which samples make the batch (default: first)")
    _of_files(job.add_argument("--config", metavar="YAML", help="a LightningCLI's: module, data and Trainer"))
    how = parser.add_argument_group("how it is trained")
    how.add_argument("--precision", metavar="P", help="as a Trainer's: 32-true, 16-mixed, bf16-mixed, ...")
    how.add_argument("--optimizer", metavar="NAME", help="torch.optim's, for what is no LightningModule")
    how.add_argument("--optimizer-arg", action="append", default=[], metavar="NAME=VALUE", help="an argument of it")
    how.add_argument("--accumulate-grad-batches", type=int, metavar="N", help="as a Trainer's")
    how.add_argument("--gradient-clip-val", type=float, metavar="X", help="as a Trainer's")
    how.add_argument("--devices", type=int, metavar="N", help="cards that train together (default: 1)")
    how.add_argument(
        "--strategy",
        metavar="NAME",
        help="how they do: ddp, fsdp, fsdp2 or another of Lightning's, or a TARGET that makes one (default: ddp)",
    )
    how.add_argument("--wrap", action="append", default=[], metavar="CLASS", help="a layer that FSDP shards as a unit")
    how.add_argument("--method", choices=("auto", "trace", "formula", "probe"), help="how it is told (default: auto)")
    card = parser.add_argument_group("the card; the first of this machine where none is named")
    which = card.add_mutually_exclusive_group()
    which.add_argument("--gpu", metavar="NAME", help="a card that need not be here, such as 'A100 80GB'")
    which.add_argument("--memory", metavar="SIZE", help="any card of so much memory, such as 24GiB")
    card.add_argument("--margin", type=float, default=MARGIN, help=f"the part to leave free (default: {MARGIN})")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("limits")
    limits.add_argument("--min-batch-size", type=int, default=1, metavar="N", help="(default: 1)")
    limits.add_argument("--max-batch-size", type=int, metavar="N")
    limits.add_argument("--multiple-of", type=int, default=1, metavar="N", help="(default: 1)")


def _of_files(action: argparse.Action) -> None:
    """A shell completes it by files: ``shtab.FILE``."""
    action.complete = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}  # type: ignore[attr-defined]


# --- what is printed
@contextmanager
def _written(path: str) -> Iterator[None]:
    """What is written meanwhile is written, or a line says why not."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path!r} cannot be written: {error.strerror or error}") from error


@contextmanager
def _working(text: str, every: float = 1.0) -> Iterator[None]:
    """Tell whoever looks what takes so long, and for how many seconds; the line is gone when it is done."""
    if not sys.stderr.isatty():
        yield
        return
    done, begun = Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(every):
            print(f"\r\x1b[K{text}, {time.monotonic() - begun:.0f} s", end="", file=sys.stderr, flush=True)

    teller = Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _say(args: argparse.Namespace, what: Any) -> None:
    """A value as JSON, or a text; with colours where rich is installed and someone looks."""
    if args.json:
        print(json.dumps(what, indent=2))
        return
    if sys.stdout.isatty():
        try:
            from rich.console import Console
        except ModuleNotFoundError:
            pass
        else:
            Console(soft_wrap=True).print(what, markup=False)
            return
    print(what)


def _described(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
