"""Read a Trainer: settings, strategy, callbacks.

Private interfaces of Lightning were checked in 2.6.6; tests in tests/unit/lightning fail where one of them moves.
"""

from __future__ import annotations

import copy
import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_memplan.lightning.compat import FLAVOURS, misconfiguration
from lightning_memplan.settings import Parallel, StepSettings, parse_precision

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
    from pytorch_lightning.callbacks import BaseFinetuning
    from pytorch_lightning.strategies import Strategy


# ----------------------------------------------------------------------------------------------------------- settings
def trainer_settings(trainer: Trainer, capability: tuple[int, int] | None = None) -> StepSettings:
    """Return how the Trainer runs a step, on a device of this compute capability.

    Raises:
        ValueError: The precision is one whose memory is not modelled.
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
    """Check that a plan may decide how many batches are accumulated, and that each rank can have an equal share.

    ``parts`` is the number of accumulated batches that the user has set.

    Raises:
        MisconfigurationException: Something else decides the accumulation, or there is no equal share.
    """
    asked = f"effective_batch_size={effective_batch_size} sets accumulate_grad_batches"
    if not getattr(module, "automatic_optimization", True):
        raise misconfiguration(
            f"{asked}, and with manual optimization it is training_step that decides when the optimizer steps: "
            "accumulate there, and pass max_batch_size in its place"
        )
    if parts != 1:
        raise misconfiguration(f"{asked}, and it is {parts} already: leave one out")
    schedulers = _kinds("callbacks", "GradientAccumulationScheduler")
    if any(isinstance(callback, schedulers) for callback in getattr(trainer, "callbacks", ())):
        raise misconfiguration(f"{asked}, and so does the callback GradientAccumulationScheduler: leave one out")
    if isinstance(getattr(trainer, "strategy", None), _kinds("strategies", "DeepSpeedStrategy")):
        raise misconfiguration(f"{asked}, and DeepSpeed counts batches by its own configuration: leave it out")
    if effective_batch_size % ranks:
        raise misconfiguration(
            f"effective_batch_size={effective_batch_size} has no equal share for each of {ranks} processes: make it a "
            f"multiple of {ranks}"
        )


def cuda_index(trainer: Trainer) -> int | None:
    """Return the index of the CUDA device on which this process trains, None if it trains elsewhere."""
    device = trainer.strategy.root_device
    return (device.index or 0) if device.type == "cuda" else None


def validates(trainer: Trainer) -> bool:
    """Return True if the Trainer validates while it trains."""
    return bool(trainer.enable_validation)


def divides_samples(trainer: Trainer) -> bool:
    """Return True if the Trainer gives each rank its share of a dataset.

    Source: pytorch_lightning/trainer/connectors/accelerator_connector.py (2.6.6), ``use_distributed_sampler``.
    """
    return bool(trainer._accelerator_connector.use_distributed_sampler)


def is_fitting(trainer: Trainer) -> bool:
    """Return True in ``trainer.fit`` and its validation, False in ``validate``, ``test`` and ``predict``."""
    return bool(trainer.state.fn == "fit")


def batches_into_epoch(checkpoint: Mapping[str, Any]) -> int:
    """Return how many batches of its epoch a checkpoint has behind it, 0 if it was saved between two epochs.

    Source: pytorch_lightning/loops/progress.py and training_epoch_loop.py (2.6.6).
    """
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    return 0 if progress.get("is_last_batch", True) else int(progress.get("current", {}).get("processed", 0))


# ----------------------------------------------------------------------------------------------------------- strategy
def parallel_of(trainer: Trainer) -> Parallel | None:
    """Return what the Trainer's strategy wraps around a module, None if it wraps nothing.

    Source: pytorch_lightning/strategies/ddp.py (2.6.6), ``_get_process_group_backend``; strategy.py, ``_layer_sync``,
    which only DDP and FSDP apply.
    """
    strategy: Any = trainer.strategy
    found = _wrapped_by(strategy, trainer.world_size, on_cuda=strategy.root_device.type == "cuda")
    if found is None:
        return None
    backend = strategy._get_process_group_backend() if hasattr(strategy, "_get_process_group_backend") else ""
    sync = getattr(strategy, "_layer_sync", None) if found.kind in ("ddp", "fsdp") else None
    return replace(found, rank=trainer.global_rank, backend=backend, layer_sync=sync)


def parallel_named(strategy: str | Strategy | None, devices: int) -> Parallel | None:
    """Return what a strategy wraps around a module on this number of GPUs, before there is a Trainer.

    Name the strategy as Lightning does; ``"fsdp2"`` stands for ``ModelParallelStrategy`` with its data on all GPUs.
    With several GPUs, ``None`` means DDP.

    Source: pytorch_lightning/strategies/ddp.py (2.6.6), ``_process_group_backend``.

    Raises:
        ValueError: Lightning knows no strategy of that name, or cannot make it here.
    """
    if strategy is None:
        return _wrapped_by(_made("ddp", devices), devices, on_cuda=True) if devices > 1 else None
    made = _made(strategy, devices) if isinstance(strategy, str) else strategy
    found = _wrapped_by(made, devices, on_cuda=True)
    backend = getattr(made, "_process_group_backend", None) or "nccl"
    return None if found is None else replace(found, backend=backend)


def sharding(units: Iterable[type[nn.Module]]) -> Strategy:
    """Return an FSDP strategy that shards layers of these classes, or the whole module as one if there are none."""
    strategy: Strategy = FLAVOURS[0].strategies.FSDPStrategy(auto_wrap_policy=set(units) or None)
    return strategy


def _made(name: str, devices: int) -> Strategy:
    strategies = importlib.import_module(f"{FLAVOURS[0].__name__}.strategies")
    names = [*strategies.StrategyRegistry, "fsdp2"]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3) or ["ddp", "fsdp", "fsdp2"]
        raise ValueError(f"Lightning has no strategy {name!r}: try {', '.join(map(repr, near))}")
    try:
        if name == "fsdp2":
            made = strategies.ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1)
        else:
            made = strategies.StrategyRegistry.get(name)
    except Exception as error:
        raise ValueError(f"the strategy {name!r} cannot be made here: {error}") from error
    strategy: Strategy = made
    return strategy


def _wrapped_by(strategy: Any, ranks: int, *, on_cuda: bool) -> Parallel | None:
    if _is_strategy(strategy, "FSDPStrategy"):
        return _fsdp(strategy, ranks)
    if _is_strategy(strategy, "DeepSpeedStrategy"):  # before DDP, from which it inherits
        return Parallel("deepspeed", ranks, strategy.config, name=type(strategy).__name__)
    if _is_strategy(strategy, "DDPStrategy"):
        return _ddp(strategy, ranks, on_cuda=on_cuda)
    if _is_strategy(strategy, "ModelParallelStrategy"):
        return _model_parallel(strategy, ranks)
    if ranks > 1 and not _is_strategy(strategy, "SingleDeviceStrategy"):
        return Parallel("other", ranks, name=type(strategy).__name__)
    return None


def _fsdp(strategy: Any, ranks: int) -> Parallel:
    """Source: pytorch_lightning/strategies/fsdp.py (2.6.6), ``_setup_model``, ``_activation_checkpointing_kwargs``."""
    arguments = {
        **strategy.kwargs,
        "cpu_offload": strategy.cpu_offload,
        "mixed_precision": strategy.mixed_precision,
        "sharding_strategy": strategy.sharding_strategy,
    }
    mesh = arguments.pop("device_mesh", None)  # (replicas, shards)
    mesh = mesh.shape if hasattr(mesh, "shape") else mesh
    shards = mesh[1] if mesh else max(1, ranks // max(1, strategy.num_nodes))
    checkpointing = strategy._activation_checkpointing_kwargs
    return Parallel("fsdp", ranks, arguments, checkpointing=checkpointing, shard_ranks=shards)


def _ddp(strategy: Any, ranks: int, *, on_cuda: bool) -> Parallel:
    """Source: pytorch_lightning/strategies/ddp.py (2.6.6), ``_register_ddp_hooks``: on CUDA only."""
    hook = strategy._ddp_comm_hook if on_cuda else None
    if hook is not None and strategy._ddp_comm_wrapper is not None:
        hook = strategy._ddp_comm_wrapper(hook)
    state = strategy._ddp_comm_state
    return Parallel("ddp", ranks, strategy._ddp_kwargs, None if hook is None else (state, hook))


def _model_parallel(strategy: Any, ranks: int) -> Parallel:
    """Source: pytorch_lightning/strategies/model_parallel.py (2.6.6), sizes that may be "auto"."""
    data, tensor = strategy._data_parallel_size, strategy._tensor_parallel_size
    tensor = tensor if isinstance(tensor, int) else ranks // data if isinstance(data, int) else ranks
    if tensor * (data if isinstance(data, int) else ranks // tensor) != ranks:
        raise ValueError(f"ModelParallelStrategy's sizes, {data} and {tensor}, do not make up {ranks} devices")
    return Parallel("model_parallel", ranks, tensor_parallel=tensor)


def _is_strategy(strategy: object, name: str) -> bool:
    return isinstance(strategy, _kinds("strategies", name))


# ---------------------------------------------------------------------------------------------------------- callbacks
def check_alone(trainer: Trainer) -> None:
    """Check that Lightning's own finder will not set the batch size again when training begins.

    Raises:
        MisconfigurationException: The Trainer has a BatchSizeFinder.
    """
    finders = _kinds("callbacks", "BatchSizeFinder")
    if any(isinstance(callback, finders) for callback in _callbacks(trainer)):
        raise misconfiguration(
            "MemoryPlanner sets the batch size, and so does the callback BatchSizeFinder: leave one out, or pass "
            "MemoryPlanner(apply=False)"
        )


def averaging_bytes(trainer: Trainer, module: Callable[[], nn.Module]) -> int:
    """Return the bytes of the copies that weight-averaging callbacks will hold on the training device.

    ``module`` returns the module after its ``setup`` has run; it is called only if there is such a callback.

    Source: pytorch_lightning/callbacks/weight_averaging.py (2.6.6), ``AveragedModel(pl_module, device)`` at ``setup``,
    kept as ``_average_model``; stochastic_weight_avg.py, a copy that is moved to the device when averaging begins. Both
    keep the device as ``_device``.
    """
    average, stochastic = _kinds("callbacks", "WeightAveraging"), _kinds("callbacks", "StochasticWeightAveraging")
    copies = 0
    for callback in _callbacks(trainer):
        made = isinstance(callback, average) and callback._average_model is not None  # it is allocated already
        if isinstance(callback, (*average, *stochastic)) and not made:
            copies += torch.device(getattr(callback, "_device", None) or "cuda").type == "cuda"
    if not copies:
        return 0
    weights = module()
    return copies * sum({id(t): t.nbytes for t in (*weights.parameters(), *weights.buffers())}.values())


def finetuning(module: Any) -> list[BaseFinetuning]:
    """Return copies of the Trainer's callbacks that freeze parts of the module and unfreeze them in a later epoch."""
    real = getattr(module._trainer, "_real", None)
    kinds = _kinds("callbacks", "BaseFinetuning")
    return [copy.deepcopy(callback) for callback in getattr(real, "callbacks", ()) if isinstance(callback, kinds)]


def unfreeze(
    callbacks: Sequence[BaseFinetuning], module: LightningModule, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Begin every epoch for these callbacks, so that all that they will ever train is trained: the highest peak.

    Source: pytorch_lightning/callbacks/finetuning.py (2.6.6), ``on_train_epoch_start``.
    """
    epochs = module.trainer.max_epochs if callbacks else 0
    for epoch in range(epochs if epochs is not None and 0 <= epochs < _EPOCHS else _EPOCHS):
        for callback in callbacks:
            for optimizer in optimizers:
                callback.finetune_function(module, epoch, optimizer)


_EPOCHS = 1000  #: number of epochs that Lightning trains by default


def _callbacks(trainer: Trainer) -> list[Any]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def _kinds(namespace: str, name: str) -> tuple[type[Any], ...]:
    """Return the class of this name in each installed Lightning that has it."""
    found = (getattr(getattr(flavour, namespace), name, None) for flavour in FLAVOURS)
    return tuple(kind for kind in found if kind is not None)
