"""Jobs: which samples batches are made of, what limits their size, and what of a Trainer or of arguments is kept."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_memplan as mp
from lightning_memplan.data import streams
from lightning_memplan.planning import job as jobs
from lightning_memplan.planning.job import (
    DataSource,
    Sampling,
    Training,
    TrainingJob,
    default_device,
    device_of_trainer,
    job_of_trainer,
    named_device,
    nccl_allowance,
    sampling_of,
    share_of_validation,
    source_of_trainer,
    training_job,
)
from lightning_memplan.planning.limits import Limits
from lightning_memplan.settings import NCCL, Parallel, StepSettings
from lightning_memplan.types import Plan

GiB = 2**30
BATCH = torch.zeros(4, 8)
CARD = mp.Device("a card", total=GiB, capability=(7, 0))
HERE = mp.Device("a card that is here", total=GiB, index=0, capability=(9, 0))
ADAM = partial(torch.optim.Adam, lr=0.1)


class Stream(IterableDataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return (torch.zeros(1) for _ in range(self.count))


def by_fours(samples: list[torch.Tensor]) -> torch.Tensor:
    assert len(samples) % 4 == 0
    return torch.stack(samples)


def always_eight(samples: list[torch.Tensor]) -> torch.Tensor:
    assert len(samples) == 8
    return torch.stack(samples)


class Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SetUp(Plain):
    def setup(self, stage):
        self.stages = (*getattr(self, "stages", ()), stage)
        self.head = nn.Linear(8, 3)

    def train_dataloader(self):
        return DataLoader(torch.zeros(self.head.out_features, 8))  # which is there after setup alone


def trainer_of(**settings: Any) -> Any:
    return pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **settings)


# ------------------------------------------------------------------------------------------------------------- samples


def test_sampling_is_checked():
    with pytest.raises(ValueError, match=r"^sample is one of 'auto', 'first', 'largest', not 'last'$"):
        Sampling("last")
    with pytest.raises(ValueError, match=r"^sample_size is the number of samples to look at, .*, not 0$"):
        Sampling("largest", 0)
    with pytest.raises(ValueError, match=r"^samples is 'auto' or 'first' or 'largest', not 'last'$"):
        sampling_of("last")
    assert sampling_of("first") == Sampling("first", 64)


@pytest.mark.parametrize(
    ("sampling", "width"),
    [
        (Sampling("first", 3), 5),  # the first five, whatever the count
        (Sampling("largest", 3), 9),  # three that are spread over eleven: the first, the sixth, the last
        (Sampling("largest", 2), 7),  # the first and the last
        (Sampling("auto", 2), 7),  # the first five differ in size
    ],
    ids=str,
)
def test_batches_are_made_of_the_samples_that_are_looked_at(sampling, width):
    samples = [torch.zeros(width) for width in (1, 2, 3, 4, 5, 9, 1, 1, 1, 1, 7)]
    source = DataSource(DataLoader(samples, collate_fn=torch.stack), sampling)
    assert source.samples.make(2).shape == (2, width)
    assert source.samples is source.samples  # they are read once


def test_a_source_knows_its_sizes():
    source = DataSource(DataLoader(torch.zeros(21, 8), batch_size=6))
    assert (source.size, source.batch_size, source.own_size) == (21, 6, 6)
    assert [source.samples_of_a_rank(ranks) for ranks in (1, 2, 4)] == [21, 11, 6]  # rounded up
    whole = DataSource(source.data, divided=False)  # each rank reads all of them
    assert [whole.samples_of_a_rank(ranks) for ranks in (1, 2)] == [21, 21]
    batch = DataSource(BATCH)
    assert (batch.size, batch.batch_size, batch.own_size) == (None, None, None)


# ------------------------------------------------------------------------------------------ what limits the batch size


def test_a_rank_has_its_share_of_the_samples():
    found = DataSource(DataLoader(torch.zeros(21, 8))).within(Limits(multiple_of=3, max_batch_size=64), 2)
    assert found == Limits(multiple_of=3, max_batch_size=64, samples=11, ranks=2)


def test_a_batch_limits_nothing():
    assert DataSource(BATCH).within(Limits(), 3) == Limits(ranks=3)


def test_a_stream_that_was_read_to_its_end_has_so_many_samples():
    source = DataSource(DataLoader(Stream(3), batch_size=2))
    assert source.size is None
    assert source.within(Limits(), 1).samples == 3


def test_a_stream_is_limited_by_the_host_alone_where_the_user_names_a_size(monkeypatch):
    monkeypatch.setattr(streams, "cpu_device", lambda: mp.Device("host", total=2**40, kind="cpu"))
    source = DataSource(DataLoader(Stream(10**9), batch_size=2, num_workers=0))
    source.__dict__["samples"] = replace(source.samples, count=None)
    assert source.within(Limits(), 1).samples == 2**16
    # a quarter of 1 TiB, in samples of one float and 1024 bytes beside it
    assert source.within(Limits(max_batch_size=10**8), 1).samples == 2**38 // 1028
    ahead = DataSource(DataLoader(Stream(10**9), batch_size=2, num_workers=1, prefetch_factor=3))
    ahead.__dict__["samples"] = source.samples
    assert ahead.within(Limits(max_batch_size=10**8), 1).samples == 2**38 // 4 // 1028  # three batches are made ahead


def test_a_loader_that_makes_batches_of_multiples_alone():
    loader = DataLoader(torch.zeros(100, 8), batch_size=8, collate_fn=by_fours)
    assert DataSource(loader).within(Limits(), 1).multiple_of == 4
    # 12 is the least common multiple of 4 and 6
    assert DataSource(loader).within(Limits(multiple_of=6), 1) == Limits(multiple_of=12, samples=100)


def test_a_loader_that_makes_batches_of_one_size_alone():
    source = DataSource(DataLoader(torch.zeros(100, 8), batch_size=8, collate_fn=always_eight))
    found = source.within(Limits(max_batch_size=64, multiple_of=6), 2)
    assert found == Limits(min_batch_size=8, max_batch_size=8, ranks=2)
    plan = a_plan(limited_by="memory")
    assert source.explained(plan) == replace(plan, limited_by="dataset")


def a_plan(**fields: Any) -> Plan:
    known = {"batch_size": 7, "budget": GiB, "margin": 0.0, "method": "trace", "notes": ("known",)}
    peaks = dict.fromkeys(("peak_reserved", "peak_allocated", "formula_peak"), 1)
    return Plan(**{"device": CARD, **known, **peaks, **fields})


def test_a_length_that_is_not_known_is_explained_where_it_limits():
    unknown = DataSource(DataLoader(Stream(10**6), batch_size=2))
    by_dataset = a_plan(limited_by="dataset")
    explained = unknown.explained(by_dataset)
    assert explained.notes == (
        "known",
        "the length of the data is not known: at most 7 samples are planned for; max_batch_size allows more",
    )
    assert replace(explained, notes=("known",)) == by_dataset
    dropping = DataSource(DataLoader(Stream(10**6), batch_size=2, drop_last=True))
    assert "and a last batch that is not full may be dropped" in dropping.explained(by_dataset).notes[-1]
    by_memory = a_plan(limited_by="memory")
    assert unknown.explained(by_memory) is by_memory
    known = DataSource(DataLoader(torch.zeros(7, 8)))
    assert known.explained(by_dataset) is by_dataset


# --------------------------------------------------------------------------------------------------------------- a job


def a_job(module=None, **fields: Any) -> TrainingJob:
    return TrainingJob(
        module or Plain(), **{"source": DataSource(BATCH), "settings": StepSettings(), "device": CARD, **fields}
    )


def test_a_job_knows_its_ranks():
    assert (a_job().name, a_job().ranks) == ("Plain", 1)
    assert a_job(settings=StepSettings(parallel=Parallel("ddp", 3))).ranks == 3
    # the Trainer's, whatever wraps the module
    assert a_job(trainer=SimpleNamespace(world_size=5), settings=StepSettings(parallel=Parallel("ddp", 3))).ranks == 5


def test_room_for_nccl_is_left_on_the_gpus_of_several_ranks():
    two = StepSettings(parallel=Parallel("ddp", 2))
    host = mp.Device("host", total=GiB, kind="cpu")
    assert nccl_allowance(two, CARD) == a_job(settings=two).nccl == NCCL
    assert nccl_allowance(StepSettings(), CARD) == nccl_allowance(two, host) == 0
    assert nccl_allowance(StepSettings(parallel=Parallel("ddp", 1)), CARD) == 0


def test_steps_are_given_all_that_a_job_has():
    module, loader, data, trainer = Plain(), DataLoader(torch.zeros(9, 8)), object(), SimpleNamespace(world_size=1)
    job = a_job(
        module, source=DataSource(loader), trainer=trainer, datamodule=data, optimizer=ADAM, batch_size_name="bs"
    )
    setup = job.setup
    assert (setup.module, setup.settings, setup.trainer, setup.datamodule) == (module, job.settings, trainer, data)
    assert (setup.optimizer, setup.loaders, setup.batch_size_name) == (ADAM, loader, "bs")
    # without a Trainer no step asks it for loaders, and a batch is none
    assert a_job().setup.loaders is None
    assert a_job().setup.batch_size_name == "batch_size"


def test_another_accumulation_changes_nothing_else():
    job = a_job(settings=StepSettings(precision="16-mixed"))
    found = job.accumulating(5)
    assert found == replace(job, settings=StepSettings(precision="16-mixed", accumulate_grad_batches=5))
    assert found.replicas is job.replicas  # the user's hooks are called once for both


@pytest.mark.parametrize(
    ("method", "device", "parallel", "able", "probed"),
    [
        ("auto", HERE, None, True, True),
        ("auto", HERE, None, False, False),
        ("probe", CARD, Parallel("fsdp", 8), False, True),  # it is asked for: what is in the way is said later
        ("trace", HERE, None, True, False),
        ("formula", HERE, None, True, False),
        ("auto", CARD, None, True, False),  # it is named, and not here
        ("auto", replace(HERE, kind="cpu"), None, True, False),
        ("auto", HERE, Parallel("ddp", 2), True, True),
        ("auto", HERE, Parallel("fsdp", 1), True, True),  # one rank holds all parameters anyway
        ("auto", HERE, Parallel("fsdp", 2), True, False),
        ("auto", HERE, Parallel("other", 2), True, False),  # whose ranks may wait for one another
    ],
    ids=str,
)
def test_steps_are_probed_where_only_this_process_waits_for_them(monkeypatch, method, device, parallel, able, probed):
    monkeypatch.setattr(jobs, "can_probe", lambda: able)
    job = a_job(method=method, device=device, settings=StepSettings(parallel=parallel))
    assert job.is_probed is probed


@pytest.mark.parametrize(
    ("available", "initialized", "size", "probed"),
    [(False, True, 2, True), (True, False, 2, True), (True, True, 2, False), (True, True, 1, True)],
)
def test_ranks_that_nothing_wraps_are_not_probed(monkeypatch, available, initialized, size, probed):
    monkeypatch.setattr(jobs, "can_probe", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_available", lambda: available)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: size)
    assert a_job(device=HERE).is_probed is probed


def test_a_module_begins_after_its_setup_on_a_replica():
    module = SetUp()
    job = a_job(module, stage="fit", method="trace")
    begun = job.begun()
    assert (begun.stages, hasattr(module, "head")) == (("fit",), False)
    assert type(begun.layer.weight.data).__name__ == "FakeTensor"  # steps are traced alone
    assert job.begun() is job.setup.module is begun
    assert a_job(module).begun() is module  # without a stage no setup is called

    class Reads(Plain):
        def setup(self, stage):
            self.epochs = self.trainer.max_epochs

    assert a_job(Reads(), stage="fit", method="trace", trainer=trainer_of(max_epochs=7)).begun().epochs == 7


def test_a_module_that_is_probed_begins_with_real_tensors():
    begun = a_job(SetUp(), stage="fit", method="probe").begun()
    assert type(begun.head.weight) is nn.Parameter
    assert begun.head.weight.device.type == "cpu"


class Lazy(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(5)

    def setup(self, stage):
        self.stages = (*getattr(self, "stages", ()), stage)


def test_lazy_layers_get_their_shapes_from_a_batch():
    module = Lazy()
    job = a_job(module, stage="fit", method="trace")
    begun = job.begun()
    assert (begun.layer.weight.shape, begun.stages) == ((5, 8), ("fit",))
    assert torch.nn.parameter.is_lazy(module.layer.weight)
    assert job.begun() is begun
    # without data yet, the module is asked for its loaders: its layers stay lazy
    waiting = replace(job, source=DataSource(None)).begun()
    assert torch.nn.parameter.is_lazy(waiting.layer.weight)


def test_a_beginning_is_shared_and_a_failing_hook_leaves_none():
    job = a_job(method="trace")
    assert job.beginning() is job.beginning()
    assert job.begun_replica() is job.beginning().begun
    assert a_job(nn.Linear(8, 8)).begun_replica() is None  # it has no hooks before the first step

    class Fails(Plain):
        def configure_optimizers(self):
            raise KeyError("mine")

    failing = a_job(Fails(), method="trace")
    with pytest.raises(mp.TraceError, match="KeyError: 'mine'"):
        failing.beginning()
    assert failing.begun_replica() is None


# ---------------------------------------------------------------------------------------------------- from arguments


def test_every_setting_of_training_is_in_the_job():
    how = Training("16-mixed", ADAM, None, 0.5, 3, 2, "ddp")
    net = nn.Linear(8, 8)
    job = training_job(net, BATCH, how, device=CARD, samples="first", method="formula")
    settings = job.settings
    assert (job.module, job.source, job.device) == (net, DataSource(BATCH, Sampling("first")), CARD)
    assert (job.optimizer, job.trainer, job.datamodule, job.stage, job.method) == (ADAM, None, None, None, "formula")
    assert (settings.precision, settings.gradient_clip_val, settings.accumulate_grad_batches) == ("16-mixed", 0.5, 3)
    assert (settings.parallel.kind, settings.parallel.ranks) == ("ddp", 2)
    assert settings.capability == (7, 0)


def test_by_default_one_device_trains_in_single_precision_without_accumulation():
    job = training_job(nn.Linear(8, 8), BATCH, device=mp.Device("unknown", total=GiB))
    assert job.settings == StepSettings()
    assert (job.method, job.source.sampling) == ("auto", Sampling("auto"))


def test_arguments_override_a_trainers_settings():
    trainer = trainer_of(precision="bf16-true", gradient_clip_val=2.0, accumulate_grad_batches=4)
    job = training_job(Plain(), BATCH, Training(trainer=trainer), device=CARD)
    settings = job.settings
    assert (job.trainer, settings.precision, settings.gradient_clip_val) == (trainer, "bf16-true", 2.0)
    assert settings.accumulate_grad_batches == 4
    over = training_job(Plain(), BATCH, Training("32", None, trainer, 0.0, 2), device=CARD).settings
    assert (over.precision, over.gradient_clip_val, over.accumulate_grad_batches) == ("32-true", 0.0, 2)


def test_kernels_are_those_of_the_device_or_of_the_first_gpu_here(monkeypatch):
    monkeypatch.setattr(jobs, "detect_devices", lambda: (HERE, CARD))
    net = nn.Linear(8, 8)
    named = training_job(net, BATCH, device="T4")
    assert (named.device.name, named.settings.capability) == ("T4", (7, 5))
    assert (training_job(net, BATCH).device, training_job(net, BATCH).settings.capability) == (HERE, (9, 0))
    free = training_job(net, BATCH, assume_default=False)
    assert (free.device, free.settings.capability) == (HERE, (8, 6))
    assert training_job(net, BATCH, device="T4", assume_default=False).settings.capability == (7, 5)


def test_a_strategy_is_named_for_one_device_or_several():
    def parallel(**how: Any) -> Any:
        return training_job(nn.Linear(8, 8), BATCH, Training(**how), device=CARD).settings.parallel

    assert parallel() is None
    assert (parallel(devices=2).kind, parallel(devices=2).ranks) == ("ddp", 2)
    assert (parallel(strategy="fsdp").kind, parallel(strategy="fsdp").ranks) == ("fsdp", 1)
    assert (parallel(strategy="fsdp", devices=4).kind, parallel(strategy="fsdp", devices=4).ranks) == ("fsdp", 4)


def test_layers_that_fsdp_ignores_are_named_by_their_path():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    strategy = pl.strategies.FSDPStrategy(ignored_modules=[net[1]])
    settings = training_job(net, BATCH, Training(strategy=strategy, devices=2), device=CARD).settings
    assert settings.parallel.arguments["ignored_modules"] == ("1",)


@pytest.mark.parametrize(
    ("module", "how", "kind", "text"),
    [
        ("net", {}, TypeError, r"^module is a LightningModule or another nn\.Module, not 'net'$"),
        (
            nn.Linear(8, 8),
            {"optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.1)},
            TypeError,
            r"^optimizer is a function that makes one from parameters, such as .*, not a SGD that is made already$",
        ),
        (Plain(), {"optimizer": ADAM}, ValueError, r"^a LightningModule makes its optimizers in configure_optimizers:"),
        (nn.Linear(8, 8), {"accumulate_grad_batches": 0}, ValueError, r"^accumulate_grad_batches is an int .* not 0$"),
        (nn.Linear(8, 8), {"devices": 0}, ValueError, r"^devices is an int of at least 1, not 0$"),
        (
            Plain(),
            {"devices": 2, "trainer": trainer_of()},
            ValueError,
            r"^a Trainer has its own devices and strategy: leave devices and strategy out$",
        ),
        (Plain(), {"strategy": "ddp", "trainer": trainer_of()}, ValueError, r"^a Trainer has its own devices"),
        (
            Plain(),
            {"strategy": "fsdp2", "devices": 2},
            ValueError,
            r"^with ModelParallelStrategy \(fsdp2\) a module shards itself, and Plain has no configure_model that does",
        ),
    ],
)
def test_arguments_that_are_wrong_in_themselves(module, how, kind, text):
    with pytest.raises(kind, match=text):
        training_job(module, BATCH, Training(**how), device=CARD)


def test_an_optimizer_is_for_modules_that_make_none():
    class Bare(pl.LightningModule):
        pass

    assert training_job(Bare(), BATCH, Training(optimizer=ADAM), device=CARD).optimizer is ADAM

    class Meshed(Plain):
        def configure_model(self):
            pass

    how = Training(strategy="fsdp2", devices=2)
    assert training_job(Meshed(), BATCH, how, device=CARD).settings.parallel.kind == "model_parallel"


class Data(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.calls = ()

    def prepare_data(self):
        self.calls += ("prepare_data",)

    def setup(self, stage):
        self.calls += (stage,)

    def train_dataloader(self):
        return DataLoader(torch.zeros(30, 8), batch_size=max(1, len(self.calls)))

    def test_dataloader(self):
        return DataLoader(torch.zeros(7, 8))


def test_a_datamodule_is_prepared_on_a_copy_whose_hooks_a_batch_passes():
    data = Data()
    job = training_job(Plain(), data, device=CARD)
    assert (job.source.batch_size, job.source.size) == (2, 30)
    assert (job.datamodule.calls, data.calls) == (("prepare_data", "fit"), ())
    # a batch beside a Trainer passes the hooks of the datamodule that the Trainer has
    trainer = trainer_of()
    trainer.datamodule = data
    assert training_job(Plain(), BATCH, Training(trainer=trainer), device=CARD).datamodule is data
    assert training_job(Plain(), BATCH, device=CARD).datamodule is None


# ------------------------------------------------------------------------------------------------------ from a Trainer


def with_loaders(owner: Any, **settings: Any) -> Any:
    """Return a Trainer whose loaders, of all phases, are those of the owner."""
    trainer = trainer_of(**settings)
    for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop, trainer.test_loop):
        loop._data_source.instance = owner
    return trainer


def test_a_trainers_fit_is_a_job():
    loader = DataLoader(torch.zeros(21, 8), batch_size=3)
    trainer, module = with_loaders(loader, precision="bf16-mixed", accumulate_grad_batches=2), Plain()
    trainer.datamodule = data = Data()
    job = job_of_trainer(trainer, module, "fit", CARD, Sampling("largest", 7), "trace", "bs")
    assert job.source == DataSource(loader, Sampling("largest", 7), divided=True)
    assert (job.module, job.device, job.trainer, job.stage, job.method) == (module, CARD, trainer, "fit", "trace")
    assert job.settings == StepSettings("bf16-mixed", accumulate_grad_batches=2, capability=(7, 0))
    assert (job.batch_size_name, job.optimizer) == ("bs", None)
    assert (type(job.datamodule), job.datamodule is data) == (Data, False)
    plain = job_of_trainer(with_loaders(loader), module, "fit", CARD)
    assert (plain.method, plain.batch_size_name, plain.source.sampling) == ("auto", "batch_size", Sampling())


def test_a_test_has_loaders_of_its_own():
    trainer, data = with_loaders(DataLoader(torch.zeros(21, 8))), Data()
    trainer.test_loop._data_source.instance = DataLoader(torch.zeros(5, 8))
    assert job_of_trainer(trainer, Plain(), "test", CARD).source.size == 5
    assert job_of_trainer(trainer, Plain(), "fit", CARD).source.size == 21
    trainer = with_loaders(data)
    trainer.datamodule = data  # whose hooks make them
    assert job_of_trainer(trainer, Plain(), "test", CARD).source.size == 7
    assert job_of_trainer(trainer, Plain(), "fit", CARD).source.size == 30


def test_a_hook_makes_loaders_on_the_module_as_it_is_after_setup():
    module = SetUp()
    trainer = with_loaders(module)
    module._trainer = trainer
    job = job_of_trainer(trainer, module, "fit", CARD, method="trace")
    assert job.source.size == 3  # the head that setup makes has three outputs
    assert not hasattr(module, "head")


def test_layers_that_a_trainers_fsdp_ignores_are_named_too(monkeypatch):
    module = Plain()
    parallel = Parallel("fsdp", 2, {"ignored_modules": [module.layer]})
    monkeypatch.setattr(jobs, "trainer_settings", lambda trainer, capability: StepSettings(parallel=parallel))
    trainer = with_loaders(DataLoader(torch.zeros(21, 8)))
    assert job_of_trainer(trainer, module, "fit", CARD).settings.parallel.arguments == {"ignored_modules": ("layer",)}


@pytest.mark.parametrize("divided", [True, False])
def test_a_source_knows_whether_lightning_divides_its_samples(divided):
    trainer = with_loaders(DataLoader(torch.zeros(21, 8)), use_distributed_sampler=divided)
    trainer.fit_loop.epoch_loop.val_loop._data_source.instance = DataLoader(torch.zeros(6, 8))
    found = source_of_trainer(a_job(trainer=trainer), "val", Sampling("first"))
    assert (found.samples_of_a_rank(2), found.sampling) == (3 if divided else 6, Sampling("first"))


# -------------------------------------------------------------------------------------------------------------- devices


def test_a_device_is_named_or_described_or_neither():
    assert named_device(None) is None
    assert named_device(CARD) is CARD
    assert named_device("T4").name == "T4"
    with pytest.raises(TypeError, match=r"^device is the name of a GPU or a Device, not 0$"):
        named_device(0)


def test_the_default_device_is_the_first_gpu_or_else_the_host(monkeypatch):
    monkeypatch.setattr(jobs, "detect_devices", lambda: (HERE, CARD))
    assert default_device() is HERE
    monkeypatch.setattr(jobs, "detect_devices", lambda: ())
    assert default_device().kind == "cpu"


def test_a_trainer_runs_on_the_device_of_its_index(monkeypatch):
    second = replace(HERE, index=1)
    monkeypatch.setattr(jobs, "detect_devices", lambda: (HERE, second))

    def on(device: str) -> Any:
        return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))

    assert device_of_trainer(on("cpu")).kind == "cpu"
    assert device_of_trainer(on("cuda:1")) is second
    assert device_of_trainer(on("cuda")) is HERE
    with pytest.raises(MisconfigurationException, match=r"^the Trainer runs on cuda:2, and the devices found are \(D"):
        device_of_trainer(on("cuda:2"))


# ----------------------------------------------------------------------------- validation that follows the batch size


class Shared(pl.LightningDataModule):
    """``sizes`` gives validation's batch size for that of training."""

    def __init__(self, sizes: Any, held: bool = False) -> None:
        super().__init__()
        self.sizes, self.held = sizes, held
        if held:
            self.save_hyperparameters({"batch_size": 4})
        else:
            self.batch_size = 4

    def val_dataloader(self) -> Any:
        size = self.sizes(self.hparams["batch_size"] if self.held else self.batch_size)
        return DataLoader(torch.zeros(100, 8), batch_size=size)


