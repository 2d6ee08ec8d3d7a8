"""Which way to predict a step is taken, what is said of those that failed, and what each is given."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_memplan as mp
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.memory.events import Event, Trace
from lightning_memplan.memory.formula import Formula
from lightning_memplan.memory.loops import LOOPS
from lightning_memplan.memory.program import scale
from lightning_memplan.planning import job as jobs
from lightning_memplan.planning import predict as predicting
from lightning_memplan.planning import retrace
from lightning_memplan.planning.job import DataSource, Training, training_job
from lightning_memplan.planning.predict import predict, predict_test, trace_of_validation
from lightning_memplan.trace import tracer

MiB, GiB = 2**20, 2**30
CARD = mp.Device("a card", total=GiB, capability=(8, 6))
HERE = mp.Device("a card that is here", total=GiB, index=1, capability=(8, 6))
FORMULA = Formula((), 1000, 900, 10, 45)
BATCH = torch.zeros(4, 8)


def estimate(method="trace", sizes=(2, 3, 5), each=MiB, **fields: Any) -> Estimate:
    program = scale([Trace(n, (Event(0, n * each, "forward", 1),)) for n in sizes])
    return Estimate(method, FORMULA, None if method == "formula" else program, **fields)


def predict_validation(job, training, batch_size, validation):
    return trace_of_validation(job, validation).beside(training, batch_size)


class Net(pl.LightningModule):
    """``step(module, x)`` is its loss, and its validation and test take ``evaluate(module, x)``."""

    def __init__(self, step=lambda module, x: module.net(x).sum(), evaluate=lambda module, x: module.net(x)):
        super().__init__()
        self.net, self.step, self.evaluate = nn.Linear(8, 8), step, evaluate

    def training_step(self, batch, batch_idx):
        return self.step(self, batch)

    def validation_step(self, batch, batch_idx):
        self.evaluate(self, batch)

    def test_step(self, batch, batch_idx):
        self.evaluate(self, batch)

    def configure_optimizers(self):
        CALLS.append("optimizers")
        return torch.optim.SGD(self.parameters(), lr=0.1)


CALLS: list[str] = []


@pytest.fixture(autouse=True)
def no_calls():
    CALLS.clear()


def a_job(module=None, batch=BATCH, method="auto", device=CARD, **how: Any) -> Any:
    return training_job(module or Net(), batch, Training(**how), device=device, method=method)


class Differing(IterableDataset):
    """Samples that differ in length: a note says that batches are of the largest, which has eight numbers."""

    def __iter__(self):
        return iter([torch.zeros(1), *[torch.zeros(8)] * 3])


def differing(**arguments: Any) -> Any:
    return DataLoader(Differing(), collate_fn=torch.stack, **arguments)


DIFFER = "samples differ in size (4 B to 32 B): planned for batches of the largest of"


# --------------------------------------------------------------------------------------------------- which way is taken


@pytest.fixture
def ways(monkeypatch):
    """A GPU that can be probed, and what probe and trace return or raise; the list tells which of them were asked."""
    monkeypatch.setattr(jobs, "can_probe", lambda: True)

    def found(probed, traced) -> list[Any]:
        asked: list[Any] = []

        def of(result, asking):
            asked.append(asking)
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(predicting, "_probed", lambda job, largest: of(probed, ("probe", largest)))
        monkeypatch.setattr(predicting, "_traced", lambda job: of(traced, "trace"))
        return asked

    return found


def predicted(method="auto", device=HERE, largest=None) -> Estimate:
    return predict(a_job(method=method, device=device), largest)


def test_a_probe_that_is_asked_for_is_all(ways):
    probed = estimate("probe")
    asked = ways(probed, estimate())
    assert predicted("probe", largest=9) is probed
    assert asked == [("probe", 9)]


@pytest.mark.parametrize("error", [mp.TraceError("no copy"), KeyError("mine"), RuntimeError("shapes"), OSError("disk")])
def test_a_probe_that_is_asked_for_raises_its_own_error(ways, error):
    asked = ways(error, estimate())
    with pytest.raises(type(error)) as caught:
        predicted("probe")
    assert caught.value is error
    assert asked == [("probe", None)]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (mp.TraceError("no copy"), "no copy"),
        (KeyError("mine"), "the step failed in a probe (KeyError: 'mine'); at no line of the module's own code"),
        (TypeError("mine"), "the step failed in a probe (TypeError: mine); at no line of the module's own code"),
        (AttributeError("mine"), "the step failed in a probe (AttributeError: mine); at no line of the module's own"),
    ],
    ids=str,
)
def test_what_a_replica_cannot_run_is_traced_and_said(ways, error, why):
    error.__traceback__ = None
    ways(error, estimate(notes=("a trace's",)))
    first, second = predicted().notes
    assert first.startswith(f"not planned by a probe: {why.split('; at')[0]}")
    assert second == "a trace's"


@pytest.mark.parametrize("error", [RuntimeError("shapes"), AssertionError(), IndexError("mine"), ValueError("mine")])
def test_a_step_that_is_wrong_at_every_size_raises_its_own_error(ways, error):
    ways(error, estimate())
    with pytest.raises(type(error)) as caught:
        predicted()
    assert caught.value is error


@pytest.mark.parametrize(
    "traced", [estimate(sizes=(8,), only_at=8), estimate(sizes=(32, 64, 128))], ids=["one", "many"]
)
def test_a_step_that_refuses_few_samples_is_planned_by_its_trace(ways, traced):
    ways(RuntimeError("too few"), traced)
    found = predicted()
    assert found.notes[0].startswith("not planned by a probe: the step failed in a probe (RuntimeError: too few)")
    assert replace(found, notes=()) == traced


def test_an_error_that_no_step_refuses_with_is_raised_at_once(ways):
    asked = ways(OSError("disk"), estimate())
    with pytest.raises(OSError, match="disk"):
        predicted()
    assert asked == [("probe", None)]


def test_nothing_is_traced_for_a_gpu_that_failed(ways, monkeypatch):
    error = RuntimeError("device-side assert")
    asked = ways(error, estimate(only_at=8))
    monkeypatch.setattr(predicting, "gpu_failed", lambda found: found is error)
    with pytest.raises(RuntimeError, match="device-side assert"):
        predicted()
    assert asked == [("probe", None)]


def test_where_neither_can_be_had_both_reasons_are_said(ways):
    ways(mp.TraceError("no copy"), mp.TraceError("a value", reason="data_dependent"))
    with pytest.raises(mp.TraceError, match=r"^a value; not probed: no copy$") as caught:
        predicted()
    assert caught.value.reason == "data_dependent"


@pytest.mark.parametrize(("probed", "traced"), [(mp.TraceError("no copy"), OSError("disk")), (None, OSError("disk"))])
def test_an_error_of_no_trace_is_raised_as_it_is(ways, probed, traced):
    ways(probed, traced)
    with pytest.raises(OSError, match=r"^disk$") as caught:
        predicted(device=CARD if probed is None else HERE)
    assert caught.value is traced


def test_a_trace_that_fails_alone_is_raised_as_it_is(ways):
    error = mp.TraceError("a value", reason="data_dependent")
    asked = ways(None, error)
    with pytest.raises(mp.TraceError) as caught:
        predicted(device=CARD)
    assert caught.value is error
    assert asked == ["trace"]


@pytest.mark.parametrize(
    ("error", "why"), [(mp.TraceError("a value"), "a value"), (OSError("disk"), "OSError: disk")], ids=str
)
def test_a_probe_plans_where_the_trace_fails(ways, error, why):
    probed = estimate("probe", notes=("a probe's",))
    ways(probed, error)
    notes = predicted().notes
    assert notes[0] == "a probe's"
    assert notes[1].startswith(f"not traced: {why}")
    assert len(notes) == 2


def test_a_device_elsewhere_is_planned_by_the_trace_alone(ways):
    traced = estimate(notes=("a trace's",))
    asked = ways(estimate("probe"), traced)
    assert predicted(device=CARD) == traced
    assert asked == ["trace"]


@pytest.mark.parametrize("traced", [estimate("formula"), estimate(only_at=8)], ids=["formula", "one size"])
def test_a_probe_plans_alone_where_the_trace_knows_less(ways, traced):
    probed = estimate("probe")
    ways(probed, traced)
    assert predicted() is probed


@pytest.mark.parametrize(
    ("sizes", "first"),
    [((2, 3, 5), "trace"), ((2, 3, 6), "probe")],  # of 6 samples more is seen than a trace sees
)
def test_of_two_that_saw_few_samples_the_one_that_needs_more_plans(ways, sizes, first):
    probed = estimate("probe", sizes, notes=("both", "a probe's"))
    traced = estimate("trace", each=2 * MiB, notes=("both", "a trace's"))
    ways(probed, traced)
    found = predicted()
    expected, other = (traced, probed) if first == "trace" else (probed, traced)
    assert found == replace(expected, alternatives=(other,), notes=("both", "a probe's", "a trace's"))


def test_the_tightest_is_the_one_with_which_the_fewest_samples_fit():
    # 1 GiB has room for 1024 samples of 1 MiB; for 512 of 2 MiB; and for any number where none takes more
    one, two = estimate(), estimate(each=2 * MiB)
    constant = Estimate("probe", FORMULA, scale([Trace(n, (Event(0, MiB, "forward", 1),)) for n in (2, 3)]))
    assert predicting._tightest_first((constant, one, two), CARD) == [two, one, constant]
    # 600 MiB at once, and 1 MiB a sample: 424 fit in 1 GiB, of 8 GiB 7592, where those of 2 MiB are 4096
    base = (Event(0, 600 * MiB, "setup"),)
    high = Estimate("trace", FORMULA, scale([Trace(n, (*base, Event(1, n * MiB, "forward", 1))) for n in (2, 3, 5)]))
    assert predicting._tightest_first((two, high), CARD) == [high, two]
    assert predicting._tightest_first((two, high), mp.Device("large", total=8 * GiB)) == [two, high]


# -------------------------------------------------------------------------------------------------------------- a probe


@pytest.fixture
def probing(monkeypatch):
    """Note how steps are probed; what is recorded is a trace on fake tensors."""
    monkeypatch.setattr(jobs, "can_probe", lambda: True)
    asked: list[Any] = []

    def probe_steps(setup, sample, index, *, capacity=None, largest=None, begun=None):
        asked.append((setup, [size for size, _ in sample()], index, capacity, largest, begun))
        result = tracer.trace_counted(setup, sample())
        first, *others = result.traces
        return [replace(first, notes=("of the first run",)), *others], result.formula

    monkeypatch.setattr(predicting, "probe_steps", probe_steps)
    return asked


def test_a_probe_is_given_the_job_and_the_gpu(probing):
    job = a_job(batch=differing(batch_size=2), method="probe", device=HERE)
    found = predict(job, 7)
    assert probing == [(job.setup, [2, 3, 5], 1, HERE.capacity, 7, job.begun_replica())]
    assert job.begun_replica() is not None
    assert (found.method, found.program.batch_sizes, found.loops) == ("probe", (2, 3, 5), False)
    assert found.notes[0] == "of the first run"
    assert found.notes[1].startswith(DIFFER)
    assert len(found.notes) == 2
    assert found.formula == mp.estimate(Net(), torch.zeros(4, 8)).formula
    assert found.settings == predicting._allocator()


def test_a_probed_step_may_loop_over_its_samples(probing):
    looping = Net(lambda module, x: sum(module.net(row).sum() for row in x))
    found = predict(a_job(looping, method="probe", device=HERE))
    assert found.loops
    assert found.notes == ("of the first run", LOOPS)


@pytest.mark.parametrize("device", [CARD, mp.Device("host", total=GiB, index=0, kind="cpu")], ids=lambda d: d.name)
def test_a_probe_needs_a_gpu_of_this_machine(probing, device):
    text = f"^a probe runs on a CUDA device of this machine, not on '{device.name}': use method='trace'$"
    with pytest.raises(ValueError, match=text):
        predict(a_job(method="probe", device=device))
    assert not probing


def test_a_module_without_a_real_replica_is_not_probed(probing):
    job = a_job(method="probe", device=HERE)
    job.replicas.why_not_real = "no room"
    with pytest.raises(mp.TraceError, match=r"^no room$") as caught:
        predict(job)
    assert (caught.value.reason, probing) == ("failed", [])


# -------------------------------------------------------------------------------------------------------------- a trace


def noted(monkeypatch, name, **result: Any) -> list[Any]:
    """Note what a function of the tracer is given, and change fields of what it returns."""
    asked: list[Any] = []
    function = getattr(tracer, name)

    def noting(*arguments: Any, **named: Any) -> Any:
        asked.append((arguments, named))
        return replace(function(*arguments, **named), **result)

    monkeypatch.setattr(predicting, name, noting)
    return asked


def test_a_step_is_traced_at_few_sizes_from_its_beginning(monkeypatch):
    asked = noted(monkeypatch, "trace_counted")
    job = a_job(batch=differing(batch_size=2), method="trace")
    found = predict(job)
    (((setup, batches), how),) = asked
    assert (setup, how["beginning"]) == (job.setup, job.beginning())
    assert [(size, tuple(batch.shape)) for size, batch in batches] == [(2, (2, 8)), (3, (3, 8)), (5, (5, 8))]
    assert CALLS == ["optimizers"]  # for all three
    assert (found.method, found.loops, found.least, found.only_at) == ("trace", False, None, None)
    assert found.notes[0].startswith(DIFFER)
    assert (found.formula.parameter_bytes, found.settings) == (4 * (8 * 8 + 8), predicting._allocator())


def test_a_step_that_loops_over_its_samples_says_so():
    found = predict(a_job(Net(lambda module, x: sum(module.net(row).sum() for row in x)), method="trace"))
    assert (found.loops, found.notes) == (True, (LOOPS,))


@pytest.mark.parametrize(
    ("step", "sizes"),
    [
        (lambda module, x: module.net(x.view(32, -1, 8)).sum(), (32, 64, 128)),
        (lambda module, x: module.net(x.view(60, -1, 8)).sum(), (60, 120, 240)),
    ],
    ids=["by 32", "by 60"],
)
def test_a_step_that_refuses_few_samples_is_traced_with_many(step, sizes):
    found = predict(a_job(Net(step), batch=differing(batch_size=2), method="trace"))
    assert found.program.batch_sizes == sizes
    text = f"the step does something else with few samples: planned from {sizes[0]} and more"
    assert found.notes[0] == text
    assert found.notes[1].startswith(DIFFER)


def test_a_step_that_does_something_else_with_few_samples_is_traced_with_many():
    # up to five samples there is another layer for each number of them; that many is no loop, whose steps are alike
    def step(module, x):
        for _ in range(len(x) ** 2 if len(x) < 6 else 2):
            x = module.net(x)
        return x.sum()

    found = predict(a_job(Net(step), method="trace"))
    assert (found.program.batch_sizes, found.loops) == ((32, 64, 128), False)


def test_a_step_that_trains_nothing_on_few_samples_is_traced_with_many():
    def step(module, x):
        return None if len(x) < 30 and x.sum().item() <= 0 else module.net(x).sum()

    assert predict(a_job(Net(step), method="trace")).program.batch_sizes == (32, 64, 128)


def test_many_samples_that_the_host_cannot_hold_are_not_tried(monkeypatch):
    monkeypatch.setattr(retrace, "cpu_device", lambda: mp.Device("host", total=1024, kind="cpu"))
    with pytest.raises(mp.TraceError, match=r"^Net cannot be traced: .*shape '\[32, -1, 8\]' is invalid") as caught:
        predict(a_job(Net(lambda module, x: module.net(x.view(32, -1, 8)).sum()), method="trace"))
    assert caught.value.reason == "refused"


def test_an_error_that_has_nothing_to_do_with_few_samples_is_not_tried_again(monkeypatch):
    asked = noted(monkeypatch, "trace_counted")

    def fails(module, x):
        raise OSError("disk")

    with pytest.raises(mp.TraceError, match=r"^Net cannot be traced: the step failed in a trace \(OSError: disk\)"):
        predict(a_job(Net(fails), method="trace"))
    assert len(asked) == 1


def test_of_a_compiled_step_both_bounds_are_traced(monkeypatch):
    upper, lower = noted(monkeypatch, "trace_counted", fused=True), noted(monkeypatch, "trace_steps")
    bounds = []
    monkeypatch.setattr(predicting, "Graphs", lambda: bounds.append(SimpleGraphs()) or bounds[-1])
    job = a_job(method="trace")
    found = predict(job)
    (((_, batches), how),) = upper
    assert lower == [((job.setup, batches), {"graphs": how["graphs"], "beginning": job.beginning()})]
    (graphs,) = bounds
    assert how["graphs"] is graphs
    assert graphs.lower_bound
    assert found.least.batch_sizes == (2, 3, 5)
    assert found.least is not found.program


class SimpleGraphs(predicting.Graphs):
    """Graphs that are compared by identity."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


