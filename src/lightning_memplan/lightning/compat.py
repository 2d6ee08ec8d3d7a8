"""Lightning under either of its two names: ``pytorch_lightning`` and ``lightning.pytorch``."""

from __future__ import annotations

import copy
import importlib
import pickle
from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection as apply_to_collection

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule


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
    """Whether ``thing`` is a LightningModule of either name."""
    return any(isinstance(thing, flavour.LightningModule) for flavour in FLAVOURS)


def as_lightning_module(module: Any) -> Any:
    """A LightningModule that ``torch.compile`` wrapped, with its steps compiled, as a Trainer unwraps it: on a shallow
    copy. Any other module is itself.

    Source: pytorch_lightning/utilities/compile.py (2.6), ``from_compiled``.
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
    """Whether ``thing`` is a LightningDataModule of either name."""
    return any(isinstance(thing, flavour.LightningDataModule) for flavour in FLAVOURS)


def is_overridden(method: str, thing: object) -> bool:
    """Whether the user's LightningModule or LightningDataModule defines ``method`` itself."""
    for flavour in FLAVOURS:
        for base in (flavour.LightningModule, flavour.LightningDataModule):
            if isinstance(thing, base):
                inherited = getattr(base, method, None)
                return inherited is None or getattr(type(thing), method, None) is not inherited
    return False


def misconfiguration(message: str) -> Exception:
    """Lightning's own MisconfigurationException."""
    utilities = importlib.import_module(f"{FLAVOURS[0].__name__}.utilities.exceptions")
    return utilities.MisconfigurationException(message)  # type: ignore[no-any-return]


@contextmanager
def isolated_random_state() -> Iterator[None]:
    """The random states of Python, NumPy and torch as they were, whatever happens inside; CUDA is not touched."""
    from lightning_fabric.utilities.seed import _collect_rng_states, _set_rng_states

    states = _collect_rng_states(include_cuda=False)
    try:
        yield
    finally:
        _set_rng_states(states)


def random_states() -> bytes:
    """Where Python's and NumPy's random numbers are."""
    from lightning_fabric.utilities.seed import _collect_rng_states

    states = _collect_rng_states(include_cuda=False)
    return pickle.dumps([states[name] for name in ("python", "numpy") if name in states])


def move_to_device(batch: Any, device: torch.device) -> Any:
    """A batch, moved as Lightning moves it (lightning_fabric/utilities/apply_func.py). The one that is given stays
    where it is: graphs move themselves."""
    utilities = importlib.import_module(f"{FLAVOURS[0].__name__}.utilities")
    return utilities.move_data_to_device(apply_to_collection(batch, _MovesItself, copy.copy), device)


class _MovesItself(ABC):  # noqa: B024 - it says what there is, and asks for nothing
    """What may change itself in its ``to(device)`` (torch_geometric's ``Data``, transformers' ``BatchEncoding``)."""

    @classmethod
    def __subclasshook__(cls, kind: type) -> bool:
        return callable(getattr(kind, "to", None)) and not issubclass(kind, (torch.Tensor, tuple))


def configured_optimizers(module: LightningModule) -> tuple[list[torch.optim.Optimizer], list[Any]]:
    """Optimizers and schedulers that ``configure_optimizers`` returns, in any of the forms that Lightning accepts."""
    name = next(f.__name__ for f in FLAVOURS if isinstance(module, f.LightningModule))
    parse = importlib.import_module(f"{name}.core.optimizer")._configure_optimizers
    configured = module.configure_optimizers()
    optimizers, schedulers, _ = ([], [], None) if configured is None else parse(configured)
    return list(optimizers), [s["scheduler"] if isinstance(s, dict) else s for s in schedulers]


def is_combined_loader(thing: object) -> bool:
    """Whether ``thing`` is a CombinedLoader of either name."""
    utilities = (importlib.import_module(f"{flavour.__name__}.utilities.combined_loader") for flavour in FLAVOURS)
    return any(isinstance(thing, module.CombinedLoader) for module in utilities)


def agree_on_smallest(batch_size: int) -> int:
    """The smallest of what all ranks found; itself where there is one process."""
    return min(int(size) for size in over_ranks(batch_size))


def over_ranks(value: Any) -> list[Any]:
    """What each rank has, in their order; every rank must ask."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
