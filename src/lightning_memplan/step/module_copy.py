"""Replicate a module so that it can train a few steps, with a stand-in for its Trainer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from lightning_memplan.errors import TraceError
from lightning_memplan.lightning.compat import is_datamodule, is_lightning_module
from lightning_memplan.lightning.loggers import silent_logger


class StandInTrainer:
    """Stand for a replica's Trainer: the real one's attributes can be read, and nothing that is set reaches it.

    Without a ``real`` one it has the attributes that any step may read.
    """

    def __init__(self, real: Any = None) -> None:
        loggers = [silent_logger() for _ in getattr(real, "loggers", ())]
        self.__dict__["_real"] = real
        self.__dict__["_own"] = {
            "estimated_stepping_batches": 1000,  # the real one would build the user's loaders
            "num_training_batches": 1000,
            "logger": loggers[0] if loggers else None,
            "loggers": loggers,
            "callbacks": [],
            "training": True,
            "barebones": False,
            "global_step": 0,
            "current_epoch": 0,
            "world_size": getattr(real, "world_size", 1),
            "strategy": StandInStrategy(getattr(real, "strategy", None)),
            "lr_scheduler_configs": [],
            "callback_metrics": {},
            "logged_metrics": {},
            "progress_bar_metrics": {},
            "sanity_checking": False,
            "is_global_zero": True,
        }

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__["_own"]
        if name in own:
            return own[name]
        if name.startswith("__") or self.__dict__["_real"] is None:
            raise AttributeError(f"the trainer has no {name!r} before training has begun")
        return getattr(self.__dict__["_real"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["_own"][name] = value

    def __deepcopy__(self, memo: Any) -> StandInTrainer:
        return self


class StandInStrategy:
    """Stand for a replica's strategy: collectives of the step reach fake ranks. The rest is the real one's.

    Source: lightning_fabric/utilities/distributed.py (2.6), ``_all_gather_ddp_if_available`` and ``_sync_ddp``.
    """

    def __init__(self, real: Any = None) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self._real is None:
            raise AttributeError(f"the strategy has no {name!r} before training has begun")
        return getattr(self._real, name)

    def __deepcopy__(self, memo: Any) -> StandInStrategy:
        return self

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        if not dist.is_initialized():
            return tensor
        from torch.distributed.nn.functional import all_gather

        with nullcontext() if sync_grads else torch.no_grad():
            return torch.stack(all_gather(tensor.contiguous()))

    def reduce(self, tensor: Any, *_: Any, **__: Any) -> Any:
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:  # noqa: A002 - its name
        return decision

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    def barrier(self, name: str | None = None) -> None:
        """Return at once: there is no other rank."""


def replicate(module: nn.Module, memo: dict[int, Any], *, trainer: Any, device: torch.device) -> nn.Module:
    """Return a deep copy of the module, to be trained on ``device``.

    ``memo`` maps the id of an object of the module to its replacement. Datasets and loaders are shared, since they are
    only read.

    >>> net = nn.Linear(2, 1)
    >>> replica = replicate(net, {}, trainer=None, device=torch.device("cpu"))
    >>> replica.weight is net.weight, bool((replica.weight == net.weight).all())
    (False, True)

    Raises:
        TraceError: a part of the module cannot be copied.
    """
    for path, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            raise TraceError(
                f"{path or type(module).__name__} is TorchScript, of which no copy can be trained: plan with the "
                "module that it was made of",
                reason="not_copyable",
            )
    stand_in = StandInTrainer(trainer)
    for child in module.modules():
        _replace_in(child, memo, stand_in)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            replica = copy.deepcopy(module, memo)
    except Exception as error:
        raise TraceError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}): "
            "what cannot be copied should be made in setup() or training_step(), not kept on the module",
            reason="not_copyable",
        ) from error
    _compile_anew(module, replica)
    for child in replica.modules():
        _finish(child, memo, stand_in, device)
    return replica


def _replace_in(child: nn.Module, memo: dict[int, Any], stand_in: StandInTrainer) -> None:
    """Add to ``memo`` the objects of a submodule that are shared, or that deepcopy would refuse."""
    for value in child.__dict__.values():
        if isinstance(value, (Dataset, DataLoader)) or is_datamodule(value):
            memo[id(value)] = value
    for leaf in tree_leaves([value for value in child.__dict__.values() if isinstance(value, _HOLDERS)]):
        if isinstance(leaf, torch.Tensor) and not leaf.is_leaf and id(leaf) not in memo:
            memo[id(leaf)] = leaf.detach().clone()  # a step left it there, or a weight is computed from others
    for own in (child.__dict__, child.__dict__.get("_compiler_ctx") or {}):
        if "dynamo_ctx" in own:
            memo[id(own["dynamo_ctx"])] = own["dynamo_ctx"]  # settings of torch.compile
    real = child.__dict__.get("_trainer")
    if real is not None:
        memo[id(real)] = stand_in


def _finish(child: nn.Module, memo: dict[int, Any], stand_in: StandInTrainer, device: torch.device) -> None:
    """Turn a copied submodule's references to the user's objects into references to the replica's."""
    own = child.__dict__
    for holder in (own, *(own[name] for name in _HOOKS if name in own)):
        for key, value in holder.items():
            if type(value) is FunctionType:
                holder[key] = _rebound(value, memo)
    if is_lightning_module(child):
        own["_trainer"] = stand_in
        _log_nothing(child)
    if "_device" in own:
        own["_device"] = device
    if getattr(child, "validate_args", None) is True and _is_metric(child):
        own["validate_args"] = False  # torchmetrics would check values, which fake tensors do not have