def test_what_is_compiled_is_traced_at_larger_sizes(monkeypatch):
    job = a_job(method="trace")
    assert predict(job).program.batch_sizes == (2, 3, 5)
    monkeypatch.setattr(predicting, "compiled_parts", lambda module: [module] if module is job.setup.module else [])
    assert predict(job).program.batch_sizes == (16, 24, 40)


# ------------------------------------------------------------------------------------- the own batch, and the formula


class TakesEight(Net):
    def __init__(self):
        super().__init__(lambda module, x: module.net(x.view(8, 8)).sum())


@pytest.mark.parametrize("batch", [torch.zeros(8, 8), differing(batch_size=8)], ids=["a batch", "a loader"])
def test_a_step_that_takes_its_own_size_alone_is_traced_there(monkeypatch, batch):
    asked = noted(monkeypatch, "trace_counted")
    job = a_job(TakesEight(), batch)
    found = predict(job)
    assert (found.method, found.only_at, found.program.batch_sizes) == ("trace", 8, (8,))
    assert found.notes[0].startswith("the step takes its own batch size 8 alone (the step failed in a trace (RuntimeE")
    assert found.notes[0].endswith("): it stays")
    assert [note[: len(DIFFER)] for note in found.notes[1:]] == [DIFFER] * isinstance(batch, DataLoader)
    ((setup, ((size, own),)), how) = asked[-1]
    assert (setup, size, own.shape, how) == (job.setup, 8, (8, 8), {"beginning": job.beginning()})
    assert (found.formula.parameter_bytes, found.settings) == (4 * (8 * 8 + 8), predicting._allocator())


