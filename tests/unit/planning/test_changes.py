"""The changes that advice tries: which apply to what, how each is described, and what it does to a replica alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import lightning_memplan as mp
from lightning_memplan.memory.allocator_settings import AllocatorSettings
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.memory.events import Event, Trace
from lightning_memplan.memory.formula import Formula
from lightning_memplan.memory.program import scale
from lightning_memplan.planning import changes as changing
from lightning_memplan.planning.changes import (
    DoesNotApplyError,
    TracedJob,
    changes,
    checkpoint_themselves,
    checkpointed,
    largest,
    sharding_changes,
)
from lightning_memplan.planning.job import Training, training_job
from lightning_memplan.settings import NCCL, Parallel
from lightning_memplan.trace import tracer

MiB, GiB = 2**20, 2**30
FORMULA = Formula((), 1000, 900, 10, 45)
AMPERE = mp.Device("a card", total=GiB, capability=(8, 6))
BATCH = torch.zeros(4, 8)
ADAM = partial(torch.optim.Adam, lr=0.1)
SGD = partial(torch.optim.SGD, lr=0.1)


def estimate(*parts: tuple[str, int], each: int = MiB, **fields: Any) -> Estimate:
    """Return an estimate of blocks by category, in bytes, and of ``each`` bytes a sample."""
    held = [Event(k, size, "setup", category=name) for k, (name, size) in enumerate(parts)]
    traces = [Trace(n, (*held, Event(len(parts), n * each, "forward", 1))) for n in (2, 3, 5)]
    return Estimate("trace", FORMULA, scale(traces), **fields)


def traced_job(module: Any, batch: Any = BATCH, found: Any = None, device: Any = AMPERE, **how: Any) -> TracedJob:
    job = training_job(module, batch, Training(**how), device=device, method="trace")
    return TracedJob(job, found or estimate(notes=("known",)), job.source.samples.batches())


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, scale=1):
        return x + self.two(self.one(x).relu()) * scale


class Net(pl.LightningModule):
    def __init__(self, net=None, make=ADAM):
        super().__init__()
        self.net, self.make = net or nn.Linear(8, 8), make

    def training_step(self, batch, batch_idx):
        return self.net(batch).sum()

    def configure_optimizers(self):
        return self.make(self.parameters())


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class KeepsGradients(Net):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


class ChecksItself(nn.Module):
    supports_gradient_checkpointing = True

    def __init__(self):
        super().__init__()
        self.blocks, self.asked = nn.ModuleList(Block() for _ in range(3)), []

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs):
        self.asked.append(gradient_checkpointing_kwargs)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


# ------------------------------------------------------------------------------------------------------ what is listed


def listed(job, batch_size=8, *kinds):
    return [
        (change.kind, change.text, change.cost, change.parts, change.nccl)
        for change in changes(job, batch_size)
        if not kinds or change.kind in kinds
    ]


def test_changes_of_a_layer_and_what_each_costs():
    assert listed(traced_job(nn.Linear(8, 8))) == [
        ("precision", "precision='bf16-mixed'", "half-precision arithmetic where autocast allows it", 1, 0),
        (
            "precision",
            "precision='bf16-true'",
            "weights and optimizer state in half precision: see that it still learns",
            1,
            0,
        ),
        ("optimizer", "the optimizer with fused=True", "none: the same steps, in one kernel", 1, 0),
        ("optimizer", "the optimizer with foreach=False", "more, smaller kernels: a slower optimizer step", 1, 0),
        (
            "optimizer",
            "bitsandbytes' optimizer of that name in 8 bits (Adam8bit, AdamW8bit, SGD8bit)",
            "its state is rounded: see that it still learns",
            1,
            0,
        ),
        ("optimizer", "torch.optim.SGD without momentum", "another optimizer: it may train worse", 1, 0),
        (
            "accumulation",
            "accumulate_grad_batches=2 at batch size 4",
            "smaller batches use the GPU less well; batch norm sees fewer samples",
            2,
            0,
        ),
        ("allocator", "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True", "none on Linux", 1, 0),
    ]


@pytest.mark.parametrize(
    ("precision", "capability", "others"),
    [
        ("64-true", (8, 6), ["32-true", "bf16-mixed", "bf16-true"]),
        ("32-true", (8, 0), ["bf16-mixed", "bf16-true"]),  # which is the first that has bfloat16
        ("32-true", (7, 5), ["16-mixed", "16-true"]),
        ("16-mixed", (7, 5), ["16-true"]),
        ("bf16-mixed", (9, 0), ["bf16-true"]),
        ("16-true", (8, 6), []),
        ("bf16-true", (8, 6), []),
    ],
)
def test_lower_precisions_are_tried(monkeypatch, precision, capability, others):
    device = mp.Device("a card", total=GiB, capability=capability)
    job = traced_job(nn.Linear(8, 8), device=device, precision=precision, accumulate_grad_batches=3)
    assert [text for _, text, *_ in listed(job, 8, "precision")] == [f"precision={other!r}" for other in others]
    if others[:1] == ["32-true"]:
        assert listed(job, 8, "precision")[0][2] == "single precision"
    asked = recorded(monkeypatch)
    for change in changes(job, 8):
        if change.kind == "precision":
            change.make()
    assert [setup.settings for setup, _, _ in asked] == [replace(job.settings, precision=other) for other in others]


@pytest.mark.parametrize(
    ("module", "batch_size", "parts", "text"),
    [
        (nn.Linear(8, 8), 9, 3, "accumulate_grad_batches=6 at batch size 4"),
        (Net(), 2, 1, "accumulate_grad_batches=2 at batch size 1"),
        (nn.Linear(8, 8), 1, 1, None),  # which cannot be halved
        (Manual(), 8, 1, None),  # training_step decides what is accumulated
    ],
    ids=["a layer", "automatic", "one sample", "manual"],
)
def test_half_a_batch_is_accumulated_twice_as_often(monkeypatch, module, batch_size, parts, text):
    job = traced_job(module, accumulate_grad_batches=parts)
    found = listed(job, batch_size, "accumulation")
    assert [row[1] for row in found] == ([] if text is None else [text])
    if text is not None:
        (setup, _, _) = made(monkeypatch, job, "accumulation", batch_size)
        assert setup.settings == replace(job.settings, accumulate_grad_batches=2 * parts)


def test_segments_that_cannot_grow_yet_are_let_grow():
    settings = AllocatorSettings(max_split_size=64 * MiB)
    job = traced_job(nn.Linear(8, 8), found=estimate(settings=settings, notes=("known",)))
    (change,) = (each for each in changes(job, 8) if each.kind == "allocator")
    after = change.make()
    assert after == replace(job.found, settings=replace(settings, expandable_segments=True))
    assert not [each for each in changes(replace(job, found=after), 8) if each.kind == "allocator"]


def test_gradients_are_freed_where_a_module_keeps_them(monkeypatch):
    assert listed(traced_job(Net()), 8, "zero_grad") == []
    module = KeepsGradients()
    job = traced_job(module)
    assert listed(job, 8, "zero_grad") == [
        ("zero_grad", "optimizer.zero_grad(set_to_none=True) in optimizer_zero_grad", "none", 1, 0)
    ]
    (setup, _, _) = made(monkeypatch, job, "zero_grad")
    optimizer = SGD([nn.Parameter(torch.zeros(2))])
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.zeros(2)
    setup.module.optimizer_zero_grad(0, 0, optimizer)
    assert parameter.grad is None
    assert "optimizer_zero_grad" not in module.__dict__


# ------------------------------------------------------------------------------------------------- what a change does


def recorded(monkeypatch) -> list[Any]:
    """Note the setup, the batches and the beginning of each step that would be traced."""
    asked: list[Any] = []

    def trace_steps(setup, batches, *, beginning):
        asked.append((setup, batches, beginning))
        return tracer.TraceResult(tuple(Trace(n, (Event(0, 7 * n, "forward", 1),)) for n in (2, 3, 5)))

    monkeypatch.setattr(changing, "trace_steps", trace_steps)
    return asked


def made(monkeypatch, job, kind, batch_size=8, place=0):
    """Make a change of a kind, without a trace; return what would have been traced."""
    asked = recorded(monkeypatch)
    found = [change for change in changes(job, batch_size) if change.kind == kind]
    after = found[place].make()
    assert after == replace(job.found, program=after.program)
    assert after.program.batch_sizes == (2, 3, 5)
    return asked[-1]


def test_a_job_is_traced_again_from_its_beginning(monkeypatch):
    job = traced_job(Net())
    asked = recorded(monkeypatch)
    assert job.module is job.job.module
    assert job.settings is job.job.settings
    after = job.again()
    assert after == replace(job.found, program=after.program)
    assert asked[0] == (job.job.setup, job.batches, job.job.beginning())
    other = [(2, torch.zeros(2, 8))]
    job.again(batches=other, settings=replace(job.settings, accumulate_grad_batches=2))
    setup, batches, beginning = asked[1]
    assert (setup.settings.accumulate_grad_batches, batches, beginning) == (2, other, job.job.beginning())


def test_blocks_are_checkpointed_on_a_replica(monkeypatch):
    net = nn.Sequential(*(Block() for _ in range(2)))
    job = traced_job(net)
    text = "torch.utils.checkpoint around each of the 2 blocks (Block), use_reentrant=False"
    assert listed(job, 8, "checkpointing") == [("checkpointing", text, "their forward runs twice", 1, 0)]
    (setup, _, _) = made(monkeypatch, job, "checkpointing")
    calls = []
    monkeypatch.setattr(changing, "checkpoint", lambda function, *args, **how: calls.append((function, args, how)))
    for block in setup.module:
        block("x", scale=2)
    assert [(args, how) for _, args, how in calls] == [(("x",), {"use_reentrant": False, "scale": 2})] * 2
    assert [function.args for function, *_ in calls] == [(block,) for block in setup.module]
    assert calls[0][0].func is Block.forward
    assert "forward" not in net[0].__dict__


def test_models_that_checkpoint_themselves_are_asked_to(monkeypatch):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.XLNet, self.second = ChecksItself(), ChecksItself()

    net = Two()
    job = traced_job(net)
    enable = "gradient_checkpointing_enable({'use_reentrant': False})"
    text = f"XLNet.{enable} and second.{enable}"
    assert listed(job, 8, "checkpointing") == [("checkpointing", text, "their forward runs twice", 1, 0)]
    (setup, _, _) = made(monkeypatch, job, "checkpointing")
    assert setup.module.XLNet.asked == setup.module.second.asked == [{"use_reentrant": False}]
    assert net.XLNet.asked == []
    assert listed(traced_job(ChecksItself()), 8, "checkpointing")[0][1] == enable


def test_a_replica_has_the_trainer_of_the_module(monkeypatch):
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=7)
    (setup, _, _) = made(monkeypatch, traced_job(KeepsGradients(), trainer=trainer), "zero_grad")
    assert setup.module.trainer.max_epochs == 7


class CannotCheckItself(ChecksItself):
    supports_gradient_checkpointing = False


class SaysItCan(nn.Module):
    supports_gradient_checkpointing = True


class SaysNothing(nn.Module):
    def gradient_checkpointing_enable(self):
        """Do it in another way than transformers' models."""


