"""The callback in whole fits: on the CPU what it reads, writes and leaves alone; on the null GPU its figures."""

from __future__ import annotations

import copy
import csv
import dataclasses
import gc
import inspect
import json
import multiprocessing
import random
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_memplan as mp
from lightning_memplan.lightning.trainer import averaging_bytes, batches_into_epoch, check_accumulation
from lightning_memplan.planning import predict
from lightning_memplan.trace import tracer
from tests.paths import PROGRAMS

GiB = 2**30
CARD = mp.Device("a card", total=8 * GiB)
CPU_MEASURES_NOTHING = "MemoryPlanner measures nothing: the Trainer runs on cpu"


def trainer(*callbacks: Any, flavour: Any = pl, **kwargs: Any) -> Any:
    settings = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return flavour.Trainer(callbacks=list(callbacks), **{**settings, **kwargs})


def fit(module: Any, data: Any = None, planner: mp.MemoryPlanner | None = None, *others: Any, **kwargs: Any) -> Any:
    """Fit on the CPU, with a plan for at most 7 samples a batch if nothing else is said; the Trainer."""
    planner = planner or planner_of()
    whole = trainer(planner, *others, **kwargs)
    made = isinstance(data, pl.LightningDataModule)
    with pytest.warns(UserWarning, match=CPU_MEASURES_NOTHING):
        whole.fit(module, **{"datamodule" if made else "train_dataloaders": data})
    assert planner.plan is not None
    return whole


def planner_of(**kwargs: Any) -> mp.MemoryPlanner:
    return mp.MemoryPlanner(
        **{"apply": True, "on_error": "raise", "device": CARD, "max_batch_size": 7, "method": "trace", **kwargs}
    )


def samples(count: int = 21) -> TensorDataset:
    return TensorDataset(torch.randn(count, 8), torch.randint(0, 3, (count,)))


class Net(pl.LightningModule):
    """The least that trains; ``seen`` are the sizes of the batches that real steps were given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.seen: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.seen.append(len(x))
        return F.cross_entropy(self.layer(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Data(pl.LightningDataModule):
    def __init__(self, dataset: Any = None, batch_size: Any = 2) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.dataset = samples() if dataset is None else dataset

    def train_dataloader(self) -> Any:
        return DataLoader(self.dataset, batch_size=self.batch_size)


# ---------------------------------------------------------------------------------------- what must stay as it was


class Generated(Dataset[Any]):
    """A dataset that remembers what was asked of it, and draws from its own random states and the global ones."""

    def __init__(self) -> None:
        self.served = 0
        self.cache: dict[int, float] = {}
        self.order: list[int] = []
        self.own = random.Random(1)
        self.drawn = np.random.default_rng(1)

    def __len__(self) -> int:
        return 21

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.served += 1
        self.order.append(index)
        self.cache[index] = self.own.random() + self.drawn.random() + random.random() + np.random.rand()
        return torch.randn(3, 8, 8) * self.cache[index], index % 3


class Everything(pl.LightningModule):
    """One of each: what a step reads, changes, counts and keeps."""

    def __init__(self, lr: float = 0.1, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Dropout(0.5), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)
        )
        self.net(torch.zeros(2, 3, 8, 8))
        self.frozen = nn.BatchNorm2d(3).eval().requires_grad_(False)
        self.average = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("scratch", torch.arange(3.0), persistent=False)
        self.accuracy = MulticlassAccuracy(num_classes=3)
        self.table = torch.randn(3, 3)
        self.tables = {"a": [torch.randn(2)], "b": np.arange(4)}
        self.net[0].weight.grad = torch.ones_like(self.net[0].weight)
        self.count, self.kept, self.own = 0, [], random.Random(3)
        self.calls: list[str] = []
        self.handle = self.net[1].register_forward_hook(lambda module, args, out: self.calls.append("hook"))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        out = self.net(self.frozen(x)) + self.table.to(x.device).sum()
        loss = F.cross_entropy(out, y)
        self.accuracy(out, y)
        self.log("accuracy", self.accuracy)
        self.seen += 1
        self.count += 1
        self.table = self.table + 1
        self.kept.append(self.own.random())
        with torch.no_grad():
            for mean, parameter in zip(self.average.parameters(), self.net.parameters(), strict=True):
                mean.lerp_(parameter, 0.1)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.count += 10

    def configure_optimizers(self) -> Any:
        self.count += 100
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.hparams["lr"])


class GeneratedData(pl.LightningDataModule):
    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size, self.loaders_made = batch_size, 0
        self.kept: list[int] = []

    def setup(self, stage: str) -> None:
        self.dataset = Generated()

    def train_dataloader(self) -> DataLoader[Any]:
        self.loaders_made += 1
        torch.rand(1)  # a random split, say
        return DataLoader(self.dataset, batch_size=self.batch_size, shuffle=True, num_workers=0)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.moved = getattr(self, "moved", 0) + 1
        return batch


def frozen_state(module: pl.LightningModule, data: Any) -> dict[str, Any]:
    """Everything that planning must leave as it is, by value and, where it is an object of the user's, by identity."""
    return {
        "parameters": {n: (id(p), p.detach().clone(), p.requires_grad) for n, p in module.named_parameters()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()},
        "buffers": {n: (id(b), b.clone()) for n, b in module.named_buffers()},
        "modes": {n: m.training for n, m in module.named_modules()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in module.named_modules()},
        "random": (random.getstate(), np.random.get_state(), torch.get_rng_state().clone()),
        "own": {n: copy.deepcopy(getattr(module, n)) for n in ("table", "tables", "count", "kept", "calls")},
        "generator": module.own.getstate(),
        "metric": {n: getattr(module.accuracy, n).clone() for n in module.accuracy._defaults},
        "updates": module.accuracy.update_count,
        "hparams": dict(module.hparams),
        "attributes": sorted(module.__dict__),
        "data": {n: copy.deepcopy(v) for n, v in data.__dict__.items() if n in ("kept", "loaders_made", "moved")},
        "dataset": {n: copy.deepcopy(v) for n, v in data.dataset.__dict__.items() if n not in ("own", "drawn")},
        "dataset's states": (data.dataset.own.getstate(), data.dataset.drawn.bit_generator.state),
        "torch": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
        "collects": gc.isenabled(),
    }


