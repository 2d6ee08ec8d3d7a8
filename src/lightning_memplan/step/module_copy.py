"""Replicate a module so that it can train a few steps, with a stand-in for its Trainer."""

from __future__ import annotations

import io
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_memplan.errors import TraceError, message_of
from lightning_memplan.lightning.compat import is_datamodule, is_lightning_module
from lightning_memplan.step.stand_ins import StandInTrainer
from lightning_memplan.step.uncopyable import Preparation


def replicate(
    module: nn.Module,
    memo: dict[int, Any],
    *,
    trainer: Any,
    device: torch.device,
    beside: Sequence[Any] = (),
    tensor_copy: Callable[[torch.Tensor], torch.Tensor | None] = lambda tensor: None,
) -> nn.Module:
    """Return a deep copy of the module, to be trained on ``device``.

    ``memo`` maps the id of an object of the module to its replacement, and has the copies afterwards. ``tensor_copy``
    may return what stands for a tensor, None where a copy does. ``trainer`` is the real Trainer, or the stand-in of a
    replica that is copied. Objects ``beside`` the module may be copied with the same memo afterwards.

    Datasets and loaders are shared, since they are only read, and so are locks and streams. A stand-in takes the place
    of anything else that cannot be copied (see ``Uncopied``).

    >>> net = nn.Linear(2, 1)
    >>> replica = replicate(net, {}, trainer=None, device=torch.device("cpu"))
    >>> replica.weight is net.weight, bool((replica.weight == net.weight).all())
    (False, True)

    Raises:
        TraceError: the module refuses to be copied.
    """
    source = trainer if isinstance(trainer, StandInTrainer) else None
    stand_in = StandInTrainer(trainer) if source is None else source.copied()
    memo.update({id(real): own for real, own in stand_in.replacements(source)})
    for child in module.modules():
        for own in (child.__dict__, child.__dict__.get("_compiler_ctx") or {}):
            if "dynamo_ctx" in own:
                memo[id(own["dynamo_ctx"])] = own["dynamo_ctx"]  # settings of torch.compile
    preparation = Preparation(memo, partial(_replacement, stand_in, tensor_copy))
    for root in (module, *beside):
        preparation.visit(root, "self")
    preparation.copy_by_themselves()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            replica: nn.Module = preparation.copied(module)
    except Exception as error:
        raise TraceError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {message_of(error)}): "
            "what cannot be copied should be made in setup() or training_step(), not kept on the module",
            reason="not_copyable",
        ) from error
    preparation.follow_references()
    _compile_anew(module, replica)
    for child in replica.modules():
        _finish(child, memo, stand_in, device)
    stand_in.stand_for(replica, memo)
    return replica


def _replacement(stand_in: StandInTrainer, tensor_copy: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Return what stands for an object in a replica, None for an object that is copied."""
    if isinstance(value, torch.jit.ScriptModule):
        return _script_copy(value)
    if isinstance(value, nn.parameter.UninitializedBuffer):  # it refuses, as lazy parameters do not
        made_lazy: Any = nn.parameter.UninitializedBuffer
        return made_lazy(device=value.device, dtype=value.dtype)
    if isinstance(value, torch.Tensor):
        made = tensor_copy(value)
        if made is None and not value.is_leaf:  # a step left it, or a weight is computed from others
            made = value.detach().clone()
        return made
    if isinstance(value, (Dataset, DataLoader)):
        return value
    return stand_in.copied_datamodule(value) if is_datamodule(value) else None


def _script_copy(script: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """Return a copy of TorchScript with parameters of its own: a deep copy's are computed from the module's."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.save(script, file)
        file.seek(0)
        copied: torch.jit.ScriptModule = torch.jit.load(file)
    return copied


def _finish(child: nn.Module, memo: dict[int, Any], stand_in: StandInTrainer, device: torch.device) -> None:
    """Turn a copied submodule's references to the user's objects into references to the replica's."""
    own = child.__dict__
    for holder in (own, *(own[name] for name in _HOOKS if name in own)):
        for key, value in holder.items():
            if type(value) is FunctionType:
                holder[key] = rebound(value, memo)
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
            anew: Any = rebound(call, {id(call._torchdynamo_orig_callable): own})
            anew._torchdynamo_orig_callable = own
            child._compiled_call_impl = anew
        context = child.__dict__.get("_compiler_ctx")
        if context is not None:
            for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
                child.__dict__[name] = context["dynamo_ctx"](getattr(type(child), name).__get__(child))


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def rebound(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """Return a function whose closure (a hook that names ``self``) and defaults have the copies of what was copied."""
    cells, defaults, named = function.__closure__ or (), function.__defaults__ or (), function.__kwdefaults__ or {}
    memo.setdefault(id(function), function)  # it may close over itself
    changed = tuple(_copied_cell(cell, memo) for cell in cells)
    own_defaults = tuple(_copied(value, memo) for value in defaults)
    own_named = {name: _copied(value, memo) for name, value in named.items()}
    pairs = zip((*cells, *defaults, *named.values()), (*changed, *own_defaults, *own_named.values()), strict=True)
    if all(a is b for a, b in pairs):
        return function
    own = FunctionType(function.__code__, function.__globals__, function.__name__, own_defaults or None, changed)
    memo[id(function)] = own
    own.__kwdefaults__ = own_named or None
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
    if isinstance(value, weakref.ref) and id(value()) in memo:  # as schedulers refer to their optimizer
        return weakref.ref(memo[id(value())])
    return rebound(value, memo) if type(value) is FunctionType else value


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
