"""Write the batch size where the user keeps it: attributes, hyperparameters, and the loaders themselves."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from lightning_memplan.data.holders import DEFAULT_NAME, Holder, holders_of
from lightning_memplan.data.loaders import (
    batch_size_of_loader,
    batches_of_epoch,
    batches_of_loaders,
    check_resizable,
    last_batch,
    loaders_in,
    planned_sizes,
    resized_loaders,
    unit_of,
)
from lightning_memplan.errors import ApplyError
from lightning_memplan.lightning.data_source import Phase, change_loaders, kept_loaders, loaders_are_made, train_loaders
from lightning_memplan.lightning.loggers import say, warn
from lightning_memplan.lightning.ranks import over_ranks
from lightning_memplan.lightning.trainer import divides_samples, validates
from lightning_memplan.planning.proposal import IsFatal, RankResult, always, on_each_rank

_STAGES = ("train", "val", "test", "predict")


def names_by_stage(batch_arg_name: object) -> dict[str, str]:
    """Return the names of the batch size by stage; a single name is training's.

    >>> names_by_stage("batch_size"), names_by_stage({"val": "val_batch_size"})
    ({'train': 'batch_size'}, {'train': 'batch_size', 'val': 'val_batch_size'})

    Raises:
        ValueError: a stage is unknown, a name is no text, or validation or tests have training's name.
    """
    names = {"train": batch_arg_name} if isinstance(batch_arg_name, str) else batch_arg_name
    if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(
            f"batch_arg_name is a name such as 'batch_size', or names by stage such as {{'val': 'val_batch_size'}}, "
            f"not {batch_arg_name!r}"
        )
    if unknown := [stage for stage in names if stage not in _STAGES]:
        raise ValueError(f"batch_arg_name has names for {', '.join(map(repr, _STAGES))}, not for {unknown[0]!r}")
    if "predict" in names:
        raise ValueError("batch_arg_name['predict'] cannot be planned yet: leave it out")
    found = {"train": DEFAULT_NAME, **names}
    for stage, name in found.items():
        if stage != "train" and name == found["train"]:
            raise ValueError(f"{name!r} is training's batch size: leave batch_arg_name[{stage!r}] out, or name its own")
    return found


class LoaderSizes:
    """Give the loaders that a hook makes their planned sizes, as long as the hook asks for what it asked for first.

    A hook may make other batches in later epochs: these stay, except where ``fits`` says that they would run out of
    memory. A hook may also follow no holder, and make loaders that cannot be resized: these stay as they are, and
    ``refused`` is called with the reason.

    >>> from torch.utils.data import DataLoader
    >>> hook = LoaderSizes([8], lambda batch_size: batch_size <= 8)
    >>> [hook(DataLoader(range(32), batch_size=size)).batch_size for size in (2, 2, 4, 16)]
    [8, 8, 4, 8]
    """

    def __init__(
        self, sizes: Sequence[int], fits: Callable[[int], bool], refused: Callable[[Exception], object] = bool
    ) -> None:
        self._sizes, self._fits, self._refused = sizes, fits, refused
        self._asked: list[int | None] = []  # for, the first time
        self._said: set[int | None] = set()

    def __call__(self, loaders: Any) -> Any:
        try:
            return self._resized(loaders)
        except Exception as error:  # noqa: BLE001 - training has begun, and goes on with the loaders as they are
            self._refused(error)
            return loaders

    def _resized(self, loaders: Any) -> Any:
        asked = [batch_size_of_loader(loader) for loader in loaders_in(loaders)]
        self._asked = self._asked or asked
        if asked == self._asked:
            return resized_loaders(loaders, self._sizes)
        size, planned = unit_of(loaders), min(self._sizes)
        too_large = size is not None and size > planned and not all(over_ranks(self._fits(size)))
        if size not in self._said:
            self._said.add(size)
            if too_large:
                warn(f"the loaders now have batches of {size}, which do not fit: they get the planned {planned}")
            else:
                say(f"MemoryPlanner: the loaders now have batches of {size}: they stay")
        return resized_loaders(loaders, self._sizes) if too_large else loaders


@dataclass(frozen=True, slots=True)
class Place:
    """The places that keep the batch size of a fit, found before planning and written after it.

    ``source`` is what gives the loaders of a phase. An attribute that differs from their batch size keeps its ratio to
    it (``self.batch_size // 4`` in the hook of a run on four GPUs). ``fits`` tells whether another batch size fits.
    """

    holders: tuple[Holder, ...]
    trainer: Any
    source: Any
    before: tuple[int, ...]  #: what the holders held
    phase: Phase = "train"
    own: int | None = None  #: number of samples that a batch has before, where the loaders do not say
    fits: Callable[[int], bool] = bool
    refused: list[Exception] = field(default_factory=list)  #: why the loaders that a hook made were not resized

    def write(self, batch_size: int, undo: ExitStack) -> None:
        """Set it on all holders and on the Trainer's loaders; ``undo`` puts all of it back.

        Raises:
            ApplyError: a holder or a loader cannot be set, or an epoch has too few batches of that size.
        """
        if self.phase == "train":
            check_batches(self.trainer, self.source, batch_size)
        if not self.holders or not loaders_are_made(self.trainer, self.phase):
            check_resizable(self.source, batch_size)
        for holder, value in zip(self.holders, self._values(batch_size), strict=True):
            undo.callback(holder.restore, holder.read())
            holder.write(value)
        undo.callback(kept_loaders(self.trainer, self.phase))
        if loaders_are_made(self.trainer, self.phase):
            sizes = LoaderSizes(planned_sizes(self.source, batch_size), self.fits, partial(self._refuse, batch_size))
            change_loaders(self.trainer, sizes, self.phase)
        else:
            resized = partial(resized_loaders, sizes=planned_sizes(self.source, batch_size))
            change_loaders(self.trainer, resized, self.phase)

    def _refuse(self, batch_size: int, error: Exception) -> None:
        """Take back what the holders hold: the hook does not follow them, and its loaders cannot be resized."""
        self.put_back(batch_size)
        if self.phase == "train":
            self.refused.append(error)  # for ``check``
        else:
            warn(f"the batch size of {self.phase} stays: {error}")

    def put_back(self, batch_size: int) -> None:
        """Give the holders what they held before this batch size was written; one that was set since stays."""
        for holder, old, value in zip(self.holders, self.before, self._values(batch_size), strict=True):
            if holder.read() == value:
                holder.restore(old)

    def _values(self, batch_size: int) -> list[int]:
        """Return what each holder holds at a batch size."""
        unit = unit_of(self.source) or self.own
        return [max(1, batch_size * old // unit) if unit else batch_size for old in self.before]

    def held(self, batch_size: int) -> int:
        """Return the value of the attribute, or ``batch_size`` where no attribute holds it."""
        return int(self.holders[0].read()) if self.holders else batch_size

    def check(self, batch_size: int) -> None:
        """Raise ApplyError unless the Trainer's loaders, which are there now, have the size that was planned."""
        if self.refused:
            raise self.refused[0]
        loaders = loaders_in(train_loaders(self.trainer))
        for loader, planned in zip(loaders, planned_sizes(self.source, batch_size), strict=False):
            if batch_size_of_loader(loader) not in (None, planned):
                raise ApplyError(
                    f"{planned} samples a batch were planned, and the {type(loader).__name__} gives "
                    f"{batch_size_of_loader(loader)}: Lightning made it anew, with its own sampler, from arguments "
                    "that do not tell its batch size; give its __init__ an argument batch_size, or pass apply=False"
                )


def check_batches(trainer: Any, source: Any, batch_size: int) -> None:
    """Raise ApplyError where Lightning would stop, since an epoch has too few batches of that size.

    Source: pytorch_lightning 2.6, loops/fit_loop.py (``setup_data``) and trainer/connectors/data_connector.py.
    """
    count = batches_of_epoch(source, batch_size, ranks_of(trainer))
    each = batches_of_loaders(source, batch_size, ranks_of(trainer))
    limit, interval = trainer.limit_train_batches, trainer.val_check_interval
    if count is None or each is None or limit == 0:
        return
    if isinstance(limit, float) and int(min(each) * limit) == 0:  # Lightning takes a part of each loader
        name = "overfit_batches" if trainer.overfit_batches else "limit_train_batches"
        raise ApplyError(
            f"{name}={limit} is a part of an epoch's batches, and {'an epoch' if len(each) == 1 else 'a loader'} has "
            f"{min(each)} of the planned batch size {batch_size}, which is not one: give a number of batches "
            f"({name}=1), or a max_batch_size"
        )
    few, count = count, batches_taken(trainer, count)
    counted = trainer.limit_val_batches > 0 and trainer.check_val_every_n_epoch is not None
    if isinstance(interval, int) and count < interval and counted:
        raise ApplyError(
            f"val_check_interval={interval} counts batches, and an epoch has {few} of the planned batch size "
            f"{batch_size}: give a part of an epoch (val_check_interval=1.0), pass check_val_every_n_epoch=None, or "
            f"max_batch_size={max(1, batch_size * count // interval)}"
        )


def most_within_epochs(trainer: Any, source: Any, most: int, own: int | None) -> int:
    """Return the largest batch size, ``most`` at most, with which epochs have the batches that the Trainer needs.

    These are the batches of ``check_batches``, and those up to the first validation, where it comes with the user's
    ``own`` size. Where no size has them, ``most`` stays, and ``check_batches`` says why. Where nobody knows how many
    batches an epoch has, and a setting counts them, the user's own size has enough.
    """
    if own is not None and batches_of_epoch(source, 1, ranks_of(trainer)) is None and _counts_batches(trainer):
        return min(most, own)

    def enough(batch_size: int) -> bool:
        try:
            check_batches(trainer, source, batch_size)
        except ApplyError:
            return False
        return own is None or _validates(trainer, source, batch_size) or not _validates(trainer, source, own)

    if enough(most) or not enough(1):
        return most
    return bisect_left(range(1, most + 1), x=True, key=lambda size: not enough(size))  # larger sizes have fewer batches


def _counts_batches(trainer: Any) -> bool:
    """Return True if training needs some number of batches in an epoch: for a part of them, or up to a validation.

    Where no length is known, the validation after an epoch comes with the last of ``limit_train_batches``.

    Source: pytorch_lightning/loops/training_epoch_loop.py (2.6.6), ``_should_check_val_fx``.
    """
    limit, interval = trainer.limit_train_batches, trainer.val_check_interval
    ends = trainer.check_val_every_n_epoch is not None or (trainer.max_epochs or -1) > 0
    counted = isinstance(interval, int) and interval > 1 and trainer.limit_val_batches > 0
    limited = isinstance(limit, int) and limit > 1 and validates(trainer)
    return (ends and (counted or limited)) or (isinstance(limit, float) and 0 < limit < 1)


def _validates(trainer: Any, source: Any, batch_size: int) -> bool:
    """Tell whether training comes to its first validation, where this is counted in batches of all epochs."""
    interval, count = trainer.val_check_interval, batches_of_epoch(source, batch_size, ranks_of(trainer))
    if trainer.check_val_every_n_epoch is not None or not isinstance(interval, int) or count is None:
        return True
    epochs, steps = trainer.max_epochs or -1, trainer.max_steps
    batches = [batches_taken(trainer, count) * epochs] if epochs > 0 else []
    batches += [steps * trainer.accumulate_grad_batches] if steps > 0 else []
    return min(batches, default=interval) >= interval


def batches_taken(trainer: Any, count: int) -> int:
    """Return how many batches of an epoch a Trainer takes, of so many."""
    limit = trainer.limit_train_batches
    return min(count, limit) if isinstance(limit, int) else int(count * limit)


def training_remarks(
    trainer: Any, module: Any, source: Any, batch_size: int, own: int | None, accumulates: bool = True
) -> list[str]:
    """Return what a batch size changes in training beside memory, where it was another: texts for warnings.

    ``accumulates`` says that the Trainer's own accumulation stays.

    Source: pytorch_lightning/loops/training_epoch_loop.py (2.6.6), ``_should_accumulate``: the last batch of an epoch
    ends an accumulation.
    """
    if own is None or own == batch_size:
        return []
    counts = [batches_of_epoch(source, size, ranks_of(trainer)) for size in (own, batch_size)]
    if None in counts:
        return []
    before, after = (batches_taken(trainer, count) for count in counts if count is not None)
    remarks, parts = [], trainer.accumulate_grad_batches
    if accumulates and parts > after and -(-before // parts) > 1:
        remarks.append(
            f"accumulate_grad_batches={parts} is more than the {after} {'batch' if after == 1 else 'batches'} of an "
            f"epoch at batch size {batch_size}: the optimizer steps once an epoch, instead of {-(-before // parts)} "
            f"times with batches of {own}; lower accumulate_grad_batches, or pass max_batch_size or "
            "effective_batch_size"
        )
    if has_batch_norm(module) and leaves_one_sample(trainer, source, batch_size, own):
        remarks.append(
            f"the last batch of an epoch has one sample at batch size {batch_size}, and {type(module).__name__} has "
            "batch norm, which may refuse it: pass drop_last=True to the loader, or multiple_of or max_batch_size"
        )
    return remarks


def has_batch_norm(module: Any) -> bool:
    return any(isinstance(part, _BatchNorm) for part in module.modules())


def leaves_one_sample(trainer: Any, source: Any, batch_size: int, own: int | None) -> bool:
    """Return True if an epoch would have a last batch of one sample, and has none with the own size.

    Batch norm refuses one sample, a squeezed batch has another shape, and a ``collate_fn`` may leave the only one out.
    """
    if own in (None, batch_size):
        return False
    last, before = (last_batch(source, size, ranks_of(trainer)) for size in (batch_size, own))
    return last == 1 and before != 1


def ranks_of(trainer: Any) -> int:
    """Return among how many ranks the Trainer divides the samples of an epoch."""
    return int(trainer.world_size) if divides_samples(trainer) else 1


def find_holders(name: str, *owners: Any) -> tuple[Holder, ...]:
    """Find the attributes and hyperparameters of that name that are an int; with the default name there may be none.

    Raises:
        ApplyError: nothing has an attribute or hyperparameter of that name.
        TypeError: it is not an int, and was named.
    """
    found = holders_of(name, *owners)
    whole = tuple(holder for holder in found if type(holder.read()) is int)
    if found and not whole and name != DEFAULT_NAME:
        raise TypeError(f"{found[-1]} should be an int, the batch size, and is {found[-1].read()!r}")
    if not found and name != DEFAULT_NAME:
        owners_named = " or ".join(type(owner).__name__ for owner in owners if owner is not None)
        raise ApplyError(
            f"{owners_named} has no attribute or hyperparameter {name!r} to set: name the one that holds the batch "
            "size with batch_arg_name=..., leave it out to set the loaders alone, or pass apply=False"
        )
    return whole


def find_place(
    trainer: Any, source: Any, holders: tuple[Holder, ...], phase: Phase = "train", own: int | None = None
) -> Place:
    """Find the places that keep the batch size; ``own`` is the number of samples that a batch has, where it is known.

    Raises:
        ApplyError: the loaders have to be set themselves, and one of them cannot be; says what to change.
    """
    if not holders or not loaders_are_made(trainer, phase):
        check_resizable(source)
    elif unit_of(source) is None and own is not None:
        _check_followed(holders, own, trainer.world_size)
    return Place(holders, trainer, source, tuple(holder.read() for holder in holders), phase, own)


def _check_followed(holders: tuple[Holder, ...], own: int, ranks: int) -> None:
    """Raise ApplyError unless a holder has the size of the loaders' batches: of each rank, or of all of them."""
    if not any(holder.read() in (own, own * ranks) for holder in holders):
        raise ApplyError(
            f"{holders[-1]} is {holders[-1].read()}, and the loaders' batches have {own} samples: it does not hold "
            "their size. Name the attribute that does with batch_arg_name=..., or pass apply=False"
        )


@contextmanager
def write_together(
    sizes: Sequence[tuple[Place, int]],
    trainer: Any,
    accumulate_grad_batches: int | None = None,
    is_fatal: IsFatal = always,
    describe: Callable[[], object] = bool,
) -> Iterator[None]:
    """Write batch sizes and accumulation on all ranks, all of them or none: what fails inside the block undoes all.

    Accumulation is set where a batch size is, and where it is given. Every rank votes: where one cannot write or
    ``describe`` what it has written, all undo it.

    Raises:
        ApplyError: a holder or a loader cannot be set, or an epoch has too few batches of that size.
        PlanningFailedError: a rank has failed, for no reason that ``is_fatal``.
    """

    def write(undo: ExitStack) -> None:
        for place, size in sizes:
            place.write(size, undo)
        if sizes and accumulate_grad_batches is not None:
            undo.callback(setattr, trainer, "accumulate_grad_batches", trainer.accumulate_grad_batches)
            trainer.accumulate_grad_batches = accumulate_grad_batches
        describe()

    with ExitStack() as undo:
        on_each_rank(partial(write, undo), lambda _: RankResult(), is_fatal)
        yield
        undo.pop_all()
