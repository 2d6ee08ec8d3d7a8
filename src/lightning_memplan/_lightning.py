"""Lightning under whichever of its two names it is installed, and the parts of its inside that are needed.

``pytorch_lightning`` and ``lightning.pytorch`` are the same code under two names, with classes that do not know each
other. What is ours inherits from both where both are installed, and a check accepts either.

Checked on 2.6.6 of both; a test fails loudly where one of these moves.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import pickle
from abc import ABC
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning_utilities.core.apply_func import apply_to_collection as apply_to_collection
from torch import nn

from lightning_memplan.settings import Parallel, StepSettings, parse_precision

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


_FLAVOURS = _installed()


if TYPE_CHECKING:
    CallbackBase = Callback
else:
    CallbackBase = type("CallbackBase", tuple(flavour.Callback for flavour in _FLAVOURS), {})


def is_lightning_module(thing: object) -> bool:
    """Whether ``thing`` is a LightningModule of either name."""
    return any(isinstance(thing, flavour.LightningModule) for flavour in _FLAVOURS)


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
    return any(isinstance(thing, flavour.LightningDataModule) for flavour in _FLAVOURS)


def is_overridden(method: str, thing: object) -> bool:
    """Whether the user's LightningModule or LightningDataModule defines ``method`` itself."""
    for flavour in _FLAVOURS:
        for base in (flavour.LightningModule, flavour.LightningDataModule):
            if isinstance(thing, base):
                inherited = getattr(base, method, None)
                return inherited is None or getattr(type(thing), method, None) is not inherited
    return False


def misconfiguration(message: str) -> Exception:
    """Lightning's own MisconfigurationException."""
    utilities = importlib.import_module(f"{_FLAVOURS[0].__name__}.utilities.exceptions")
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
    utilities = importlib.import_module(f"{_FLAVOURS[0].__name__}.utilities")
    return utilities.move_data_to_device(apply_to_collection(batch, _MovesItself, copy.copy), device)


class _MovesItself(ABC):  # noqa: B024 - it says what there is, and asks for nothing
    """What may change itself in its ``to(device)`` (torch_geometric's ``Data``, transformers' ``BatchEncoding``)."""

    @classmethod
    def __subclasshook__(cls, kind: type) -> bool:
        return callable(getattr(kind, "to", None)) and not issubclass(kind, (torch.Tensor, tuple))


def configured_optimizers(module: LightningModule) -> tuple[list[torch.optim.Optimizer], list[Any]]:
    """Optimizers and schedulers that ``configure_optimizers`` returns, in any of the forms that Lightning accepts."""
    name = next(f.__name__ for f in _FLAVOURS if isinstance(module, f.LightningModule))
    parse = importlib.import_module(f"{name}.core.optimizer")._configure_optimizers
    configured = module.configure_optimizers()
    optimizers, schedulers, _ = ([], [], None) if configured is None else parse(configured)
    return list(optimizers), [s["scheduler"] if isinstance(s, dict) else s for s in schedulers]


def read_cli_config(
    path: str, module: type[Any] | None = None, datamodule: type[Any] | None = None
) -> tuple[Any, Any, dict[str, Any]]:
    """The module and the datamodule that a LightningCLI's YAML names, made, and the Trainer's settings as they stand.

    No Trainer is made, so the YAML may name accelerators that are not here. Classes are given where it does not name
    them. ``_run_subcommand`` is LightningCLI's own, which would fit.

    Raises:
        ValueError: LightningCLI cannot read the file; says what is wrong with it.
        ModuleNotFoundError: jsonargparse is not installed.
    """
    try:
        import jsonargparse
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a YAML needs jsonargparse: pip install 'jsonargparse[signatures]>=4.39'") from error
    flavour = next((f for f in _FLAVOURS if module is not None and issubclass(module, f.LightningModule)), _FLAVOURS[0])
    base = importlib.import_module(f"{flavour.__name__}.cli").LightningCLI

    class Reader(base):  # type: ignore[misc, valid-type]
        def instantiate_trainer(self, **kwargs: Any) -> None:
            return None

        def _run_subcommand(self, subcommand: str) -> None:
            return None

    try:
        read = Reader(
            module,
            datamodule,
            save_config_callback=None,
            seed_everything_default=False,
            auto_configure_optimizers=True,
            parser_kwargs={"exit_on_error": False, "fit": {"exit_on_error": False}},
            args=["fit", f"--config={path}"],
        )
    except jsonargparse.ArgumentError as error:
        raise ValueError(f"LightningCLI cannot read {path}: {error}") from error
    strategy = read.config_init["fit"]["trainer"].get("strategy")  # made, where the YAML has its class
    return read.model, read.datamodule, {**read.config["fit"]["trainer"], "strategy": strategy}


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
    schedulers = tuple(flavour.callbacks.GradientAccumulationScheduler for flavour in _FLAVOURS)
    if any(isinstance(callback, schedulers) for callback in getattr(trainer, "callbacks", ())):
        raise misconfiguration(f"{asked}, and so does the callback GradientAccumulationScheduler: leave one out")
    if isinstance(getattr(trainer, "strategy", None), tuple(f.strategies.DeepSpeedStrategy for f in _FLAVOURS)):
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
    return _FLAVOURS[0].strategies.FSDPStrategy(auto_wrap_policy=set(units) or None)


