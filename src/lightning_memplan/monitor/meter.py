"""Measure the peaks of each training step on a CUDA device, against a forecast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import inf

from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_memplan.devices.allocator_stats import AllocatorStats, read_stats, reset_peaks
from lightning_memplan.devices.detect import NvmlMeter
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.monitor.floor import FIRST, Floor
from lightning_memplan.monitor.record import Record
from lightning_memplan.types import Measurement, Peaks
from lightning_memplan.units import MiB, format_bytes

#: Least distance in steps between later measurements of the phases: Lightning's default interval for logging.
APART = 50

#: A measurement is kept where it is the highest by one of these
_HEIGHTS: tuple[Callable[[Measurement], float], ...] = (
    lambda m: m.reserved,
    lambda m: m.allocated,
    lambda m: m.predicted_reserved,
    lambda m: m.predicted_allocated,
    lambda m: abs(m.error_percent),
)

PHASES = ("forward", "backward", "optimizer")  #: the phases that hooks can tell apart


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predict the peaks of every batch of training from those of the few that were replayed.

    Batches after the replayed ones repeat the last ``cycle`` optimizer steps. Where training accumulates more
    microbatches than were replayed, those between the first and the last of an optimizer step are alike.

    >>> forecast = Forecast((Peaks(5, 6), Peaks(8, 9), Peaks(9, 9)), already_allocated=100)
    >>> [forecast.at(batch).allocated for batch in range(5)]
    [105, 108, 109, 109, 109]
    """

    replayed: tuple[Peaks, ...]  #: peaks of each batch that was replayed, in order
    already_allocated: int = 0  #: bytes on the device that the replay does not know
    microbatches: int = 1  #: replayed batches that make one optimizer step
    accumulate: int = 1  #: batches of training that make one optimizer step
    cycle: int = 1  #: optimizer steps after which the peaks repeat

    @classmethod
    def of(
        cls, estimate: Estimate, batch_size: int, capacity: int, *, accumulate: int = 1, already_allocated: int = 0
    ) -> Forecast:
        """Replay an estimate at one batch size, on a device with ``capacity`` bytes for the allocator."""
        replayed, program = estimate.step_peaks(batch_size, capacity), estimate.program
        if program is None:  # the formula has a single step
            return cls(replayed, already_allocated, accumulate=accumulate)
        cycle = max(1, program.period // program.microbatches)
        return cls(replayed, already_allocated, program.microbatches, accumulate, cycle)

    def at(self, batch: int) -> Peaks:
        """Return the predicted peaks of a batch of training, counted from 0; zeros where nothing was predicted."""
        if not self.replayed:
            return Peaks(0, 0)
        return self._above(self.replayed[self._place(batch)])

    def _place(self, batch: int) -> int:
        """Return which replayed batch a batch of training is like.

        >>> steps = tuple(Peaks(n, n) for n in range(9))  # three optimizer steps of three microbatches
        >>> forecast = Forecast(steps, microbatches=3, accumulate=4)
        >>> [forecast._place(batch) for batch in range(9)]
        [0, 1, 1, 2, 3, 4, 4, 5, 6]
        """
        step, microbatch = divmod(batch, self.accumulate)
        steps, last = len(self.replayed) // self.microbatches, self.microbatches - 1
        if step >= steps:
            step = steps - self.cycle + (step - steps) % self.cycle
        place = 0 if microbatch == 0 else last if microbatch == self.accumulate - 1 else min(1, last)
        return step * self.microbatches + place

    def _above(self, peaks: Peaks) -> Peaks:
        base = self.already_allocated
        phases = {name: peak + base for name, peak in peaks.phases.items()}
        return Peaks(peaks.allocated + base, peaks.reserved + base, phases)


class Meter:
    """Measure each step of one run on the device ``index``.

    Call ``begin``, ``enter`` and ``end`` as a step proceeds. The step's own peaks are read in every step. Its phases
    cost one more reading each, so they are measured in the first three steps, then in logged steps at least ``APART``
    steps apart, and in the step after one that took more than was predicted.

    >>> meter = Meter(0, Forecast((Peaks(100, 110),)))
    >>> meter.begin()
    >>> meter.enter("backward")
    >>> meter.enter("optimizer")
    >>> meter.end().predicted_allocated
    100

    Args:
        index: Index of the CUDA device.
        forecast: Predicted peaks of each batch.
        every_n_steps: Distance between the steps that are logged.
        manual: Set for manual optimization, where forward follows each optimizer step.
        margin: Fraction by which a step may exceed its prediction before ``remark`` reports it; ``None`` never does.
        limit: Most bytes that may be allocated, None where that is not known.
    """

    def __init__(
        self,
        index: int,
        forecast: Forecast,
        *,
        every_n_steps: int = 1,
        manual: bool = False,
        margin: float | None = None,
        limit: int | None = None,
    ) -> None:
        self.index = index
        self.forecast = forecast
        self.retries = 0  #: of all steps
        self.validates = False
        self._steps = Record[Measurement](*_HEIGHTS, first=FIRST)
        self._validations = Record[Peaks](lambda peaks: peaks.allocated, lambda peaks: peaks.reserved)
        self._every_n_steps = every_n_steps
        self._phases_every = every_n_steps * -(-APART // every_n_steps)
        self._optimizer_hook = register_optimizer_step_post_hook(lambda *_: self.enter("forward")) if manual else None
        self._nvml: NvmlMeter | None = None
        with suppress(Exception):  # a driver's library that fails: the allocator's figures do without
            self._nvml = NvmlMeter(index)
        self._margin, self._limit = margin, limit
        self._drifted = ""  # remark on a step without phases, kept until the next step adds its phases
        self._floor = Floor()
        self.phase = ""  #: the phase being measured; empty outside of one
        self._peaks: dict[str, int] = {}
        self._reserved = 0
        self._before = AllocatorStats()

    @property
    def measurements(self) -> list[Measurement]:
        """The measurements that are kept: the first steps, the highest, and the last thousand."""
        return self._steps.kept

    @property
    def validations(self) -> list[Peaks]:
        """The peaks of validations that are kept: the first, the highest, and the last thousand."""
        return self._validations.kept

    @property
    def step(self) -> int:
        """The step that runs or comes next, counted from 0: so many were measured."""
        return self._steps.count

    @property
    def predicted(self) -> Peaks:
        """Predicted peaks of the step that runs or comes next."""
        return self.forecast.at(self.step)

    @property
    def highest(self) -> Peaks:
        """The highest measured peaks of all steps so far."""
        allocated = max((m.allocated for m in self.measurements), default=0)
        return Peaks(allocated, max((m.reserved for m in self.measurements), default=0))

    def logs(self, step: int) -> bool:
        """Return True for a step that is logged."""
        return step % self._every_n_steps == 0

    def begin(self) -> None:
        """Begin a step, with its batch on the device."""
        if not self.step:
            self._before = read_stats(self.index)
        self._peaks, self._reserved = {}, 0
        reset_peaks(self.index)
        if self.step < FIRST or self.step % self._phases_every == 0 or self._drifted:
            self.phase = PHASES[0]

    def enter(self, phase: str) -> None:
        """End the current phase and begin another; do nothing in steps whose phases are not measured."""
        if self.phase:
            stats = read_stats(self.index)
            reset_peaks(self.index)
            self._end_phase(stats)
            self.phase = phase

    def end(self) -> Measurement:
        """End a step and return its measurement."""
        stats, before, step, predicted = read_stats(self.index), self._before, self.step, self.predicted
        allocated, reserved, phases, predicted_phases = stats.peak_allocated, stats.peak_reserved, self._peaks, {}
        if self.phase:
            self._end_phase(stats)
            allocated, reserved = max(phases.values()), self._reserved
            predicted_phases = {name: predicted.phases[name] for name in phases if name in predicted.phases}
        process, card = self._read_nvml() if self.logs(step) else (None, None)
        measured = Measurement(
            step=step,
            predicted_allocated=predicted.allocated,
            predicted_reserved=predicted.reserved,
            allocated=allocated,
            reserved=reserved,
            predicted_phases=predicted_phases,
            phases=phases,
            floor=stats.allocated,
            retries=stats.retries - before.retries,
            device_allocations=stats.device_allocations - before.device_allocations,
            process=process,
            card=card,
        )
        self.phase, self._before = "", stats
        self.retries += measured.retries
        self._steps.add(measured)
        return measured

    def remark(self, left: float = inf) -> str | None:
        """Return one sentence on what is wrong with the last step, or None; each kind of problem is reported once.

        ``left`` is the number of steps that are left of the epoch.
        """
        last = self.measurements[-1]
        text = ""
        if self._margin is not None and last.allocated > last.predicted_allocated:
            text = drift(last, self._margin)
        if text and not last.phases:  # the next step tells in which phase
            self._drifted, text = text, ""
        elif text := text or self._drifted:
            self._drifted, self._margin = "", None
        room = None if self._limit is None else self._limit - last.allocated
        return text or self._floor.add(last.floor, room, left)

    def begin_validation(self) -> None:
        """Begin a validation."""
        self.validates = True
        reset_peaks(self.index)

    def end_validation(self) -> Peaks:
        """End a validation and return its peaks."""
        self.validates = False
        stats = read_stats(self.index)
        self._validations.add(Peaks(stats.peak_allocated, stats.peak_reserved))
        return self.validations[-1]

    def close(self) -> None:
        """Release NVML and the optimizer hook."""
        self._close_nvml()
        if self._optimizer_hook is not None:
            self._optimizer_hook.remove()
            self._optimizer_hook = None

    def _read_nvml(self) -> tuple[int | None, int | None]:
        """Return the bytes of this process and of the GPU, until NVML fails or does not list the process."""
        if self._nvml is None:
            return None, None
        process = used = None
        with suppress(Exception):
            process, used = self._nvml.read()
        if process is None:
            self._close_nvml()
            return None, None
        return process, used

    def _close_nvml(self) -> None:
        nvml, self._nvml = self._nvml, None
        if nvml is not None:
            with suppress(Exception):
                nvml.close()

    def _end_phase(self, stats: AllocatorStats) -> None:
        self._peaks[self.phase] = max(stats.peak_allocated, self._peaks.get(self.phase, 0))
        self._reserved = max(stats.peak_reserved, self._reserved)


def drift(measurement: Measurement, margin: float) -> str:
    """Describe a step that took more than predicted, by over the fraction ``margin`` and over 64 MiB; else return "".

    >>> print(drift(Measurement(7, 2**30, 2**31, 2**31, 2**31, {"forward": 2**30}, {"forward": 2**31}), margin=0.05))
    step 7 allocated 2.00 GiB where 1.00 GiB were predicted (+100.0 %), most of it more in the forward phase ...

    A step that took less is no drift: the last batch of an epoch is often smaller.
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
