"""What a strategy's wrapper takes: torch's own DistributedDataParallel, around a copy, in a group that says nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import nn

import lightning_memplan as mp
from lightning_memplan.lightning.trainer import parallel_of
from lightning_memplan.memory.events import EMPTY, Event, Stream
from lightning_memplan.planning.proposal import RankResult, deciding_rank, see_failures
from lightning_memplan.settings import Parallel, StepSettings
from lightning_memplan.step.backend import StepBackend
from lightning_memplan.step.context import EventContext
from lightning_memplan.step.fake_cuda import DEVICE
from lightning_memplan.step.precision import FakeGradScaler
from lightning_memplan.step.setup import TrainingSetup
from lightning_memplan.step.strategies.base import SingleDeviceStrategy, UnmodelledStrategy
from lightning_memplan.step.strategies.choose import choose_strategy
from lightning_memplan.step.strategies.ddp import DDPStrategy
from lightning_memplan.step.strategies.deepspeed import DeepSpeedStrategy
from lightning_memplan.step.strategies.fsdp import FSDPStrategy
from lightning_memplan.step.strategies.model_parallel import ModelParallelStrategy
from lightning_memplan.step.strategies.process_group import fake_ranks
from lightning_memplan.step.strategies.sharding import ShardingStrategy
from lightning_memplan.trace.tracer import trace_steps
from tests.paths import PROGRAMS

MiB = 2**20


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(1024, 8192), nn.ReLU(), nn.Linear(8192, 1024))


#: of two layers, 1024 x 8192 weights each, and 8192 + 1024 biases, in float32
GRADIENTS = 4 * (2 * 1024 * 8192 + 8192 + 1024)


def communication(accumulate_grad_batches: int = 1, **arguments: Any) -> list[Event]:
    settings = StepSettings(accumulate_grad_batches=accumulate_grad_batches, parallel=Parallel("ddp", 2, arguments))
    trace = trace_steps(TrainingSetup(net(), settings, optimizer=torch.optim.SGD), [(4, torch.zeros(4, 1024))]).traces[
        0
    ]
    return [event for event in trace.events if event.category == "communication" and event.size > MiB]


def test_buckets_are_made_once_and_made_anew_in_the_second_step():
    first, second, *rebuilt = communication()
    # parameters go to all ranks in one copy, and then there is one bucket of all gradients, on a stream of their own
    assert [(e.step, e.size, e.stream) for e in (first, second)] == [(0, GRADIENTS, Stream.STRATEGY)] * 2
    # in the order in which gradients came, the second layer's bias and weight first: a bucket is full from 25 MiB on,
    # and its last gradient goes in whole (torch.nn.parallel.DistributedDataParallel, bucket_cap_mb)
    assert [(e.step, e.stream) for e in rebuilt] == [(2, 0)] * 2
    assert [e.size for e in rebuilt] == [4 * (1024 * 8192 + 1024), 4 * (1024 * 8192 + 8192)]


def test_gradients_may_be_views_of_buckets():
    trace = trace_steps(
        TrainingSetup(
            net(),
            StepSettings(parallel=Parallel("ddp", 2, {"gradient_as_bucket_view": True})),
            optimizer=torch.optim.SGD,
        ),
        [(4, torch.zeros(4, 1024))],
    ).traces[0]
    assert not [e for e in trace.events if e.category == "gradients" and e.step == 3 and e.size > MiB]
    assert sum(e.size for e in trace.events if e.category == "communication" and e.step == 2) >= GRADIENTS


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        # in the parameters' order, and so they stay, where each step may leave others out; the last, a bias, is small
        ({"find_unused_parameters": True}, {0: [4 * (1024 * 8192 + 8192), 4 * 1024 * 8192]}),
        # the first step only learns the graph
        ({"static_graph": True}, {0: [GRADIENTS], 3: [4 * (1024 * 8192 + 1024), 4 * (1024 * 8192 + 8192)]}),
        # one bucket for them all
        ({"bucket_cap_mb": 100}, {0: [GRADIENTS], 2: [GRADIENTS]}),
    ],
)
def test_arguments_of_the_wrapper(arguments, sizes):
    copy, *buckets = communication(**arguments)
    assert copy.size == GRADIENTS
    assert {step: [e.size for e in buckets if e.step == step] for step in sizes} == sizes
    assert len(buckets) == sum(map(len, sizes.values()))


def test_batches_that_are_only_added_up_reduce_nothing():
    steps = [event.step for event in communication(accumulate_grad_batches=2) if event.step]
    assert set(steps) == {3}  # the first optimizer step is of batches 1 and 2: buckets are made anew after it


def test_a_group_that_says_nothing_is_there_only_inside():
    assert not dist.is_initialized()
    with fake_ranks(4):
        assert (dist.get_world_size(), dist.get_rank()) == (4, 0)
        value = torch.ones(3)
        dist.all_reduce(value)
        dist.broadcast(value, 0)
        dist.barrier()
        assert value.tolist() == [1.0, 1.0, 1.0]
    assert not dist.is_initialized()


def test_what_is_read_of_a_trainers_strategy():
    settings = {"accelerator": "cpu", "devices": 2, "logger": False, "enable_checkpointing": False}
    strategy = pl.strategies.DDPStrategy(gradient_as_bucket_view=True, static_graph=True)
    found = parallel_of(pl.Trainer(strategy=strategy, **settings))
    assert found == Parallel("ddp", 2, {"gradient_as_bucket_view": True, "static_graph": True}, backend="gloo")
    found = parallel_of(pl.Trainer(strategy="ddp_spawn_find_unused_parameters_true", **settings))
    assert found == Parallel("ddp", 2, {"find_unused_parameters": True}, backend="gloo")
    assert parallel_of(pl.Trainer(**{**settings, "devices": 1})) is None


def test_lightning_empties_the_cache_before_the_first_step():
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, batch_idx):
            return self.net(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    est = mp.estimate(Module(), torch.zeros(4, 1024))
    assert [event.step for event in est.program.events if event.size == EMPTY] == [0]
    assert est.peak(64) == est.replay(64).peak_reserved


def test_the_smallest_decides_and_all_fail_with_the_reason():
    words = [RankResult("A100", 512), RankResult("RTX 3090", 96, "dataset")]
    assert deciding_rank(words) == 1
    with pytest.raises(mp.MemplanError, match=r"for all 3 ranks; rank 2: DoesNotFitError: it needs more"):
        see_failures([*words, RankResult(reason="DoesNotFitError: it needs more", fatal=True)])


KINDS = {
    "views, as in a notebook": (
        "ddp",
        {"precision": "16-mixed"},
        {"gradient_as_bucket_view": True, "start_method": "fork"},
    ),
    "buckets, and norms over both": (
        "normed",
        {"precision": "bf16-mixed", "sync_batchnorm": True},
        {"find_unused_parameters": True},
    ),
    "mesh": ("mesh", {}, {"data_parallel_size": 2, "tensor_parallel_size": 1}),
    "shards": ("fsdp", {"precision": "bf16-mixed", "accumulate_grad_batches": 2}, {"checkpointed": True}),
    "wrapped by hand, kept by the host": ("fsdp", {"precision": "bf16-mixed"}, {"wraps": True, "cpu_offload": True}),
    "hybrid, without what is ignored": (
        "fsdp",
        {"precision": "16-mixed"},
        {"ignores": True, "sharding_strategy": "HYBRID_SHARD", "device_mesh": [1, 2]},
    ),
}


#: one of Lightning's wrapper, one of a mesh and one of shards are tested by default
FURTHER = ("views, as in a notebook", "wrapped by hand, kept by the host", "hybrid, without what is ignored")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.further] if kind in FURTHER else []) for kind in KINDS]
)
def test_two_ranks_are_predicted(nullgpu, tmp_path, kind):
    """Two cards of 24 and 16 GB: both ranks train with what fits the smaller one."""
    (strategy, settings, given), within = KINDS[kind], 0.05 if kind in ("mesh", "shards") else 0.03
    script = PROGRAMS / "ranks.py"
    source = str(Path(mp.__file__).parents[1])
    arguments = [sys.executable, str(script), str(tmp_path), strategy, json.dumps(settings), json.dumps(given)]
    memory = "24000000000,16000000000"
    done = nullgpu(arguments, PYTHONPATH=source, NULLGPU_COUNT=2, NULLGPU_MEMORY=memory)
    large, small = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert done.stderr.count("memory plan for") + done.stdout.count("memory plan for") == 1
    assert (large["total"], small["total"]) == (24000000000, 16000000000)
    assert large["batch_size"] == small["batch_size"] == large["set"] == small["set"]
    assert any("rank 1 (NVIDIA GeForce RTX 3090) decides for all" in note for note in large["notes"])
    for rank in (large, small):
        assert rank["method"] == ("probe" if strategy in ("ddp", "normed") else "trace")
        assert len(rank["measured"]) == 4 * settings.get("accumulate_grad_batches", 1)
        for predicted_allocated, allocated, predicted_reserved, reserved in rank["measured"]:
            assert predicted_allocated == pytest.approx(allocated, rel=within)
            assert predicted_reserved == pytest.approx(reserved, rel=within)
    assert 0.9 * small["total"] <= max(m[3] for m in small["measured"]) <= small["total"]
    (log,) = (tmp_path / "logs").glob("events*")  # the first rank's
    assert log.read_bytes().count(b"custom_scalars__config__") == 1


# ---------------------------------------------------------------------------------------------------- which strategy


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("ddp", DDPStrategy),
        ("fsdp", FSDPStrategy),
        ("model_parallel", ModelParallelStrategy),
        ("deepspeed", DeepSpeedStrategy),
        ("other", UnmodelledStrategy),
    ],
)
def test_each_kind_has_a_strategy(kind, strategy):
    parallel = Parallel(kind, ranks=2)
    found = choose_strategy(parallel)
    assert type(found) is strategy
    assert found.parallel is parallel
    assert isinstance(found, ShardingStrategy) == parallel.shards
    assert found.calls_configure_model == (kind == "model_parallel")


def test_one_device_has_a_strategy_that_wraps_nothing():
    strategy, context = choose_strategy(None), EventContext()
    replica = nn.Linear(2, 1)
    backend = StepBackend(context, DEVICE, FakeGradScaler(context, DEVICE))
    assert type(strategy) is SingleDeviceStrategy
    with strategy.environment(backend):
        assert not dist.is_initialized()
        assert strategy.setup(replica, backend, StepSettings(), list) == []
    assert strategy.wrapper is None
    assert strategy.run_step(replica, lambda batch: batch + 1, 1, context) == 2


@pytest.mark.parametrize(
    ("kind", "precision", "input_dtype", "loss", "scales"),
    [  # a loss of 6 of one of three microbatches counts as 2; DeepSpeed's engine divides and scales it by itself
        ("ddp", "16-mixed", None, 2, True),
        ("fsdp", "bf16-mixed", None, 2, False),
        ("ddp", "bf16-true", torch.bfloat16, 2, False),
        ("deepspeed", "16-mixed", torch.float16, 6, False),
    ],
)
def test_what_a_strategy_does_to_batch_and_loss(kind, precision, input_dtype, loss, scales):
    strategy = choose_strategy(Parallel(kind, ranks=2))
    assert strategy.input_dtype(precision) == input_dtype
    assert strategy.normalize(torch.tensor(6.0), 3) == loss
    assert strategy.scales_loss(precision) == scales