def _compile_anew(module: nn.Module, replica: nn.Module) -> None:
    """Compile in the replica what is compiled in the module.

    That is ``Module.compile``, and Lightning's ``torch.compile`` of a LightningModule (pytorch_lightning 2.6,
    utilities/compile.py, ``from_compiled``).
    """
    for real, child in zip(module.modules(), replica.modules(), strict=True):
        call: Any = getattr(real, "_compiled_call_impl", None)
        if call is not None:
            own = child._call_impl
            anew: Any = _rebound(call, {id(call._torchdynamo_orig_callable): own})
            anew._torchdynamo_orig_callable = own
            child._compiled_call_impl = anew
        context = child.__dict__.get("_compiler_ctx")
        if context is not None:
            for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
                child.__dict__[name] = context["dynamo_ctx"](getattr(type(child), name).__get__(child))


_HOLDERS = (torch.Tensor, list, tuple, dict)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _rebound(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """Return a function whose closure (a hook that names ``self``) has the copies of what was copied."""
    cells = function.__closure__ or ()
    memo.setdefault(id(function), function)  # it may close over itself
    changed = tuple(_copied_cell(cell, memo) for cell in cells)
    if all(a is b for a, b in zip(cells, changed, strict=True)):
        return function
    own = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, changed)
    memo[id(function)] = own
    own.__kwdefaults__ = function.__kwdefaults__
    own.__dict__.update(function.__dict__)
    for name in _OF_COMPILED:
        if name in own.__dict__:
            own.__dict__[name] = _copied(own.__dict__[name], memo)
    if "_torchdynamo_wrapper_id" in own.__dict__:
        own.__dict__["_torchdynamo_wrapper_id"] = id(own)
    return own


#: Attributes that torch.compile gives a compiled function (torch/_dynamo/eval_frame.py, 2.11 to 2.14)
_OF_COMPILED = ("_torchdynamo_orig_callable", "_torchdynamo_inline")


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Return the replica's value: a method of a copied object, a function that closes over one, or the same."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, MethodType) and id(value.__self__) in memo:
        return MethodType(value.__func__, memo[id(value.__self__)])
    return _rebound(value, memo) if type(value) is FunctionType else value


def _copied_cell(cell: CellType, memo: dict[int, Any]) -> CellType:
    try:
        value = cell.cell_contents
    except ValueError:  # it is empty as yet
        return cell
    copied = _copied(value, memo)
    return cell if copied is value else CellType(copied)


def _is_metric(module: nn.Module) -> bool:
    return hasattr(module, "_defaults") and hasattr(module, "_computed")  # torchmetrics.Metric


def metric_states(module: nn.Module) -> Iterator[torch.Tensor]:
    """Find the tensors that torchmetrics keep in plain attributes, which ``Module.to`` moves as well."""
    for metric in filter(_is_metric, module.modules()):
        for name in metric._defaults:  # type: ignore[union-attr]
            state = getattr(metric, name)
            for tensor in state if isinstance(state, list) else [state]:
                if isinstance(tensor, torch.Tensor):
                    yield tensor


def _log_nothing(module: Any) -> None:
    """Replace the methods of a copied LightningModule that log or print."""

    def ignored(self: Any, *args: Any, **kwargs: Any) -> None:
        return None

    for name in ("log", "log_dict", "print"):
        module.__dict__[name] = MethodType(ignored, module)