def _made(name: str, devices: int) -> Any:
    strategies = importlib.import_module(f"{_FLAVOURS[0].__name__}.strategies")
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
        return any(isinstance(strategy, getattr(flavour.strategies, name)) for flavour in _FLAVOURS)

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


Phase = Literal["train", "val", "test"]  #: whose loaders


def _loop(trainer: Any, phase: Phase) -> Any:
    loops = {"train": trainer.fit_loop, "val": trainer.fit_loop.epoch_loop.val_loop, "test": trainer.test_loop}
    return loops[phase]


def loader_source(trainer: Any, module: Callable[[], Any], datamodule: Any, phase: Phase = "train") -> Any:
    """What the Trainer trains, validates or tests on: the loaders that were passed, or those that a hook makes.

    ``module`` gives the module as it is when its ``setup`` has run. It, or the datamodule, is asked on a shallow copy.
    Validation and tests take one loader after the other, which a CombinedLoader says.
    """
    source = _loop(trainer, phase)._data_source.instance
    if loaders_are_made(trainer, phase):
        with isolated_random_state():
            made = datamodule if is_datamodule(source) else module()
            owner = copy.copy(made)
            if is_lightning_module(owner):  # a copied module has no trainer (LightningModule.__getstate__)
                owner.__dict__["_trainer"] = made.__dict__["_trainer"]
            source = getattr(owner, f"{phase}_dataloader")()
    if phase == "train" or is_combined_loader(source):
        return source
    return importlib.import_module(f"{_FLAVOURS[0].__name__}.utilities.combined_loader").CombinedLoader(
        source, "sequential"
    )


def loaders_are_made(trainer: Any, phase: Phase = "train") -> bool:
    """Whether the loaders are made by a hook of the module's or datamodule's."""
    source = _loop(trainer, phase)._data_source.instance
    return is_lightning_module(source) or is_datamodule(source)


def validates(trainer: Any) -> bool:
    """Whether the Trainer validates while it trains."""
    return bool(trainer.enable_validation)


def is_fitting(trainer: Any) -> bool:
    """Whether the Trainer trains, and does not validate, test or predict alone."""
    return bool(trainer.state.fn == "fit")


def is_combined_loader(thing: object) -> bool:
    """Whether ``thing`` is a CombinedLoader of either name."""
    utilities = (importlib.import_module(f"{flavour.__name__}.utilities.combined_loader") for flavour in _FLAVOURS)
    return any(isinstance(thing, module.CombinedLoader) for module in utilities)


def remember_arguments(copied: Any, **changed: Any) -> None:
    """Change what Lightning remembers of how a loader or batch sampler was made, on a copy of one.

    Lightning notes the arguments of those that a hook makes, and makes them anew with these for a distributed sampler
    (lightning_fabric/utilities/data.py, ``_wrap_init_method``).
    """
    noted = vars(copied)
    if "__pl_saved_args" not in noted:
        return
    names, args, kwargs = noted["__pl_saved_arg_names"], noted["__pl_saved_args"], dict(noted["__pl_saved_kwargs"])
    for name, value in changed.items():
        if name in names:
            place = names.index(name)
            args = (*args[:place], value, *args[place + 1 :])
        else:
            kwargs[name] = value
    noted.update(__pl_saved_args=args, __pl_saved_kwargs=kwargs)