def test_the_outermost_models_that_can_checkpoint_themselves():
    outer = ChecksItself()
    outer.inner = ChecksItself()
    others = {"no": CannotCheckItself(), "says": SaysItCan(), "nothing": SaysNothing()}
    both = nn.ModuleDict({"net": outer, "net2": ChecksItself(), **others})
    assert [path for path, _ in checkpoint_themselves(both)] == ["net", "net2"]
    assert checkpoint_themselves(both)[0][1] is outer
    assert checkpoint_themselves(outer) == [("", outer)]
    assert checkpoint_themselves(nn.Linear(8, 8)) == []


class Other(Block):
    pass


@pytest.mark.parametrize(
    ("net", "paths"),
    [
        (nn.Sequential(Block(), Block()), ["0", "1"]),
        (nn.ModuleList([Block(), nn.Linear(8, 8), Block()]), ["0", "2"]),
        (nn.ModuleDict({"a": nn.Sequential(Block(), Block(), Other())}), ["a.0", "a.1"]),  # one of a class is no other
        (nn.ModuleDict({"a": nn.Sequential(Block(), Block()), "ab": nn.Sequential(Other(), Other())}), 4),
        (nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block())), 4),  # of those within
        (nn.ModuleList([nn.ModuleList([Block(), Block()])]), ["0.0", "0.1"]),
        (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), []),  # layers are no blocks
        (nn.ModuleDict({"a": Block(), "b": Block()}), ["a", "b"]),  # the network's own parts
        (nn.ModuleDict({"net": nn.ModuleDict({"a": Block(), "b": Other(), "head": nn.Linear(8, 8)})}), 2),
        (nn.ModuleDict({"a": Block(), "list": nn.ModuleList([Block()]), "dict": nn.ModuleDict({"c": Block()})}), ["a"]),
    ],
    ids=str,
)
def test_blocks_that_repeat_or_else_parts_are_checkpointed(net, paths):
    found = checkpointed(net)
    assert all(net.get_submodule(path) is child for path, child in found)
    if isinstance(paths, int):
        assert len(found) == paths
    else:
        assert [path for path, _ in found] == paths


