"""One fit on the CPU, planned for a GPU that is described: what is proposed, set, announced and forecast."""

from __future__ import annotations

from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

import lightning_memplan as mp
from lightning_memplan.errors import PlanningFailedError, UnmetDemandError
from lightning_memplan.monitor.history import Lesson, append
from lightning_memplan.monitor.meter import Forecast
from lightning_memplan.planning import fit as fitting
from lightning_memplan.planning.fit import FitOptions, FitPlanner
from lightning_memplan.planning.job import Sampling
from lightning_memplan.planning.limits import Limits
from lightning_memplan.planning.session import Allocated
from lightning_memplan.settings import MARGIN, StepSettings
from lightning_memplan.step.patch import patched
from lightning_memplan.types import RunRecord

CARD = mp.Device("a card", total=2**30)
SAMPLES = 60


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(100, 100)
        self.sizes = []

    def training_step(self, batch, batch_idx):
        self.sizes.append(len(batch))
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(pl.LightningDataModule):
    def __init__(self, batch_size=4, rows=SAMPLES):
        super().__init__()
        self.batch_size, self.rows = batch_size, rows

    def train_dataloader(self):
        return DataLoader(torch.ones(self.rows, 100), batch_size=self.batch_size)


def card_of(trainer):
    """Return the GPU of a Trainer that is on the CPU."""
    assert isinstance(trainer, pl.Trainer)
    return CARD


class Plans(pl.Callback):
    """Plan at setup, and run ``then`` with the planner."""

    def __init__(self, options, then=None):
        self.options, self.then, self.shown = options, then, []
        self.planner = None

    def announce(self, plan, lesson, val_plan, val_size):
        self.shown.append((plan, val_plan, val_size))
        return []

    def setup(self, trainer, module, stage):
        self.planner = FitPlanner(trainer, module, self.options)
        with patched(fitting, "plan_texts", self.announce):
            self.planner.run()
        if self.then is not None:
            self.then(self)

    def keep(self, batch_size):
        with patched(fitting, "plan_texts", self.announce):
            self.planner.keep(batch_size)


def trainer_with(callback, **settings):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(**{"max_epochs": 1, "accelerator": "cpu", **quiet, **settings}, callbacks=[callback])


def fit(plans, data=None, module=None, **settings):
    module, data, trainer = module or Net(), data or Data(), trainer_with(plans, **settings)
    trainer.fit(module, datamodule=data)
    return module, data, trainer


def options(applies=True, method="formula", **limits):
    return FitOptions(Limits(**{"max_batch_size": 20, **limits}), method=method, device=CARD, applies=applies)


def test_a_plan_is_set_and_announced():
    plans = Plans(options())
    module, data, trainer = fit(plans)
    planner = plans.planner
    assert (planner.plan.batch_size, data.batch_size, module.sizes) == (20, 20, [20] * 3)
    assert plans.shown == [(planner.plan, None, 0)]
    assert (planner.planned_size, planner.hyperparameters()) == (20, {"batch_size": 20})
    assert (trainer.accumulate_grad_batches, planner.accumulated, planner.val_plan) == (1, 1, None)
    assert planner.estimate.peak(20) == planner.plan.peak_reserved
    assert planner.structure
    planner.release()
    assert planner.planned_size is None  # no other can be set in its place


def test_a_plan_that_is_not_set_changes_nothing():
    plans = Plans(options(applies=False))
    module, data, _ = fit(plans)
    planner = plans.planner
    assert (planner.plan.batch_size, data.batch_size, module.sizes) == (20, 4, [4] * 15)
    assert (planner.planned_size, planner.hyperparameters(), planner.place) == (None, {}, None)


def test_an_effective_batch_size_is_set_by_accumulation():
    # 48 samples a step: the largest divisor up to 20 is 16, three batches of which are a step
    plans = Plans(options(effective_batch_size=48))
    module, _, trainer = fit(plans)
    planner = plans.planner
    assert (planner.plan.batch_size, planner.plan.accumulate_grad_batches) == (16, 3)
    assert (trainer.accumulate_grad_batches, planner.accumulated, module.sizes) == (3, 3, [16, 16, 16, 12])
    whole = {"batch_size": 16, "accumulate_grad_batches": 3, "effective_batch_size": 48}
    assert planner.hyperparameters() == whole


