"""Parameters in shards: torch's own FullyShardedDataParallel around a copy, on streams that are only noted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import FSDPPrecision
from torch import nn
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import lightning_memplan as mp
from lightning_memplan._history import structure_hash
from lightning_memplan._lightning import parallel_of
from lightning_memplan._step import trace_steps
from lightning_memplan._types import Event, Parallel, StepSettings

MiB = 2**20
GATHERS, REDUCES, CASTS = 1, 2, 3  # FSDP's streams, in the order in which it makes them
#: two layers, each a unit of its own: 1024 x 8192 weights, and 8192 or 1024 biases, in float32
FIRST, SECOND = 4 * (1024 * 8192 + 8192), 4 * (1024 * 8192 + 1024)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(1024, 8192), nn.ReLU(), nn.Linear(8192, 1024))


def events(ranks: int = 2, rank: int = 0, precision: str = "32-true", parts: int = 1, **arguments: Any) -> list[Event]:
    policy = ModuleWrapPolicy({nn.Linear})
    parallel = Parallel("fsdp", ranks, {"auto_wrap_policy": policy, "use_orig_params": True, **arguments}, rank=rank)
    settings = StepSettings(precision=precision, accumulate_grad_batches=parts, parallel=parallel)  # type: ignore[arg-type]
    trace = trace_steps(net(), [(4, torch.zeros(4, 1024))], settings, optimizer=torch.optim.AdamW)[0]
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
    half = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    found = events(precision="bf16-mixed", mixed_precision=half)
    # each shard is cast before it is sent
    assert made(found, step=2, category="communication", stream=CASTS) == [
        s // 4 for s in (FIRST, SECOND, SECOND, FIRST)
    ]
    assert made(found, step=2, category="communication", stream=GATHERS) == [
        s // 2 for s in (FIRST, SECOND, SECOND, FIRST)
    ]
    assert made(found, step=2, category="gradients") == [SECOND // 2, FIRST // 2]  # for the optimizer, in float32


def test_accumulated_gradients_are_whole():
    found = events(parts=2)
    # DDP and FSDP alike reduce nothing in a batch that only adds up
    assert made(found, step=1, category="gradients") == [SECOND, FIRST]
    assert made(found, step=2, category="gradients") == [SECOND // 2, FIRST // 2]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"cpu_offload": SimpleNamespace(offload_params=True)}, "cpu_offload=True"),
        ({"sharding_strategy": ShardingStrategy.HYBRID_SHARD}, "sharding_strategy='HYBRID_SHARD'"),
        ({"ignored_modules": [nn.ReLU()]}, "ignored_modules=..."),
    ],
)
def test_what_is_not_modelled_says_so(arguments, named):
    with pytest.raises(mp.TraceError) as error:
        events(**arguments)
    assert str(error.value) == f"the memory of FSDPStrategy({named}) is not modelled: plan without it"


def test_what_is_read_of_a_trainers_strategy():
    strategy = pl.strategies.FSDPStrategy(
        auto_wrap_policy={nn.Linear},
        activation_checkpointing_policy={nn.ReLU},
        sharding_strategy="SHARD_GRAD_OP",
        process_group_backend="gloo",
    )
    strategy.precision_plugin = FSDPPrecision("bf16-mixed")
    found = parallel_of(SimpleNamespace(strategy=strategy, world_size=4, global_rank=3))
    assert found is not None
    assert (found.kind, found.ranks, found.rank, found.backend, found.shards) == ("fsdp", 4, 3, "gloo", True)
    assert found.arguments["sharding_strategy"] is ShardingStrategy.SHARD_GRAD_OP
    assert found.arguments["mixed_precision"].reduce_dtype is torch.bfloat16
    assert found.arguments["use_orig_params"] is True
    assert found.checkpointing["auto_wrap_policy"]._module_classes == {nn.ReLU}


def test_a_policy_is_the_same_wherever_it_is_in_memory():
    first, second, third = (structure_hash([ModuleWrapPolicy({kind})]) for kind in (nn.Linear, nn.Linear, nn.ReLU))
    assert first == second != third
