"""An exception at a call that planning or measuring makes into user code or a library, on the CPU or on a GPU.

``python injected_cases.py '{"accelerator": "gpu", ...}' PLACE ...`` prints a JSON object for each place; ``sweep SEED
COUNT`` in place of names takes calls at random from all that are made. Run by ``test_injected.py``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import pickle
import random
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import lightning_memplan as mp
from tests.programs.interrupted_cases import HOOKS, POINTS, Data, Net, Samples, collate

CARD = mp.Device("a card", total=2**33)
SAMPLES, USERS, PLANNED = 24, 2, 8


class Unreadable(Exception):
    """Has no message that can be read."""

    def __str__(self) -> str:
        raise RuntimeError("no message")


KINDS: tuple[type[Exception], ...] = (
    *(RuntimeError, TypeError, OSError, KeyError, ValueError, AttributeError, AssertionError, StopIteration),
    *(RecursionError, MemoryError, torch.OutOfMemoryError, pickle.PicklingError, mp.MemplanError, UserWarning),
    Unreadable,
)

#: places where planning calls a hook of the user's, by name; and libraries, by module and path
USER = [*(name for name in HOOKS if not name.startswith("val")), "batch_size is set"]
LIBRARY: dict[str, str] = {
    "deepcopy": "copy:deepcopy",
    "random states are read": "lightning_fabric.utilities.seed:_collect_rng_states",
    "random states are put back": "lightning_fabric.utilities.seed:_set_rng_states",
    "optimizers are parsed": "pytorch_lightning.core.optimizer:_configure_optimizers",
    "the plan is printed": "pytorch_lightning.utilities.rank_zero:rank_zero_info",
    "the plan's table": "lightning_memplan.planning.fit:plan_texts",
    "ranks exchange": "lightning_memplan.planning.proposal:over_ranks",
    "a kernel is registered": "torch.library:Library.impl",
    "backward": "torch:Tensor.backward",
    "gradients": "torch.autograd:grad_mode.set_grad_enabled.__init__",
    "the loss": "torch.nn.functional:cross_entropy",
    "linear": "torch.nn.functional:linear",
    "stack": "torch:stack",
    "fake tensors": "torch._subclasses.fake_tensor:FakeTensorMode.__init__",
    "an optimizer": "torch.optim:AdamW.__init__",
    "the Trainer's precision": "lightning_memplan.planning.job:trainer_settings",
    "the Trainer's loaders": "lightning_memplan.lightning.data_source:_data_source",
    "the Trainer's device": "lightning_memplan.planning.fit:cuda_index",
    "modules": "torch.nn:Module.named_modules",
    "parameters": "torch.nn:Module.parameters",
    "hashes": "hashlib:sha256",
}
ON_GPU = {
    "the devices here": "lightning_memplan.planning.job:detect_devices",
    "memory_stats": "lightning_memplan.devices.allocator_stats:_STATS",
    "reset_peak_memory_stats": "lightning_memplan.devices.allocator_stats:_RESET",
    "mem_get_info": "torch.cuda:mem_get_info",
    "memory_allocated": "torch.cuda:memory_allocated",
    "empty_cache": "torch.cuda:empty_cache",
    "synchronize": "torch.cuda:synchronize",
    "device properties": "torch.cuda:get_device_properties",
    "_record_memory_history": "torch.cuda.memory:_record_memory_history",
    "_snapshot": "torch.cuda.memory:_snapshot",
    "get_rng_state": "torch.cuda:get_rng_state",
    "set_rng_state": "torch.cuda:set_rng_state",
    "nvmlInit": "pynvml:nvmlInit",
    "nvml's memory": "pynvml:nvmlDeviceGetMemoryInfo",
    "nvml's handle": "pynvml:nvmlDeviceGetHandleByUUID",
}
#: without these no step is measured
UNMEASURED = ("memory_stats", "reset_peak_memory_stats")
#: places of measuring: the exception comes in the third step
MEASURING = {
    "memory_stats in step 3": "lightning_memplan.devices.allocator_stats:_STATS",
    "reset_peak_memory_stats in step 3": "lightning_memplan.devices.allocator_stats:_RESET",
    "nvml in step 3": "lightning_memplan.devices.detect:NvmlMeter.read",
    "a forecast in step 3": "lightning_memplan.monitor.meter:Forecast.at",
    "a remark in step 3": "lightning_memplan.monitor.meter:Meter.remark",
}


class Active:
    """Note whether planning or measuring is running, and the error that it is to meet there."""

    in_planner = False
    steps = 0
    measuring = False  # the exception comes in measuring, in the third step
    error: Exception | None = None
    struck = 0

    @classmethod
    def strike(cls) -> None:
        """Raise where it is time to."""
        if cls.in_planner and cls.error is not None and cls.measuring == (cls.steps == 3):
            cls.struck += 1
            raise cls.error


class Loads(Data):
    def train_dataloader(self) -> Any:
        POINTS.reach("train_dataloader")
        return DataLoader(Samples(), self.batch_size, collate_fn=collate)


class Trained(Net):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        POINTS.reach("configure_gradient_clipping")


class Seen(pl.Callback):
    """Notes the batches that training has."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.sizes.append(len(batch[0]))