def test_what_an_earlier_plan_accumulates_is_no_obstacle():
    def again(plans):
        trainer, planner = plans.planner._trainer, plans.planner
        second = FitPlanner(trainer, planner._module, plans.options, planner.accumulated)
        second.run()
        plans.second = second

    plans = Plans(options(effective_batch_size=48), again)
    _, _, trainer = fit(plans)
    assert plans.second.plan.accumulate_grad_batches == trainer.accumulate_grad_batches == 3
    with pytest.raises(MisconfigurationException, match="accumulate_grad_batches"):  # the user's own is one
        fit(Plans(options(effective_batch_size=48)), accumulate_grad_batches=2)


def test_a_kept_size_is_set_in_place_of_the_planned_one():
    plans = Plans(options(), lambda plans: plans.keep(6))
    module, data, _ = fit(plans)
    planner = plans.planner
    assert (planner.plan.batch_size, planner.plan.limited_by, data.batch_size) == (6, "checkpoint", 6)
    assert module.sizes == [6] * 10
    assert [plan.batch_size for plan, *_ in plans.shown] == [20, 6]
    assert planner.planned_size == 20  # what was proposed


def test_a_kept_size_that_does_not_fit_leaves_what_was_planned():
    def keep(plans):
        with pytest.raises(mp.DoesNotFitError):
            plans.keep(10**7)

    plans = Plans(options(), keep)
    module, *_ = fit(plans)
    assert (plans.planner.plan.batch_size, set(module.sizes)) == (20, {20})


def test_a_forecast_is_of_the_planned_size_or_of_another():
    plans = Plans(options(method="trace"))
    fit(plans)
    planner = plans.planner
    for asked, size in ((None, 20), (7, 7)):
        found = planner.forecast(asked)
        assert found.replayed == planner.estimate.step_peaks(size, CARD.capacity)
        assert (found.accumulate, found.already_allocated) == (1, 0)
    assert FitPlanner(planner._trainer, planner._module, plans.options).forecast() == Forecast(())


def test_a_forecast_accumulates_as_the_plan_does():
    plans = Plans(options(method="trace", effective_batch_size=48))
    fit(plans)
    assert plans.planner.forecast().accumulate == 3


def test_bytes_that_are_allocated_already_are_left_out_of_the_plan_and_in_the_forecast(monkeypatch):
    asked = []

    def allocated_on(index, module):
        asked.append((index, module))
        return Allocated(other_bytes=2**20)

    monkeypatch.setattr(fitting, "allocated_on", allocated_on)
    monkeypatch.setattr(fitting, "cuda_index", lambda trainer: 3)
    plans = Plans(replace(options(), confirm=False))
    module, *_ = fit(plans)
    planner = plans.planner
    assert asked == [(3, module)]
    assert planner.already_allocated == planner.forecast().already_allocated == 2**20
    assert planner.plan.device.capacity == CARD.capacity - 2**20
    assert planner.forecast().at(0).allocated == planner.estimate.step_peaks(20, CARD.capacity)[0].allocated + 2**20


def record(structure, **changes):
    run = RunRecord(structure, "Net", "a card", CARD.total, CARD.capacity, "formula", 12, {}, {})
    return replace(run, **changes)


def test_a_size_that_once_ran_out_of_memory_is_not_planned_again(tmp_path):
    first = Plans(options())
    fit(first)
    structure, path = first.planner.structure, tmp_path / "runs.jsonl"
    append(record(structure, outcome="out of memory", predicted={"failed": (1, CARD.capacity)}), path)
    learned = Plans(replace(options(), history=path, learns_margin=True))
    fit(learned)
    assert (learned.planner.plan.batch_size, learned.planner.lesson.failed) == (11, 12)
    assert learned.planner.plan.margin == learned.planner.lesson.margin > 0
    # with a margin of the user's own, history decides nothing
    named = Plans(replace(options(margin=0.25), history=path))
    fit(named)
    assert (named.planner.plan.batch_size, named.planner.plan.margin) == (20, 0.25)
    # nor does it for other settings of the same module
    other = Plans(replace(options(), history=path, learns_margin=True))
    fit(other, precision="bf16-mixed")
    assert other.planner.structure != structure
    assert other.planner.plan.batch_size == 20


def test_real_steps_need_a_gpu():
    with pytest.raises(
        Exception, match=r"^confirm=True runs real steps on a CUDA device, and the Trainer runs on cpu$"
    ):
        fit(Plans(replace(options(), confirm=True)))