def assert_same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{k}]")
    else:
        assert a == b, where


class Watched(mp.MemoryPlanner):
    """Keeps the state of everything just before and just after it plans."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.before = frozen_state(pl_module, trainer.datamodule)
        children, folder = multiprocessing.active_children(), sorted(Path.cwd().rglob("*"))
        super().setup(trainer, pl_module, stage)
        self.after = frozen_state(pl_module, trainer.datamodule)
        assert multiprocessing.active_children() == children
        assert sorted(Path.cwd().rglob("*")) == folder


@pytest.mark.filterwarnings("ignore:Found . module.s. in eval mode")  # it is meant
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
@pytest.mark.parametrize("method", ["trace", "formula"])
def test_planning_changes_nothing_but_the_batch_size(method, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    module, data = Everything(), GeneratedData()
    module.net[2].eval()
    planner = Watched(device=CARD, method=method, apply=True)
    fit(module, data, planner, limit_train_batches=1, **settings)
    assert planner.plan.method == method
    assert_same(planner.before, planner.after)
    assert (data.batch_size, data.hparams["batch_size"]) == (21, 21)  # the dataset's length


def test_training_runs_as_it_would_have_without_the_callback():
    """The same weights, bit for bit, after an epoch at the same batch size."""

    def trained(*callbacks: Any) -> dict[str, torch.Tensor]:
        pl.seed_everything(7, verbose=False)
        module, data = Everything(), GeneratedData(batch_size=7)
        whole = trainer(*callbacks)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", CPU_MEASURES_NOTHING)
            warnings.filterwarnings("ignore", "Found . module.s. in eval mode")
            whole.fit(module, data)
        assert whole.global_step == 3  # 21 samples, 7 at a time
        return dict(module.state_dict())

    assert_same(trained(planner_of()), trained())


def test_nothing_is_left_of_a_plan_that_fails():
    class Reads(Everything):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            return batch[0][batch[1] > 0].sum()

    module, data = Reads(), GeneratedData()
    data.setup("fit")
    before = frozen_state(module, data)
    data.setup = lambda stage: None
    whole = trainer(planner_of())
    with pytest.raises(mp.TraceError):
        whole.fit(module, data)
    after = frozen_state(module, data)
    assert_same({**before, "attributes": 0}, {**after, "attributes": 0})  # Lightning's own are not ours
    assert data.batch_size == 2


# ------------------------------------------------------------------------------------------------------- bad input


def test_nothing_holds_the_batch_size_that_is_named():
    class Bare(pl.LightningDataModule):
        def train_dataloader(self):
            raise AssertionError("the loader is not made before the attribute is looked for")

    with pytest.raises(mp.ApplyError, match=r"Net or Bare has no attribute or hyperparameter 'bs' to set: .*"):
        trainer(planner_of(batch_arg_name="bs")).fit(Net(), datamodule=Bare())


def test_the_attribute_has_another_name():
    class Named(Data):
        def __init__(self):
            super().__init__()
            del self.batch_size
            self.per_gpu = 2

        def train_dataloader(self):
            return DataLoader(self.dataset, batch_size=self.per_gpu)

    module = Net()
    fit(module, Named(), planner_of(batch_arg_name="per_gpu"))
    assert module.seen == [7, 7, 7]


def test_a_named_batch_size_that_is_no_int():
    data = Data()
    data.per_gpu = "32"
    with pytest.raises(TypeError, match=r"Data\.per_gpu should be an int, the batch size, and is '32'"):
        trainer(planner_of(batch_arg_name="per_gpu")).fit(Net(), datamodule=data)


@pytest.mark.parametrize("value", [None, "auto", {"train": 4}])
def test_a_batch_size_of_another_kind_is_no_holder(value):
    class Otherwise(Data):
        def train_dataloader(self):
            return DataLoader(self.dataset, batch_size=2)

    module = Net()
    module.batch_size = value
    fit(module, Otherwise(batch_size=value), planner_of())
    assert (module.seen, module.batch_size) == ([7, 7, 7], value)


def test_an_empty_dataset():
    with pytest.raises(ValueError, match="the dataset has length 0: there is nothing to plan a batch size for"):
        trainer(planner_of()).fit(Net(), datamodule=Data(samples(0)))


@pytest.mark.parametrize("margin", [-0.1, 1, 1.5, "0.1", True, float("nan")])
def test_a_margin_that_is_no_part(margin):
    with pytest.raises(
        ValueError, match=r"margin is the part of the device's memory to leave free, at least 0 and below"
    ):
        mp.MemoryPlanner(margin=margin)


@pytest.mark.parametrize(
    "name", ["min_batch_size", "max_batch_size", "multiple_of", "every_n_steps", "effective_batch_size"]
)
@pytest.mark.parametrize("value", [0, -1, 2.0, "4", True])
def test_counts_that_are_none(name, value):
    with pytest.raises(ValueError, match=f"{name} is an int of at least 1, not {value!r}"):
        mp.MemoryPlanner(**{name: value})


def test_an_unknown_method():
    with pytest.raises(ValueError, match=r"method is one of 'auto', 'trace', 'formula', .*not 'guess'"):
        mp.MemoryPlanner(method="guess")


def test_an_unknown_card_names_the_near_ones():
    with pytest.raises(ValueError, match=r"'RTX 3091' is not in the catalogue of GPUs: near are .*'RTX 3090'"):
        mp.MemoryPlanner(device="RTX 3091")
    with pytest.raises(TypeError, match=r"device is the name of a GPU or a Device, not 3090"):
        mp.MemoryPlanner(device=3090)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"min_batch_size": 8, "max_batch_size": 4}, r"no batch size is at least 8 and at most 4"),
        ({"min_batch_size": 22}, r"no batch size is at least 22, at most 21 \(dataset\) and a multiple of 1"),
        ({"multiple_of": 8, "max_batch_size": 7}, r"no batch size from 1 to 7 is a multiple of 8"),
        ({"multiple_of": 8, "min_batch_size": 17}, r"at most 21 \(dataset\) and a multiple of 8"),
    ],
)
def test_limits_that_leave_no_size(limits, message):
    data = Data()
    with pytest.raises(ValueError, match=message):
        trainer(mp.MemoryPlanner(device=CARD, apply=True, on_error="raise", **limits)).fit(Net(), datamodule=data)
    assert data.batch_size == 2


def test_it_does_not_fit():
    # a weight of 4 · 1024 · 262144 bytes = 1 GiB, its gradient, and AdamW's two moments: 4 GiB, on a card of 2 GiB
    class Wide(Net):
        def __init__(self):
            super().__init__()
            self.wide = nn.Linear(1024, 1, bias=False)
            self.wide.weight = nn.Parameter(torch.empty(2**18, 1024))  # never written to, so it takes no memory

        def training_step(self, batch, batch_idx):
            return self.wide(batch[0].repeat(1, 128)).sum() + super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    data = Data()
    small = mp.Device("a small card", total=2 * GiB)
    with pytest.raises(
        mp.DoesNotFitError, match="Wide does not fit on a small card at batch size 1: it lacks "
    ) as caught:
        trainer(mp.MemoryPlanner(device=small, margin=0, apply=True, on_error="raise")).fit(Wide(), datamodule=data)
    assert caught.value.available == 2 * GiB
    assert 4 * GiB <= caught.value.needed < 6 * GiB
    assert data.batch_size == 2


class ReadsAnInt(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if self.layer(batch[0]).argmax().item() > 0 else 2 * loss  # reads an int


class Selects(Net):
    def training_step(self, batch, batch_idx):
        out = self.layer(batch[0])
        return out[batch[1] > 0].sum()


class Finds(Net):
    def training_step(self, batch, batch_idx):
        out = self.layer(batch[0])
        return out[torch.nonzero(batch[1])].sum()


@pytest.mark.filterwarnings("ignore:MemoryPlanner measures nothing")
@pytest.mark.parametrize("kind", [Selects, Finds])
def test_a_step_that_selects_by_values_is_planned_as_if_all_were_selected(kind):
    planner = planner_of()
    trainer(planner).fit(kind(), datamodule=Data())
    assert planner.plan.method == "trace"
    assert any("as if all were selected" in note for note in planner.plan.notes)


def test_a_step_that_needs_values_is_named_by_its_line():
    lines = Path(__file__).read_text().splitlines()
    line = next(k for k, text in enumerate(lines, 1) if text.endswith("  # reads an int"))
    with pytest.raises(mp.TraceError, match="ReadsAnInt cannot be traced: the step needs the value of a tensor") as e:
        trainer(planner_of()).fit(ReadsAnInt(), datamodule=Data())
    assert f"{__file__}:{line}: " in str(e.value)


def test_such_a_step_is_planned_by_the_formula_with_one_warning():
    module, planner = ReadsAnInt(), planner_of(method="auto")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(planner).fit(module, datamodule=Data())
    ours = [str(w.message) for w in caught if "MemoryPlanner" in str(w.message)]
    assert len(ours) == 2, ours  # this one, and that nothing is measured
    assert ours[0].startswith("MemoryPlanner: planned by the formula, since the step cannot be traced: ")
    assert "reads an int" in ours[0]  # the line itself is quoted
    assert planner.plan.method == "formula"
    assert planner.plan.batch_size == 7


@pytest.mark.parametrize("read", [lambda loss: loss.item() > 0, lambda loss: bool(torch.isnan(loss).any())])
def test_reading_a_float_or_a_bool_is_no_obstacle_and_noted(read):
    class Reads(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return 2 * loss if read(loss) else loss

    planner = planner_of()
    fit(Reads(), Data(), planner)
    assert planner.plan.method == "trace"
    assert any("the step reads values of tensors" in note for note in planner.plan.notes)


def test_there_is_no_card_to_confirm_on():
    data = Data()
    with pytest.raises(MisconfigurationException, match=r"confirm=True runs real steps on a CUDA device, .* on cpu"):
        trainer(planner_of(confirm=True)).fit(Net(), data)
    assert data.batch_size == 2


def test_a_trainer_without_cuda_measures_nothing():
    planner = planner_of()
    fit(Net(), Data(), planner)
    assert planner.measurements == []


def test_fast_dev_run_plans_nothing_and_says_so(capsys, caplog):
    module, data, planner = Net(), Data(), planner_of()
    with caplog.at_level("INFO", logger="pytorch_lightning.utilities.rank_zero"):
        trainer(planner, fast_dev_run=True).fit(module, datamodule=data)
    assert planner.plan is None
    assert (data.batch_size, module.seen) == (2, [2])
    assert "MemoryPlanner is disabled when fast_dev_run is set" in caplog.text + capsys.readouterr().err


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_other_verbs_plan_nothing(verb):
    class Evaluates(Net):
        def validation_step(self, batch, batch_idx):
            return self.layer(batch[0]).sum()

        test_step = predict_step = validation_step

    planner = planner_of()
    getattr(trainer(planner), verb)(Evaluates(), DataLoader(samples(), batch_size=2))
    assert planner.plan is None


# ------------------------------------------------------------------------------------------------ Lightning's variety


def test_a_module_with_its_own_loader():
    class Own(Net):
        def __init__(self):
            super().__init__()
            self.batch_size = 2

        def train_dataloader(self):
            return DataLoader(samples(), batch_size=self.batch_size)

    module = Own()
    fit(module)
    assert (module.batch_size, module.seen) == (7, [7, 7, 7])


def test_a_module_that_makes_its_dataset_in_setup():
    class Own(Net):
        def __init__(self, batch_size=2):
            super().__init__()
            self.save_hyperparameters()

        def setup(self, stage):
            self.dataset = samples()

        def train_dataloader(self):
            return DataLoader(self.dataset, batch_size=self.hparams.batch_size)

    module = Own()
    fit(module)
    assert (module.hparams.batch_size, module.seen) == (7, [7, 7, 7])


def test_hyperparameters_alone_hold_it():
    class Data2(pl.LightningDataModule):
        def __init__(self, batch_size=2, workers=0):
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self):
            return DataLoader(samples(), self.hparams.batch_size, num_workers=self.hparams.workers)

    module, data = Net(), Data2()
    fit(module, data)
    assert (dict(data.hparams), module.seen) == ({"batch_size": 7, "workers": 0}, [7, 7, 7])


def test_loaders_passed_to_fit_are_planned_for_but_not_changed():
    module, planner = Net(), planner_of(apply=False)
    loader = DataLoader(samples(), batch_size=3)
    fit(module, loader, planner)
    assert (planner.plan.batch_size, loader.batch_size, module.seen) == (7, 3, [3] * 7)


class Combined(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx) + self.layer(batch["b"]).sum()


@pytest.mark.parametrize("kind", [dict, CombinedLoader])
def test_two_loaders_at_once(kind):
    loaders = {"a": DataLoader(samples(), batch_size=2), "b": DataLoader(torch.zeros(12, 8), batch_size=2)}
    module, planner = Combined(), planner_of(apply=False, max_batch_size=None)
    fit(module, kind(loaders), planner)
    assert (planner.plan.batch_size, planner.plan.limited_by) == (12, "dataset")  # the smaller of 21 and 12


def scheduler(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


FORMS = {
    "optimizer": sgd,
    "list": lambda m: [sgd(m)],
    "tuple of lists": lambda m: ((o := sgd(m)), ([o], [scheduler(o)]))[1],
    "dict": lambda m: {"optimizer": (o := sgd(m)), "lr_scheduler": scheduler(o)},
    "dict with a config": lambda m: {
        "optimizer": (o := sgd(m)),
        "lr_scheduler": {"scheduler": scheduler(o), "interval": "step"},
    },
    "None": lambda m: None,
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_configure_optimizers(form):
    class Formed(Net):
        def configure_optimizers(self):
            return FORMS[form](self)

    module, planner = Formed(), planner_of()
    if form == "None":
        with pytest.warns(UserWarning, match="returned `None`, this fit will run with no optimizer"):
            fit(module, Data(), planner)
    else:
        fit(module, Data(), planner)
    assert module.seen == [7, 7, 7]


def test_a_scheduler_over_all_steps_is_made_for_the_planned_size():
    class OneCycle(Net):
        def configure_optimizers(self):
            optimizer = sgd(self)
            total = self.trainer.estimated_stepping_batches
            self.cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1, total_steps=total)
            return [optimizer], [{"scheduler": self.cycle, "interval": "step"}]

    module = OneCycle()
    whole = fit(module, Data(), max_epochs=2)
    # 21 samples, 7 at a time, twice: 6 steps; at the size of before there would have been 22
    assert (whole.global_step, module.cycle.total_steps, module.cycle.last_epoch) == (6, 6, 6)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_epochs": 3}, 9),
        ({"max_steps": 5, "max_epochs": None}, 5),
        ({"limit_train_batches": 2}, 2),
        ({"limit_train_batches": 0.67}, 2),
        ({"overfit_batches": 1}, 1),
        ({"accumulate_grad_batches": 2}, 2),
        ({"effective_batch_size": 14}, 2),
        ({"max_epochs": 4, "accumulate_grad_batches": 3}, 4),
        ({"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1}, 6),
    ],
    ids=str,
)
def test_a_schedule_runs_to_its_end_and_no_further(settings, steps):
    class OneCycle(Net):
        def configure_optimizers(self):
            optimizer, total = sgd(self), self.trainer.estimated_stepping_batches
            self.cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1, total_steps=total)
            return [optimizer], [{"scheduler": self.cycle, "interval": "step"}]

    module, planner = OneCycle(), planner_of(effective_batch_size=settings.pop("effective_batch_size", None))
    whole = fit(module, Data(), planner, **settings)  # 21 samples, 7 at a time
    assert (whole.global_step, module.cycle.total_steps, module.cycle.last_epoch) == (steps, steps, steps)


class Validated(Net):
    def __init__(self):
        super().__init__()
        self.validated: list[int] = []
        self.lr = 0.1

    def validation_step(self, batch, batch_idx):
        self.validated.append(len(self.seen))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class ValidatedData(Data):
    def val_dataloader(self):
        return DataLoader(samples(2), batch_size=2)


@pytest.mark.parametrize(("interval", "after"), [(1, [1, 2, 3]), (3, [3]), (0.34, [1, 2, 3]), (1.0, [3])])
def test_validation_comes_when_it_should(interval, after):
    module = Validated()
    fit(module, ValidatedData(), val_check_interval=interval, num_sanity_val_steps=0)
    assert module.validated == after


def test_a_learning_rate_is_looked_for_at_the_planned_size(tmp_path):
    module = Validated()
    finder = pl.callbacks.LearningRateFinder(num_training_steps=5, update_attr=True, early_stop_threshold=None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Failed to compute suggestion")
        fit(module, ValidatedData(samples(70)), None, finder, default_root_dir=tmp_path)
    assert set(module.seen) == {7}
    assert len(module.seen) == 5 + 10  # the finder's steps, and an epoch


@pytest.mark.parametrize("first", [True, False], ids=["finder first", "planner first"])
def test_a_schedule_after_a_learning_rate_was_looked_for(first, tmp_path):
    """The finder's steps are none of training's, in whichever order the callbacks are given."""

    class OneCycle(Validated):
        def configure_optimizers(self):
            optimizer, total = super().configure_optimizers(), self.trainer.estimated_stepping_batches
            self.cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1, total_steps=total)
            return [optimizer], [{"scheduler": self.cycle, "interval": "step"}]

    module, planner = OneCycle(), planner_of()
    finder = pl.callbacks.LearningRateFinder(num_training_steps=4, early_stop_threshold=None)
    callbacks = [finder, planner] if first else [planner, finder]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Failed to compute suggestion")
        warnings.filterwarnings("ignore", CPU_MEASURES_NOTHING)
        whole = trainer(*callbacks, default_root_dir=tmp_path)
        whole.fit(module, datamodule=ValidatedData())
    assert set(module.seen) == {7}
    assert (whole.global_step, module.cycle.total_steps) == (3, 3)


def test_a_finder_of_batch_sizes_beside_it():
    data = Data()
    with pytest.raises(MisconfigurationException, match=r"and so does the callback BatchSizeFinder: leave one out, or"):
        trainer(planner_of(), pl.callbacks.BatchSizeFinder()).fit(Net(), data)
    assert data.batch_size == 2


@pytest.mark.parametrize(
    ("callback", "copies"),
    [
        (pl.callbacks.EMAWeightAveraging(device="cuda"), 1),
        (pl.callbacks.EMAWeightAveraging(device="cpu"), 0),
        (pl.callbacks.StochasticWeightAveraging(0.1, device=None), 1),
        (pl.callbacks.StochasticWeightAveraging(0.1), 0),  # on the host, where nothing is said
        (pl.callbacks.EarlyStopping("loss"), 0),
    ],
)
def test_weights_that_others_average(callback, copies):
    class Later(Net):
        def configure_model(self):
            self.later = nn.Linear(8, 8)

    module = Later()
    module.configure_model()
    # 8·3 + 3 and 8·8 + 8 weights, of 4 bytes
    assert averaging_bytes(trainer(callback), lambda: module) == copies * 4 * (27 + 72)


def test_overfitting_on_less_than_a_batch():
    planner = planner_of()
    with pytest.warns(UserWarning, match=CPU_MEASURES_NOTHING):
        trainer(planner, overfit_batches=0.3).fit(Net(), Data())
    assert planner.plan.batch_size == 6  # 21 rows are 4 batches of 6, of which 0.3 are one; not so of 7


@pytest.mark.filterwarnings("ignore:The combined size of the")
def test_other_verbs_after_a_fit():
    class Evaluates(Validated):
        def test_step(self, batch, batch_idx):
            self.validated.append(len(batch[0]))
            return batch[0]

        predict_step = test_step

    module, data = Evaluates(), ValidatedData()
    whole, others = fit(module, data, num_sanity_val_steps=0), DataLoader(samples(3), batch_size=3)
    module.validated.clear()
    whole.validate(module, others)
    whole.test(module, others)
    whole.predict(module, others)
    assert (data.batch_size, module.validated[1:]) == (7, [3, 3])
    assert "dataloader" not in vars(whole.fit_loop._data_source)


def test_training_goes_on_in_a_second_fit():
    module, data, planner = Net(), Data(), planner_of()
    whole = fit(module, data, planner)
    whole.fit_loop.max_epochs, planner.max_batch_size = 2, 5
    with pytest.warns(UserWarning, match=CPU_MEASURES_NOTHING):
        whole.fit(module, data)
    assert module.seen == [7, 7, 7, 5, 5, 5, 5, 1]
    assert (data.batch_size, whole.global_step) == (5, 8)


def test_a_trainer_with_nothing_else():
    module = Net()
    bare = pl.Trainer(barebones=True, callbacks=[planner_of()], accelerator="cpu", max_epochs=1)
    with pytest.warns(UserWarning, match=CPU_MEASURES_NOTHING):
        bare.fit(module, Data())
    assert module.seen == [7, 7, 7]


# -------------------------------------------------------------------------------------------------------- resuming


@pytest.fixture
def checkpoint(tmp_path):
    """A run at batch size 7 that was cut off in the middle of an epoch."""
    path = tmp_path / "cut.ckpt"

    class Cut(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2:
                trainer.save_checkpoint(path)
                trainer.should_stop = True

    fit(Net(), Data(samples(70)), None, Cut(), min_steps=2)
    return path


def resumed(checkpoint, planner, data=None):
    module, data = Net(), data or Data(samples(70))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
        warnings.filterwarnings("ignore", CPU_MEASURES_NOTHING)
        trainer(planner).fit(module, data, ckpt_path=checkpoint)
    return module, data


def test_a_resumed_run_keeps_its_batch_size(checkpoint):
    planner = planner_of(max_batch_size=10)
    module, data = resumed(checkpoint, planner)
    assert (data.batch_size, planner.plan.batch_size, planner.plan.limited_by) == (7, 7, "checkpoint")
    assert module.seen == [7] * 8  # ten batches in an epoch, two of which had been


def test_a_resumed_run_is_planned_again_where_that_is_asked_for(checkpoint):
    planner = planner_of(max_batch_size=10, resume="plan")
    with pytest.warns(UserWarning, match="within an epoch, after 2 batches of 7, and resume='plan' goes on with"):
        module, data = resumed(checkpoint, planner)
    assert (data.batch_size, planner.plan.limited_by) == (10, "max_batch_size")
    assert set(module.seen) == {10}


class Remembers(DataLoader):
    """A loader that goes on where it was: it keeps the number of samples that it gave."""

    given = skipped = 0

    def __iter__(self):
        self.given = begin = self.skipped
        self.skipped = 0
        for index, batch in enumerate(super().__iter__()):
            if index * self.batch_size >= begin:
                self.given += len(batch[0])
                yield batch

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.skipped = state["given"]


class Numbered(Data):
    """Samples whose labels are their numbers."""

    def __init__(self):
        super().__init__(TensorDataset(torch.randn(70, 8), torch.arange(70)))

    def train_dataloader(self):
        return Remembers(self.dataset, batch_size=self.batch_size)


class Reads(Net):
    def __init__(self):
        super().__init__()
        self.numbers: list[int] = []

    def training_step(self, batch, batch_idx):
        if isinstance(self.trainer, pl.Trainer):
            self.numbers += batch[1].tolist()
        return super().training_step((batch[0], batch[1].clamp(max=2)), batch_idx)


@pytest.fixture
def cut(tmp_path):
    """A run at batch size 7 that was killed after two batches, its loader's state kept."""

    class Cut(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")
                raise KeyError("killed")

    module = Reads()
    with pytest.raises(KeyError), pytest.warns(UserWarning, match=CPU_MEASURES_NOTHING):
        trainer(planner_of(), Cut()).fit(module, Numbered())
    assert module.numbers == list(range(14))
    return tmp_path / "cut.ckpt"


def test_a_resumed_epoch_goes_on_at_the_same_sample(cut):
    module, planner = Reads(), planner_of(max_batch_size=10)
    with pytest.warns(UserWarning, match=CPU_MEASURES_NOTHING):
        trainer(planner).fit(module, Numbered(), ckpt_path=cut)
    assert module.numbers == list(range(14, 70))


@pytest.mark.filterwarnings("ignore:MemoryPlanner measures nothing")
def test_a_resumed_epoch_of_another_size_does_not_and_that_is_said(cut):
    module, planner = Reads(), planner_of(max_batch_size=10, resume="plan")
    with pytest.warns(
        UserWarning, match="within an epoch, after 2 batches of 7, and resume='plan' goes on with batches of 10"
    ):
        trainer(planner).fit(module, Numbered(), ckpt_path=cut)
    assert module.numbers == list(range(20, 70))  # the loader's 14 samples are more than a batch of 10


def test_a_checkpoint_between_two_epochs_has_no_batches_behind_it(tmp_path):
    whole = fit(Net(), Data())
    whole.save_checkpoint(tmp_path / "whole.ckpt")
    checkpoint = torch.load(tmp_path / "whole.ckpt", weights_only=False)
    assert batches_into_epoch(checkpoint) == 0
    assert checkpoint["callbacks"][planner_of().state_key] == {"batch_size": 7}
    module, planner = Net(), planner_of(max_batch_size=10, resume="plan")
    with pytest.warns(UserWarning, match=CPU_MEASURES_NOTHING):
        trainer(planner, max_epochs=2).fit(module, Data(), ckpt_path=tmp_path / "whole.ckpt")
    assert module.seen == [10, 10, 1]


def test_resume_is_one_of_two():
    with pytest.raises(ValueError, match="resume is 'keep' or 'plan', not 'no'"):
        mp.MemoryPlanner(resume="no")


class Gan(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.judge = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        self.seen.append(len(batch[0]))
        for optimizer, layer in zip(self.optimizers(), (self.layer, self.judge), strict=True):
            self.toggle_optimizer(optimizer)
            loss = layer(batch[0]).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        for schedule in self.lr_schedulers():
            schedule.step()

    def configure_optimizers(self):
        both = [torch.optim.Adam(self.layer.parameters()), torch.optim.Adam(self.judge.parameters())]
        return both, [scheduler(optimizer) for optimizer in both]


def test_two_optimizers_by_hand():
    module, planner = Gan(), planner_of()
    fit(module, Data(), planner)
    assert module.seen == [7, 7, 7]
    # the optimizers' state, from the second step on: two moments of 4 bytes for 27 + 9 weights, 512 to a block
    assert planner.plan.breakdown["optimizer"] >= 2 * 4 * (27 + 9)


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.5},
        {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
    ],
    ids=str,
)
def test_settings_of_the_trainer(settings):
    module, planner = Net(), planner_of()
    fit(module, Data(), planner, **settings)
    assert module.seen == [7, 7, 7]
    assert planner.plan.accumulate_grad_batches == settings.get("accumulate_grad_batches", 1)