class Injected(mp.MemoryPlanner):
    """Tells when it runs."""

    profile: Callable[..., None] | None = None  # of the sweep


def _told(name: str) -> Callable[..., Any]:
    def hook(self: Injected, *args: Any, **kwargs: Any) -> Any:
        Active.in_planner = True
        Active.steps += name == "on_train_batch_start"
        sys.setprofile(self.profile)
        try:
            return getattr(mp.MemoryPlanner, name)(self, *args, **kwargs)
        finally:
            sys.setprofile(None)
            Active.in_planner = False

    return hook


for _name in [name for name in vars(mp.MemoryPlanner) if name.startswith("on_") or name in ("setup", "teardown")]:
    if callable(getattr(mp.MemoryPlanner, _name)):
        setattr(Injected, _name, _told(_name))


@contextlib.contextmanager
def patched(path: str) -> Iterator[None]:
    """Let a function of a library raise, wherever it is imported to."""
    module, _, name = path.partition(":")
    owner: Any = importlib.import_module(module)
    *steps, last = name.split(".")
    for step in steps:
        owner = getattr(owner, step)
    original = getattr(owner, last)

    def raising(*args: Any, **kwargs: Any) -> Any:
        Active.strike()
        return original(*args, **kwargs)

    setattr(owner, last, raising)
    try:
        yield
    finally:
        setattr(owner, last, original)


def fit(settings: dict[str, Any], planner: mp.MemoryPlanner) -> dict[str, Any]:
    """Train, and return how that went."""
    seen, ended, Active.steps, began = Seen(), "", 0, time.monotonic()
    trainer = pl.Trainer(
        callbacks=[planner, seen], max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, **settings,
    )  # fmt: skip
    data = Loads()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(Trained(), datamodule=data)
        except BaseException as error:  # noqa: BLE001 - whatever was raised
            ended = type(error).__name__
            with contextlib.suppress(Exception):
                ended += f": {error}"
    said = [str(each.message) for each in caught if str(each.message).startswith("MemoryPlanner")]
    return {
        "ended": ended,
        "planned": planner.plan and planner.plan.batch_size,
        "size": data.batch_size,
        "seen": seen.sizes,
        "said": [text for text in said if "measures nothing" not in text],
        "measured": len(planner.measurements),
        "struck": Active.struck,
        "seconds": round(time.monotonic() - began, 1),
    }


def planner_on(settings: dict[str, Any], **options: Any) -> Injected:
    own: dict[str, Any] = {"device": CARD, "apply": True} if settings["accelerator"] == "cpu" else {}
    return Injected(max_batch_size=PLANNED, **own, **options)


def error_of(place: str, number: int = 0) -> Exception:
    """An exception for a place: the same in every run, of another kind from place to place."""
    kind = random.Random(f"{place} {number}").choice(KINDS)
    return kind(f"injected at {place}")


def injected(place: str, settings: dict[str, Any], *, strikes: bool = True) -> dict[str, Any]:
    """Train with an exception at one place, each time that planning comes by: on this rank, or another."""
    error = error_of(place)
    Active.error, Active.struck, Active.measuring = (error if strikes else None), 0, place in MEASURING
    POINTS.arm(place if place in USER else "", Active.strike, again=True)
    path = {**LIBRARY, **ON_GPU, **MEASURING}.get(place)
    try:
        with patched(path) if path else contextlib.nullcontext():
            found = fit(settings, planner_on(settings))
    finally:
        Active.error = None
        POINTS.disarm()
    return {"place": place, "kind": type(error).__name__, "gpu": settings["accelerator"] == "gpu", **found}


def wrong(row: dict[str, Any]) -> list[str]:
    """Return the faults of a training: an empty list where it went on as it should."""
    found = []
    if not row["struck"]:
        found.append("planning never comes by")
    if row["ended"]:
        found.append(f"training ended with {row['ended']}")
    size = row["planned"] or USERS
    epoch = [size] * (SAMPLES // size) + ([SAMPLES % size] if SAMPLES % size else [])
    if row["seen"] != epoch or row["size"] != size:
        found.append(f"planned {row['planned']}, set {row['size']}, seen {row['seen']}")
    if len(row["said"]) > 1 or (row["planned"] is None and not row["said"]):
        found.append(f"{len(row['said'])} warnings: {row['said']}")
    text = row["said"][0] if row["said"] else ""
    if row["planned"] is None:
        if not text.startswith("MemoryPlanner: the batch size is not planned: "):
            found.append(f"said {text}")
        if row["kind"] not in text and row["place"] not in text:
            found.append(f"the warning does not name the place or the error: {text}")
    ends = row["place"] in MEASURING and bool(text)  # measuring ends in step 3, before or after that is measured
    steps = 0 if row["place"] in UNMEASURED else len(row["seen"])
    if row["gpu"] and row["measured"] not in ((2, 3) if ends else (steps,)):
        found.append(f"{row['measured']} steps measured of {len(row['seen'])}")
    return found


# ------------------------------------------------------------------------------------------------------------ a sweep
_OURS = str(Path(mp.__file__).parent)
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))
_PROGRAMS = str(Path(__file__).parent)
_STANDARD = ("/copy.py", "/pickle.py", "/subprocess.py", "/pathlib.py", "/hashlib.py", "/tempfile.py")
#: the question which stage it is, and a function that torch calls in C++, which ends the process where it raises
_NOT_THESE = ("enums.py:StrEnum.__eq__", "simple_registry.py:find_torch_dispatch_rule")
_IN_C = ("torch", "numpy", "_io", "posix", "_pickle")