def test_a_failure_of_what_is_announced_leaves_everything_as_it_was():
    class Fails(Plans):
        def announce(self, *shown):
            raise RuntimeError("no text")

    plans, data = Fails(options(effective_batch_size=48)), Data()
    with pytest.raises(RuntimeError, match="no text"):
        fit(plans, data)
    assert (data.batch_size, plans.planner._trainer.accumulate_grad_batches) == (4, 1)
    assert plans.planner.plan is None


# ------------------------------------------------------------------------------------------------- what is said and set


def test_what_cannot_be_printed_stays_set(monkeypatch):
    def cannot(text):
        raise OSError("no terminal")

    monkeypatch.setattr(fitting, "plan_texts", lambda *arguments: ["a text"])
    monkeypatch.setattr(fitting, "say", cannot)
    data = Data()
    asked = []
    with pytest.warns(UserWarning, match=r"^MemoryPlanner: the plan is not printed: OSError: no terminal"):
        fit(Says(replace(options(), is_fatal=lambda error: bool(asked.append(error)))), data)
    assert data.batch_size == 20
    assert [type(error) for error in asked] == [OSError]
    with pytest.raises(OSError, match="no terminal"):
        fit(Says(options()), data := Data())
    assert data.batch_size == 4


class Says(Plans):
    """Plan at setup, and say so by the function that the test gives."""

    def setup(self, trainer, module, stage):
        self.planner = FitPlanner(trainer, module, self.options)
        self.planner.run()


def test_what_is_planned_is_said_in_order(monkeypatch):
    asked, said = [], []
    monkeypatch.setattr(fitting, "plan_texts", lambda *arguments: asked.append(arguments) or ["one", "two"])
    monkeypatch.setattr(fitting, "say", said.append)
    plans = Says(options())
    fit(plans)
    # 60 samples are 15 batches of 4, and 3 of 20
    advice = "MemoryPlanner: batch size 20 leaves 3 optimizer steps an epoch in place of 15. To stay closer"
    assert said[:2] == ["one", "two"]
    assert [text.startswith(advice) for text in said[2:]] == [True]
    assert asked == [(plans.planner.plan, plans.planner.lesson.text, None, 0)]


def test_a_plan_by_the_formula_alone_is_doubted():
    class Reads(Net):
        def training_step(self, batch, batch_idx):
            out = self.layer(batch)
            return out[: 1 + int(out.detach().numpy().argmax() * 0)].sum()

    with pytest.warns(
        UserWarning, match=r"^MemoryPlanner: planned by the formula, since the step cannot be traced: .*; "
    ):
        fit(Plans(options(method="auto")), module=Reads())
    fit(Plans(options(method="formula")), module=Reads())  # it is asked for: no doubt


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(100)


def test_a_size_that_leaves_a_batch_of_one_sample_is_lowered():
    # 61 samples are three batches of 20 and one sample; three of 19 and four; and eight of 7 and five
    plans = Plans(options())
    fit(plans, Data(batch_size=7, rows=61), module=Normed())
    plan = plans.planner.plan
    assert (plan.batch_size, plan.limited_by) == (19, "max_batch_size")
    text = "20 samples a batch leave a last batch of one, which a step may refuse: 19 do not"
    assert plan.notes[-1] == text
    plans = Plans(options())
    fit(plans, Data(batch_size=7, rows=61))  # without batch norm, too: another layer may refuse it
    assert plans.planner.plan.batch_size == 19
    plans = Plans(options(applies=False))
    fit(plans, Data(batch_size=7, rows=61), module=Normed())  # nothing is set
    assert plans.planner.plan.batch_size == 20


def test_a_batch_of_one_sample_that_no_smaller_size_avoids_is_said():
    plans = Plans(options(min_batch_size=20))
    with pytest.warns(UserWarning, match="the last batch of an epoch has one sample at batch size 20, and Normed has"):
        fit(plans, Data(batch_size=7, rows=61), module=Normed())
    assert plans.planner.plan.batch_size == 20
    assert not any("may refuse" in note for note in plans.planner.plan.notes)


def test_what_a_size_changes_in_training_is_said():
    with pytest.warns(UserWarning, match="accumulate_grad_batches=4 is more than the 3 batches of an epoch"):
        fit(Plans(options()), accumulate_grad_batches=4)
    fit(Plans(options(applies=False)), accumulate_grad_batches=4)