# ---------------------------------------------------------------------------------------- an effective batch size


class Steps(Net):
    """Remembers which batches the optimizer stepped after."""

    def __init__(self):
        super().__init__()
        self.stepped: list[int] = []

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.stepped.append(sum(self.seen))


def test_an_effective_batch_size_is_accumulated(tmp_path, caplog):
    module, planner = Steps(), planner_of(effective_batch_size=15)
    with caplog.at_level("INFO", logger="pytorch_lightning.utilities.rank_zero"):
        whole = fit(module, Data(samples(31)), planner, logger=CSVLogger(tmp_path, name="", version=""), max_epochs=2)
    # the divisors of 15 up to 7 are 1, 3 and 5: three batches of 5 make a step, and the 31st sample one of its own
    assert (planner.plan.batch_size, planner.plan.accumulate_grad_batches) == (5, 3)
    assert (planner.plan.limited_by, whole.accumulate_grad_batches) == ("max_batch_size", 3)
    assert module.seen == [5, 5, 5, 5, 5, 5, 1] * 2
    assert module.stepped == [15, 30, 31, 46, 61, 62]
    written = dict(line.split(": ", 1) for line in (tmp_path / "hparams.yaml").read_text().splitlines())
    assert {k: written[k] for k in ("batch_size", "accumulate_grad_batches", "effective_batch_size")} == {
        "batch_size": "5",
        "accumulate_grad_batches": "3",
        "effective_batch_size": "15",
    }
    assert "samples a step          15   3 batches of 5" in caplog.text


