"""Loaders of many kinds, trained on the null GPU in one process: prints a JSON object (see test_loaders_trained.py)."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import warnings
from collections import Counter, UserDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, get_worker_info

import lightning_memplan as mp

COUNT, WIDTH = 600, 64
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


class Rows(Dataset[torch.Tensor]):
    """Each row holds its own number."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.full((WIDTH,), float(index))


def rows_of(batch: Any) -> torch.Tensor:
    """Return the rows of a batch of any kind, before or after it was moved."""
    if isinstance(batch, torch.Tensor):
        return batch
    if dataclasses.is_dataclass(batch):
        return batch.x  # type: ignore[attr-defined, no-any-return]
    return rows_of(batch["x"] if hasattr(batch, "keys") else torch.stack(batch) if len(batch) > 3 else batch[0])


class Scheduled(pl.LightningDataModule):
    """Makes batches of 8 in the first two epochs, then of ``later``."""

    def __init__(self, later: int, held: bool) -> None:
        super().__init__()
        self.later = later
        if held:
            self.batch_size = 8

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        later = self.trainer.current_epoch > 1
        return DataLoader(Rows(), batch_size=self.later if later else getattr(self, "batch_size", 8))


class Net(pl.LightningModule):
    """Notes which rows it trained on, before they are moved to a GPU whose kernels do nothing."""

    def __init__(self, normalized: bool = False) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH) if normalized else nn.Identity())
        self.sizes: list[int] = []
        self.seen: Counter[int] = Counter()
        self.optimizer_steps = 0

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(self.trainer, pl.Trainer) and self.trainer.training:
            self.sizes.append(len(rows_of(batch)))
            self.seen.update(int(row[0]) for row in rows_of(batch))
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(rows_of(batch)).mean()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.optimizer_steps += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


# -- batches


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    names: list[str]
    label: Any = None


def in_record(samples: list[torch.Tensor]) -> Record:
    return Record(torch.stack(samples), ["a name"] * len(samples))


def in_user_dict(samples: list[torch.Tensor]) -> Any:
    return UserDict(x=torch.stack(samples), names=("a name",) * len(samples))


def with_arrays(samples: list[torch.Tensor]) -> Any:
    return {"x": torch.stack(samples), "ids": np.arange(len(samples)), "shape": np.array([3, 4]), "none": None}


def in_a_list(samples: list[torch.Tensor]) -> Any:
    return {"x": torch.stack(samples), "boxes": [{"box": torch.zeros(3, 4)} for _ in samples], "count": len(samples)}


def of_even_numbers(samples: list[torch.Tensor]) -> torch.Tensor:
    if len(samples) % 2:
        raise ValueError("pairs need an even number of samples")
    return torch.stack(samples)


# -- datasets and loaders


class AtOnce(Rows):
    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        return torch.tensor(indices, dtype=torch.float32)[:, None].expand(-1, WIDTH).contiguous()


class Bulk(AtOnce):
    def __getitem__(self, indices: Any) -> Any:
        return {"x": self.__getitems__(indices)}


class OpenedInWorkers(Rows):
    file: Any = None

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.file[index]  # type: ignore[no-any-return]


def open_file(worker: int) -> None:
    info: Any = get_worker_info()
    info.dataset.file = torch.arange(float(COUNT))[:, None].expand(-1, WIDTH)


class Shared(IterableDataset[torch.Tensor]):
    """A stream of known length, shared by its workers."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return (torch.full((WIDTH,), float(index)) for index in range(first, COUNT, step))

    def __len__(self) -> int:
        return COUNT


class Unsized(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return (torch.full((WIDTH,), float(index)) for index in range(COUNT))


class ItsOwnIterator(Shared):
    at = 0

    def __iter__(self) -> Any:
        self.at = 0
        return self

    def __next__(self) -> torch.Tensor:
        if self.at == COUNT:
            raise StopIteration
        self.at += 1
        return torch.full((WIDTH,), float(self.at - 1))


class Corrupt(Rows):
    def __getitem__(self, index: Any) -> torch.Tensor:
        if index == 0:
            raise OSError("sample 0 is corrupt")
        return super().__getitem__(index)


class Finishing(DataLoader[Any]):
    def __iter__(self) -> Any:
        return (batch["x"] for batch in super().__iter__())


class Iterable:
    """Batches of 50, begun anew by each epoch: no DataLoader."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (AtOnce().__getitems__(list(range(at, at + 50))) for at in range(0, COUNT, 50))


class Tens:
    """Lists of ten indices, whatever is asked for."""

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(at, at + 10)) for at in range(0, COUNT, 10))

    def __len__(self) -> int:
        return COUNT // 10


class Held(pl.LightningDataModule):
    """Has a batch size, of which its loader of ten knows nothing."""

    batch_size = 8

    def train_dataloader(self) -> Any:
        return DataLoader(Rows(), batch_sampler=Tens())  # type: ignore[arg-type]


class MadeInAHook(pl.LightningDataModule):
    """Makes a loader of a dataset that is its own iterator."""

    def train_dataloader(self) -> Any:
        return DataLoader(ItsOwnIterator(), batch_size=8)