def test_blocks_within_blocks_are_theirs():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(Block(), Block())

    net = nn.ModuleDict({"outer": nn.Sequential(Holds(), Holds()), "outer2": nn.Sequential(Block(), Block())})
    assert [path for path, _ in checkpointed(net)] == ["outer.0", "outer.1", "outer2.0", "outer2.1"]


def test_nested_parts_are_named_by_their_path():
    inner = nn.ModuleDict({"a": Block(), "b": Other()})
    assert [path for path, _ in checkpointed(nn.ModuleDict({"x": nn.ModuleDict({"y": inner})}))] == ["x.y.a", "x.y.b"]


@pytest.mark.parametrize(
    ("blocks", "text"),
    [
        ([Block(), Block()], "the 2 blocks (Block)"),
        ([Other(), Block(), Block()], "the 3 blocks (Block, Other)"),
        ([Block(), Other()], "0, 1"),  # a class for each
        ([nn.Sequential(), nn.Sequential(), Block()], "0, 1, 2"),  # whose class says nothing
    ],
)
def test_blocks_are_named_by_their_classes_or_paths(blocks, text):
    assert changing._named([(str(k), block) for k, block in enumerate(blocks)]) == text


# --------------------------------------------------------------------------------------------------------------- layout


def last(layer):
    return layer.to(memory_format=torch.channels_last if layer.weight.dim() == 4 else torch.channels_last_3d)


