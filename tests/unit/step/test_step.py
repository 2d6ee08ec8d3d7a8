"""Training steps on fake tensors: in Lightning's order, on a copy, and by the line where they cannot be traced."""

from __future__ import annotations

import copy
import random
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BackboneFinetuning
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

import lightning_memplan as mp
from lightning_memplan.errors import TraceError
from lightning_memplan.memory.cycles import MOST
from lightning_memplan.memory.events import Stream
from lightning_memplan.monitor.meter import Forecast
from lightning_memplan.settings import STEPS, StepSettings
from lightning_memplan.step.fake_cuda import DEVICE
from lightning_memplan.step.module_copy import StandInTrainer
from lightning_memplan.step.setup import TrainingSetup, traced_microbatches
from lightning_memplan.trace.detached import detached_copy, prepared
from lightning_memplan.trace.tracer import FormulaResult, run_formula, trace_steps
from lightning_memplan.types import Peaks

KiB = 2**10
BATCHES = [(2, torch.zeros(2, 1024)), (3, torch.zeros(3, 1024))]


class Net(pl.LightningModule):
    """One layer of 1024 · 256 weights: 1 MiB, its gradient 1 MiB, its momentum 1 MiB."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1024, 256, bias=False)
        self.order = []

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def traced(module, batches=BATCHES, **settings):
    return trace_steps(TrainingSetup(module, StepSettings(**settings)), batches).traces


def blocks(trace, category, step=None):
    return [e for e in trace.events if not e.is_free and e.category == category and step in (None, e.step)]


def copied(module, trainer=None):
    return detached_copy(module, FakeTensorMode(allow_non_fake_inputs=True), trainer=trainer)


# ------------------------------------------------------------------------------------------------------- what is traced


def test_a_trace_is_setup_and_three_steps():
    (first, second) = traced(Net())
    assert (first.batch_size, second.batch_size) == (2, 3)
    assert sorted({e.step for e in first.events}) == [0, *range(1, STEPS + 1)]
    assert [e.size for e in blocks(first, "parameters")] == [1024 * KiB]
    assert [e.size for e in blocks(first, "batch")] == [2 * 4 * KiB] * STEPS  # 2 samples of 1024 floats, each step
    assert [e.step for e in blocks(first, "optimizer")] == [1]  # the momentum comes with the first step, and stays
    assert [(e.step, e.size) for e in blocks(first, "gradients")] == [(k, 1024 * KiB) for k in range(1, STEPS + 1)]


def test_an_old_gradient_lives_until_the_forward_pass_is_over():
    trace = traced(Net())[0]
    gradient = blocks(trace, "gradients", step=1)[0]
    freed = next(e for e in trace.events if e.is_free and e.block == gradient.block)
    assert (freed.step, freed.phase) == (2, "forward")  # by zero_grad, which comes after the second step's forward


def test_the_batch_has_the_width_of_the_precision():
    assert blocks(traced(Net(), precision="bf16-true")[0], "parameters")[0].size == 512 * KiB
    assert blocks(traced(Net(), precision="64-true")[0], "parameters")[0].size == 2048 * KiB
    assert blocks(traced(Net(), precision="16-mixed")[0], "parameters")[0].size == 1024 * KiB


def test_accumulated_batches_make_one_step():
    trace = traced(Net(), accumulate_grad_batches=3)[0]
    assert len(blocks(trace, "batch")) == 3 * STEPS
    assert [e.step for e in blocks(trace, "optimizer")] == [3]  # the momentum comes when the third batch is through


@pytest.mark.parametrize(("batches", "parts"), [(1, 1), (2, 2), (3, 3), (4, 3), (100, 3)])
def test_of_many_accumulated_batches_the_middle_ones_are_alike(batches, parts):
    settings = StepSettings(accumulate_grad_batches=batches)
    assert traced_microbatches(settings) == parts
    replayed = tuple(Peaks(place, place) for place in range(STEPS * parts))
    forecast = Forecast(replayed, microbatches=parts, accumulate=batches)
    places = [forecast.at(k).allocated for k in range(6 * batches)]
    assert places[0] == 0
    assert max(places) == STEPS * parts - 1 == places[-1]  # a last batch steps the optimizer
    assert places[batches] == parts  # the second cycle's first


class Turns(Net):
    """Two layers with a gradient each; in the batches of which ``second`` says so, the second trains as well."""

    def __init__(self, second):
        super().__init__()
        self.automatic_optimization = False
        self.other, self.second = nn.Linear(512, 128, bias=False), second

    def training_step(self, batch, batch_idx):
        for layer, optimizer in zip((self.layer, self.other), self.optimizers(), strict=True):
            if layer is self.layer or self.second(self, batch_idx):
                optimizer.zero_grad()
                self.manual_backward(layer(batch[:, : layer.in_features]).sum())
                optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9) for layer in (self.layer, self.other)]


IN_TURN = {  # after how many steps they are alike, and how many are recorded: two cycles, and how the next begins
    "each batch": (lambda _, index: True, 1, 3),
    "odd batches": (lambda _, index: index % 2, 2, 6),
    "each third": (lambda _, index: index % 3 == 0, 3, 8),
    "the last of five": (lambda _, index: index % 5 == 4, 5, 12),
    "by the global step": (lambda module, _: module.global_step % 3 == 1, 2, 6),  # of both optimizers
    "once": (lambda _, index: index == 0, 0, MOST),
}


@pytest.mark.parametrize(("second", "period", "steps"), IN_TURN.values(), ids=IN_TURN)
def test_steps_that_take_turns_are_recorded_until_all_were_seen(second, period, steps):
    first, larger = traced(Turns(second))
    assert (first.period, max(e.step for e in first.events)) == (period, steps)
    assert len(first.events) == len(larger.events)
    assert [e.size for e in blocks(larger, "batch")] == [3 * 4 * KiB] * steps
    gradients = [e.step - 1 for e in blocks(first, "gradients") if e.size == 256 * KiB]  # 512 x 128 floats
    by_global_step = "global_step" in second.__code__.co_names
    assert gradients == [step for step in range(steps) if (step % 2 == 0 if by_global_step else second(None, step))]


def test_gradients_that_are_added_up_by_hand_wait_for_their_step():
    class ByHand(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.layer(batch).sum())
            if batch_idx % 4 == 3:
                self.optimizers().step()
                self.optimizers().zero_grad()

    trace = traced(ByHand())[0]
    assert (trace.period, max(e.step for e in trace.events)) == (4, 10)
    assert [e.step for e in blocks(trace, "optimizer")] == [4]  # the momentum


def test_an_optimizer_step_of_the_modules_own_may_skip_batches():
    class Skips(Net):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            optimizer.step(closure=closure) if batch_idx % 3 == 2 else closure()

    for precision in ("32-true", "16-mixed"):
        trace = traced(Skips(), precision=precision)[0]
        assert (trace.period, max(e.step for e in trace.events)) == (3, 8)
        assert [e.step for e in blocks(trace, "optimizer")] == [3]


def test_what_chance_decides_is_no_cycle():
    class Drawn(Net):
        def training_step(self, batch, batch_idx):
            return self.layer(batch).sum() * (1 if random.random() < 0.5 else self.layer(batch).mean())

    assert max(e.step for e in traced(Drawn())[0].events) == STEPS


def test_hooks_run_in_lightnings_order():
    names = """on_train_batch_start on_before_zero_grad on_after_backward on_before_optimizer_step
    on_train_batch_end""".split()
    seen = []
    overrides = {name: lambda self, *args, name=name: seen.append(name) for name in names}

    def training_step(self, batch, batch_idx):
        seen.append("training_step")
        return self.layer(batch).sum()

    module = type("Hooked", (Net,), {**overrides, "training_step": training_step})()
    traced(module, BATCHES[:1])
    one = [names[0], "training_step", *names[1:]]
    assert seen == one * STEPS

    del seen[:]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(2, 1024), batch_size=2))
    assert seen == one  # Lightning itself


def test_a_step_that_returns_nothing_is_skipped():
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    assert [e.step for e in blocks(traced(Skips())[0], "gradients")][:2] == [1, 3]


def test_a_module_that_is_no_lightning_module():
    trace = trace_steps(
        TrainingSetup(nn.Linear(1024, 256, bias=False), optimizer=lambda p: torch.optim.Adam(p)), BATCHES
    ).traces[0]
    # Adam's two moments; its counts of steps lie on the host
    assert [e.size for e in blocks(trace, "optimizer") if e.size > KiB] == [1024 * KiB] * 2


def test_metrics_are_updated_in_a_step():
    class Measured(Net):
        def __init__(self):
            super().__init__()
            self.accuracy = MulticlassAccuracy(num_classes=256)
            self.confusion = MulticlassConfusionMatrix(num_classes=256)

        def training_step(self, batch, batch_idx):
            out = self.layer(batch)
            classes = torch.zeros(len(batch), dtype=torch.long, device=self.device)
            self.log("accuracy", self.accuracy(out, classes))
            self.confusion.update(out, classes)
            return out.sum()

    module = Measured()
    traced(module)
    assert module.confusion.confmat.sum() == 0
    assert module.accuracy.update_count == 0


def test_counts_below_a_number_are_so_many():
    class Counts(Net):
        def training_step(self, batch, batch_idx):
            classes = torch.zeros(len(batch), dtype=torch.long, device=self.device)
            assert torch.bincount(classes, minlength=7).shape == (7,)
            assert torch.bincount(torch.tensor([1, 4])).tolist() == [0, 1, 0, 0, 1]  # on the host: real values
            return super().training_step(batch, batch_idx)

    traced(Counts())
    assert torch.bincount(torch.tensor([1, 4]), minlength=2).tolist() == [0, 1, 0, 0, 1]  # as ever, afterwards


# -------------------------------------------------------------------------------------------------------- on a copy


def test_a_copy_takes_no_memory_and_is_on_the_device():
    twin = copied(Net())
    assert isinstance(twin.layer.weight, FakeTensor)
    assert twin.layer.weight.device == twin.device == DEVICE
    assert twin.layer.weight.requires_grad


def test_what_a_copy_keeps():
    module = Net()
    module.tied = nn.Linear(1024, 256, bias=False)
    module.tied.weight = module.layer.weight
    module.layer.weight.own = "mine"
    module.average = copy.deepcopy(module.layer).requires_grad_(False).eval()
    module.layer.to(memory_format=torch.contiguous_format)
    twin = copied(module)
    assert twin.tied.weight is twin.layer.weight
    assert twin.layer.weight.own == "mine"
    assert not twin.average.weight.requires_grad
    assert (twin.average.training, twin.layer.training) == (False, True)


def test_a_hook_that_names_the_module_works_on_the_copy():
    module = Net()
    module.calls = []
    module.layer.register_forward_hook(lambda *args: module.calls.append("a hook"))
    module.activation = lambda x: (module.calls.append("a function"), x)[1]
    traced(module)
    assert module.calls == []


def test_a_copy_logs_nothing():
    class Logs(Net):
        def training_step(self, batch, batch_idx):
            self.log("loss", 1.0, prog_bar=True)
            self.log_dict({"a": 1.0}, on_epoch=True)
            self.print("a step")
            return super().training_step(batch, batch_idx)

    module = Logs()
    traced(module)  # without a Trainer the real ones would raise
    assert "log" not in module.__dict__


def test_what_a_copy_sees_as_its_trainer():
    real = SimpleNamespace(max_epochs=7, world_size=2, global_step=5)
    stand_in = StandInTrainer(real)
    assert (stand_in.max_epochs, stand_in.world_size, stand_in.global_step) == (7, 2, 0)
    stand_in.global_step = 9
    assert (stand_in.global_step, real.global_step) == (9, 5)
    assert copy.deepcopy(stand_in) is stand_in
    with pytest.raises(AttributeError, match="the trainer has no 'max_epochs' before training has begun"):
        StandInTrainer().max_epochs  # noqa: B018


def test_layers_made_in_setup_are_made_on_a_copy():
    class Later(Net):
        def setup(self, stage):
            self.order.append(stage)
            self.late = nn.Linear(8, 8)

    module = Later()
    twin = prepared(module, StepSettings(), stage="fit")
    assert (module.order, twin.order) == ([], ["fit"])
    assert isinstance(twin.late.weight, FakeTensor)
    assert not hasattr(module, "late")
    assert prepared(Net(), StepSettings()).__class__ is Net


# ------------------------------------------------------------------------------------------------ what cannot be traced


def line_of(comment):
    lines = Path(__file__).read_text().splitlines()
    return f"{__file__}:{next(k for k, text in enumerate(lines, 1) if text.endswith('  # ' + comment))}: "


class Branches(Net):
    def training_step(self, batch, batch_idx):
        out = self.layer(batch)
        if int(out.argmax()) > 0:  # branches on a value
            out = out * 2
        return out.sum()


class Fails(Net):
    def training_step(self, batch, batch_idx):
        return self.layer(batch[:, :7]).sum()  # a wrong shape


@pytest.mark.parametrize(
    ("module", "comment", "text"),
    [
        (Branches, "branches on a value", "the step needs the value of a tensor (DataDependentOutputException in "),
        (Fails, "a wrong shape", "the step failed in a trace (RuntimeError: "),
    ],
)
def test_the_line_is_named(module, comment, text):
    with pytest.raises(TraceError) as caught:
        traced(module())
    assert str(caught.value).startswith(text)
    assert f"; at {line_of(comment)}" in str(caught.value)
    assert caught.value.__cause__ is not None


def test_a_lazy_module_has_no_shape():
    module = Net()
    module.layer = nn.LazyLinear(256)
    with pytest.raises(TraceError, match=r"'layer\.weight' has no shape yet \(a lazy module\): run the module once"):
        traced(module)


class Refuses(Net):
    def __deepcopy__(self, memo):
        raise TypeError("no copies of me")


def test_a_module_that_refuses_to_be_copied_is_named():
    with pytest.raises(TraceError, match=r"Refuses cannot be copied \(TypeError: no copies of me\)"):
        traced(Refuses())


def test_the_formula_of_a_step_that_stops_half_way():
    found = run_formula(TrainingSetup(Branches()), BATCHES[0])
    assert found.formula.feature_bytes == 4 * 256  # the layer ran
    assert found.stopped.startswith("the step needs the value")
    assert found.notes() == (f"the formula counts the layers that ran before the step stopped: {found.stopped}",)
    assert found.notes(known=found.stopped) == ("the formula counts the layers that ran before the step stopped",)


def test_the_formula_of_a_step_that_stops_at_once():
    with pytest.raises(TraceError, match="the step failed in a trace"):
        run_formula(TrainingSetup(Fails()), BATCHES[0])


def test_the_formula_knows_the_optimizers_state():
    found = run_formula(TrainingSetup(Net()), BATCHES[0])
    formula = found.formula
    assert (formula.parameter_bytes, formula.gradient_bytes, formula.optimizer_bytes) == (1024 * KiB,) * 3
    assert found == FormulaResult(formula)


def test_a_copy_of_a_copy_is_traced_as_the_module_itself():
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    copied = detached_copy(module, FakeTensorMode(allow_non_fake_inputs=True))
    ours, theirs = (trace_steps(TrainingSetup(each), [(2, torch.zeros(2, 8))]).traces[0] for each in (module, copied))
    assert ours.events == theirs.events


# -------------------------------------------------------------------------------------------- numbers, later epochs


def test_whole_numbers_of_the_batch_are_the_largest_of_its_samples():
    class Cut(Net):
        def training_step(self, batch, batch_idx):
            features, lengths = batch
            longest = int((lengths + 1).max().item())
            assert lengths.cpu().tolist() == [7] * len(lengths)
            return self.layer(features[:, :longest].sum(1)).sum()

    def batch(size):  # of lengths 3, 7, 5: the second sample's is the largest, whichever are taken
        return size, (torch.zeros(size, 16, 1024), torch.tensor([3, 7, 5])[:size])

    for trace in traced(Cut(), [batch(1), batch(2), batch(3)]):
        features = trace.batch_size * 1024 * 4  # the sum over 8 steps, a vector of 1024 floats a sample
        assert features in [e.size for e in trace.events if e.op == "aten.sum.dim_IntList"]
        assert any("whole numbers of the batch" in note for note in trace.notes)


def test_batches_may_be_lists_of_samples():
    class Each(Net):
        def training_step(self, batch, batch_idx):
            features, targets = batch
            return self.layer(features).sum() + sum(target.sum() for target in targets[:2])

    def batch(size):
        return size, (torch.zeros(size, 1024), [torch.tensor([1, 2, 3])] * size)

    assert [trace.batch_size for trace in traced(Each(), [batch(2), batch(3)])] == [2, 3]


class Writes(Net):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def training_step(self, batch, batch_idx):
        features, lengths = batch
        lengths.add_(self.what(features))
        return self.layer(features[:, : int(lengths.max().item())].sum(1)).sum()


def test_numbers_are_followed_until_they_are_made_of_values():
    batch = torch.zeros(2, 16, 1024), torch.tensor([3, 7])
    (trace,) = traced(Writes(lambda features: 1), [(2, batch)])
    assert "the step reads whole numbers of the batch (lengths): taken as the largest of its samples" in trace.notes
    with pytest.raises(TraceError, match="the step needs the value of a tensor"):
        traced(Writes(lambda features: features.sum().long()), [(2, batch)])


def test_packed_sequences_are_as_long_as_the_longest_sample():
    class Packed(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(64, 32, batch_first=True)

        def training_step(self, batch, batch_idx):
            packed = nn.utils.rnn.pack_padded_sequence(batch[0], batch[1].cpu(), batch_first=True)
            return self.rnn(packed)[0].data.sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    (trace,) = traced(Packed(), [(3, (torch.zeros(3, 20, 64), torch.tensor([9, 8, 2])))])
    # 9 steps of each of 3 samples: 64 features in and 32 out, 4 bytes each
    sizes = [e.size for e in trace.events if e.step == 1 and e.phase == "forward"]
    assert 9 * 3 * 64 * 4 in sizes
    assert 9 * 3 * 32 * 4 in sizes


def test_what_a_callback_unfreezes_later_is_trained():
    class Tuned(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Linear(1024, 256, bias=False), nn.Linear(256, 64, bias=False)

        def training_step(self, batch, batch_idx):
            return self.head(self.backbone(batch)).sum()

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)

    module, unfreeze = Tuned(), BackboneFinetuning(unfreeze_backbone_at_epoch=2)
    unfreeze.freeze_before_training(module)  # as its setup does, before or after the plan is made
    for epochs, sizes in ((2, [64]), (3, [64, 1024])):  # KiB: 256 · 64 and 1024 · 256 floats
        trainer = SimpleNamespace(callbacks=[unfreeze], max_epochs=epochs, world_size=1)
        (trace,) = trace_steps(TrainingSetup(module, trainer=trainer), BATCHES[:1]).traces
        assert sorted(e.size for e in blocks(trace, "gradients", STEPS)) == [size * KiB for size in sizes]
        assert sorted(e.size for e in blocks(trace, "optimizer")) == [size * KiB for size in sizes]
    assert not module.backbone.weight.requires_grad


# ------------------------------------------------------------------------------------------------ what steps often do


class Does(pl.LightningModule):
    """A linear layer, and a step that is given."""

    def __init__(self, step):
        super().__init__()
        self.net, self.step = nn.Linear(8, 4), step

    def training_step(self, batch, batch_idx):
        return self.step(self, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def by_distribution(module, x):
    out = module.net(x)
    drawn = torch.distributions.Normal(out, out.exp()).rsample()  # which checks that they are numbers, and positive
    return torch.distributions.Categorical(logits=drawn).entropy().mean()


def unless_it_diverged(module, x):
    loss = module.net(x).mean()
    if not torch.isfinite(loss) or torch.isnan(module.net.weight).any():
        return None
    assert torch.isfinite(module.net.weight).all()
    return loss


def with_numpy(module, x):
    out = module.net(x)
    right = np.asarray(out.argmax(1).cpu()) == out.detach().cpu().numpy().argmax(1)
    module.log("accuracy", right.mean() + sum(out.detach().mean(0).tolist()))
    return out.mean()


def with_a_list(module, x):
    norms = [parameter.detach().norm() for parameter in module.parameters()]
    module.log("norm", torch.tensor(norms).norm())
    return module.net(x).mean() + torch.tensor([norms[0], 1.0], device=module.device).sum()


def by_functional_call(module, x):
    weights = {name: parameter * 1.0 for name, parameter in module.net.named_parameters()}
    return torch.func.functional_call(module.net, weights, (x,)).mean()


def over_all_ranks(module, x):
    return module.all_gather(module.net(x), sync_grads=True).mean() + module.trainer.strategy.reduce(x.mean())


def keeps_a_result(module, x):
    module.last = module.net(x).mean()
    module.all_of_them = [*getattr(module, "all_of_them", ()), module.last]
    return module.last * 1.0


@pytest.mark.parametrize(
    "step",
    [by_distribution, unless_it_diverged, with_numpy, with_a_list, by_functional_call, over_all_ranks, keeps_a_result],
)
def test_steps_that_read_values_and_ask_others_are_traced(step):
    module = Does(step)
    before = {name: parameter.clone() for name, parameter in module.state_dict().items()}
    if step is keeps_a_result:
        step(module, torch.zeros(2, 8))  # what is no leaf of a graph cannot be copied by itself
    est = mp.estimate(module, torch.zeros(6, 8), method="trace")
    assert est.method == "trace"
    assert est.formula.parameter_bytes == 4 * (8 * 4 + 4)  # float32, of a weight and a bias
    assert all(torch.equal(before[name], parameter) for name, parameter in module.state_dict().items())


class Prepares(Does):
    """What is made when training begins, and what is asked of Lightning in a step."""

    def __init__(self, step):
        super().__init__(step)
        self.register_buffer("queue", torch.zeros(4, 256))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def on_fit_start(self):
        self.weights = torch.ones(4, device=self.device)

    def on_train_start(self):
        self.trainer.datamodule.nothing_of_the_kind()

    def on_train_epoch_start(self):
        self.seen = []

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def in_a_queue(module, x):
    out = module.net(x) * module.weights
    begin = int(module.place)
    assert 256 % len(x) == 0  # as it is written where this comes from (arXiv 1911.05722)
    module.queue[:, begin : begin + len(x)] = out.detach().T
    module.place[0] = (begin + len(x)) % 256
    module.seen.append(begin)
    module.log("rate", module.optimizers().param_groups[0]["lr"] + module.lr_schedulers().get_last_lr()[0])
    return (out @ module.queue.clone()).mean()


def test_hooks_before_the_first_step_are_run_on_the_copy():
    module = Prepares(in_a_queue)
    est = mp.estimate(module, torch.zeros(6, 8), method="trace")
    assert not hasattr(module, "weights")
    assert module.place.item() == 0
    assert est.program.batch_sizes == (32, 64, 128)
    (note,) = (note for note in est.notes if "left out" in note)
    assert note.startswith("on_train_start was left out: it failed in a copy (AttributeError: ")
    assert "whole numbers of the batch" not in " ".join(est.notes)
    assert not any(note.startswith(("on_fit_start", "on_train_epoch_start")) for note in est.notes)


def test_the_value_of_a_buffer_is_not_the_batchs():
    class Counts(pl.LightningModule):
        def __init__(self, reads):
            super().__init__()
            self.net, self.reads = nn.Linear(8, 4), reads
            self.register_buffer("place", torch.zeros(1, dtype=torch.long))

        def training_step(self, batch, batch_idx):
            return self.net(batch[0])[:, : 1 + self.reads(self, batch[1])].sum()

    sample = torch.zeros(4, 8), torch.ones(4, dtype=torch.long)
    notes = {}
    for name, reads in {
        "buffer": lambda module, labels: int(module.place + 1),
        "batch": lambda module, labels: int(labels.max()),
        "both": lambda module, labels: int(labels.max() + module.place),
        "mask": lambda module, labels: int((module.net(torch.zeros(1, 8, device=labels.device)) > 0).sum()) // 4,
    }.items():
        notes[name] = mp.estimate(Counts(reads), sample, method="trace").notes
    lengths = "the step reads whole numbers of the batch (lengths): taken as the largest of its samples"
    mask = "the step selects by values (a mask, nonzero, unique, coalesce): planned as if all were selected"
    assert notes == {"buffer": (), "batch": (lengths,), "both": (lengths,), "mask": (mask,)}


def with_cuda(module, x):
    """What is asked of a card is answered where there is none, and does nothing to one that is there."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = module.net(x)
    out.record_stream(torch.cuda.current_stream())
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.nvtx.range_push("loss")
    loss = out.mean()
    torch.cuda.nvtx.range_pop()
    end.record()
    torch.cuda.synchronize()
    module.log("milliseconds", begin.elapsed_time(end))
    module.log("peak", torch.cuda.max_memory_allocated() / 2**30 + torch.cuda.memory_stats()["num_ooms"])
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.empty_cache()
    assert torch.cuda.get_device_capability() == (8, 0)
    return loss


