"""Stand for the Trainer and the strategy of a replica: a step reads them as in training, and changes nothing real."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from typing import Any

import torch
import torch.distributed as dist

from lightning_memplan.data.loaders import batches_of_epoch, loaders_in, planned_sizes, resized_loaders, unit_of
from lightning_memplan.errors import ApplyError
from lightning_memplan.lightning.compat import is_combined_loader, is_datamodule
from lightning_memplan.lightning.data_source import loader_source
from lightning_memplan.lightning.loggers import silent_logger

_STEPS = 1000  #: number of batches in an epoch whose loader has no length

_SCHEDULED = 100  #: least number of steps of a schedule: more than planning runs, since some refuse to go beyond


class StandInTrainer:
    """Stand for a replica's Trainer: the real one's attributes can be read, and nothing that is set reaches it.

    Without a ``real`` one it has the attributes that any step may read. ``loaders`` are those of training, and
    ``batch_size`` is the one that they have.
    """

    def __init__(self, real: Any = None, loaders: Any = None) -> None:
        logging = [silent_logger(logger) for logger in getattr(real, "loggers", ())]
        self.__dict__.update(_real=real, _loaders=loaders, _batch_size=None)
        self.__dict__["_own"] = {
            "logger": logging[0] if logging else None,
            "loggers": logging,
            "training": True,
            "barebones": False,
            "global_step": 0,
            "current_epoch": 0,
            "world_size": getattr(real, "world_size", 1),
            "strategy": StandInStrategy(getattr(real, "strategy", None)),
            "optimizers": [],
            "lr_scheduler_configs": [],
            "callback_metrics": {},
            "logged_metrics": {},
            "progress_bar_metrics": {},
            "sanity_checking": False,
            "is_global_zero": True,
            "is_last_batch": False,
            "should_stop": False,
        }
        if is_datamodule(datamodule := getattr(real, "datamodule", None)):
            self._own["datamodule"] = self.copied_datamodule(datamodule)

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__["_own"]
        if name in own:
            return own[name]
        if name in _COMPUTED:
            return _COMPUTED[name](self)
        if name.startswith("__") or self.__dict__["_real"] is None:
            raise AttributeError(f"the trainer has no {name!r} before training has begun")
        return getattr(self.__dict__["_real"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["_own"][name] = value

    def __deepcopy__(self, memo: Any) -> StandInTrainer:
        return self

    # -- replicas of a replica

    def copied(self) -> StandInTrainer:
        """Return a stand-in for the Trainer of a copy of the replica."""
        other = StandInTrainer.__new__(StandInTrainer)
        other.__dict__.update(self.__dict__)
        other.__dict__["_own"] = {**self._own, "strategy": StandInStrategy(self._own["strategy"].real)}
        if is_datamodule(datamodule := self._own.get("datamodule")):
            other._own["datamodule"] = other.copied_datamodule(datamodule)
        return other

    def replacements(self, source: StandInTrainer | None) -> Iterator[tuple[Any, Any]]:
        """Yield each object of the real Trainer's, or of the ``source`` that was copied, and what stands for it."""
        real = self.__dict__["_real"]
        for trainer in (real, source):
            if trainer is not None:
                yield trainer, self
                if (strategy := getattr(trainer, "strategy", None)) is not None:
                    yield strategy, self._own["strategy"]
                if is_datamodule(datamodule := getattr(trainer, "datamodule", None)):
                    yield datamodule, self._own["datamodule"]

    def copied_datamodule(self, datamodule: Any) -> Any:
        """Return a shallow copy of a datamodule, whose hyperparameters and batch size can be set."""
        own = copy.copy(datamodule)
        own.__dict__["trainer"] = self
        if "_hparams" in own.__dict__:
            with suppress(Exception):  # they stay shared where a value of the user's cannot be copied
                own.__dict__["_hparams"] = copy.deepcopy(own.__dict__["_hparams"])
        return own

    def stand_for(self, replica: Any, memo: dict[int, Any]) -> None:
        """Have the copies of what belongs to a replica: optimizers, schedulers, what its hooks have set."""
        for name, value in self._own.items():
            if name in ("strategy", "datamodule", "logger", "loggers"):
                continue
            with suppress(Exception):  # whatever the user has put there
                self._own[name] = copy.deepcopy(value, memo)
        self.train(replica, replica)

    def train(self, model: Any, replica: Any) -> None:
        """Train a replica, around which ``model`` is wrapped."""
        self._own.update(model=model, lightning_module=replica)
        strategy = self._own["strategy"]
        strategy.model, strategy.lightning_module = model, replica

    def train_batches_of(self, batch_size: int) -> None:
        """Have loaders of this batch size."""
        self.__dict__["_batch_size"] = batch_size

    # -- what is computed when it is read

    def _train_loaders(self) -> Any:
        loaders, size = self._loaders, self._batch_size
        if size is not None and loaders is not None:
            with suppress(ApplyError):
                loaders = resized_loaders(loaders, planned_sizes(loaders, size))
        return loaders.iterables if is_combined_loader(loaders) else loaders

    def _val_loaders(self) -> Any:
        own = self._own
        if "val_dataloaders" not in own:
            own["val_dataloaders"] = None
            if self._real is not None:
                with suppress(Exception):  # the hook is the user's: a step that needs it fails with what it has instead
                    made = loader_source(self._real, lambda: own["lightning_module"], own.get("datamodule"), "val")
                    own["val_dataloaders"] = made.iterables if is_combined_loader(made) else made
        return own["val_dataloaders"]

    def _val_batches(self) -> list[float]:
        """Return the number of batches of each validation loader, infinite where it is not known."""
        found = self._val_loaders()
        counts: list[float] = []
        for loader in [] if found is None else loaders_in(found):
            try:
                counts.append(len(loader))
            except (TypeError, NotImplementedError):
                counts.append(math.inf)
        return counts

    def _batches(self) -> int:
        """Return the number of batches in an epoch, as far as it is known."""
        count = None
        if self._loaders is not None:
            with suppress(Exception):  # a loader that is none of torch's
                size = self._batch_size or unit_of(self._loaders) or 1
                count = batches_of_epoch(self._loaders, size, self._own["world_size"])
        limit = getattr(self._real, "limit_train_batches", 1.0)
        if count is None:
            return limit if isinstance(limit, int) else _STEPS
        return max(1, min(count, limit) if isinstance(limit, int) else int(count * limit))

    def _batches_between_validations(self) -> float:
        """Return what ``fit_loop.setup_data`` makes of ``val_check_interval``."""
        interval = getattr(self._real, "val_check_interval", 1.0)
        return interval if isinstance(interval, int) else max(1, int(self._batches() * (interval or 1.0)))

    def _optimizer_steps(self) -> float:
        """Return the number of optimizer steps, as ``Trainer.estimated_stepping_batches`` does."""
        real = self._real
        epochs, steps = getattr(real, "max_epochs", 1), getattr(real, "max_steps", -1)
        accumulate = getattr(real, "accumulate_grad_batches", 1)
        if epochs is None or epochs == -1:
            return math.inf if steps == -1 else steps
        whole = math.ceil(self._batches() / accumulate) * max(epochs, 1)
        return max(_SCHEDULED, whole if steps == -1 else min(whole, steps))

    def _fit_loop(self) -> Any:
        """Return a copy of the real loop, in which nothing is to be set up."""
        loop = copy.copy(self._real.fit_loop)
        loop.__dict__["setup_data"] = lambda *_: None
        loop.__dict__["max_batches"] = self._batches()
        self._own["fit_loop"] = loop
        return loop

    def _log_dir(self) -> Any:
        return getattr(self._own["logger"], "log_dir", None) or getattr(self._real, "default_root_dir", None)

    def _callbacks(self) -> list[Any]:
        return [copy.copy(callback) for callback in getattr(self._real, "callbacks", ())]


_COMPUTED: Mapping[str, Callable[[StandInTrainer], Any]] = {
    "train_dataloader": StandInTrainer._train_loaders,
    "val_dataloaders": StandInTrainer._val_loaders,
    "num_val_batches": StandInTrainer._val_batches,
    "num_training_batches": StandInTrainer._batches,
    "val_check_batch": StandInTrainer._batches_between_validations,
    "estimated_stepping_batches": StandInTrainer._optimizer_steps,
    "fit_loop": StandInTrainer._fit_loop,
    "log_dir": StandInTrainer._log_dir,
    "callbacks": StandInTrainer._callbacks,
}


class StandInStrategy:
    """Stand for a replica's strategy: collectives of the step reach fake ranks. The rest is the real one's.

    Source: lightning_fabric/utilities/distributed.py (2.6), ``_all_gather_ddp_if_available`` and ``_sync_ddp``.
    """

    def __init__(self, real: Any = None) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self.__dict__.get("real") is None:
            raise AttributeError(f"the strategy has no {name!r} before training has begun")
        return getattr(self.real, name)

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