@pytest.mark.parametrize(
    ("layers", "formats"),
    [
        ([nn.Conv2d(3, 4, 3)], ["channels_last"]),
        ([nn.ConvTranspose2d(3, 4, 3)], ["channels_last"]),
        ([nn.Conv3d(3, 4, 3)], ["channels_last_3d"]),
        ([nn.ConvTranspose3d(3, 4, 3), nn.Conv2d(3, 4, 3)], ["channels_last", "channels_last_3d"]),
        ([last(nn.Conv2d(3, 4, 3))], []),
        ([last(nn.Conv2d(3, 4, 3)), nn.Conv2d(3, 4, 3)], ["channels_last"]),
        ([nn.Conv1d(3, 4, 3), nn.Linear(3, 4)], []),
    ],
)
def test_convolutions_have_formats_that_others_have_not(monkeypatch, layers, formats):
    net = nn.Sequential(*layers)
    job = traced_job(net)
    text = " and ".join(f"module.to(memory_format=torch.{name})" for name in formats)
    rows = [("layout", text, "none; with half precision it is faster", 1, 0)] if formats else []
    assert listed(job, 8, "layout") == rows
    if not formats:
        return
    before = [parameter.stride() for parameter in net.parameters()]
    (setup, _, _) = made(monkeypatch, job, "layout")
    assert changing._formats(setup.module) == []
    assert [parameter.stride() for parameter in net.parameters()] == before
    shapes = [parameter.shape for parameter in net.parameters()]
    assert [parameter.shape for parameter in setup.module.parameters()] == shapes


def test_a_format_is_given_to_parameters_of_its_dimensions_alone(monkeypatch):
    net = nn.Sequential(last(nn.Conv3d(3, 4, 3)), nn.Conv2d(3, 4, 3), nn.Linear(2, 2))
    (setup, _, _) = made(monkeypatch, traced_job(net), "layout")
    assert [p.stride() for p in setup.module[0].parameters()] == [p.stride() for p in net[0].parameters()]
    assert setup.module[1].weight.stride() == (27, 1, 9, 3)  # 4 x 3 x 3 x 3: channels of a pixel side by side


# ------------------------------------------------------------------------------------------------------------- sharding


def shards(monkeypatch, module, found, after, **how):
    """Return what is yielded, and how many GPUs were tried, where ``after`` gives an estimate by their number."""
    job, tried = traced_job(module, found=found, **how), []

    def again(self, *, settings):
        tried.append(settings.parallel.ranks)
        assert settings == replace(job.settings, parallel=settings.parallel)
        assert settings.parallel.kind == "fsdp"
        result = after(settings.parallel.ranks)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(TracedJob, "again", again)
    return lambda batch_size, budget: (list(sharding_changes(job, batch_size, budget)), tried)


#: 10,000 MiB of weights, gradients and optimizer state, and 1 MiB a sample
WHOLE = estimate(("parameters", 2500 * MiB), ("gradients", 2500 * MiB), ("optimizer", 5000 * MiB))