def test_notes_of_the_trace_of_its_own_batch_are_kept():
    def draws(module, x):
        return module.net(x.view(8, 8)).sum() * random.random()

    found = predict(a_job(Net(draws), torch.zeros(8, 8)))
    assert any("draws numbers" in note for note in found.notes[1:])


def test_a_step_that_cannot_be_traced_at_all_is_counted(monkeypatch):
    asked = noted(monkeypatch, "run_formula", stopped="it stopped")

    def fails(module, x):
        module.net(x)
        raise OSError("disk")

    job = a_job(Net(fails), differing(batch_size=2))
    found = predict(job)
    assert (found.method, found.program, found.only_at) == ("formula", None, None)
    first, second, third = found.notes
    assert first.startswith("planned by the formula, since the step cannot be traced: the step failed in a trace (OSE")
    assert second == "the formula counts the layers that ran before the step stopped: it stopped"
    assert third.startswith(DIFFER)
    (((setup, (size, batch), beginning), _),) = asked
    assert (setup, size, len(batch), beginning) == (job.setup, 2, 2, job.beginning())
    assert (found.formula.parameter_bytes, found.settings) == (4 * (8 * 8 + 8), predicting._allocator())


def test_why_a_step_stopped_is_said_once():
    def fails(module, x):
        module.net(x)
        raise OSError("disk")

    found = predict(a_job(Net(fails)))
    assert found.notes[1:] == ("the formula counts the layers that ran before the step stopped",)