def test_epochs_keep_the_batches_that_the_trainer_needs():
    # 60 samples are 6 batches of 10 to 11, and 5 of 12
    plans = Plans(options())
    fit(plans, Validated(), module=Evaluates(), val_check_interval=6)
    assert plans.planner.plan.batch_size == 11
    plans = Plans(options(min_batch_size=12))
    with pytest.raises(mp.MemplanError, match="val_check_interval=6 counts batches"):
        fit(plans, Validated(), module=Evaluates(), val_check_interval=6)


# --------------------------------------------------------------------------------------------------- a size that stays


class Fixed(Data):
    """Its loader makes batches by a list, which cannot be resized."""

    def __init__(self):
        super().__init__()
        del self.batch_size

    def train_dataloader(self):
        return DataLoader(torch.ones(self.rows, 100), batch_sampler=[range(6), range(6, 12)])


def test_a_size_that_cannot_be_set_stays_and_is_planned_for():
    asked = []
    plans = Plans(replace(options(), is_fatal=lambda error: bool(asked.append(error))))
    with pytest.warns(UserWarning, match=r"^MemoryPlanner: the batch size stays 6, and its steps are predicted: "):
        module, *_ = fit(plans, Fixed())
    planner = plans.planner
    assert module.sizes == [6, 6]
    assert (planner.plan.batch_size, planner.plan.limited_by, planner.place) == (6, "dataset", None)
    assert [type(error) for error in asked] == [mp.ApplyError]
    assert planner.plan.notes[-1] == f"the batch size stays: {asked[0]}"
    assert (planner.planned_size, planner.hyperparameters(), planner.own_size) == (None, {}, 6)


@pytest.mark.parametrize(
    ("limits", "fatal"),
    [({}, True), ({"min_batch_size": 2}, False), ({"effective_batch_size": 12}, False)],
    ids=["fatal", "at least two", "twelve a step"],
)
def test_a_size_that_was_demanded_and_cannot_be_set_is_an_error(limits, fatal):
    plans = Plans(replace(options(**limits), is_fatal=lambda error: fatal))
    with pytest.raises(mp.MemplanError, match="cannot be set"):
        fit(plans, Fixed())


def test_the_samples_of_a_batch_are_counted_where_rows_tell():
    plans = Plans(options())
    fit(plans)
    planner = plans.planner
    assert planner.size_of(torch.zeros(7, 100)) == 7
    assert planner.size_of(["no tensor"]) is None
    planner._rows_are_samples = False
    assert planner.size_of(torch.zeros(7, 100)) is None
    planner.place = None
    assert planner.size_of(torch.zeros(7, 100)) == 4  # the user's own


# ------------------------------------------------------------------------------------------------ validation and tests


class Validated(Data):
    def __init__(self):
        super().__init__()
        self.val_size, self.test_size = 3, 2

    def val_dataloader(self):
        return DataLoader(torch.ones(50, 100), batch_size=self.val_size)

    def test_dataloader(self):
        return DataLoader(torch.ones(40, 100), batch_size=self.test_size)


class Evaluates(Net):
    def validation_step(self, batch, batch_idx):
        self.layer(batch)

    def test_step(self, batch, batch_idx):
        self.layer(batch)


NAMES = {"train": "batch_size", "val": "val_size", "test": "test_size"}


def test_validation_that_cannot_be_read_costs_no_plan(monkeypatch):
    def unreadable(*_):
        raise OSError("no such file")

    monkeypatch.setattr(fitting, "share_of_validation", unreadable)
    plans = Plans(options(method="trace"))
    _, data, _ = fit(plans, Validated(), module=Evaluates())
    assert (plans.planner.plan.batch_size, data.batch_size) == (20, 20)
    (note,) = (note for note in plans.planner.plan.notes if "validation" in note)
    assert note.startswith("validation is not planned beside training: OSError: no such file at ")


def test_validation_has_a_size_of_its_own():
    plans = Plans(replace(options(method="trace", max_batch_size=40), names=NAMES))
    _, data, _ = fit(plans, Validated(), module=Evaluates())
    planner = plans.planner
    assert (planner.plan.batch_size, planner.val_plan.batch_size, data.batch_size, data.val_size) == (40, 40, 40, 40)
    assert planner.hyperparameters() == {"batch_size": 40, "val_size": 40}
    assert plans.shown == [(planner.plan, planner.val_plan, 40)]
    assert planner._val_place.phase == "val"
    planner.release()
    assert planner._validation is None