def sharded(ranks):
    return estimate(("parameters", 10000 * MiB // ranks))


NET = nn.Sequential(Block(), Block())


@pytest.mark.parametrize(
    ("budget", "cards", "tried"),
    [
        (NCCL + 5010 * MiB, 2, [2]),  # half of the weights, ten samples, and NCCL's bytes beside
        (NCCL + 5010 * MiB - 1, 4, [2, 4]),
        (NCCL + 2510 * MiB, 4, [2, 4]),
        (NCCL + 2510 * MiB - 1, 8, [2, 4, 8]),
        (NCCL + 1 * MiB, 8, [2, 4, 8]),  # none suffices: the most save the most
        (20_000 * MiB, 2, [2]),  # it fits already, and half of it is saved
    ],
)
def test_the_fewest_gpus_that_hold_a_batch_share_it(monkeypatch, budget, cards, tried):
    (change,), asked = shards(monkeypatch, NET, WHOLE, sharded)(10, budget)
    assert (change.kind, change.parts, change.nccl, asked) == ("sharding", 1, NCCL, tried)
    policy = "FSDPStrategy(auto_wrap_policy={Block})"
    assert change.text == f"sharded over {cards} GPUs: strategy={policy}, devices={cards}"
    assert change.cost == "GPUs, which wait for one another's parameters in each forward and backward pass"
    assert change.make().peak(10) == sharded(cards).peak(10)


def test_a_module_without_blocks_is_sharded_as_a_whole(monkeypatch):
    (change,), _ = shards(monkeypatch, nn.Linear(8, 8), WHOLE, sharded)(10, 20_000 * MiB)
    assert change.text == "sharded over 2 GPUs: strategy=FSDPStrategy(), devices=2"


def test_all_classes_of_blocks_are_units(monkeypatch):
    net = nn.Sequential(Other(), Block(), Block(), Other())
    (change,), _ = shards(monkeypatch, net, WHOLE, sharded)(10, 20_000 * MiB)
    assert "auto_wrap_policy={Block, Other}" in change.text


def test_ranks_of_ddp_share_what_each_has(monkeypatch):
    (change,), tried = shards(monkeypatch, NET, WHOLE, sharded, devices=4)(10, 1 * MiB)
    assert (tried, change.nccl) == ([4], 0)  # NCCL's bytes are there already
    assert change.text.endswith("devices=4")


@pytest.mark.parametrize("kind", ["fsdp", "other"])
def test_what_is_sharded_or_unknown_is_left_alone(monkeypatch, kind):
    job = traced_job(NET, found=WHOLE)
    parallel = replace(job.job, settings=replace(job.settings, parallel=Parallel(kind, 2)))
    monkeypatch.setattr(TracedJob, "again", lambda self, **changes: pytest.fail("nothing is traced"))
    assert list(sharding_changes(replace(job, job=parallel), 10, GiB)) == []


@pytest.mark.parametrize("name", ["parameters", "gradients", "optimizer", "communication"])
def test_what_saves_less_than_a_tenth_is_not_traced(monkeypatch, name):
    # 1000 MB less NCCL's 700 are a tenth of 3000 MB: with samples of 1 MiB that is up to 1907 of them
    found = estimate((name, 1_000_000_000))
    for batch_size, asked in ((1890, [2]), (1920, [])):
        _, tried = shards(monkeypatch, NET, found, lambda ranks: mp.TraceError("no"))(batch_size, GiB)
        assert tried == asked
    # of ranks that are there already, 100 MiB of 1000 are just a tenth
    found = estimate((name, 100 * MiB))
    for batch_size, asked in ((900, [4]), (902, [])):
        _, tried = shards(monkeypatch, NET, found, lambda ranks: mp.TraceError("no"), devices=4)(batch_size, GiB)
        assert tried == asked
    # 105,067,315 bytes in a segment of 102 MiB, and 900 samples: a tenth of 1002 MiB are 105,067,315.2 bytes
    for size, asked in ((105_067_315, []), (105_067_316, [4])):
        found = estimate((name, size))
        _, tried = shards(monkeypatch, NET, found, lambda ranks: mp.TraceError("no"), devices=4)(900, GiB)
        assert tried == asked


def test_activations_are_not_sharded(monkeypatch):
    found = estimate(("activations", 10_000 * MiB))
    assert shards(monkeypatch, NET, found, sharded)(10, GiB) == ([], [])


def test_a_step_that_is_not_traced_when_sharded_is_not_advised(monkeypatch):
    assert shards(monkeypatch, NET, WHOLE, lambda ranks: mp.TraceError("no"))(10, GiB) == ([], [2])


def test_sharding_that_does_not_help_is_not_advised(monkeypatch):
    # it fits before; 9,009 MiB and NCCL's 668 of 10,010 save 333, less than a tenth
    found, tried = shards(monkeypatch, NET, WHOLE, lambda ranks: estimate(("parameters", 9000 * MiB)))(10, 20_000 * MiB)
    assert (found, tried) == ([], [2, 4, 8])
    # a tenth of 10,020 MiB is 1,002, and 20 MiB are the samples'
    for left, advised in ((8998, 1), (9000, 0)):
        after = estimate(("parameters", left * MiB))
        found, _ = shards(monkeypatch, NET, WHOLE, lambda ranks, after=after: after, devices=4)(20, 20_000 * MiB)
        assert len(found) == advised


def test_a_batch_that_fits_with_more_gpus_alone_is_worth_it(monkeypatch):
    # 9,010 MiB fit in 9,678, and 10,010 do not, though less than a tenth is saved
    after = estimate(("parameters", 9000 * MiB))
    (change,), tried = shards(monkeypatch, NET, WHOLE, lambda ranks: after)(10, 9010 * MiB + NCCL)
    assert (tried, change.make()) == ([2], after)


# -------------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(2, 3, 16, 16), (16, 16)),
        (torch.zeros(2, 3, 64, 15), ()),  # too small to be an image
        (torch.zeros(2, 3, 15, 64), ()),
        ((torch.zeros(2, 3, 16, 64), torch.zeros(2, 1, 32, 64)), (32, 64)),  # the larger
        ((torch.zeros(2, 3, 32, 64), torch.zeros(2, 1, 16, 64)), (32, 64)),
        ((torch.zeros(2, 3, 16, 128), torch.zeros(2, 1, 32, 32)), (16, 128)),
        ((torch.zeros(2, 32).long(), torch.zeros(2, 64).long()), (64,)),
        ((torch.zeros(2, 99).long(), torch.zeros(2, 3, 16, 16)), (16, 16)),  # a text beside images
        (torch.zeros(2, 3, 16, 16).long(), ()),  # numbers of no image
        (torch.zeros(2, 16, 16), ()),
        (torch.zeros(2, 16, 16).long(), ()),
        (torch.zeros(2, 16).long(), (16,)),
        (torch.zeros(2, 15).long(), ()),
    ],
    ids=lambda value: str(getattr(value, "shape", "")),
)
def test_samples_have_a_size_that_can_be_halved(batch, size):
    assert changing._sample_size(batch) == size


