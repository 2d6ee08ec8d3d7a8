"""Import Lightning under either of its two names: ``pytorch_lightning`` and ``lightning.pytorch``.

Private interfaces of Lightning were checked in 2.6.6; tests in tests/unit/lightning fail where one of them moves.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import random
import sys
from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection as apply_to_collection

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule

T = TypeVar("T")


def _installed() -> tuple[ModuleType, ...]:
    found = []
    for name in ("pytorch_lightning", "lightning.pytorch"):
        try:
            found.append(importlib.import_module(name))
        except ModuleNotFoundError:
            continue
    if not found:
        raise ModuleNotFoundError("lightning-memplan needs Lightning: pip install pytorch-lightning (or lightning)")
    return tuple(found)


FLAVOURS = _installed()


if TYPE_CHECKING:
    CallbackBase = Callback
else:  # its own name is private: LightningCLI does not offer it among the callbacks
    CallbackBase = type("_CallbackBase", tuple(flavour.Callback for flavour in FLAVOURS), {})


def is_lightning_module(thing: object) -> bool:
    """Return True for a LightningModule of either name."""
    return any(isinstance(thing, flavour.LightningModule) for flavour in FLAVOURS)


def as_lightning_module(module: Any) -> Any:
    """Unwrap a LightningModule that ``torch.compile`` wrapped; return any other module as it is.

    The result is a shallow copy with compiled steps, as a Trainer unwraps it.

    Source: pytorch_lightning/utilities/compile.py (2.6.6), ``from_compiled``, which writes ``_compiler_ctx``.
    """
    own = getattr(module, "_orig_mod", None)
    if not is_lightning_module(own):
        return module
    unwrapped = copy.copy(own)
    for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
        unwrapped.__dict__[name] = module.dynamo_ctx(getattr(type(own), name).__get__(unwrapped))
    unwrapped.__dict__["_compiler_ctx"] = {"dynamo_ctx": module.dynamo_ctx}
    return unwrapped


def is_datamodule(thing: object) -> bool:
    """Return True for a LightningDataModule of either name."""
    return any(isinstance(thing, flavour.LightningDataModule) for flavour in FLAVOURS)


def is_overridden(method: str, thing: object) -> bool:
    """Return True if the user's LightningModule or LightningDataModule defines ``method`` itself."""
    for flavour in FLAVOURS:
        for base in (flavour.LightningModule, flavour.LightningDataModule):
            if isinstance(thing, base):
                inherited = getattr(base, method, None)
                return inherited is None or getattr(type(thing), method, None) is not inherited
    return False


def misconfiguration(message: str) -> Exception:
    """Return a MisconfigurationException of Lightning's."""
    utilities = importlib.import_module(f"{FLAVOURS[0].__name__}.utilities.exceptions")
    return utilities.MisconfigurationException(message)  # type: ignore[no-any-return]


@contextmanager
def isolated_random_state(seed: int | None = None) -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch (not CUDA) on exit, even after an error.

    With a ``seed`` they begin there.
    """
    from lightning_fabric.utilities.seed import _set_rng_states

    states = _random_states()
    try:
        if seed is not None:
            random.seed(seed)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA too, for good
            if "numpy" in states:
                sys.modules["numpy"].random.seed(seed)
        yield
    finally:
        _set_rng_states(states)


def random_states() -> bytes:
    """Return the random states of Python and NumPy as bytes that can be compared."""
    states = _random_states()
    return pickle.dumps([states[name] for name in ("python", "numpy") if name in states])


def _random_states() -> dict[str, Any]:
    """Return the random states by library: "torch", "python", and "numpy" if it is installed.

    Source: lightning_fabric/utilities/seed.py (2.6.6), ``_collect_rng_states`` and its inverse ``_set_rng_states``.
    """
    from lightning_fabric.utilities.seed import _collect_rng_states

    return _collect_rng_states(include_cuda=False)


def move_to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch on ``device``, moved as Lightning moves it; leave the given batch where it is.

    Batches that move themselves, such as graphs, are copied first.

    Source: lightning_fabric/utilities/apply_func.py (2.6.6), ``move_data_to_device``.
    """
    utilities = importlib.import_module(f"{FLAVOURS[0].__name__}.utilities")
    return utilities.move_data_to_device(apply_to_collection(batch, _MovesItself, copy.copy), device)


class _MovesItself(ABC):  # noqa: B024 - a structural type, without abstract methods
    """Any class with a ``to(device)`` that may move it in place, as torch_geometric's ``Data`` does."""

    @classmethod
    def __subclasshook__(cls, kind: type) -> bool:
        return callable(getattr(kind, "to", None)) and not issubclass(kind, (torch.Tensor, tuple))


def configured_optimizers(module: LightningModule) -> tuple[list[torch.optim.Optimizer], list[Any]]:
    """Return what ``configure_optimizers`` makes: optimizers, and the configs that Lightning keeps of schedulers.

    Source: pytorch_lightning/core/optimizer.py (2.6.6), ``_init_optimizers_and_lr_schedulers``.
    """
    name = next(f.__name__ for f in FLAVOURS if isinstance(module, f.LightningModule))
    core = importlib.import_module(f"{name}.core.optimizer")
    configured = module.configure_optimizers()
    if configured is None:
        return [], []
    optimizers, schedulers, monitor = core._configure_optimizers(configured)
    if module.automatic_optimization:
        return list(optimizers), core._configure_schedulers_automatic_opt(schedulers, monitor)
    return list(optimizers), core._configure_schedulers_manual_opt(schedulers)


def is_combined_loader(thing: object) -> bool:
    """Return True for a CombinedLoader of either name."""
    utilities = (importlib.import_module(f"{flavour.__name__}.utilities.combined_loader") for flavour in FLAVOURS)
    return any(isinstance(thing, module.CombinedLoader) for module in utilities)