def test_without_validation_none_is_planned():
    plans = Plans(replace(options(method="trace"), names=NAMES))
    _, data, _ = fit(plans, Validated(), module=Evaluates(), limit_val_batches=0)
    assert (plans.planner.val_plan, data.val_size) == (None, 3)
    plans = Plans(options(method="trace"))  # nor where nobody names it
    _, data, _ = fit(plans, Validated(), module=Evaluates())
    assert (plans.planner.val_plan, data.val_size) == (None, 3)


def test_validation_that_cannot_be_traced_has_the_size_of_training():
    plans = Plans(replace(options(), names=NAMES))  # by the formula nothing is known beside it
    with pytest.warns(UserWarning, match="validation gets training's batch size, since it cannot be traced"):
        _, data, _ = fit(plans, Validated(), module=Evaluates())
    assert (plans.planner.val_plan, data.val_size, plans.planner._val_place.phase) == (None, 20, "val")
    assert plans.shown == [(plans.planner.plan, None, 20)]


@pytest.mark.parametrize("device", [CARD, None], ids=["named", "the Trainer's"])
def test_a_test_is_planned_and_set(monkeypatch, device):
    def device_of_trainer(trainer):
        assert isinstance(trainer, pl.Trainer)
        return mp.Device("the Trainer's", total=2**29)

    def allocated_on(index, module):
        asked.append((index, module))
        return Allocated(module_bytes=7, other_bytes=2**20)

    monkeypatch.setattr(fitting, "device_of_trainer", device_of_trainer)
    monkeypatch.setattr(fitting, "cuda_index", lambda trainer: 3)
    monkeypatch.setattr(fitting, "allocated_on", allocated_on)
    found, asked, module = [], [], Evaluates()

    class Tests(pl.Callback):
        def setup(self, trainer, module, stage):
            limits = Limits(0.25, min_batch_size=99, max_batch_size=30)
            found.append(fitting.plan_and_set_test(trainer, module, FitOptions(limits, device=device, names=NAMES)))

    data = Validated()
    trainer_with(Tests()).test(module, datamodule=data, verbose=False)
    assert asked == [(3, module)]
    (test,) = found
    plan = test.plan
    assert (test.batch_size, plan.batch_size, plan.limited_by, data.test_size) == (30, 30, "max_batch_size", 30)
    test.put_back()
    assert data.test_size == Validated().test_size
    assert (plan.margin, plan.method) == (0.25, "trace")
    assert plan.device.capacity == (2**30 if device else 2**29) - 2**20  # what others have allocated is not there


# --------------------------------------------------------------------------------------------------------- real steps


@pytest.mark.parametrize(
    ("confirm", "device", "index", "asked"),
    [
        (None, None, 0, [False]),
        (None, None, None, []),
        (None, CARD, 0, []),  # it is planned for another GPU
        (True, CARD, 0, [True]),  # whose errors are raised
        (False, None, 0, []),
    ],
)
def test_real_steps_confirm_a_plan_for_the_gpu_of_this_fit(monkeypatch, confirm, device, index, asked):
    how = []

    def confirmed(proposal, *, strict, is_fatal):
        how.append((strict, is_fatal))
        return proposal.noted("confirmed")

    monkeypatch.setattr(fitting, "confirmed", confirmed)
    monkeypatch.setattr(fitting, "cuda_index", lambda trainer: index)
    monkeypatch.setattr(fitting, "device_of_trainer", card_of)
    plans = Plans(replace(options(), confirm=confirm, device=device))
    fit(plans)
    assert how == [(each, plans.options.is_fatal) for each in asked]
    assert ("confirmed" in plans.planner.plan.notes) is bool(asked)


def test_copies_of_weights_that_callbacks_hold_on_the_gpu_are_left_out_of_the_plan(monkeypatch):
    monkeypatch.setattr(fitting, "confirmed", lambda proposal, **how: proposal)
    monkeypatch.setattr(fitting, "cuda_index", lambda trainer: 0)
    monkeypatch.setattr(fitting, "averaging_bytes", lambda trainer, module: 1000 + len(list(module().parameters())))
    plans = Plans(options())
    fit(plans)
    assert plans.planner.plan.device.capacity == CARD.capacity - 1002
    assert plans.planner.already_allocated == 1002


