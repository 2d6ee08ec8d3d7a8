"""ZeRO: DeepSpeed's own engine around a copy. What needs the engine is skipped where deepspeed is not installed."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import lightning_memplan as mp
from lightning_memplan.settings import StepSettings
from lightning_memplan.step.strategies.deepspeed import _config
from tests.paths import PROGRAMS, ROOT

engine = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch.*")  # DeepSpeed's names of collectives

ROWS = json.loads((ROOT / "benchmarks/accuracy/rows/deepspeed.json").read_text())


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(1024, 8192), nn.ReLU(), nn.Linear(8192, 1024))


WHOLE = 2 * 1024 * 8192 + 8192 + 1024  # its parameters
BUCKET = 10**6


def estimated(ranks: int = 2, precision: str = "bf16-mixed", **arguments: Any) -> mp.Estimate:
    sizes = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET, **arguments}
    return mp.estimate(
        net(),
        torch.zeros(4, 1024),
        optimizer=torch.optim.AdamW,
        precision=precision,
        devices=ranks,
        strategy=pl.strategies.DeepSpeedStrategy(**sizes),
        method="trace",
    )


def buckets(est: mp.Estimate, step: int) -> list[int]:
    assert est.program is not None
    return [
        e.size for e in est.program.events if (e.step, e.category) == (step, "communication") and e.size == 2 * BUCKET
    ]


@engine
def test_stage_2_holds_all_parameters_and_a_part_of_the_rest():
    est = estimated(4)
    found = est.breakdown(8)
    # two bytes for each parameter, and four for those that this rank updates; AdamW's two moments of them
    assert found["parameters"] == pytest.approx(2 * WHOLE + 4 * WHOLE / 4, abs=64)
    assert found["optimizer"] == pytest.approx(2 * 4 * WHOLE / 4, abs=64)
    # a bucket is reduced while the other is filled (overlap_comm)
    assert buckets(est, step=3) == [2 * BUCKET] * 2


@engine
def test_stage_3_holds_a_part_of_everything():
    est = estimated(4, stage=3)
    found = est.breakdown(8)
    assert found["parameters"] == pytest.approx((2 + 4) * WHOLE / 4, abs=64 * 1024)  # biases are whole on each rank
    assert found["optimizer"] == pytest.approx(2 * 4 * WHOLE / 4, abs=64)
    assert found["gradients"] == pytest.approx(2 * WHOLE / 4, abs=64)
    assert buckets(est, step=0) == [2 * BUCKET]


@engine
def test_an_engine_that_ran_in_a_trace_leaves_nothing():
    from deepspeed.accelerator import real_accelerator
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    def state() -> list[Any]:
        owners = (real_accelerator, "ds_accelerator"), (comm, "cdb"), (groups, "_WORLD_GROUP"), (groups, "mpu")
        torch_own = nn.functional.linear, torch.Tensor.item, torch.Tensor.record_stream, torch.Tensor.__bool__
        return [*(getattr(*owner) for owner in owners), *torch_own, os.environ.get("LOCAL_RANK")]

    before, module = state(), net()
    weights = [p.detach().clone() for p in module.parameters()]
    strategy = pl.strategies.DeepSpeedStrategy(stage=3)
    config = json.dumps(strategy.config)
    how = {"optimizer": torch.optim.AdamW, "precision": "bf16-mixed", "devices": 2, "strategy": strategy}
    est = mp.estimate(module, torch.zeros(4, 1024), method="trace", **how)
    assert state() == before
    assert json.dumps(strategy.config) == config
    assert all(map(torch.equal, weights, module.parameters()))
    assert not torch.distributed.is_initialized()
    (note,) = est.notes
    version = sys.modules["deepspeed"].__version__
    assert note == (
        f"ZeRO stage 3, as the engine of DeepSpeed {version} runs it: where the host runs ahead of the GPU, it may "
        "reserve more"
    )


@engine
@pytest.mark.slow
@pytest.mark.parametrize(
    "row", ROWS["rows"], ids=lambda row: f"{row['net']} {row['arguments']['stage']} {row['precision']}"
)
def test_steps_are_as_they_were_measured(row):
    """The first rank's, on two null GPUs over gloo (benchmarks/accuracy/rows/README.md)."""
    from tests.programs.ranks import NETS, Classifier

    make, shape = NETS[row["net"]]
    strategy = pl.strategies.DeepSpeedStrategy(process_group_backend="gloo", **row["arguments"])
    batch = (torch.zeros(4, *shape), torch.zeros(4, dtype=torch.int64))
    how = {"precision": row["precision"], "devices": 2, "strategy": strategy}
    est = mp.estimate(Classifier(make()), batch, method="trace", **how)
    allocated, reserved = (max(steps) for steps in zip(*row["measured"], strict=True))
    assert est.peak_allocated(row["batch_size"]) == pytest.approx(allocated, rel=0.05)
    assert est.peak(row["batch_size"]) == pytest.approx(reserved, rel=0.05)


@engine
@pytest.mark.slow
def test_two_ranks_are_predicted(nullgpu, tmp_path):
    source, script = str(Path(mp.__file__).parents[1]), PROGRAMS / "ranks.py"
    arguments = json.dumps({"net": "mlp", "stage": 2})
    given = [sys.executable, str(script), str(tmp_path), "deepspeed", '{"precision": "bf16-mixed"}', arguments]
    nullgpu(given, PYTHONPATH=source, NULLGPU_COUNT=2, NULLGPU_MEMORY="24000000000,16000000000")
    large, small = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert large["batch_size"] == small["batch_size"] == large["set"] == small["set"]
    for predicted_allocated, allocated, predicted_reserved, reserved in large["measured"] + small["measured"]:
        assert predicted_allocated == pytest.approx(allocated, rel=0.05)
        assert predicted_reserved == pytest.approx(reserved, rel=0.05)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        (
            {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}},
            "'optimizer' of DeepSpeed's configuration",
        ),
        ({}, "stage 0"),
    ],
)
def test_what_is_not_modelled_is_said(given, named):
    with pytest.raises(mp.TraceError) as error:
        _config(given, StepSettings("bf16-mixed"))
    assert str(error.value) == f"the memory of DeepSpeedStrategy with {named} is not modelled: plan without it"


def test_a_configuration_is_completed_as_lightning_does():
    zero = {"zero_optimization": {"stage": 2}, "train_batch_size": 64}
    assert _config(zero, StepSettings("16-mixed", gradient_clip_val=0.5, accumulate_grad_batches=3)) == {
        "zero_optimization": {"stage": 2},
        "gradient_accumulation_steps": 3,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.5,
        "fp16": {"enabled": True},
    }
    with pytest.raises(mp.TraceError, match="DeepSpeed does not train in precision '64-true'"):
        _config(zero, StepSettings("64-true"))


@engine
def test_what_lightning_refuses_is_said():
    class Two(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, batch_idx):
            return self.net(batch).sum()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[0].parameters()), torch.optim.SGD(self.net[2].parameters())]

    how = {"devices": 2, "strategy": "deepspeed_stage_2", "method": "trace", "precision": "bf16-mixed"}
    with pytest.raises(mp.TraceError, match="DeepSpeed takes one optimizer, and configure_optimizers gives 2"):
        mp.estimate(Two(), torch.zeros(4, 1024), **how)
    by_hand = Two()
    by_hand.automatic_optimization = False
    with pytest.raises(mp.TraceError, match="manual optimization with DeepSpeedStrategy is not modelled"):
        mp.estimate(by_hand, torch.zeros(4, 1024), **how)
