"""The Trainer of a replica answers as the real one would in training, and nothing real is changed through it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_memplan.step.module_copy import replicate
from lightning_memplan.step.stand_ins import StandInTrainer

CPU = torch.device("cpu")


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Rows(pl.LightningDataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return DataLoader(torch.zeros(6, 2), batch_size=3)


def loader(samples: int = 20, batch_size: int = 4) -> Any:
    return DataLoader(torch.zeros(samples, 2), batch_size=batch_size)  # type: ignore[arg-type]


def trainer(tmp_path, **settings: Any) -> pl.Trainer:
    made = pl.Trainer(accelerator="cpu", logger=CSVLogger(tmp_path), enable_progress_bar=False, **settings)
    made._data_connector.attach_data(Net(), datamodule=Rows())
    made.strategy.connect(Net())
    return made


def replica_in(real: pl.Trainer, loaders: Any = None) -> tuple[Any, Any]:
    module = Net()
    module._trainer = real
    replica: Any = replicate(module, {}, trainer=StandInTrainer(real, loaders), device=CPU)
    return replica, replica.trainer


def test_the_model_is_the_replica_by_every_name(tmp_path):
    replica, stand_in = replica_in(trainer(tmp_path))
    assert stand_in.model is replica
    assert stand_in.lightning_module is replica
    assert stand_in.strategy.model is replica
    assert stand_in.strategy.lightning_module is replica


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_epochs": 100}, 500),  # 20 rows in batches of 4: 5 batches an epoch
        ({"max_epochs": 100, "accumulate_grad_batches": 2}, 300),  # ceil(5 / 2) = 3 steps an epoch
        ({"max_epochs": 100, "limit_train_batches": 2}, 200),
        ({"max_epochs": 100, "limit_train_batches": 0.4}, 200),  # int(5 * 0.4) = 2
        ({"max_epochs": 100, "max_steps": 150}, 150),
        ({"max_epochs": -1, "max_steps": 150}, 150),
        ({"max_epochs": -1}, math.inf),
        ({"max_epochs": 1}, 100),  # a schedule of 5 steps would end while planning tries more
    ],
)
def test_schedules_have_the_steps_that_training_will_have(tmp_path, settings, steps):
    _, stand_in = replica_in(trainer(tmp_path, **settings), loader())
    stand_in.train_batches_of(4)
    assert stand_in.estimated_stepping_batches == steps


def test_loaders_have_the_batch_size_that_is_traced(tmp_path):
    _, stand_in = replica_in(trainer(tmp_path), loader())
    stand_in.train_batches_of(10)
    assert stand_in.train_dataloader.batch_size == 10
    assert len(stand_in.train_dataloader) == stand_in.num_training_batches == 2  # 20 rows
    assert [len(batch) for batch in stand_in.val_dataloaders] == [3, 3]
    assert stand_in.num_val_batches == [2]  # 6 rows


def test_a_loader_without_a_length_has_many_batches(tmp_path):
    _, stand_in = replica_in(trainer(tmp_path), iter([]))
    assert stand_in.num_training_batches == 1000


def test_what_is_read_of_a_trainer_is_there(tmp_path):
    real = trainer(tmp_path, max_epochs=3)
    _, stand_in = replica_in(real, loader())
    assert (stand_in.max_epochs, stand_in.current_epoch, stand_in.global_step) == (3, 0, 0)
    assert stand_in.precision == real.precision
    assert [type(each) for each in stand_in.callbacks] == [type(each) for each in real.callbacks]
    assert str(stand_in.log_dir).startswith(str(tmp_path))
    assert stand_in.logger.save_dir == str(tmp_path)
    assert (stand_in.logger.name, stand_in.logger.version) == (real.logger.name, real.logger.version)
    stand_in.logger.experiment.add_image("nothing", None)  # kept nowhere
    stand_in.fit_loop.setup_data()  # builds no loader
    assert stand_in.fit_loop.max_batches == 5
    assert real.fit_loop._combined_loader is None


def test_nothing_that_is_set_reaches_the_real_one(tmp_path):
    real = trainer(tmp_path)
    _, stand_in = replica_in(real)
    stand_in.should_stop = True
    stand_in.datamodule.batch_size = 7
    stand_in.datamodule.hparams.batch_size = 7
    stand_in.callback_metrics["loss"] = 1
    assert real.should_stop is False
    assert (real.datamodule.batch_size, real.datamodule.hparams.batch_size) == (4, 4)
    assert dict(real.callback_metrics) == {}


def test_a_copy_of_a_replica_has_a_trainer_of_its_own(tmp_path):
    replica, first = replica_in(trainer(tmp_path), loader())
    replica.kept = replica.trainer
    other: Any = replicate(replica, {}, trainer=first, device=CPU)
    assert other.trainer is not first
    assert other.kept is other.trainer
    assert other.trainer.model is other
    other.trainer.global_step = 5
    other.trainer.datamodule.batch_size = 9
    assert (first.global_step, first.datamodule.batch_size) == (0, 4)


def test_what_no_trainer_has_is_an_attribute_error():
    stand_in = StandInTrainer()
    assert stand_in.global_step == 0
    with pytest.raises(AttributeError, match="the trainer has no 'precision' before training has begun"):
        _ = stand_in.precision