def test_a_plan_of_which_one_ranks_size_stays_is_not_confirmed(monkeypatch):
    told = []
    monkeypatch.setattr(fitting, "confirmed", lambda proposal, **how: pytest.fail("no real steps"))
    monkeypatch.setattr(fitting, "cuda_index", lambda trainer: 0)
    monkeypatch.setattr(fitting, "device_of_trainer", card_of)
    monkeypatch.setattr(fitting, "over_ranks", lambda stays: told.append(stays) or [stays, True])
    fit(Plans(replace(options(), device=None)))
    monkeypatch.setattr(fitting, "over_ranks", lambda stays: told.append(stays) or [stays])
    with pytest.warns(UserWarning, match="the batch size stays 6"):
        fit(Plans(replace(options(), device=None, is_fatal=lambda error: False)), Fixed())
    assert told == [False, True]


# --------------------------------------------------------------------------------------------------- what is handed on


def test_a_planner_that_has_not_run_knows_nothing():
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    planner = FitPlanner(trainer, Net(), options(margin=0.25))
    assert (planner.plan, planner.val_plan, planner.estimate, planner.place, planner.own_size) == (None,) * 5
    assert (planner.structure, planner.already_allocated, planner.accumulated) == ("", 0, 1)
    assert (planner.lesson, planner.settings) == (Lesson(0.25), StepSettings())
    assert (planner.planned_size, planner.hyperparameters(), planner.size_of(torch.zeros(7, 2))) == (None, {}, 7)
    assert planner.forecast() == Forecast(())
    assert FitPlanner(trainer, Net(), options(), 5).accumulated == 5


def test_a_job_is_made_of_the_options(monkeypatch):
    made = []
    job_of_trainer = fitting.job_of_trainer
    monkeypatch.setattr(
        fitting, "job_of_trainer", lambda *arguments: made.append(arguments) or job_of_trainer(*arguments)
    )

    class Named(Net):
        def __init__(self):
            super().__init__()
            self.bs = 4

        def train_dataloader(self):
            return DataLoader(torch.ones(SAMPLES, 100), batch_size=self.bs)

    sampling, module = Sampling("first", 3), Named()
    plans = Plans(replace(options(), names={"train": "bs"}, sampling=sampling))
    trainer = trainer_with(plans)
    trainer.fit(module)
    assert made == [(trainer, module, "fit", CARD, sampling, "formula", "bs")]
    planner = plans.planner
    assert (planner._session.job.batch_size_name, planner._session.method) == ("bs", "formula")
    assert (module.bs, planner.hyperparameters()) == (20, {"bs": 20})  # on the module itself


def test_loaders_without_an_attribute_are_set_alone():
    plans, module = Plans(options()), Net()
    trainer = trainer_with(plans)
    trainer.fit(module, DataLoader(torch.ones(SAMPLES, 100), batch_size=4))
    assert (module.sizes, plans.planner.hyperparameters()) == ([20] * 3, {"batch_size": 20})


@pytest.mark.parametrize(("learns", "margin"), [(True, None), (False, 0.25)])
def test_history_teaches_a_margin_where_none_is_named(monkeypatch, tmp_path, learns, margin):
    asked = []
    monkeypatch.setattr(
        fitting, "learn", lambda *arguments, **named: asked.append((arguments, named)) or Lesson(0.4, failed=9)
    )
    plans = Plans(replace(options(margin=0.25), history=tmp_path, learns_margin=learns))
    fit(plans)
    planner = plans.planner
    how = {"method": "formula", "margin": margin, "prior": MARGIN}
    assert asked == [((tmp_path, planner.structure, planner._session.device), how)]
    assert (planner.plan.margin, planner.plan.batch_size) == (0.4, 8)  # below the size that failed


def test_a_kept_size_that_another_error_forbids_need_not_stop_training():
    def keep(plans):
        with pytest.raises(PlanningFailedError):
            plans.planner.keep(10**7, lambda error: False)

    plans = Plans(options(), keep)
    fit(plans)
    assert plans.planner.plan.batch_size == 20


def test_two_samples_may_be_too_many_for_the_trainer():
    plans = Plans(options(max_batch_size=2))
    fit(plans, Validated(), module=Evaluates(), val_check_interval=31)  # 60 samples are 30 batches of 2
    assert plans.planner.plan.batch_size == 1


def test_an_accumulation_that_is_planned_is_no_surprise():
    # half of the 4 batches of 16 are 2, of which 3 make a step: what the user has set had 7, and was no accumulation
    plans = Plans(options(effective_batch_size=48))
    fit(plans, limit_train_batches=0.5)
    assert plans.planner.accumulated == 3


