"""Build the job that a command line describes."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_memplan.cli.output import UsageError, described
from lightning_memplan.devices.catalogue import gpu
from lightning_memplan.lightning.config_file import read_cli_config
from lightning_memplan.lightning.trainer import sharding
from lightning_memplan.planning.api import estimate
from lightning_memplan.planning.job import default_device
from lightning_memplan.types import Device
from lightning_memplan.units import MiB, parse_bytes


# --- the job: what is trained, on what, and how
@dataclass(frozen=True)
class Job:
    module: nn.Module
    batch: Any
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return type(self.module).__name__

    def estimated(self, device: Device | None) -> Any:
        return estimate(self.module, self.batch, device=device, **self.settings)


def make_job(args: argparse.Namespace) -> Job:
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


def _from_target(args: argparse.Namespace) -> Job:
    if not args.target:
        raise UsageError(
            "nothing to plan: name it as package.module:Name or script.py:name, or by --config config.yaml"
        )
    module = _made(args.target, args.arg, "--arg")
    batch = _made(args.data, args.data_arg, "--data-arg") if args.data else None
    return Job(module, _plain_batch(args.input, args.labels) if args.input is not None else batch)


def _from_config(args: argparse.Namespace) -> Job:
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
    return Job(module, batch, settings | {"devices": cards * (nodes or 1)})


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
        raise UsageError(f"{place!r} cannot be imported: {described(error)}") from error
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
        raise UsageError(f"{path} cannot be made: {described(error)}; its arguments are {option} name=value") from error


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


def device_of(args: argparse.Namespace, *, default: bool = True) -> Any:
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
