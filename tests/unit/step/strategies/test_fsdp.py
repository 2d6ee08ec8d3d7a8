"""Parameters in shards: torch's own FullyShardedDataParallel around a copy, on streams that are only noted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import FSDPPrecision
from torch import nn
from torch.distributed.fsdp import CPUOffload, MixedPrecision, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, wrap
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lightning_memplan as mp
from lightning_memplan.lightning.trainer import parallel_of
from lightning_memplan.memory.events import Event
from lightning_memplan.memory.structure import structure_hash
from lightning_memplan.settings import Parallel, StepSettings
from lightning_memplan.step.setup import TrainingSetup
from lightning_memplan.step.strategies.fsdp import _DTYPES
from lightning_memplan.trace.tracer import trace_steps, trace_test, trace_validation
from tests.paths import ROOT

MiB = 2**20
GATHERS, REDUCES, CASTS = 1, 2, 3  # FSDP's streams, in the order in which it makes them
#: two layers, each a unit of its own: 1024 x 8192 weights, and 8192 or 1024 biases, in float32
FIRST, SECOND = 4 * (1024 * 8192 + 8192), 4 * (1024 * 8192 + 1024)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(1024, 8192), nn.ReLU(), nn.Linear(8192, 1024))


def events(ranks: int = 2, rank: int = 0, precision: str = "32-true", parts: int = 1, **arguments: Any) -> list[Event]:
    policy = ModuleWrapPolicy({nn.Linear})
    shards = arguments.pop("shard_ranks", 0)
    arguments = {"auto_wrap_policy": policy, "use_orig_params": True, **arguments}
    parallel = Parallel("fsdp", ranks, arguments, rank=rank, shard_ranks=shards)
    settings = StepSettings(precision=precision, accumulate_grad_batches=parts, parallel=parallel)  # type: ignore[arg-type]
    trace = trace_steps(
        TrainingSetup(net(), settings, optimizer=torch.optim.AdamW), [(4, torch.zeros(4, 1024))]
    ).traces[0]
    return [event for event in trace.events if event.is_free or event.size > MiB]


def made(found: list[Event], *, step: int, category: str | None = None, stream: int | None = None) -> list[int]:
    return [
        e.size
        for e in found
        if not e.is_free and e.step == step and category in (None, e.category) and stream in (None, e.stream)
    ]


def test_each_rank_holds_its_part_of_parameters_gradients_and_optimizer_state():
    found = events(ranks=4)
    freed = {e.block for e in found if e.is_free}
    assert [e.size for e in found if e.step == 0 and e.block not in freed] == [FIRST // 4, SECOND // 4]
    # reduced on a stream of its own; the last layer's come first
    assert made(found, step=3, category="gradients") == [SECOND // 4, FIRST // 4]
    assert made(found, step=3, category="gradients", stream=REDUCES) == [SECOND // 4, FIRST // 4]
    # AdamW's two moments of the first rank's part, in which there are only weights; biases are the last one's
    assert made(found, step=1, category="optimizer") == [FIRST // 4, FIRST // 4, SECOND // 4, SECOND // 4]


def test_layers_are_gathered_when_they_are_needed_and_freed():
    found = events()
    gathered = [e for e in found if not e.is_free and e.step == 2 and e.category == "communication"]
    assert [(e.phase, e.size, e.stream) for e in gathered] == [
        ("forward", FIRST, GATHERS),
        ("forward", SECOND, GATHERS),
        ("backward", SECOND, GATHERS),
        ("backward", FIRST, GATHERS),  # fetched before the second layer's gradient is computed
    ]
    freed = {e.block: found.index(e) for e in found if e.is_free}
    made = {e.block: found.index(e) for e in gathered}
    first, second, again, before = (e.block for e in gathered)
    assert freed[first] < made[second] < freed[second] < made[again] < made[before] < freed[again] < freed[before]


def test_gradients_only_are_sharded():
    found = events(sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)
    gathered = [(e.phase, e.size) for e in found if not e.is_free and e.step == 2 and e.category == "communication"]
    assert gathered == [("forward", FIRST), ("forward", SECOND)]  # and kept until the backward pass is done with them
    assert made(found, step=2, category="gradients") == [SECOND // 2, FIRST // 2]


def test_mixed_precision_gathers_half_the_bytes():
    found = events(precision="bf16-mixed")
    # each shard is cast before it is sent
    assert made(found, step=2, category="communication", stream=CASTS) == [
        s // 4 for s in (FIRST, SECOND, SECOND, FIRST)
    ]
    assert made(found, step=2, category="communication", stream=GATHERS) == [
        s // 2 for s in (FIRST, SECOND, SECOND, FIRST)
    ]
    assert made(found, step=2, category="gradients") == [SECOND // 2, FIRST // 2]  # for the optimizer, in float32


def test_precision_is_what_lightning_makes_of_it():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of full-precision copies, where parameters are of half precision
        found = {name: FSDPPrecision(name).mixed_precision_config for name in _DTYPES}
    assert found == {name: MixedPrecision(dtype, dtype, dtype) for name, dtype in _DTYPES.items()}


def test_precision_of_ones_own_and_precision_that_there_is_not():
    own = MixedPrecision(param_dtype=torch.float32)
    found = events(precision="bf16-mixed", mixed_precision=own)
    assert made(found, step=2, category="communication") == [FIRST, SECOND, SECOND, FIRST]
    with pytest.raises(mp.TraceError, match="FSDP does not train in precision '64-true'"):
        events(precision="64-true")


def test_accumulated_gradients_are_whole():
    found = events(parts=2)
    # DDP and FSDP alike reduce nothing in a batch that only adds up
    assert made(found, step=1, category="gradients") == [SECOND, FIRST]
    assert made(found, step=2, category="gradients") == [SECOND // 2, FIRST // 2]


def test_what_the_host_keeps_is_not_on_the_card():
    found = events(cpu_offload=CPUOffload(offload_params=True))
    freed = {e.block for e in found if e.is_free}
    assert [e for e in found if e.step == 0 and e.block not in freed] == []
    # each shard comes to the card, and from there into what is gathered; its gradient goes back
    assert made(found, step=2, category="communication") == [FIRST, SECOND, SECOND, FIRST]
    assert made(found, step=1, category="optimizer") == []


def test_hybrid_shards_are_of_a_node():
    hybrid: dict[str, Any] = {"sharding_strategy": ShardingStrategy.HYBRID_SHARD, "shard_ranks": 2}
    found = events(ranks=8, rank=5, **hybrid)
    freed = {e.block for e in found if e.is_free}
    assert [e.size for e in found if e.step == 0 and e.block not in freed] == [FIRST // 2, SECOND // 2]
    assert made(found, step=3, category="gradients") == [SECOND // 2, FIRST // 2]


def test_what_is_ignored_is_whole_on_each_rank():
    module = net()
    for ignored in ({"ignored_modules": [module[0]]}, {"ignored_states": [module[0].weight, module[0].bias]}):
        strategy = pl.strategies.FSDPStrategy(auto_wrap_policy={nn.Linear}, **ignored)
        how: dict[str, Any] = {"devices": 4, "strategy": strategy, "optimizer": torch.optim.AdamW, "method": "trace"}
        parts = mp.estimate(module, torch.zeros(4, 1024), **how).breakdown(8)
        assert parts["parameters"] == FIRST + SECOND // 4
        assert parts["optimizer"] == 2 * (FIRST + SECOND // 4)
        with pytest.raises(mp.TraceError, match=r"\(ignored_.*=...\) names what is not in Sequential: plan"):
            mp.estimate(net(), torch.zeros(4, 1024), **how)


def test_ranks_that_are_only_a_group_of_the_users_say_so():
    with pytest.raises(mp.TraceError) as error:
        events(process_group=object())
    assert str(error.value) == "the memory of FSDPStrategy(process_group=...) is not modelled: plan without it"


def test_validation_gathers_too():
    class Validates(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, batch_idx):
            return self.net(batch).sum()

        validation_step = training_step

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    parallel = Parallel("fsdp", 2, {"auto_wrap_policy": ModuleWrapPolicy({nn.Linear}), "use_orig_params": True})
    batch = torch.zeros(4, 1024)
    trace = trace_validation(TrainingSetup(Validates(), StepSettings(parallel=parallel)), batch, [(4, batch)]).traces[0]
    assert made(list(trace.events), step=2, category="communication") == [FIRST, SECOND]
    with pytest.raises(mp.TraceError, match="what each rank holds of sharded parameters in a test is not modelled"):
        trace_test(TrainingSetup(Validates(), StepSettings(parallel=parallel)), [(4, batch)])
    assert not torch.distributed.is_initialized()


def test_what_is_read_of_a_trainers_strategy():
    strategy = pl.strategies.FSDPStrategy(
        auto_wrap_policy={nn.Linear},
        activation_checkpointing_policy={nn.ReLU},
        sharding_strategy="SHARD_GRAD_OP",
        process_group_backend="gloo",
    )
    strategy._parallel_devices, strategy.cluster_environment = [torch.device("cuda", 0)], None
    trainer = SimpleNamespace(strategy=strategy, world_size=4, global_rank=3)
    found = parallel_of(trainer)
    assert found is not None
    assert (found.kind, found.ranks, found.rank, found.backend, found.shards) == ("fsdp", 4, 3, "gloo", True)
    assert found.arguments["sharding_strategy"] is ShardingStrategy.SHARD_GRAD_OP
    assert found.arguments["mixed_precision"] is None  # what the Trainer's precision says
    assert found.arguments["use_orig_params"] is True
    assert found.checkpointing["auto_wrap_policy"]._module_classes == {nn.ReLU}


def test_a_policy_is_the_same_wherever_it_is_in_memory():
    first, second, third = (structure_hash([ModuleWrapPolicy({kind})]) for kind in (nn.Linear, nn.Linear, nn.ReLU))
    assert first == second != third


# -------------------------------------------------------------------------------------------------------------- a mesh


class Meshed(pl.LightningModule):
    """Layers that ``configure_model`` makes, of which each is sharded by itself, or split between ranks."""

    def configure_model(self) -> None:
        self.net = net()
        data, parts = self.device_mesh["data_parallel"], self.device_mesh["tensor_parallel"]
        if parts.size() > 1:
            parallelize_module(self.net, parts, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        for layer in (self.net[0], self.net[2]):
            fully_shard(layer, mesh=data)
        fully_shard(self.net, mesh=data)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def test_a_mesh_shards_parameters():
    module, strategy = Meshed(), pl.strategies.ModelParallelStrategy(data_parallel_size=4, tensor_parallel_size=1)
    est = mp.estimate(module, torch.zeros(4, 1024), method="trace", devices=4, strategy=strategy)
    assert not hasattr(module, "net")
    parts = est.breakdown(8)
    # each layer's bias is sharded by itself; AdamW's two moments, and two scalars that count steps on the host
    assert parts["parameters"] == parts["optimizer"] // 2 == (FIRST + SECOND) // 4
    made = {e.size for e, _ in est.replayer_at(8).live_at_peak(8)} | {e.size for e in est.program.events if e.step == 2}
    assert {FIRST, SECOND} <= made  # gathered, in one block
    assert est.formula.parameter_bytes == FIRST + SECOND
    assert not torch.distributed.is_initialized()


def test_a_mesh_splits_layers():
    strategy = pl.strategies.ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    est = mp.estimate(Meshed(), torch.zeros(4, 1024), method="trace", devices=2, strategy=strategy)
    # a half of both weights and of the first bias; the second bias is whole on each rank
    assert est.breakdown(8)["parameters"] == 4 * (1024 * 8192 + 4096 + 1024)
    first = [
        e.size for e in est.program.events if (e.step, e.phase, e.path) == (2, "forward", "net.0") and not e.is_free
    ]
    assert 2 * 4 * 4096 in first  # half of its features, for the two samples with which the trace begins


def test_sizes_of_a_mesh_make_up_its_devices():
    strategy = pl.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=4)
    with pytest.raises(ValueError, match="ModelParallelStrategy's sizes, 2 and 4, do not make up 4 devices"):
        mp.estimate(Meshed(), torch.zeros(4, 1024), devices=4, strategy=strategy)


# ------------------------------------------------------------------------------------------------- without a Trainer


def test_several_cards_without_a_trainer():
    blocks = pl.strategies.FSDPStrategy(auto_wrap_policy={nn.Linear})
    how: dict[str, Any] = {"optimizer": torch.optim.AdamW, "device": "A100 80GB", "max_batch_size": 64}
    alone, four = (
        mp.plan(net(), torch.zeros(4, 1024), **how, **more) for more in ({}, {"devices": 4, "strategy": blocks})
    )
    assert (alone.batch_size, four.batch_size, alone.method, four.method) == (64, 64, "trace", "trace")
    assert alone.breakdown["optimizer"] >= 2 * (FIRST + SECOND) > 3 * four.breakdown["optimizer"]
    assert (alone.nccl, four.nccl) == (0, 700_000_000)
    assert four.device.context - alone.device.context == 700_000_000
    assert four.budget < alone.budget
    rows = mp.plan_table(four).splitlines()
    assert rows[2] == "    NCCL          667.57 MiB   left to it beside the allocator: an allowance"  # 700e6 / 2**20
    assert "NCCL" not in mp.plan_table(alone)
    # four times the larger layer's 33,587,200 bytes
    assert four.notes == ("where the host runs ahead of the GPU, FSDP may reserve up to 128.12 MiB more",)
    buckets = mp.estimate(net(), torch.zeros(4, 1024), optimizer=torch.optim.AdamW, devices=4)  # DDP
    assert buckets.notes == ()
    ahead = pl.strategies.FSDPStrategy(auto_wrap_policy={nn.Linear}, limit_all_gathers=False)
    (note,) = mp.estimate(net(), torch.zeros(4, 1024), optimizer=torch.optim.SGD, devices=4, strategy=ahead).notes
    assert note == "with limit_all_gathers=False nothing limits what FSDP reserves where the host runs ahead of the GPU"
    assert buckets.breakdown(64)["communication"] >= FIRST + SECOND


def test_which_cards_would_do_together():
    blocks = pl.strategies.FSDPStrategy(auto_wrap_policy={nn.Linear})
    cards = [mp.Device("small", total=10**9), mp.Device("large", total=2 * 10**9)]
    how: dict[str, Any] = {"optimizer": torch.optim.AdamW, "devices": 4, "strategy": blocks, "max_batch_size": 64}
    # 268 MB of parameters, gradients and moments are 67 MB on each of 4 ranks, and one gathered layer is 34 MB; of the
    # small card NCCL leaves 300 MB, of which a twentieth stays free
    assert [size for _, size in mp.cards_for(net(), torch.zeros(4, 1024), cards=cards, **how)] == [64, 64]
    alone = mp.cards_for(net(), torch.zeros(4, 1024), cards=[cards[0]], **{**how, "devices": 1, "strategy": None})
    assert alone[0][1] == 64
    (tight,) = mp.cards_for(net(), torch.zeros(4, 1024), cards=[mp.Device("tiny", total=701 * 10**6)], **how)
    assert tight[1] == 0


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"devices": 0}, "devices is an int of at least 1, not 0"),
        ({"strategy": "ddq", "devices": 2}, "Lightning has no strategy 'ddq': try 'ddp'"),
        (
            {"strategy": "fsdp2", "devices": 2},
            "a module shards itself, and Sequential has no configure_model that does",
        ),
        ({"strategy": "deepspeed", "devices": 2}, "the strategy 'deepspeed' cannot be made here: .*DeepSpeed"),
        (
            {"devices": 2, "trainer": SimpleNamespace(world_size=1)},
            "a Trainer has its own devices and strategy: leave devices and strategy out",
        ),
    ],
)
def test_wrong_arguments(how, message, monkeypatch):
    monkeypatch.setattr("lightning_memplan.planning.job.trainer_settings", lambda trainer: StepSettings())
    with pytest.raises(ValueError, match=message):
        mp.estimate(net(), torch.zeros(4, 1024), **how)


def test_deepspeed_is_never_a_silent_number(monkeypatch):
    deepspeed = object.__new__(pl.strategies.DeepSpeedStrategy)  # no deepspeed is installed to make one
    deepspeed._parallel_devices, deepspeed.cluster_environment = [torch.device("cuda", 0)], None
    deepspeed._process_group_backend, deepspeed.config = "nccl", {"zero_optimization": {"stage": 3}}
    trainer = SimpleNamespace(strategy=deepspeed, world_size=4, global_rank=0)
    found = parallel_of(trainer)
    assert found is not None
    assert (found.kind, found.ranks, found.shards) == ("deepspeed", 4, True)
    assert found.arguments["zero_optimization"] == {"stage": 3}
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    how = {"optimizer": torch.optim.AdamW, "strategy": deepspeed, "devices": 4}
    est = mp.estimate(net(), torch.zeros(4, 1024), **how)
    assert est.method == "formula"
    (note,) = est.notes
    assert note == (
        "planned by the formula, since the step cannot be traced: DeepSpeedStrategy is traced with DeepSpeed's own "
        "engine: pip install 'deepspeed>=0.16'"
    )
    with pytest.raises(mp.TraceError, match="Sequential cannot be traced: DeepSpeedStrategy is traced with"):
        mp.estimate(net(), torch.zeros(4, 1024), method="trace", **how)


def test_layers_that_configure_model_wraps_are_units():
    class Wraps(pl.LightningModule):
        def configure_model(self):
            self.net = net()
            for place in (0, 2):
                self.net[place] = wrap(self.net[place])
            self.net = wrap(self.net)

        def training_step(self, batch, batch_idx):
            return self.net(batch).sum()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    module, how = Wraps(), {"method": "trace", "devices": 2, "strategy": "fsdp"}
    est = mp.estimate(module, torch.zeros(4, 1024), **how)
    assert not hasattr(module, "net")
    assert est.breakdown(8)["parameters"] == (FIRST + SECOND) // 2
    steps = [e for e in est.program.events if e.step == 2 and e.category == "communication" and e.size > MiB]
    assert [e.size for e in steps] == [FIRST, SECOND, SECOND, FIRST]


@pytest.mark.slow
@pytest.mark.further
def test_seven_billion_parameters_are_planned_without_one():
    """On 8 cards of 80 GB, in a process that shows what of the host's memory it took."""
    source = str(Path(mp.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.large_models", "7"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    # Llama's: 32 layers of 4 x 4096² + 3 x 4096 x 11008 + 2 x 4096, two embeddings of 32000 x 4096, and the last norm
    whole = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    assert found["parameters"] == whole == 6738415616
    assert found["method"] == "trace"
    assert found["breakdown"]["parameters"] == found["breakdown"]["gradients"] == 4 * whole // 8
    assert found["breakdown"]["optimizer"] == 2 * 4 * whole // 8
    assert found["batch_size"] >= 2
    assert found["host"] < 2 * 2**30  # of which importing torch and Lightning takes a good half