class Sweep:
    """Calls from the planner into other code: counts them, or raises at one of them."""

    def __init__(self, target: str = "", nth: int = 1) -> None:
        self.target, self.nth = target, nth
        self.counts: dict[str, int] = {}
        self._known: dict[Any, str] = {}

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        if event == "call" and frame.f_back is not None:
            key = (frame.f_back.f_code, frame.f_code)
            if key not in self._known:
                self._known[key] = _python_call(*key)
        elif event == "c_call":
            key = (frame.f_code, getattr(arg, "__qualname__", ""))
            if key not in self._known:
                self._known[key] = _c_call(frame.f_code, arg)
        else:
            return
        if not (place := self._known[key]):
            return
        place = f"measuring: {place}" if Active.steps else place
        self.counts[place] = self.counts.get(place, 0) + 1
        if place == self.target and self.counts[place] == self.nth and Active.error is not None:
            Active.struck += 1
            raise Active.error


def _python_call(caller: Any, code: Any) -> str:
    """The name of a call of a Python function; "" where it is none of the planner's or of a user's."""
    ours, there = caller.co_filename.startswith(_OURS), code.co_filename
    users = there.startswith(_PROGRAMS) and code.co_name not in ("reach", "strike", "hook", "raising")
    if not users and not (ours and (there.startswith(_LIBRARIES) or there.endswith(_STANDARD))):
        return ""
    name = f"{Path(there).name}:{getattr(code, 'co_qualname', code.co_name)}"
    if name in _NOT_THESE:
        return ""
    return _called_from(caller, name) if ours else name


def _c_call(caller: Any, function: Any) -> str:
    """The name of a call of a function in C; "" where it is none of the planner's."""
    module = getattr(function, "__module__", None) or type(getattr(function, "__self__", None)).__module__
    if not caller.co_filename.startswith(_OURS) or not str(module).startswith(_IN_C):
        return ""
    return _called_from(caller, getattr(function, "__qualname__", repr(function)))


def _called_from(caller: Any, name: str) -> str:
    name = name.split("abi_1xxx_use_cxx11_abi_1.")[-1]  # which build of pybind11
    return f"{Path(caller.co_filename).name}:{caller.co_name} → {name}"


def calls(settings: dict[str, Any]) -> dict[str, int]:
    """Every call that planning and measuring make into other code, and how often."""
    planner, sweep = planner_on(settings), Sweep()
    planner.profile = sweep
    found = fit(settings, planner)
    assert found["planned"] == PLANNED, found
    return sweep.counts


def swept(place: str, nth: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train with an exception at the n-th time of one call, and return how that went."""
    planner, Active.error, Active.struck = planner_on(settings), error_of(place, nth), 0
    kind = type(Active.error).__name__
    planner.profile = Sweep(place, nth)
    try:
        found = fit(settings, planner)
    finally:
        Active.error = None
    return {"place": place, "nth": nth, "kind": kind, "gpu": settings["accelerator"] == "gpu", **found}


def sampled(seed: int, count: int, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Train once for each of ``count`` calls, and return how each went."""
    draw, found = random.Random(seed), calls(settings)
    places = sorted(found)
    for place in draw.sample(places, min(count, len(places))):
        row = swept(place, draw.randint(1, found[place]), settings)
        yield {**row, "wrong": wrong_in_sweep(row)}


def wrong_in_sweep(row: dict[str, Any]) -> list[str]:
    """Return the faults where an exception came once: another way may have planned, and measuring may have ended."""
    found = wrong({**row, "gpu": False})
    return [text for text in found if "never comes by" not in text]  # not every run makes as many calls


def main(settings: str, *places: str) -> None:
    on = json.loads(settings)
    if places[0] == "sweep":
        for row in sampled(int(places[1]), int(places[2]), on):
            print("SHOWN", json.dumps(row), flush=True)
        return
    for place in places:
        row = injected(place, on)
        print("SHOWN", json.dumps({**row, "wrong": wrong(row)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