def test_an_effective_batch_size_that_fits_is_one_batch():
    module, planner, data = Steps(), planner_of(effective_batch_size=7, max_batch_size=None), Data()
    whole = fit(module, data, planner)
    assert (data.batch_size, whole.accumulate_grad_batches, planner.plan.limited_by) == (7, 1, "effective_batch_size")
    assert module.stepped == [7, 14, 21]


def test_it_is_traced_with_accumulation_only_where_it_has_to_be(monkeypatch):
    traced = []

    def trace_counted(setup, batches, **kwargs):
        traced.append(setup.settings.accumulate_grad_batches)
        return original(setup, batches, **kwargs)

    original = tracer.trace_counted
    monkeypatch.setattr(predict, "trace_counted", trace_counted)
    for effective, expected in ((7, [1]), (14, [1, 3]), (21, [1, 3])):
        traced.clear()
        fit(Net(), Data(), planner_of(effective_batch_size=effective))
        assert traced == expected


def test_an_effective_batch_size_again_with_the_same_trainer():
    planner = planner_of(effective_batch_size=14)
    whole = fit(Steps(), Data(), planner)
    assert whole.accumulate_grad_batches == 2
    planner.max_batch_size = 3
    again = Steps()
    whole.fit_loop.epoch_progress.reset()
    with pytest.warns(UserWarning, match=CPU_MEASURES_NOTHING):
        whole.fit(again, Data())
    assert (planner.plan.batch_size, whole.accumulate_grad_batches) == (2, 7)
    assert again.stepped == [14, 21]


