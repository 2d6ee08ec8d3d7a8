"""Datamodules, and loaders that hooks make."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.robustness.job import WIDTH, Bare, Net, Rows, Training, job, loader

DATAMODULES = "datamodules with state"
MADE = "loaders that hooks make"


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return DataLoader(Rows(), batch_size=self.batch_size)


def module_of(kind: Any, samples: Any = "same", **training: Any) -> None:
    """Register a datamodule's class as the job of its name."""
    name = "".join(f"_{c.lower()}" if c.isupper() else c for c in kind.__name__).lstrip("_")
    job(DATAMODULES, samples, name=name)(lambda: Training(Bare(), kind(), **training))


class PreparesOnce(Data):
    """Downloads once, and refuses to do it twice."""

    def prepare_data(self) -> None:
        Path("data").mkdir()

    def setup(self, stage: str) -> None:
        self.rows = Rows()

    def train_dataloader(self) -> Any:
        return DataLoader(self.rows, batch_size=self.batch_size)


class SplitsInSetup(Data):
    def setup(self, stage: str) -> None:
        self.train, self.val = torch.utils.data.random_split(Rows(30), [24, 6])

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)


class CountsItsLoaders(Data):
    made = 0

    def train_dataloader(self) -> Any:
        self.made += 1
        assert self.made <= 2, "made for the plan, and for training"
        return super().train_dataloader()


class LoaderMadeOnce(Data):
    """Keeps the loader that it made, of the size that it then had."""

    kept: Any = None

    def train_dataloader(self) -> Any:
        self.kept = self.kept or super().train_dataloader()
        return self.kept


class HasLocks(Data):
    def __init__(self) -> None:
        super().__init__()
        self.lock, self.file = threading.Lock(), open("rows.txt", "w+")  # noqa: SIM115 - as datamodules do

    def train_dataloader(self) -> Any:
        with self.lock:
            return super().train_dataloader()