def test_steps_that_ask_torch_cuda_are_traced_without_a_card():
    before = {name: getattr(torch.cuda, name) for name in ("Event", "Stream", "stream", "synchronize", "memory_stats")}
    est = mp.estimate(Does(with_cuda), torch.zeros(6, 8), method="trace", device="A100 40GB")
    assert {e.stream for e in est.program.events if e.op == "aten.addmm.default"} == {
        Stream.STEP + step for step in (1, 2, 3)
    }
    assert {name: getattr(torch.cuda, name) for name in before} == before


def test_torchscript_is_refused_in_a_sentence():
    module = Does(lambda module, x: module.net(x).mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        module.net = torch.jit.script(module.net)
    with pytest.raises(TraceError, match=r"net is TorchScript, of which no copy can be trained: plan with the module"):
        mp.estimate(module, torch.zeros(6, 8), method="trace")


def draws(module, x):
    if random.random() < 0.5:
        x = x.flip(-1)
    if np.random.rand() < 0.5:
        x = x + 1
    return module.net(x).mean()


def test_steps_that_draw_what_they_do_draw_the_same_at_each_batch_size():
    random.seed(1)
    state, numbers = random.getstate(), np.random.get_state()[1].copy()
    for _ in range(6):  # each begins with other numbers
        est = mp.estimate(Does(draws), torch.zeros(6, 8), method="trace")
        assert "the step draws numbers (random, NumPy): planned for what it did with those of the trace" in est.notes
        assert random.getstate() == state
        assert (np.random.get_state()[1] == numbers).all()
        random.random()
        state = random.getstate()
    assert not mp.estimate(Does(keeps_a_result), torch.zeros(6, 8), method="trace").notes


def test_steps_that_cut_a_batch_into_parts_are_planned_from_batches_that_have_them_all():
    est = mp.estimate(
        Does(lambda module, x: sum(module.net(part).mean() for part in x.chunk(4))), torch.zeros(6, 8), method="trace"
    )
    assert est.program.batch_sizes == (32, 64, 128)
    assert "the step does something else with few samples: planned from 32 and more" in est.notes
    parts = [e.size for e in est.program.events if e.op == "aten.addmm.default" and e.category == "temporaries"]
    assert parts[:4] == [4 * 8 * 4] * 4  # 8 samples, 4 outputs, float32