def test_the_formula_that_is_asked_for_traces_nothing(monkeypatch):
    asked = noted(monkeypatch, "trace_counted")
    found = predict(a_job(method="formula"))
    assert (found.method, found.notes, asked) == ("formula", (), [])


def test_layers_are_counted_where_a_hook_fails(monkeypatch):
    class Fails(Net):
        def configure_optimizers(self):
            raise KeyError("mine")

    asked = noted(monkeypatch, "run_formula")
    found = predict(a_job(Fails(), method="formula"))
    ((_, _, beginning), _) = asked[0]
    assert (found.method, beginning) == ("formula", None)
    # without the optimizer's state: weights and their gradients
    assert found.formula.memory(1) >= 2 * 4 * (8 * 8 + 8)


# -------------------------------------------------------------------------------------------------- validation and test


def training_estimate(**fields: Any) -> Estimate:
    return replace(mp.estimate(Net(), BATCH, method="trace", device=CARD), **fields)


def test_validation_is_planned_beside_training_at_its_size(monkeypatch):
    asked = noted(monkeypatch, "trace_validation")
    settings = replace(predicting._allocator(), expandable_segments=True)
    job, training = a_job(), training_estimate(method="probe", settings=settings, formula=FORMULA)
    found = predict_validation(job, training, 100, DataSource(differing(batch_size=2)))
    (((setup, first, batches), how),) = asked
    assert (setup, first.shape, how) == (job.setup, (2, 8), {"beginning": job.beginning()})
    assert [(size, tuple(batch.shape)) for size, batch in batches] == [(2, (2, 8)), (3, (3, 8)), (5, (5, 8))]
    assert (found.method, found.formula, found.settings) == ("probe", FORMULA, settings)
    assert found.notes[-1].startswith(DIFFER)
    # training at 100 samples is in it, whatever the size of validation
    assert found.peak_allocated(1) >= training.peak_allocated(100)
    assert found.peak_allocated(10_000) > 10_000 * 2 * 8 * 4