def passed(loader: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    return lambda: {"train_dataloaders": loader()}


#: Loaders whose batch size is set
SET: dict[str, Callable[[], dict[str, Any]]] = {
    "a record": passed(lambda: DataLoader(Rows(), batch_size=8, collate_fn=in_record)),
    "a UserDict": passed(lambda: DataLoader(Rows(), batch_size=8, collate_fn=in_user_dict)),
    "arrays": passed(lambda: DataLoader(Rows(), batch_size=8, collate_fn=with_arrays)),
    "a list of boxes": passed(lambda: DataLoader(Rows(), batch_size=8, collate_fn=in_a_list)),
    "even numbers": passed(lambda: DataLoader(Rows(), batch_size=8, collate_fn=of_even_numbers)),
    "read at once": passed(lambda: DataLoader(AtOnce(), batch_size=8, collate_fn=lambda batch: batch)),
    "bulk reads": passed(lambda: DataLoader(Bulk(), sampler=BatchSampler(range(COUNT), 8, False), batch_size=None)),
    "opened in workers": passed(
        lambda: DataLoader(OpenedInWorkers(), batch_size=8, num_workers=1, worker_init_fn=open_file)
    ),
    "shared by workers": passed(lambda: DataLoader(Shared(), batch_size=8, num_workers=2)),
    "shared, dropping the last": passed(lambda: DataLoader(Shared(), batch_size=8, num_workers=2, drop_last=True)),
    "a stream without a length": passed(lambda: DataLoader(Unsized(), batch_size=8)),
    "a corrupt sample that is skipped": passed(lambda: DataLoader(Corrupt(), batch_size=8, sampler=range(1, COUNT))),
    "a loader that finishes the batch": passed(
        lambda: Finishing(Rows(), batch_size=8, collate_fn=lambda rows: {"x": torch.stack(rows)})
    ),
    "its own iterator": lambda: {"datamodule": MadeInAHook()},
}

#: Loaders whose batch size stays, and is said to
STAYS: dict[str, tuple[Callable[[], dict[str, Any]], int]] = {
    "an iterable": (passed(Iterable), 50),
    "a sampler of tens": (passed(lambda: DataLoader(Rows(), batch_sampler=Tens())), 10),  # type: ignore[arg-type]
    "a holder that does not hold it": (lambda: {"datamodule": Held()}, 10),
    "batches of the dataset": (passed(lambda: DataLoader([rows] * 30, batch_size=None)), 20),
    "an item that is a batch": (passed(lambda: DataLoader([rows] * 30, collate_fn=lambda samples: samples[0])), 1),
    "a stream that drops": (passed(lambda: DataLoader(Unsized(), batch_size=8, drop_last=True)), 8),
}
rows = torch.arange(20.0)[:, None].expand(-1, WIDTH).contiguous()


def scheduled(later: int, held: bool) -> dict[str, Any]:
    return {"datamodule": Scheduled(later, held)}


def fit(data: dict[str, Any], planner: mp.MemoryPlanner | None, **settings: Any) -> Net:
    net = Net(settings.pop("normalized", False))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        **{"accelerator": "gpu", "devices": 1, "max_epochs": 1, "enable_model_summary": False, **quiet, **settings},
        callbacks=[planner] if planner else [],
    )
    trainer.fit(net, **data)
    return net


def result(make: Callable[[], dict[str, Any]], apply: bool | None = None, **settings: Any) -> dict[str, Any]:
    """Train an epoch without the planner and one with it."""
    options = {name: settings.pop(name) for name in ("max_batch_size", "device") if name in settings}
    planner = mp.MemoryPlanner(apply=apply, **options)
    without = fit(make(), None, **settings)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        net = fit(make(), planner, **settings)
    plan = planner.plan
    return {
        "planned": None if plan is None else plan.batch_size,
        "confirmed": plan is not None and plan.confirmed is not None,
        "notes": [] if plan is None else list(plan.notes),
        "sizes": net.sizes,
        "own": without.sizes,
        "same": net.seen == without.seen,
        "predicted": len({m.predicted_allocated for m in planner.measurements}),
        "errors": max((abs(m.predicted_allocated / m.allocated - 1) for m in planner.measurements[2:]), default=0.0),
        "steps": [without.optimizer_steps, net.optimizer_steps],
        "said": [str(each.message) for each in said if str(each.message).startswith("MemoryPlanner")],
    }


def main() -> None:
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {name: result(make) for name, make in SET.items()}
    found |= {name: result(make) for name, (make, _) in STAYS.items()}
    plain = passed(lambda: DataLoader(Rows(), batch_size=8))
    found["accumulated"] = result(plain, accumulate_grad_batches=8)
    one_more = passed(lambda: DataLoader(torch.utils.data.Subset(Rows(), range(577)), batch_size=5, shuffle=True))
    found["a last sample"] = result(one_more, normalized=True, max_batch_size=64)
    found["for information"] = result(SET["a UserDict"], apply=False)
    found["for information, joined"] = result(
        passed(lambda: DataLoader(Rows(), batch_size=8, collate_fn=lambda samples: torch.cat(samples).view(-1, WIDTH))),
        apply=False,
    )
    reloads = {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3}
    for held in (False, True):
        found[f"later batches of 12, {held}"] = result(partial(scheduled, 12, held), max_batch_size=60, **reloads)
    found["for a larger GPU"] = result(plain, device="RTX 3090")
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
