"""Measure the peaks of each training step on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_memplan.devices.allocator_stats import AllocatorStats, read_stats, reset_peaks
from lightning_memplan.devices.detect import CardMeter
from lightning_memplan.settings import STEPS
from lightning_memplan.types import Measurement, Peaks
from lightning_memplan.units import MiB, format_bytes

#: Steps of a run whose phases are measured whatever ``every_n_steps`` is: what the first two allocate stays.
FIRST = 3


#: Steps at least from one whose phases are measured to the next, after the first three: as Lightning logs by default.
APART = 50


PHASES = ("forward", "backward", "optimizer")  #: those that hooks tell apart


class Meter:
    """Measures each step of one run on the device ``index``.

    ``begin``, ``enter`` and ``end`` are called as a step proceeds. The step's peaks are read in every step; those of
    its phases, which take a reading more for each that begins, in the first three steps, in those that are logged and
    ``APART`` from the last of these, and in the one after a step that took more than was predicted.

    >>> meter = Meter(0, lambda step: Peaks(100, 110))
    >>> meter.begin()
    >>> meter.enter("backward")
    >>> meter.enter("optimizer")
    >>> meter.end().predicted_allocated
    100

    Args:
        index: the CUDA device.
        predict: the peaks predicted for the n-th batch of training, from 0.
        every_n_steps: which steps are logged.
        manual: whether the step calls its optimizers itself: what follows an optimizer's step is forward again.
        resets: whether the allocator's peaks are reset; else a measurement is the highest peak so far, and so is what
            it is compared with.
        nvml: whether NVML is asked in the steps that are logged.
        margin: by which part a step may exceed its prediction before ``remark`` says so; ``None`` for any.
    """

    def __init__(
        self,
        index: int,
        predict: Callable[[int], Peaks],
        *,
        every_n_steps: int = 1,
        manual: bool = False,
        resets: bool = True,
        nvml: bool = False,
        margin: float | None = None,
    ) -> None:
        self.index = index
        self.measurements: list[Measurement] = []
        self.validations: list[Peaks] = []
        self.validates = False
        self._predict = predict
        self._every_n_steps = every_n_steps
        self._phases_every = every_n_steps * -(-APART // every_n_steps)
        self._resets = resets
        self._stepped = register_optimizer_step_post_hook(lambda *_: self.enter("forward")) if manual else None
        self._card = CardMeter(index) if nvml else None
        self._margin = margin
        self._drifted = ""  # said of a step without phases, which the next one is to have
        self._floor = Floor()
        self._foreseen = Peaks(0, 0)  # the highest predicted so far
        self.phase = ""  #: the one that is measured now; empty where none is
        self._peaks: dict[str, int] = {}
        self._reserved = 0
        self._before = AllocatorStats()

    @property
    def step(self) -> int:
        """The step that runs, or comes next, from 0."""
        return len(self.measurements)

    @property
    def predicted(self) -> Peaks:
        """What the step that runs, or comes next, is predicted to take."""
        return self._predict(self.step)

    @property
    def highest(self) -> Peaks:
        """The highest peaks of all steps so far."""
        allocated = max((m.allocated for m in self.measurements), default=0)
        return Peaks(allocated, max((m.reserved for m in self.measurements), default=0))

    def logs(self, step: int) -> bool:
        """Whether a step is one of those to log."""
        return step % self._every_n_steps == 0

    def begin(self) -> None:
        """A step begins, its batch on the device."""
        step = len(self.measurements)
        if not step:
            self._before = read_stats(self.index)
        self._peaks, self._reserved = {}, 0
        if self._resets:
            reset_peaks(self.index)
            if step < FIRST or step % self._phases_every == 0 or self._drifted:
                self.phase = PHASES[0]

    def enter(self, phase: str) -> None:
        """A phase begins, and the one before it ends."""
        if self.phase:
            stats = read_stats(self.index)
            reset_peaks(self.index)
            self._ended(stats)
            self.phase = phase

    def end(self) -> Measurement:
        """The step has ended: what it took."""
        stats, before, step = read_stats(self.index), self._before, len(self.measurements)
        predicted = self._predict(step)
        allocated, reserved, phases, foreseen = stats.peak_allocated, stats.peak_reserved, self._peaks, {}
        if self.phase:
            self._ended(stats)
            allocated, reserved = max(phases.values()), self._reserved
            foreseen = {name: predicted.phases[name] for name in phases if name in predicted.phases}
        if not self._resets:
            self._foreseen = predicted = _higher(self._foreseen, predicted)
        process, card = self._card.read() if self._card is not None and self.logs(step) else (None, None)
        measured = Measurement(
            step,
            predicted.allocated,
            predicted.reserved,
            allocated,
            reserved,
            foreseen,
            phases,
            stats.allocated,
            stats.retries - before.retries,
            stats.device_allocations - before.device_allocations,
            process,
            card,
        )
        self.phase, self._before = "", stats
        self.measurements.append(measured)
        return measured

    def remark(self) -> str | None:
        """What is wrong with the last step, in a sentence; each kind of thing is said once."""
        last = self.measurements[-1]
        text = ""
        if self._margin is not None and last.allocated > last.predicted_allocated:
            text = drift(last, self._margin)
        if text and self._resets and not last.phases:  # the next step tells in which phase
            self._drifted, text = text, ""
        elif text := text or self._drifted:
            self._drifted, self._margin = "", None
        return text or self._floor.add(last.floor)

    def begin_validation(self) -> None:
        """A validation begins."""
        self.validates = True
        if self._resets:
            reset_peaks(self.index)

    def end_validation(self) -> Peaks:
        """A validation has ended: what it took at most."""
        self.validates = False
        stats = read_stats(self.index)
        self.validations.append(Peaks(stats.peak_allocated, stats.peak_reserved))
        return self.validations[-1]

    def close(self) -> None:
        """Let NVML and the optimizers go."""
        if self._card is not None:
            self._card.close()
        if self._stepped is not None:
            self._stepped.remove()
            self._stepped = None

    def _ended(self, stats: AllocatorStats) -> None:
        """The phase that is measured has ended."""
        self._peaks[self.phase] = max(stats.peak_allocated, self._peaks.get(self.phase, 0))
        self._reserved = max(stats.peak_reserved, self._reserved)


def drift(measurement: Measurement, margin: float) -> str:
    """By how much a step took more than was predicted, where that is more than a part ``margin`` of it, and 64 MiB.

    >>> print(drift(Measurement(7, 2**30, 2**31, 2**31, 2**31, {"forward": 2**30}, {"forward": 2**31}), margin=0.05))
    step 7 allocated 2.00 GiB where 1.00 GiB were predicted (+100.0 %), most of it more in the forward phase ...

    Less is no drift, and nothing is said: the last batch of an epoch is often smaller.
    """
    predicted, actual = measurement.predicted_allocated, measurement.allocated
    if actual - predicted <= max(margin * predicted, 64 * MiB):
        return ""
    more = {name: peak - measurement.predicted_phases.get(name, 0) for name, peak in measurement.phases.items()}
    name = max(more, key=more.__getitem__, default="")
    phase = (
        f", most of it more in the {name} phase ({format_bytes(measurement.phases[name] - more[name])} predicted, "
        f"{format_bytes(measurement.phases[name])} measured)"
        if name
        else ""
    )
    return (
        f"step {measurement.step} allocated {format_bytes(actual)} where {format_bytes(predicted)} were predicted "
        f"({100 * (actual - predicted) / predicted:+.1f} %){phase}: its batch is larger than those that were planned "
        "with, or it keeps what a planned step frees"
    )


class Floor:
    """Tells when what steps leave allocated rises steadily: something keeps memory from step to step.

    The lowest floor of every ``WINDOW`` steps counts, so that batches of varying size are no alarm: it must rise from
    each of ``WINDOWS`` windows to the next, in all by at least 1 MiB and by more than it varies within the first.

    >>> floor = Floor()
    >>> said = [floor.add(2**30 + step * 2**20) for step in range(200)]
    >>> [step for step, text in enumerate(said) if text], said[101]
    ([101], 'memory allocated at the end of a step rises by 1.00 MiB a step ...
    """

    WINDOW = 16
    WINDOWS = 6

    def __init__(self) -> None:
        self._window: list[int] = []
        self._length = 2 * FIRST + self.WINDOW  # the first steps' gradients and optimizer state stay, and do not count
        self._lows: list[int] = []
        self._spread = 0
        self._said = False

    def add(self, floor: int) -> str | None:
        """One step's floor, in bytes; a sentence when the rise is certain, once."""
        self._window.append(floor)
        if len(self._window) < self._length:
            return None
        window, self._window, self._length = self._window[-self.WINDOW :], [], self.WINDOW
        low = min(window)
        if not self._lows or low <= self._lows[-1]:
            self._lows, self._spread = [], max(window) - low
        self._lows.append(low)
        rise = low - self._lows[0]
        if self._said or len(self._lows) < self.WINDOWS or rise < max(MiB, self._spread):
            return None
        self._said = True
        rate = rise / ((len(self._lows) - 1) * self.WINDOW)
        return (
            f"memory allocated at the end of a step rises by {format_bytes(round(rate))} a step (over the last "
            f"{len(self._lows) * self.WINDOW}): something keeps tensors from step to step, such as a list of losses "
            "that were not detached"
        )


def _higher(a: Peaks, b: Peaks) -> Peaks:
    return Peaks(max(a.allocated, b.allocated), max(a.reserved, b.reserved))


def traced_step(batch: int, whole: int, parts: int, steps: int = STEPS) -> int:
    """Which of a trace's steps the ``batch``-th batch of training (from 0) is like.

    ``whole`` batches are accumulated in training, ``parts`` in the trace, which has ``steps`` steps of the optimizer.

    >>> [traced_step(batch, 1, 1) for batch in range(5)]
    [0, 1, 2, 2, 2]
    >>> [traced_step(batch, 4, 3) for batch in range(9)]
    [0, 1, 1, 2, 3, 4, 4, 5, 6]
    """
    cycle, part = divmod(batch, whole)
    place = part if part == 0 else parts - 1 if part == whole - 1 else 1
    return min(cycle, steps - 1) * parts + place