def test_validation_has_notes_of_its_own():
    def draws(module, x):
        module.net(x).mul(random.random())

    found = predict_validation(a_job(Net(evaluate=draws)), training_estimate(), 4, DataSource(BATCH))
    assert [note.split(" (")[0] for note in found.notes] == ["the step draws numbers"]


def sliding(module, x):
    """As a sliding window does: the number of positions is no line."""
    for _ in range(len(x) ** 2 if len(x) < 9 else 3):
        module.net(x)


def test_validation_that_differs_by_its_size_is_known_at_its_own_alone(monkeypatch):
    asked = noted(monkeypatch, "trace_validation")
    job = a_job(Net(evaluate=sliding))
    found = predict_validation(job, training_estimate(), 4, DataSource(DataLoader(torch.zeros(30, 8), batch_size=6)))
    assert found.program.batch_sizes == (6,)
    assert [[(size, len(batch)) for size, batch in batches] for (_, _, batches), _ in asked][-1] == [(6, 6)]
    with pytest.raises(mp.TraceError, match="does something else"):  # a batch says no size
        predict_validation(job, training_estimate(), 4, DataSource(BATCH))


def test_validation_beside_a_formula_is_not_known():
    with pytest.raises(
        mp.TraceError, match=r"^training is planned by the formula, which knows no order of events$"
    ) as caught:
        predict_validation(a_job(), Estimate("formula", FORMULA), 4, DataSource(BATCH))
    assert caught.value.reason == "unsupported"