def change_loaders(trainer: Any, change: Callable[[Any], Any], phase: Phase = "train") -> None:
    """Let the Trainer have ``change(loaders)`` in the place of those that were passed, or that a hook makes.

    What was passed is changed once; what a hook makes, each time it is called in this fit. Call it at ``setup``.
    """
    source = _loop(trainer, phase)._data_source
    owner = source.instance
    if not loaders_are_made(trainer, phase):
        source.instance = change(owner)
        return

    def dataloader() -> Any:
        loaders = type(source).dataloader(source)
        return change(loaders) if source.instance is owner else loaders

    source.dataloader = dataloader


def kept_loaders(trainer: Any, phase: Phase = "train") -> Callable[[], None]:
    """What undoes a ``change_loaders`` that is yet to come."""
    source = _loop(trainer, phase)._data_source
    before = dict(vars(source))

    def put_back() -> None:
        vars(source).clear()
        vars(source).update(before)

    return put_back


def release_loaders(trainer: Any) -> None:
    """Undo ``change_loaders`` for the fits to come."""
    for phase in get_args(Phase):
        vars(_loop(trainer, phase)._data_source).pop("dataloader", None)


def train_loaders(trainer: Any) -> Any:
    """What the Trainer trains with, once it has begun: a CombinedLoader."""
    return trainer.fit_loop._combined_loader


def averaging_bytes(trainer: Any, module: Callable[[], Any]) -> int:
    """What callbacks that average weights will hold on the training device, beside the module: a copy each.

    ``module`` gives the module as it is when its ``setup`` has run; it is asked where there is such a callback.

    Source: pytorch_lightning/callbacks/weight_averaging.py (2.6), ``AveragedModel(pl_module, device)`` at ``setup``;
    stochastic_weight_avg.py, a copy that is moved to the device when averaging begins, unless it stays on the host.
    """
    average: tuple[Any, ...] = tuple(
        kind for f in _FLAVOURS if (kind := getattr(f.callbacks, "WeightAveraging", None)) is not None
    )
    stochastic: tuple[Any, ...] = tuple(f.callbacks.StochasticWeightAveraging for f in _FLAVOURS)
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
    kinds = tuple(flavour.callbacks.BaseFinetuning for flavour in _FLAVOURS)
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
    finders = tuple(flavour.callbacks.BatchSizeFinder for flavour in _FLAVOURS)
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


def silent_logger() -> Any:
    """A logger of Lightning's that takes whatever is logged, and keeps nothing."""
    return importlib.import_module(f"{_FLAVOURS[0].__name__}.loggers.logger").DummyLogger()


def tensorboard_writers(trainer: Any) -> list[Any]:
    """The SummaryWriter of each TensorBoard logger; none on ranks but the first, which have none."""
    return [logger.experiment for logger in _loggers(trainer, "TensorBoardLogger")] if trainer.is_global_zero else []


def log_first_hyperparams(trainer: Any, module: Any, params: dict[str, Any]) -> None:
    """Log hyperparameters to TensorBoard, with the module's and datamodule's own: it shows those that come first.

    Call it at ``on_fit_start``, after which Lightning logs their own, as they were before the batch size was set
    (pytorch_lightning/loggers/utilities.py, ``_log_hyperparams``).
    """
    own: dict[str, Any] = {}
    for owner in (module, trainer.datamodule):
        if getattr(owner, "_log_hyperparams", False):
            own |= owner.hparams_initial
    own.pop("_class_path", None)  # LightningCLI's
    for logger in _loggers(trainer, "TensorBoardLogger"):
        logger.log_hyperparams(own | params)


def log_hyperparams(trainer: Any, params: dict[str, Any]) -> None:
    """Log hyperparameters to every logger. MLflow keeps what it has: it refuses another value, with an exception."""
    keeping = _loggers(trainer, "MLFlowLogger") if trainer.is_global_zero else []
    for logger in trainer.loggers:
        known = logger.experiment.get_run(logger.run_id).data.params if logger in keeping else ()
        logger.log_hyperparams({name: value for name, value in params.items() if name not in known})


def _loggers(trainer: Any, kind: str) -> list[Any]:
    kinds = tuple(getattr(flavour.loggers, kind) for flavour in _FLAVOURS)
    return [logger for logger in trainer.loggers if isinstance(logger, kinds)]


def logged_step(trainer: Any) -> int:
    """The step under which Lightning itself logs the metrics of this batch."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


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


def say(text: str) -> None:
    """Print to whoever runs the Trainer, once for all ranks, as Lightning itself does."""
    _rank_zero().rank_zero_info(text)


def _rank_zero() -> ModuleType:
    return importlib.import_module(f"{_FLAVOURS[0].__name__}.utilities.rank_zero")