class DividesTheBatch(Data):
    """The size is for all devices together."""

    def train_dataloader(self) -> Any:
        return DataLoader(Rows(), batch_size=self.batch_size // self.trainer.world_size)


class OneSizeForEach(Data):
    train_batch_size, val_batch_size = 4, 8

    def train_dataloader(self) -> Any:
        return DataLoader(Rows(), batch_size=self.train_batch_size)


class DoublesInside(Data):
    def train_dataloader(self) -> Any:
        return DataLoader(Rows(), batch_size=2 * self.batch_size)


class FixedInside(Data):
    def train_dataloader(self) -> Any:
        return DataLoader(Rows(), batch_size=4)


class Transfers(Data):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch * 2

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        assert batch.is_cuda
        return batch / 2


class NewEveryEpoch(Data):
    """Another subset each epoch."""

    def train_dataloader(self) -> Any:
        rows = Rows(16 if self.trainer.current_epoch == 0 else 24)
        return DataLoader(rows, batch_size=self.batch_size)


class SavesState(Data):
    def state_dict(self) -> Any:
        return {"position": 1}

    def load_state_dict(self, state: Any) -> None:
        self.position = state["position"]


class SeveralLoaders(Data):
    def train_dataloader(self) -> Any:
        return {"a": super().train_dataloader(), "b": super().train_dataloader()}

    def val_dataloader(self) -> Any:
        return [super().train_dataloader(), super().train_dataloader()]


class HyperParameters(pl.LightningDataModule):
    def __init__(self, batch_size: int = 4, num_workers: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return DataLoader(Rows(), self.hparams.batch_size, num_workers=self.hparams.num_workers)


class ReadOnlySize(Data):
    def __init__(self) -> None:
        pl.LightningDataModule.__init__(self)

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        return 4


class OwnValidationSize(Data):
    def val_dataloader(self) -> Any:
        return DataLoader(Rows(8), batch_size=self.batch_size)


for _kind in (
    PreparesOnce,
    SplitsInSetup,
    CountsItsLoaders,
    LoaderMadeOnce,
    HasLocks,
    DividesTheBatch,
    OneSizeForEach,
    DoublesInside,
    FixedInside,
    Transfers,
    SavesState,
    HyperParameters,
    ReadOnlySize,
    OwnValidationSize,
):
    module_of(_kind)
module_of(NewEveryEpoch, settings={"reload_dataloaders_every_n_epochs": 1})


@job(DATAMODULES, "any")
def loaders_by_name_of_a_datamodule() -> Any:
    class Both(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch["a"]).mean() + self(batch["b"]).mean()

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            self.log("val", self(batch).mean())

    return Training(Both(), SeveralLoaders())


@job(DATAMODULES)
def datamodule_from_datasets() -> Any:
    return Training(Bare(), pl.LightningDataModule.from_datasets(Rows(), batch_size=4))


# ---------------------------------------------------------------------------------------------------------- made


@job(MADE)
def loader_is_kept_on_the_module() -> Any:
    class Keeps(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.loader = loader(shuffle=True)

        def train_dataloader(self) -> Any:
            return self.loader

    return Keeps()


@job(MADE)
def data_is_kept_on_the_module() -> Any:
    class Keeps(Net):
        def __init__(self) -> None:
            super().__init__()
            self.rows = torch.ones(24, WIDTH)

        def train_dataloader(self) -> Any:
            return DataLoader(self.rows, batch_size=self.batch_size)

    return Keeps()


@job(MADE)
def dataset_can_be_read_once() -> Any:
    """Each row may be read as often as training reads it, in two epochs, and once more for the plan."""

    class Metered(Rows):
        reads = 0

        def __getitem__(self, index: int) -> Any:
            Metered.reads += 1
            return super().__getitem__(index)

    return Training(Bare(), loader(Metered()))


@job(MADE)
def dataset_asserts_its_order() -> Any:
    class Ordered(Rows):
        """Sequential storage: rows come in order, epoch after epoch."""

        def __init__(self) -> None:
            super().__init__()
            self.expected = itertools.cycle(range(24))

        def __getitem__(self, index: int) -> Any:
            expected = next(self.expected)
            assert index == expected, f"row {index} is read where {expected} is next"
            return super().__getitem__(index)

    return Training(Bare(), loader(Ordered()))


@job(MADE)
def dataset_with_a_lock_and_a_cache() -> Any:
    class Locked(Rows):
        def __init__(self) -> None:
            super().__init__()
            self.lock, self.cache = threading.Lock(), {}

        def __getitem__(self, index: int) -> Any:
            with self.lock:
                return self.cache.setdefault(index, super().__getitem__(index))

    return Training(Bare(), loader(Locked()))


@job(MADE)
def dataset_on_the_gpu() -> Any:
    class OnGpu(Rows):
        def __init__(self) -> None:
            super().__init__()
            self.rows = torch.ones(24, WIDTH, device="cuda")

        def __getitem__(self, index: int) -> Any:
            return self.rows[index]

    return Training(Bare(), loader(OnGpu()))


@job(MADE)
def samples_fail_at_times() -> Any:
    """A broken file is replaced by another one, as robust datasets do."""

    class Broken(Rows):
        def __getitem__(self, index: int) -> Any:
            try:
                if index % 5 == 0:
                    raise OSError("a broken file")
            except OSError:
                return self[(index + 1) % 24]
            return super().__getitem__(index)

    return Training(Bare(), loader(Broken()))


@job(MADE)
def first_sample_is_broken() -> Any:
    class Broken(Rows):
        def __getitem__(self, index: int) -> Any:
            if index == 0:
                raise OSError("a broken file")
            return super().__getitem__(index)

    return Training(Bare(), loader(Broken(), sampler=range(1, 24)))


@job(MADE)
def loader_needs_the_epoch() -> Any:
    class Needs(Net):
        def train_dataloader(self) -> Any:
            assert self.trainer.current_epoch in (0, 1)
            return DataLoader(Rows(), batch_size=self.batch_size)

    return Training(Needs(), settings={"reload_dataloaders_every_n_epochs": 1})


@job(MADE)
def loader_made_from_hyperparameters() -> Any:
    class Hyper(Bare):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return DataLoader(Rows(), batch_size=self.hparams.data["batch_size"])

    return Hyper(data={"batch_size": 4})


@job(MADE)
def validation_of_larger_samples() -> Any:
    class Larger(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("val", self(batch.view(-1, WIDTH)).mean())

        def val_dataloader(self) -> Any:
            return DataLoader(Rows(10, WIDTH * 8), batch_size=self.batch_size)

    return Larger()


@job(MADE)
def empty_validation() -> Any:
    class Empty(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("there is nothing to validate")

        def val_dataloader(self) -> Any:
            return []

    return Empty()


@job(MADE)
def train_and_validation_are_one_loader() -> Any:
    class Same(Bare):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("val", self(batch).mean())

    both = loader()
    return Training(Same(), both, both)


@job(MADE)
def items_made_by_a_generator_of_the_dataset() -> Any:
    class Draws(Dataset):
        def __init__(self) -> None:
            self.rows = (torch.ones(WIDTH) for _ in range(48))

        def __len__(self) -> int:
            return 24

        def __getitem__(self, index: int) -> Any:
            return next(self.rows)

    return Training(Bare(), loader(Draws()))