@pytest.mark.parametrize("world_size", [2, 7])
def test_an_effective_batch_size_is_shared_among_processes(world_size, monkeypatch):
    monkeypatch.setattr(pl.Trainer, "world_size", world_size)
    planner = planner_of(effective_batch_size=28, max_batch_size=None, apply=False)
    fit(Net(), Data(samples(100)), planner)
    plan = planner.plan
    assert (plan.batch_size, plan.accumulate_grad_batches) == (28 // world_size, 1)


def refused(module=None, *others, **kwargs):
    data, whole = Data(), trainer(planner_of(effective_batch_size=14), *others, **kwargs)
    before = whole.accumulate_grad_batches
    with pytest.raises(MisconfigurationException, match="effective_batch_size=14 ") as caught:
        whole.fit(module or Net(), data)
    assert (data.batch_size, whole.accumulate_grad_batches) == (2, before)
    return str(caught.value)


def test_what_accumulates_already_is_refused(monkeypatch):
    assert "manual optimization it is training_step that decides when the optimizer steps" in refused(Gan())
    assert "and it is 3 already: leave one out" in refused(accumulate_grad_batches=3)
    scheduler = pl.callbacks.GradientAccumulationScheduler({2: 4})
    assert "so does the callback GradientAccumulationScheduler" in refused(None, scheduler)
    monkeypatch.setattr(pl.Trainer, "world_size", 3)
    assert "has no equal share for each of 3 processes: make it a multiple of 3" in refused()
    deepspeed = object.__new__(pl.strategies.DeepSpeedStrategy)  # no deepspeed is installed to make one
    with pytest.raises(MisconfigurationException, match="DeepSpeed counts batches by its own configuration"):
        check_accumulation(14, Net(), SimpleNamespace(strategy=deepspeed), 1, 2)


def test_more_samples_a_step_than_there_are():
    with pytest.raises(ValueError, match=r"effective_batch_size=22 is 22 samples a step .* has 21 for each: no step"):
        trainer(planner_of(effective_batch_size=22)).fit(Net(), datamodule=Data())


def test_limits_that_leave_no_divisor():
    with pytest.raises(ValueError, match=r"no batch size divides 7, is at least 2, at most 5 \(max_batch_size\)"):
        trainer(planner_of(effective_batch_size=7, max_batch_size=5, min_batch_size=2)).fit(Net(), datamodule=Data())


def test_a_step_without_batch_idx():
    class Short(Net):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    module = Short()
    fit(module, Data())
    assert module.seen == [7, 7, 7]


@dataclasses.dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


def as_pair(rows):
    return Pair(torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows]))