@dataclass
class Pictures:
    image: torch.Tensor
    mask: torch.Tensor
    label: torch.Tensor


@dataclass(frozen=True)
class Frozen:
    image: torch.Tensor


def test_samples_of_half_the_size_are_cut_from_all_that_have_it(monkeypatch):
    batch = Pictures(torch.arange(2.0 * 3 * 32 * 20).view(2, 3, 32, 20), torch.zeros(2, 32, 20), torch.zeros(2, 20))
    job = traced_job(nn.Linear(8, 8), batch)
    text = "samples of 16 x 10 in place of 32 x 20"
    assert listed(job, 8, "samples") == [("samples", text, "each sees less", 1, 0)]
    (_, batches, _) = made(monkeypatch, job, "samples")
    assert [size for size, _ in batches] == [2, 3, 5]
    for size, cut in batches:
        assert (cut.image.shape, cut.mask.shape, cut.label.shape) == ((size, 3, 16, 10), (size, 16, 10), (size, 20))
    first = batches[0][1]
    assert torch.equal(first.image, batch.image[:, :, :16, :10])
    assert first.image.is_contiguous()  # and takes no more than it shows
    assert batch.image.shape == (2, 3, 32, 20)


def test_a_batch_that_cannot_be_changed_stays(monkeypatch):
    asked, frozen = recorded(monkeypatch), Frozen(torch.zeros(2, 3, 32, 32))
    changing._with_smaller_samples(replace(traced_job(nn.Linear(8, 8)), batches=[(2, frozen)]), (32, 32), (16, 16))
    assert asked[0][1] == [(2, frozen)]