def test_a_finder_beside_the_planner_is_refused_where_the_size_is_set():
    finder = pl.callbacks.BatchSizeFinder
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[finder()])
    with pytest.raises(MisconfigurationException, match="so does the callback BatchSizeFinder"):
        FitPlanner(trainer, Net(), options()).run()


def test_an_effective_batch_size_is_planned_from_its_whole_on(monkeypatch):
    asked = []
    estimate_at = fitting.PlanningSession.estimate_at
    monkeypatch.setattr(
        fitting.PlanningSession, "estimate_at", lambda self, size: asked.append(size) or estimate_at(self, size)
    )
    fit(Plans(options(effective_batch_size=48)))
    assert asked[0] == 48
    asked.clear()
    fit(Plans(options()))
    assert asked[0] == 1


def test_a_size_that_is_lowered_for_batch_norm_is_limited_by_what_limited_it_before():
    found = mp.estimate(Normed(), torch.zeros(4, 100), method="formula")
    tight = mp.Device("tight", total=found.peak(20))
    plans = Plans(replace(options(margin=0.0, max_batch_size=None), device=tight))
    fit(plans, Data(batch_size=7, rows=61), module=Normed())
    assert (plans.planner.plan.batch_size, plans.planner.plan.limited_by) == (19, "memory")


def test_planning_that_fails_need_not_stop_training():
    plans = Plans(replace(options(min_batch_size=10**7, max_batch_size=None), is_fatal=lambda error: False))
    with pytest.raises(PlanningFailedError, match="no batch size is at least 10000000"):
        fit(plans)
    with pytest.raises(UnmetDemandError, match="no batch size is at least 10000000"):
        fit(Plans(options(min_batch_size=10**7, max_batch_size=None)))


@pytest.mark.parametrize(("fatal", "error"), [(True, mp.DoesNotFitError), (False, PlanningFailedError)])
def test_validation_that_does_not_fit_undoes_the_plan(monkeypatch, fatal, error):
    def fails(*arguments):
        raise mp.DoesNotFitError("no room for validation", needed=2, available=1)

    monkeypatch.setattr(fitting, "plan_validation", fails)
    data = Validated()
    plans = Plans(replace(options(method="trace"), names=NAMES, is_fatal=lambda error: fatal))
    with pytest.raises(error, match="no room for validation"):
        fit(plans, data, module=Evaluates())
    assert (data.batch_size, data.val_size, plans.planner.plan) == (4, 3, None)


def noted(monkeypatch, name):
    """Note what a function of the module is given."""
    asked, function = [], getattr(fitting, name)

    def noting(*arguments, **named):
        asked.append(arguments)
        return function(*arguments, **named)

    monkeypatch.setattr(fitting, name, noting)
    return asked


def test_a_step_is_known_by_its_settings_and_ranks(monkeypatch):
    asked = noted(monkeypatch, "structure_of")
    plans = Plans(options())
    fit(plans)
    planner = plans.planner
    assert asked == [(planner._session.estimate_at(1), "Net", planner.settings, 1)]


def test_epochs_are_looked_at_from_the_users_own_size(monkeypatch):
    asked, places = noted(monkeypatch, "most_within_epochs"), noted(monkeypatch, "find_place")
    plans = Plans(options())
    _, _, trainer = fit(plans)
    source = plans.planner.place.source
    assert asked == [(trainer, source, 20, 4)]
    assert [given[:2] for given in places] == [(trainer, source)]
    assert plans.planner.place.own == 4


def test_a_size_of_tests_may_be_the_modules(monkeypatch):
    class Owns(Evaluates):
        def __init__(self):
            super().__init__()
            self.test_size = 2

        def test_dataloader(self):
            return DataLoader(torch.ones(40, 100), batch_size=self.test_size)

    asked, module = noted(monkeypatch, "find_place"), Owns()

    class Tests(pl.Callback):
        def setup(self, trainer, module, stage):
            how = FitOptions(Limits(max_batch_size=30), device=CARD, names=NAMES)
            assert fitting.plan_and_set_test(trainer, module, how).batch_size == 30

    trainer_with(Tests()).test(module, verbose=False)
    assert module.test_size == 30
    ((_, source, _, phase),) = asked
    assert phase == "test"
    assert len(source.flattened[0].dataset) == 40