def test_a_test_is_traced_on_its_own_batches(monkeypatch):
    asked = noted(monkeypatch, "trace_test")
    job = a_job(batch=differing(batch_size=2))
    found = predict_test(job)
    (((setup, batches), _),) = asked
    assert (setup, [size for size, _ in batches]) == (job.setup, [2, 3, 5])
    assert (found.method, found.loops, found.settings) == ("trace", False, predicting._allocator())
    assert found.program.batch_sizes == (2, 3, 5)
    assert found.formula.gradient_bytes == 0
    assert found.notes[0].startswith(DIFFER)


def test_a_test_may_loop_over_its_samples_and_draw():
    def loops(module, x):
        for row in x:
            module.net(row).mul(random.random())

    found = predict_test(a_job(Net(evaluate=loops)))
    assert found.loops
    assert [note.split(" (")[0] for note in found.notes] == ["the step draws numbers", LOOPS]


def test_a_test_that_cannot_be_traced_says_so():
    def fails(module, x):
        raise IndexError("mine")

    with pytest.raises(mp.TraceError, match=r"^a test of Net cannot be traced: the step failed in a tr") as caught:
        predict_test(a_job(Net(evaluate=fails)))
    assert caught.value.reason == "refused"


# -------------------------------------------------------------------------------------------------------- the allocator


@pytest.mark.parametrize(
    ("version", "by_address"),
    [("1.14.0", True), ("2.13.1", True), ("2.14.0+cu130", False), ("2.15.0a0+git1", False), ("3.0.1", False)],
)
def test_blocks_of_one_size_were_ordered_by_address_before_torch_2_14(monkeypatch, version, by_address):
    monkeypatch.setattr(predicting, "torch", SimpleNamespace(__version__=version))
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    found = predicting._allocator()
    assert (found.by_address, found.expandable_segments) == (by_address, False)


def test_the_allocator_has_the_settings_of_the_environment(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:64")
    found = predicting._allocator()
    assert (found.expandable_segments, found.max_split_size) == (True, 64 * MiB)
