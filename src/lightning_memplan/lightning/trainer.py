"""Read a Trainer: settings, strategy, callbacks."""

from __future__ import annotations

import copy
import difflib
import importlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_memplan.lightning.compat import FLAVOURS, misconfiguration
from lightning_memplan.settings import Parallel, StepSettings, parse_precision


def trainer_settings(trainer: Any, capability: tuple[int, int] | None = None) -> StepSettings:
    """How the Trainer runs a step, as far as memory is concerned.

    Raises:
        ValueError: a precision whose memory is not modelled.
    """
    return StepSettings(
        precision=parse_precision(trainer.precision),
        gradient_clip_val=trainer.gradient_clip_val,
        gradient_clip_algorithm="value" if "value" in str(trainer.gradient_clip_algorithm).lower() else "norm",
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        capability=capability or (8, 6),
        parallel=parallel_of(trainer),
    )


def check_accumulation(effective_batch_size: int, module: Any, trainer: Any, parts: int, ranks: int) -> None:
    """Raise unless a plan can decide how many batches are accumulated, and each rank can have the same share.

    ``parts`` is the number that was asked for otherwise.

    Raises:
        MisconfigurationException: something else decides it, or there is no equal share.
    """
    asked = f"effective_batch_size={effective_batch_size} sets accumulate_grad_batches"
    if not getattr(module, "automatic_optimization", True):
        raise misconfiguration(
            f"{asked}, and with manual optimization it is training_step that decides when the optimizer steps: "
            "accumulate there, and pass max_batch_size in its place"
        )
    if parts != 1:
        raise misconfiguration(f"{asked}, and it is {parts} already: leave one out")
    schedulers = tuple(flavour.callbacks.GradientAccumulationScheduler for flavour in FLAVOURS)
    if any(isinstance(callback, schedulers) for callback in getattr(trainer, "callbacks", ())):
        raise misconfiguration(f"{asked}, and so does the callback GradientAccumulationScheduler: leave one out")
    if isinstance(getattr(trainer, "strategy", None), tuple(f.strategies.DeepSpeedStrategy for f in FLAVOURS)):
        raise misconfiguration(f"{asked}, and DeepSpeed counts batches by its own configuration: leave it out")
    if effective_batch_size % ranks:
        raise misconfiguration(
            f"effective_batch_size={effective_batch_size} has no equal share for each of {ranks} processes: make it a "
            f"multiple of {ranks}"
        )


def parallel_of(trainer: Any) -> Parallel | None:
    """What the Trainer's strategy wraps around a module, None where that is nothing."""
    strategy, on_cuda = trainer.strategy, trainer.strategy.root_device.type == "cuda"
    found = _wrapped_by(strategy, trainer.world_size, on_cuda=on_cuda)
    if found is None:
        return None
    backend = strategy._get_process_group_backend() if hasattr(strategy, "_get_process_group_backend") else ""
    sync = getattr(strategy, "_layer_sync", None) if found.kind in ("ddp", "fsdp") else None  # the others ignore it
    return replace(found, rank=trainer.global_rank, backend=backend, layer_sync=sync)


def parallel_named(strategy: Any, devices: int) -> Parallel | None:
    """The same of a strategy by its name in Lightning, or a strategy that no Trainer has yet, on so many GPUs.

    ``"fsdp2"``, which has no name there, is ``ModelParallelStrategy`` with its data on all of them.

    Raises:
        ValueError: Lightning knows no strategy of that name, or cannot make it here.
    """
    if strategy is None:
        return _wrapped_by(_made("ddp", devices), devices, on_cuda=True) if devices > 1 else None
    made = _made(strategy, devices) if isinstance(strategy, str) else strategy
    found = _wrapped_by(made, devices, on_cuda=True)
    backend = getattr(made, "_process_group_backend", None) or "nccl"
    return None if found is None else replace(found, backend=backend)


def sharding(units: Iterable[type[nn.Module]]) -> Any:
    """FSDP whose units are layers of these classes; the whole module is one where there are none."""
    return FLAVOURS[0].strategies.FSDPStrategy(auto_wrap_policy=set(units) or None)


def _made(name: str, devices: int) -> Any:
    strategies = importlib.import_module(f"{FLAVOURS[0].__name__}.strategies")
    names = [*strategies.StrategyRegistry, "fsdp2"]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3) or ["ddp", "fsdp", "fsdp2"]
        raise ValueError(f"Lightning has no strategy {name!r}: try {', '.join(map(repr, near))}")
    try:
        if name == "fsdp2":
            return strategies.ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1)
        return strategies.StrategyRegistry.get(name)
    except Exception as error:
        raise ValueError(f"the strategy {name!r} cannot be made here: {error}") from error


