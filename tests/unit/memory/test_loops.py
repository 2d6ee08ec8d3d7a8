"""Steps that loop over their samples: what differs between batch sizes, taken merge_loops."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

import lightning_memplan as mp
from lightning_memplan.data.samples import read_samples
from lightning_memplan.errors import TraceError
from lightning_memplan.memory.allocator import replay
from lightning_memplan.memory.events import EMPTY, Event, Stream, Trace
from lightning_memplan.memory.loops import LOOPS, is_loop, merge_loops, scale_with_loops
from lightning_memplan.memory.program import scale
from lightning_memplan.step.setup import TrainingSetup
from lightning_memplan.trace.tracer import trace_steps

KIB = 2**10


def step(samples: int, beside: int = 4 * KIB) -> Trace:
    """A product of all samples; of each a result of 2 KiB, made with ``beside``; a sum; all are freed at the end."""
    events = [Event(0, samples * 8 * KIB, "forward", 1, "activations", "net", "mm")]
    for n in range(samples):
        events += [
            Event(2 * n + 1, beside, "forward", 1, "temporaries", "", "sub"),
            Event(2 * n + 2, 2 * KIB, "forward", 1, "activations", "", "abs"),
            Event(2 * n + 1, -1, "forward", 1),
        ]
    events.append(Event(999, 512, "forward", 1, "activations", "", "sum"))
    events += [Event(2 * n + 2, -1, "backward", 1) for n in range(samples)]
    return Trace(samples, (*events, Event(0, -1, "backward", 1), Event(999, -1, "backward", 1)))


def peak(program, samples):
    return replay(program.at(samples)).peak_allocated


@pytest.mark.parametrize("beside", [512, 4 * KIB, 64 * KIB])
def test_bytes_are_those_of_a_trace_at_that_batch_size(beside):
    program, notes = scale_with_loops([step(n, beside) for n in (2, 3, 5)])
    assert notes == (LOOPS,)
    for samples in (2, 3, 5, 8, 100):
        # the product, all results, and what is beside the last of them, or the sum
        assert peak(program, samples) == samples * 10 * KIB + max(beside, 512)


def test_segments_of_a_loop_are_given_back_on_a_full_gpu():
    MiB = 2**20

    def looped(samples):
        """A result of 5 MiB for each sample; all are freed before an optimizer's block of 40 MiB."""
        results = [Event(n, 5 * MiB, "forward", 1, "activations", op="abs") for n in range(samples)]
        frees = [Event(n, -1, "backward", 1) for n in range(samples)]
        return Trace(samples, (*results, *frees, Event(99, 40 * MiB, "optimizer", 1, "optimizer", op="sqrt")))

    # of 10 results the 2 that all traces have are in a segment of 20 MiB, and the other 8, as one block, in one of 40
    program, _ = scale_with_loops([looped(n) for n in (2, 3, 5)])
    entries = program.at(10)
    assert {stream for _, size, stream in entries if size >= 0} == {Stream.DEFAULT, Stream.LOOPS}
    assert replay(entries).peak_reserved == (20 + 40 + 40) * MiB
    full = replay(entries, capacity=70 * MiB)
    assert (full.out_of_memory, full.peak_reserved, full.reserved, full.retries) == (None, 60 * MiB, 40 * MiB, 1)
    assert replay([*entries[:-1], (-1, EMPTY, Stream.DEFAULT)]).reserved == 0


def test_what_all_have_keeps_its_place():
    (first, *_) = merge_loops([step(n) for n in (2, 3, 5)])
    assert next(event.op for event in first.events if event.size > 0) == "mm"
    assert "sum" in [event.op for event in first.events]
    assert {event.block for event in first.events if event.size >= 0} == {
        event.block for event in first.events if event.is_free
    }


def test_sizes_that_grow_with_the_samples_are_polynomials_and_not_measurements():
    def results(samples, last=512):
        """A result of 512 bytes for each sample; the last one of another size."""
        made = [Event(n, 512 if n + 1 < samples else last, "forward", 1, op="abs") for n in range(samples)]
        return Trace(samples, (*made, *(Event(n, -1, "backward", 1) for n in range(samples))))

    def rules(*traces):
        return {event.rule[:1] for trace in merge_loops(traces) for event in trace.events}

    assert rules(results(1), results(2), results(3)) == {()}
    assert rules(results(1), results(2), results(3, last=2048)) == {(), ("measured",)}


def test_a_step_that_is_no_loop_over_samples_is_told():
    # a turn more for every second sample: 1, 1, 2
    traces = [Trace(n, step(n // 2).events) for n in (2, 3, 5)]
    assert not is_loop(traces)
    with pytest.raises(TraceError, match="a plan for other batch sizes cannot be made"):
        scale_with_loops(traces)


def test_a_step_that_is_alike_stays_as_it_is():
    traces = [Trace(n, (Event(0, n * 512), Event(0, -1))) for n in (2, 3, 5)]
    program, notes = scale_with_loops(traces)
    assert (program, notes) == (scale(traces), ())


class InTurn(pl.LightningModule):
    """Images that are resized one by one, and losses one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images = torch.stack([F.interpolate(image[None] / 2, scale_factor=2)[0] for image in batch[0]])
        losses = []
        for scores, label in zip(self.net(images), batch[1], strict=True):
            mask = scores > 0.5
            found = max(1, int(mask.sum()))  # all of them
            losses.append((scores[mask].sum() - label.float()).abs() / found)
        return torch.stack(losses).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def test_a_module_that_loops_over_its_samples():
    batch = (torch.zeros(4, 3, 64, 64), torch.zeros(4, dtype=torch.long))
    found = mp.estimate(InTurn(), batch, method="trace")
    assert LOOPS in found.notes
    (trace,) = trace_steps(TrainingSetup(InTurn()), read_samples(batch).batches((24,))).traces
    whole = replay([(event.block, event.size, event.stream) for event in trace.events])
    assert found.peak_allocated(24) == pytest.approx(whole.peak_allocated, rel=0.005)
    segments = found.reserved_range(24)
    assert segments.low <= whole.peak_reserved <= found.peak(24) < 1.15 * whole.peak_reserved


class Detector(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.detection import fasterrcnn_resnet50_fpn

        self.net = fasterrcnn_resnet50_fpn(weights_backbone=None, num_classes=5, min_size=96, max_size=96)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return sum(self.net(*batch).values())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Images(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        boxes = torch.tensor([[10.0, 10, 60, 60], [20, 30, 90, 80]])
        return torch.rand(3, 96, 96), {"boxes": boxes, "labels": torch.tensor([1, 2])}


def collate(samples):
    return tuple(zip(*samples, strict=True))


@pytest.mark.slow
def test_a_detector_of_torchvision():
    pytest.importorskip("torchvision")
    loader = torch.utils.data.DataLoader(Images(), batch_size=2, collate_fn=collate)
    found = mp.estimate(Detector(), loader, method="trace")
    assert LOOPS in found.notes
    (trace,) = trace_steps(TrainingSetup(Detector()), read_samples(loader).batches((8,)), steps=2).traces
    whole = replay([(event.block, event.size, event.stream) for event in trace.events])
    assert found.peak_allocated(8) == pytest.approx(whole.peak_allocated, rel=0.01)