def as_dict(rows):
    return {"x": torch.stack([x for x, _ in rows]), "y": torch.stack([y for _, y in rows]), "name": ["a"] * len(rows)}


@pytest.mark.parametrize("collate", [as_pair, as_dict])
def test_batches_of_other_shapes(collate):
    class Takes(Net):
        def training_step(self, batch, batch_idx):
            batch = vars(batch) if isinstance(batch, Pair) else batch
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    class Collated(Data):
        def train_dataloader(self):
            return DataLoader(self.dataset, batch_size=self.batch_size, collate_fn=collate)

    module = Takes()
    fit(module, Collated())
    assert module.seen == [7, 7, 7]


def test_an_iterable_dataset():
    class Stream(IterableDataset[Any]):
        begun = 0

        def __iter__(self):
            self.begun += 1
            return iter([samples(1)[0]] * 14)

    stream, module = Stream(), Net()
    fit(module, Data(stream))
    assert (module.seen, stream.begun) == ([7, 7], 1)


def test_layers_made_in_configure_model_and_setup():
    class Later(Net):
        def __init__(self):
            super().__init__()
            self.before, self.after = None, None

        def setup(self, stage):
            self.before = nn.Linear(8, 8)

        def configure_model(self):
            self.after = self.after or nn.Linear(8, 8)

        def training_step(self, batch, batch_idx):
            return super().training_step((self.after(self.before(batch[0])), batch[1]), batch_idx)

    module, planner = Later(), planner_of()
    fit(module, Data(), planner)
    assert module.seen == [7, 7, 7]
    # three layers: 8·3 + 3 and twice 8·8 + 8 weights, of 4 bytes
    assert planner.plan.breakdown["parameters"] == 4 * (27 + 2 * 72)