def _wrapped_by(strategy: Any, ranks: int, *, on_cuda: bool) -> Parallel | None:
    """Source: pytorch_lightning/strategies/ddp.py, fsdp.py, model_parallel.py and deepspeed.py (2.6)."""

    def has_kind(name: str) -> bool:
        return any(isinstance(strategy, getattr(flavour.strategies, name)) for flavour in FLAVOURS)

    if has_kind("FSDPStrategy"):
        arguments = {
            **strategy.kwargs,
            "cpu_offload": strategy.cpu_offload,
            "mixed_precision": strategy.mixed_precision,
            "sharding_strategy": strategy.sharding_strategy,
        }
        mesh = arguments.pop("device_mesh", None)  # of copies, and of shards
        mesh = mesh.shape if hasattr(mesh, "shape") else mesh
        shards = mesh[1] if mesh else max(1, ranks // max(1, strategy.num_nodes))
        checkpointing = strategy._activation_checkpointing_kwargs
        return Parallel("fsdp", ranks, arguments, checkpointing=checkpointing, shard_ranks=shards)
    if has_kind("DDPStrategy") and not has_kind("DeepSpeedStrategy"):  # which inherits from it
        hook = strategy._ddp_comm_hook if on_cuda else None
        if hook is not None and strategy._ddp_comm_wrapper is not None:
            hook = strategy._ddp_comm_wrapper(hook)
        state = strategy._ddp_comm_state
        return Parallel("ddp", ranks, strategy._ddp_kwargs, None if hook is None else (state, hook))
    if has_kind("ModelParallelStrategy"):
        data, parts = strategy._data_parallel_size, strategy._tensor_parallel_size
        parts = parts if isinstance(parts, int) else ranks // data if isinstance(data, int) else ranks
        if parts * (data if isinstance(data, int) else ranks // parts) != ranks:
            raise ValueError(f"ModelParallelStrategy's sizes, {data} and {parts}, do not make up {ranks} devices")
        return Parallel("model_parallel", ranks, tensor_parallel=parts)
    if has_kind("DeepSpeedStrategy"):
        return Parallel("deepspeed", ranks, strategy.config, name=type(strategy).__name__)
    if ranks > 1 and not has_kind("SingleDeviceStrategy"):
        return Parallel("other", ranks, name=type(strategy).__name__)
    return None


def validates(trainer: Any) -> bool:
    """Whether the Trainer validates while it trains."""
    return bool(trainer.enable_validation)


def is_fitting(trainer: Any) -> bool:
    """Whether the Trainer trains, and does not validate, test or predict alone."""
    return bool(trainer.state.fn == "fit")


def averaging_bytes(trainer: Any, module: Callable[[], Any]) -> int:
    """What callbacks that average weights will hold on the training device, beside the module: a copy each.

    ``module`` gives the module as it is when its ``setup`` has run; it is asked where there is such a callback.

    Source: pytorch_lightning/callbacks/weight_averaging.py (2.6), ``AveragedModel(pl_module, device)`` at ``setup``;
    stochastic_weight_avg.py, a copy that is moved to the device when averaging begins, unless it stays on the host.
    """
    average: tuple[Any, ...] = tuple(
        kind for f in FLAVOURS if (kind := getattr(f.callbacks, "WeightAveraging", None)) is not None
    )
    stochastic: tuple[Any, ...] = tuple(f.callbacks.StochasticWeightAveraging for f in FLAVOURS)
    copies = 0
    for callback in trainer.callbacks:
        made = isinstance(callback, average) and callback._average_model is not None  # it is among the bytes held
        if isinstance(callback, (*average, *stochastic)) and not made:
            copies += torch.device(getattr(callback, "_device", None) or "cuda").type == "cuda"
    if not copies:
        return 0
    weights: nn.Module = module()
    return copies * sum({id(t): t.nbytes for t in (*weights.parameters(), *weights.buffers())}.values())


def finetuning(module: Any) -> list[Any]:
    """Copies of the callbacks of the module's Trainer that freeze parts of it, and train them from some epoch on."""
    real = getattr(module._trainer, "_real", None)
    kinds = tuple(flavour.callbacks.BaseFinetuning for flavour in FLAVOURS)
    return [copy.deepcopy(callback) for callback in getattr(real, "callbacks", ()) if isinstance(callback, kinds)]


def unfreeze(callbacks: list[Any], module: Any, optimizers: list[torch.optim.Optimizer]) -> None:
    """Begin every epoch for these callbacks, so that the module is as they leave it: with the highest peak.

    Source: pytorch_lightning/callbacks/finetuning.py (2.6), ``on_train_epoch_start``.
    """
    epochs = module._trainer.max_epochs if callbacks else 0
    for epoch in range(epochs if epochs is not None and 0 <= epochs < _EPOCHS else _EPOCHS):
        for callback in callbacks:
            for optimizer in optimizers:
                callback.finetune_function(module, epoch, optimizer)


_EPOCHS = 1000  #: what Lightning takes where no number of epochs is given


def check_alone(trainer: Any) -> None:
    """Raise MisconfigurationException where Lightning's finder would set the batch size anew, as training begins."""
    finders = tuple(flavour.callbacks.BatchSizeFinder for flavour in FLAVOURS)
    if any(isinstance(callback, finders) for callback in trainer.callbacks):
        raise misconfiguration(
            "MemoryPlanner sets the batch size, and so does the callback BatchSizeFinder: leave one out, or pass "
            "MemoryPlanner(apply=False)"
        )


def batches_into_epoch(checkpoint: dict[str, Any]) -> int:
    """How many batches of an epoch a checkpoint has behind it; 0 where it was made between two epochs.

    Source: pytorch_lightning/loops/progress.py and training_epoch_loop.py (2.6).
    """
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    return 0 if progress.get("is_last_batch", True) else int(progress.get("current", {}).get("processed", 0))


def cuda_index(trainer: Any) -> int | None:
    """The index of the CUDA device on which this process trains, None where it is none."""
    device = trainer.strategy.root_device
    return (device.index or 0) if device.type == "cuda" else None