def test_halves_of_texts_are_of_tokens(monkeypatch):
    job = traced_job(nn.Linear(8, 8), {"ids": torch.arange(128).view(2, 64), "labels": torch.zeros(64).long()})
    assert listed(job, 8, "samples")[0][1] == "samples of 32 tokens in place of 64 tokens"
    (_, batches, _) = made(monkeypatch, job, "samples")
    # labels have one dimension alone, which is the batch, whatever its length
    assert [tuple(batch["ids"].shape) for _, batch in batches] == [(2, 32), (3, 32), (5, 32)]
    assert batches[0][1]["ids"][1, 0] == 64
    asked = recorded(monkeypatch)
    labels = [(64, {"labels": torch.zeros(64).long()})]
    changing._with_smaller_samples(replace(job, batches=labels), (64,), (32,))
    assert asked[0][1][0][1]["labels"].shape == (64,)


# ------------------------------------------------------------------------------------------------------- the optimizer


def parameters(*sizes):
    return [nn.Parameter(torch.zeros(size)) for size in sizes or (4,)]


@pytest.mark.parametrize(
    ("place", "check"),
    [
        (0, lambda optimizer: optimizer.param_groups[0]["fused"] and not optimizer.param_groups[0]["foreach"]),
        (1, lambda optimizer: optimizer.param_groups[0]["foreach"] is False),
        (2, lambda optimizer: type(optimizer) is changing._EightBit),
        (3, lambda optimizer: type(optimizer) is torch.optim.SGD),
    ],
    ids=["fused", "one by one", "eight bits", "without state"],
)
def test_the_optimizer_is_another_whoever_makes_it(monkeypatch, place, check):
    (setup, _, _) = made(monkeypatch, traced_job(nn.Linear(8, 8), optimizer=ADAM), "optimizer", place=place)
    assert check(setup.optimizer(iter(parameters())))
    module = Net()
    (setup, _, _) = made(monkeypatch, traced_job(module), "optimizer", place=place)
    (optimizer,) = setup.module.configure_optimizers()
    assert check(optimizer)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
    assert "configure_optimizers" not in module.__dict__


def test_the_optimizers_of_a_module_are_all_changed_once(monkeypatch):
    class Two(Net):
        def configure_optimizers(self):
            return [ADAM([p]) for p in self.parameters()], []

    found = []
    asked = recorded(monkeypatch)
    changing._with_optimizer(traced_job(Two()), lambda optimizer: found.append(optimizer) or optimizer)
    assert len(found) == 2  # on the copy at its first step
    replica = asked[0][0].module
    assert replica.configure_optimizers() == found[2:]
    assert len(found) == 4
    assert [len(part) for part in replica.configure_optimizers()] == [2, 0]  # its own, from here on
    assert len(found) == 4


@pytest.mark.parametrize("module", [nn.Linear(8, 8), Manual()], ids=["it has none", "it steps itself"])
def test_an_optimizer_that_cannot_be_changed(module):
    for change in changes(traced_job(module), 8):
        if change.kind == "optimizer":
            with pytest.raises(DoesNotApplyError):
                change.make()


@pytest.mark.parametrize(
    ("options", "applies"),
    [({}, True), ({"fused": True}, True), ({"foreach": False}, True), ({"fused": True, "foreach": False}, False)],
)
def test_an_option_that_is_set_already_is_no_change(options, applies):
    optimizer = torch.optim.Adam(parameters(), lr=0.1)
    optimizer.param_groups[0].update(options)
    if applies:
        assert changing._fused(optimizer) is optimizer
        assert (optimizer.param_groups[0]["fused"], optimizer.param_groups[0]["foreach"]) == (True, False)
    else:
        with pytest.raises(DoesNotApplyError):
            changing._fused(optimizer)


def test_an_option_is_set_in_every_group_or_unknown():
    one, two = parameters(4, 4)
    optimizer = torch.optim.Adam([{"params": [one]}, {"params": [two]}], lr=0.1)
    changing._one_by_one(optimizer)
    assert [(group["foreach"], group["fused"]) for group in optimizer.param_groups] == [(False, None)] * 2
    with pytest.raises(DoesNotApplyError):
        changing._one_by_one(optimizer)
    with pytest.raises(DoesNotApplyError):  # which has neither option
        changing._fused(torch.optim.SparseAdam(parameters()))
    without = torch.optim.Adam(parameters(), lr=0.1)
    del without.param_groups[0]["foreach"]
    with pytest.raises(DoesNotApplyError):
        changing._fused(without)