def test_what_a_step_can_ask_of_its_module_and_trainer(tmp_path):
    class Asks(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, prog_bar=True, on_epoch=True)
            self.log_dict({"a": loss, "b": loss})
            if self.logger is not None:
                self.logger.experiment.log_metrics({"c": 1.0}, step=self.global_step)
            assert self.trainer.current_epoch == self.current_epoch == 0
            assert self.trainer.max_epochs == 1
            if batch_idx % self.trainer.accumulate_grad_batches == 0 and self.trainer.is_global_zero:
                self.print("a step")
            return {"loss": loss, "out": loss.detach()}

    module = Asks()
    fit(module, Data(), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert module.seen == [7, 7, 7]


@pytest.mark.parametrize("name", ["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize("alone", [True, False], ids=["callbacks=cb", "callbacks=[cb]"])
def test_both_names_of_lightning(name, alone):
    flavour = pytest.importorskip(name)

    class Flavoured(flavour.LightningModule):
        training_step, configure_optimizers = Net.training_step, Net.configure_optimizers

        def __init__(self):
            super().__init__()
            self.layer, self.seen, self.batch_size = nn.Linear(8, 3), [], 2

        def train_dataloader(self):
            return DataLoader(samples(), batch_size=self.batch_size)

    module, planner = Flavoured(), planner_of()
    whole = flavour.Trainer(
        callbacks=planner if alone else [planner],
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.warns(UserWarning, match=CPU_MEASURES_NOTHING):
        whole.fit(module)
    assert module.seen == [7, 7, 7]


def test_two_fits_with_one_callback():
    planner, first, second = planner_of(max_batch_size=None), Net(), Net()
    fit(first, Data(), planner)
    one = planner.plan
    fit(second, Data(samples(10)), planner)
    assert (first.seen, second.seen) == ([21], [10])
    assert planner.plan.batch_size == 10
    assert one.batch_size == 21


def test_the_plan_is_among_the_hyperparameters(tmp_path):
    planner, data = planner_of(), Data()
    data.save_hyperparameters({"batch_size": 2, "folder": "images"})
    fit(Net(), data, planner, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    written = dict(line.split(": ", 1) for line in (tmp_path / "hparams.yaml").read_text().splitlines())
    assert written["batch_size"] == "7"  # what was trained with, not what was there at the beginning
    assert written["folder"] == "images"
    assert (written["memplan/batch_size"], written["memplan/limited_by"]) == ("7", "max_batch_size")
    assert written["memplan/device"] == "a card"
    assert float(written["memplan/predicted_reserved_gib"]) == planner.plan.peak_reserved / GiB


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI calls what a newer jsonargparse deprecates
def test_lightning_cli_makes_it_from_yaml(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    pytest.importorskip("jsonargparse")
    from pytorch_lightning.cli import LightningCLI

    file = tmp_path / "config.yaml"
    file.write_text(
        "trainer:\n  logger: false\n  callbacks:\n  - class_path: lightning_memplan.MemoryPlanner\n    init_args:\n"
        "      device: RTX 3090\n      margin: 0.1\n      max_batch_size: 512\n"
    )
    cli = LightningCLI(
        pl.LightningModule,
        run=False,
        seed_everything_default=False,
        args=[f"--config={file}"],
        save_config_callback=None,
    )
    made = next(callback for callback in cli.trainer.callbacks if isinstance(callback, mp.MemoryPlanner))
    assert (made.device, made.margin, made.max_batch_size) == (mp.gpu("RTX 3090"), 0.1, 512)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI calls what a newer jsonargparse deprecates
@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--trainer.callbacks.help=lightning_memplan.MemoryPlanner"], 0, "Largest batch size allowed. (type: int"),
        (["--trainer.callbacks=lightning_memplan.MemoryPlanner", "--trainer.callbacks.margin=much"], 2, "margin"),
    ],
)
def test_lightning_cli_has_its_help_and_its_types(words, status, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("COLUMNS", "120")
    pytest.importorskip("jsonargparse")
    from pytorch_lightning.cli import LightningCLI

    with pytest.raises(SystemExit) as caught:
        LightningCLI(pl.LightningModule, run=False, args=words, save_config_callback=None)
    assert caught.value.code == status
    printed = capsys.readouterr()
    assert said in printed.out + printed.err
    names = inspect.signature(mp.MemoryPlanner).parameters
    assert status or all(f"--trainer.callbacks.{name} " in printed.out for name in names)


# ------------------------------------------------------------------------------------------------- on the null GPU


@pytest.fixture(scope="module")
def fits(nullgpu, tmp_path_factory):
    """The results of every scenario of ``fits.py``, by its name, and the folder with their logs."""
    folder = tmp_path_factory.mktemp("fits")
    source = str(Path(mp.__file__).parents[1])
    done = nullgpu([sys.executable, str(PROGRAMS / "fits.py"), str(folder)], PYTHONPATH=source)
    rows = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return folder, {row["name"]: row for row in rows}


ASKED_FOR = ["resnet50_16_mixed", "resnet50_32_true", "cnn3d_32_true", "cnn3d_16_mixed"]
KEYS = {
    f"memplan/{key}"
    for key in (
        "predicted_reserved_gib",
        "actual_reserved_gib",
        "predicted_allocated_gib",
        "actual_allocated_gib",
        "error_percent",
        "formula_gib",
    )
}


def logged_in_csv(folder: Path) -> list[dict[str, float]]:
    with open(folder / "csv" / "metrics.csv", newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [row for row in rows if "memplan/error_percent" in row]


def logged_in_tensorboard(folder: Path) -> list[dict[str, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    steps: dict[int, dict[str, float]] = {}
    for key in events.Tags()["scalars"]:
        if key.startswith("memplan/"):
            for event in events.Scalars(key):
                steps.setdefault(event.step, {})[key] = event.value
    return [steps[k] for k in sorted(steps)]


@pytest.mark.slow
@pytest.mark.parametrize("read", [logged_in_csv, logged_in_tensorboard])
@pytest.mark.parametrize("name", ASKED_FOR)
def test_it_fills_the_card_as_predicted(fits, name, read):
    folder, results = fits
    result = results[name]
    assert "failed" not in result, result["failed"]
    assert (result["method"], result["limited_by"], result["steps"]) == ("probe", "memory", 6)
    assert result["data_batch_size"] == result["batch_size"] > 2
    rows = read(folder / name)
    assert len(rows) == 6
    for row in rows:
        assert row.keys() >= KEYS
        for kind in ("reserved", "allocated"):
            actual = row[f"memplan/actual_{kind}_gib"]
            assert row[f"memplan/predicted_{kind}_gib"] == pytest.approx(actual, rel=0.03)
        assert abs(row["memplan/error_percent"]) < 3
    peak = max(row["memplan/actual_reserved_gib"] for row in rows)
    assert 0.9 * result["total"] <= peak * GiB <= result["total"]


KINDS = [
    "accumulated_and_clipped",
    "effective_batch_size",
    "averaged_weights",
    "clipped_in_16_mixed",
    "bf16_true",
    "channels_last",
    "frozen_backbone",
    "tied_weights",
    "manual_optimization",
    "twice_with_one_callback",
    "without_a_logger",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_each_step_is_predicted(fits, name):
    result = fits[1][name]
    assert "failed" not in result, result["failed"]
    assert result["method"] == "trace"
    assert result["warnings"] == []
    for found in (result, result.get("first", result)):
        assert len(found["measured"]) >= 6
        for predicted_allocated, allocated, predicted_reserved, reserved in found["measured"]:
            assert predicted_allocated == pytest.approx(allocated, rel=0.03)
            assert predicted_reserved == pytest.approx(reserved, rel=0.05)
        for predicted, measured in found["phases"][:3]:
            assert list(measured) == ["forward", "backward", "optimizer"]
            assert predicted == {name: pytest.approx(peak, rel=0.03) for name, peak in measured.items()}


@pytest.mark.slow
def test_memory_that_the_process_holds_already_is_not_planned_with(fits):
    result = fits[1]["does_not_fit"]
    assert "failed" not in result, result["failed"]
    assert "Classifier does not fit on NVIDIA GeForce RTX 3090 at batch size 1" in result["text"]
    assert result["available"] < 4 * GiB  # 23.7 GiB, less the 20 that are held