def shared(sizes: Any, held: bool = False) -> Any:
    data = Shared(sizes, held)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit_loop.epoch_loop.val_loop._data_source.instance = data
    job = replace(training_job(nn.Linear(8, 8), torch.zeros(4, 8), device="T4"), trainer=trainer, datamodule=data)
    validation = DataSource(DataLoader(torch.zeros(100, 8), batch_size=sizes(4)))
    found = share_of_validation(job, validation, 4)
    assert data.val_dataloader().batch_size == sizes(4)  # the user's own is as it was
    return found


@pytest.mark.parametrize("held", [False, True])
def test_validation_that_follows_the_batch_size_of_training(held: bool) -> None:
    assert shared(lambda size: size, held) == 1
    assert shared(lambda size: 3 * size, held) == 3
    assert shared(lambda size: size // 2, held) == Fraction(1, 2)
    assert shared(lambda size: size * size, held) == 8  # 64 of validation for 8


def test_validation_of_a_size_of_its_own_follows_nothing() -> None:
    assert shared(lambda size: 16) is None

    def refuses(size: int) -> int:
        if size != 4:
            raise ValueError("four alone")
        return size

    assert shared(refuses) is None


def test_validation_loaders_that_were_passed_follow_nothing() -> None:
    loader = DataLoader(torch.zeros(100, 8), batch_size=4)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit_loop.epoch_loop.val_loop._data_source.instance = loader
    job = replace(training_job(nn.Linear(8, 8), torch.zeros(4, 8), device="T4"), trainer=trainer)
    assert share_of_validation(job, DataSource(loader), 4) is None