def test_sgd_without_momentum_has_no_state():
    one, two = parameters(4, 5)
    groups = [{"params": [one]}, {"params": [two]}]
    for optimizer in (torch.optim.Adam(groups, lr=0.1), torch.optim.SGD(groups, lr=0.1, momentum=0.9)):
        found = changing._stateless(optimizer)
        assert type(found) is torch.optim.SGD
        assert [[p.shape for p in group["params"]] for group in found.param_groups] == [[(4,)], [(5,)]]
        assert [(group["momentum"], group["lr"]) for group in found.param_groups] == [(0, 1e-3)] * 2
    with pytest.raises(DoesNotApplyError):
        changing._stateless(torch.optim.SGD(parameters(), lr=0.1))
    mixed = torch.optim.SGD([{"params": parameters()}, {"params": parameters(), "momentum": 0.9}], lr=0.1)
    assert type(changing._stateless(mixed)) is torch.optim.SGD


@pytest.mark.parametrize(
    ("make", "states"),
    [
        (torch.optim.Adam, 2),
        (torch.optim.AdamW, 2),
        (partial(torch.optim.SGD, momentum=0.9), 1),
        (torch.optim.SGD, 0),  # without momentum it has no state
        (torch.optim.Adagrad, 0),
        (type("Mine", (torch.optim.Adam,), {}), 0),  # whose state nobody knows
    ],
    ids=str,
)
def test_optimizers_in_eight_bits_have_the_state_of_their_kind(make, states):
    small, large = parameters(4095, 4096)
    optimizer = make([{"params": [small]}, {"params": [large]}], lr=0.1)
    if not states:
        with pytest.raises(DoesNotApplyError):
            changing._in_eight_bits(optimizer)
        return
    eight = changing._in_eight_bits(optimizer)
    assert [[p is one for p in group["params"]] for group, one in zip(eight.param_groups, (small, large), strict=True)]
    for parameter in (small, large):
        parameter.grad = torch.zeros_like(parameter)
    assert eight.step() is None
    names = [f"{name}{k}" for name in ("state", "absmax") for k in range(states)]
    assert list(eight.state[small]) == names[:states]
    assert list(eight.state[large]) == names
    assert {(v.dtype, v.shape) for v in eight.state[small].values()} == {(torch.float32, (4095,))}
    assert {v.shape for k, v in eight.state[large].items() if k.startswith("state")} == {(4096,)}
    assert {v.dtype for k, v in eight.state[large].items() if k.startswith("state")} == {torch.uint8}
    # a number for 256 values
    assert {v.shape for k, v in eight.state[large].items() if k.startswith("absmax")} == {(16,)}
    assert [t.shape for t in eight._maps] == [(256,)] * states  # which all parameters share
    before = dict(eight.state[large])
    assert eight.step(lambda: torch.tensor(3.0)) == 3
    assert all(eight.state[large][name] is value for name, value in before.items())
    assert len(eight._maps) == states


def test_state_in_eight_bits_is_on_the_device_of_its_parameter_and_begins_with_a_gradient():
    (one,) = [nn.Parameter(torch.zeros(70_000, device="meta"))]
    without, tiny = parameters(5000, 10)
    eight = changing._in_eight_bits(torch.optim.Adam([one, without, tiny]))
    tiny.grad = torch.zeros(10)
    eight.step()
    assert eight._maps == []  # a small parameter needs none
    one.grad = torch.zeros(70_000, device="meta")
    eight.step()
    assert {tensor.device.type for tensor in (*eight.state[one].values(), *eight._maps)} == {"meta"}
    assert eight.state[one]["absmax1"].shape == (274,)  # 70,000 / 256 is 273.4
    assert not eight.state[without]


def test_the_loss_of_a_closure_has_gradients():
    (one,) = parameters(4)
    eight = changing._in_eight_bits(torch.optim.Adam([one]))
    with torch.no_grad():
        loss = eight.step(lambda: (one * 2).sum())
    assert loss.requires_grad
    assert not eight.state[one]  # it has no gradient yet


# ---------------------------------------------------------------------------------------------- how many samples fit


def test_the_largest_batch_size_after_a_change_is_bounded():
    assert largest(estimate(), 100 * MiB, GiB) == 100
    assert largest(estimate(each=0), 100 * MiB, GiB) == 2**20


def test_workspaces_of_convolutions_have_to_fit_in_the_whole_gpu():
    net = nn.Conv2d(16, 32, 3)
    found = mp.estimate(net, torch.zeros(4, 16, 64, 64), precision="16-mixed", device=AMPERE, method="trace")
    tight, ample = (largest(found, GiB, capacity) for capacity in (GiB, 4 * GiB))
    assert 0 < tight < ample
    assert found.fits(ample, GiB)
    assert not found.fits(ample + 1, GiB)
