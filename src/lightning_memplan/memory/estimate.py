"""Estimate how much memory training needs at any batch size, and for what."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lightning_memplan.checks import check_batch_size
from lightning_memplan.cuda.workspaces import Choice
from lightning_memplan.memory.allocator import Replay, replay
from lightning_memplan.memory.allocator_settings import AllocatorSettings
from lightning_memplan.memory.program import Program
from lightning_memplan.memory.replayer import Replayer
from lightning_memplan.memory.snapshot import Snapshot, make_snapshot, write_snapshot
from lightning_memplan.types import EstimateRow, Layer, Peaks, Range

if TYPE_CHECKING:
    from lightning_memplan.memory.formula import Formula


@dataclass(frozen=True)
class Estimate:
    """Memory that training a module needs, at any batch size. Bytes are ``int``.

    ``method`` is ``"probe"`` or ``"trace"``, where the events of whole training steps are replayed through a model of
    PyTorch's caching allocator, or ``"formula"``. Every estimate has a ``formula``; ``alternatives`` are the estimates
    of other methods that ran.

    >>> import torch, lightning_memplan as mp
    >>> est = mp.estimate(torch.nn.Linear(1000, 1000), torch.zeros(4, 1000))
    >>> est.peak(batch_size=64) >= est.peak_allocated(batch_size=64) > 4 * 1000 * 1000
    True
    """

    method: Literal["trace", "formula", "probe"]
    formula: Formula
    program: Program | None = None
    settings: AllocatorSettings = field(default_factory=AllocatorSettings)
    notes: tuple[str, ...] = ()
    alternatives: tuple[Estimate, ...] = ()
    least: Program | None = None  #: the lower bound of the step, where ``torch.compile`` compiles it
    loops: bool = False  #: True if the step loops over its samples, so that its segments are known by a range
    only_at: int | None = None  #: the one batch size that the step takes, None where it takes any
    #: by batch size, estimates that were traced at that very size, where the step does something else than the program
    exact: Mapping[int, Estimate] = field(default_factory=dict)
    #: replays of ``program``, which ``dataclasses.replace`` keeps for as long as program and settings stay the same
    replayer: Replayer | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        kept = self.replayer
        if self.program is None:
            kept = None
        elif kept is None or kept.program is not self.program or kept.settings != self.settings:
            kept = Replayer(self.program, self.settings)
        object.__setattr__(self, "replayer", kept)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The formula's rows: path, type, parameters, output shape, bytes of the feature map for one sample."""
        return self.formula.layers

    @property
    def largest_seen(self) -> int:
        """The largest batch size at which the step was recorded, 0 for the formula."""
        return 0 if self.program is None else max(self.program.batch_sizes)

    @property
    def traced(self) -> Estimate | None:
        """This estimate or the alternative that is by trace."""
        return next((one for one in (self, *self.alternatives) if one.method == "trace"), None)

    @property
    def has_workspaces(self) -> bool:
        """True if the step has convolutions whose workspaces are not known to the byte."""
        return self.program is not None and self.program.has_workspaces

    def at(self, batch_size: int) -> Estimate:
        """Return the estimate that was traced at this very batch size, or else this one."""
        check_batch_size(batch_size)
        return self.exact.get(batch_size, self)

    def replayer_at(self, batch_size: int) -> Replayer:
        """Return the replays for this batch size.

        Raises:
            ValueError: the estimate is by the formula, which has no events.
        """
        replayer = self.at(batch_size).replayer
        if replayer is None:
            raise ValueError("the formula has no events to replay: ask for method='trace'")
        return replayer

    def replay(self, batch_size: int, capacity: int | None = None, workspaces: Choice = "low") -> Replay:
        """Return the allocator's replay at a batch size (see ``allocator.replay``); ``peaks`` are by step and phase.

        It goes on beyond the recorded steps, until these leave what they find (``Program.at_steady_state``).
        """
        return self.replayer_at(batch_size).replay(batch_size, capacity, workspaces)

    def peak(self, batch_size: int, capacity: int | None = None) -> int:
        """Return the most bytes that the allocator reserves (``torch.cuda.max_memory_reserved``).

        Under a ``capacity`` (bytes), idle segments are released as the allocator would when it reaches that.
        """
        replayer = self.at(batch_size).replayer
        if replayer is None:
            return self.formula.memory(batch_size)
        return replayer.replay(batch_size, capacity).peak_reserved

    def peak_allocated(self, batch_size: int) -> int:
        """Return the most bytes that are allocated at once (``torch.cuda.max_memory_allocated``)."""
        replayer = self.at(batch_size).replayer
        if replayer is None:
            return self.formula.memory(batch_size)
        return replayer.replay(batch_size).peak_allocated

    def methods(self, batch_size: int, capacity: int | None = None) -> Mapping[str, int]:
        """Return ``peak`` by each method that ran: this estimate's own first, the formula last."""
        peaks = [(estimate.method, estimate.peak(batch_size, capacity)) for estimate in (self, *self.alternatives)]
        return dict([*peaks, ("formula", self.formula.memory(batch_size))])

    def reserved_range(self, batch_size: int, capacity: int | None = None) -> Range:
        """Return ``peak`` with no, the expected and the most workspaces of cuDNN's convolutions.

        ``peak`` is the low end, which is known to the byte. cuDNN decides on the GPU how much is added (see
        ``workspaces``): more where it tries out algorithms (``cudnn.benchmark``), and never more than there is. A probe
        has measured it, so its three values are one, and so are those of a step without convolutions.

        Where ``torch.compile`` compiles, ``peak`` is the upper bound of the compiled step, and the low end is what
        cannot be fused away. Where the step loops over its samples (see ``loops``), the low end is ``peak_allocated``.

        >>> import torch, lightning_memplan as mp
        >>> est = mp.estimate(torch.nn.Conv2d(16, 32, 3), torch.zeros(4, 16, 64, 64), precision="16-mixed")
        >>> found = est.reserved_range(batch_size=64)
        >>> est.peak(batch_size=64) == found.low < found.expected <= found.high
        True
        """
        own = self.at(batch_size)
        peak = own.peak(batch_size, capacity)
        low = peak
        if own.least is not None:
            low = min(peak, replay(own.least.at(batch_size), capacity, own.settings).peak_reserved)
        if own.loops:
            low = min(low, own.peak_allocated(batch_size))
        if not own.has_workspaces:
            return Range(low, peak, peak)
        peaks = [peak]
        choices: tuple[Choice, ...] = ("expected", "high")
        for choice in choices:
            found = own.replay(batch_size, capacity, choice)
            most = found.peak_reserved if capacity is None or found.out_of_memory is None else capacity
            peaks.append(max(peaks[-1], most))
        return Range(low, *peaks[1:])

    def allocated_range(self, batch_size: int) -> tuple[int, int]:
        """Return the lower and the upper bound of ``peak_allocated``: they differ where ``torch.compile`` compiles.

        The allocator makes a block of over 1 MiB up to 1 MiB larger than the request, if that is all that is left of a
        cached one: the lower bound has none of that, the upper bound the most.

        >>> import torch, lightning_memplan as mp
        >>> est = mp.estimate(torch.nn.Linear(1000, 1000), torch.zeros(4, 1000))
        >>> est.allocated_range(batch_size=64) == (est.peak_allocated(batch_size=64),) * 2
        True
        """
        own = self.at(batch_size)
        peak = own.peak_allocated(batch_size)
        if own.least is None:
            return peak, peak
        large = sum(size > 2**20 for _, size in own.replayer_at(batch_size).live_at_peak(batch_size))
        return min(peak, own.least.peak_live_bytes(batch_size)), peak + large * 2**20

    def fits(self, batch_size: int, capacity: int, workspaces: Choice = "low") -> bool:
        """Return True if training runs in ``capacity`` bytes: its events are replayed in no more than that.

        ``workspaces`` chooses how much of cuDNN's workspaces must fit too: convolutions run without, by slower
        algorithms.
        """
        replayer = self.at(batch_size).replayer
        if replayer is None:
            return self.formula.memory(batch_size) <= capacity
        return replayer.fits(batch_size, capacity, workspaces)

    def steps(self, batch_size: int, capacity: int | None = None) -> tuple[tuple[int, int], ...]:
        """Return each step's peak ``(allocated, reserved)`` bytes; later steps are like the last.

        The first step has neither old gradients nor optimizer state; from the second on they coexist with the forward
        pass.
        """
        return tuple((peaks.allocated, peaks.reserved) for peaks in self.step_peaks(batch_size, capacity))

    def step_peaks(self, batch_size: int, capacity: int | None = None) -> tuple[Peaks, ...]:
        """Return the peak bytes of each step, and of its phases; later steps are like the last."""
        replayer = self.at(batch_size).replayer
        if replayer is None:
            return (Peaks(self.formula.memory(batch_size), self.formula.memory(batch_size)),)
        return replayer.step_peaks(batch_size, capacity)

    def phases(self, batch_size: int) -> Mapping[str, int]:
        """Return the most bytes that are allocated at once in each phase, over all steps, in a step's order.

        >>> import torch, lightning_memplan as mp
        >>> phases = mp.estimate(torch.nn.Linear(1000, 1000), torch.zeros(4, 1000)).phases(batch_size=64)
        >>> list(phases)
        ['batch', 'forward', 'backward', 'optimizer']
        """
        steps = self.step_peaks(batch_size)
        names = dict.fromkeys(name for step in steps for name in step.phases)
        return {name: max(step.phases.get(name, 0) for step in steps) for name in names}

    def phase(self, batch_size: int) -> str:
        """Return the phase in which the allocated bytes reach their peak: "forward", "backward" or "optimizer"."""
        replayer = self.at(batch_size).replayer
        return "backward" if replayer is None else replayer.phase_of_peak(batch_size)

    def breakdown(self, batch_size: int) -> Mapping[str, int]:
        """Return bytes by category at the peak of the allocated bytes, largest first.

        ``"rounding"`` is what the allocator rounds up, so that the parts add up to ``peak_allocated``.
        """
        replayer = self.at(batch_size).replayer
        if replayer is None:
            parts = {
                "parameters": self.formula.parameter_bytes,
                "gradients": self.formula.gradient_bytes,
                "batch": batch_size * self.formula.input_bytes,
                "activations": 2 * batch_size * self.formula.feature_bytes,
            }
            return _largest_first(parts)
        sums: dict[str, int] = {}
        for event, size in replayer.live_at_peak(batch_size):
            sums[event.category] = sums.get(event.category, 0) + size
        sums["rounding"] = self.peak_allocated(batch_size) - sum(sums.values())
        return _largest_first(sums)

    def row(self, batch_size: int, capacity: int | None = None) -> EstimateRow:
        """Return the estimate at one batch size: peaks, their range, the formula and the breakdown.

        >>> import torch, lightning_memplan as mp
        >>> est = mp.estimate(torch.nn.Linear(1000, 1000), torch.zeros(4, 1000))
        >>> mp.as_dict(est.row(batch_size=64))["peak_reserved"] == est.peak(batch_size=64)
        True
        """
        return EstimateRow(
            batch_size=batch_size,
            peak_reserved=self.peak(batch_size, capacity),
            peak_allocated=self.peak_allocated(batch_size),
            formula_peak=self.formula.memory(batch_size),
            phase=self.phase(batch_size),
            breakdown=self.breakdown(batch_size),
            phases=self.phases(batch_size),
            reserved_range=self.reserved_range(batch_size, capacity),
        )

    def snapshot(self, batch_size: int, capacity: int | None = None) -> Snapshot:
        """Return what ``torch.cuda.memory._snapshot()`` would after the recorded steps (see ``save_snapshot``).

        >>> import torch, lightning_memplan as mp
        >>> found = mp.estimate(torch.nn.Linear(1000, 1000), torch.zeros(4, 1000)).snapshot(batch_size=64)
        >>> first = found["device_traces"][0][1]
        >>> first["action"], first["size"], first["frames"][-1]["name"]
        ('alloc', 4000000, 'parameters')

        Raises:
            ValueError: the estimate is by the formula, which has no events.
        """
        replayer = self.replayer_at(batch_size)
        program, journal = replayer.program, replayer.journal(batch_size, capacity)
        return make_snapshot(program.events, program.at(batch_size), journal, self.settings, capacity)

    def save_snapshot(self, path: str | os.PathLike[str], batch_size: int, capacity: int | None = None) -> None:
        """Write a predicted snapshot, which https://pytorch.org/memory_viz opens like a real one.

        It has every block of the recorded steps at that batch size. In place of the stack, a block has the operator,
        the modules around it, the phase and the category. Under a ``capacity`` (bytes) in which the steps do not fit,
        it ends where memory runs out.

        Raises:
            ValueError: the estimate is by the formula, which has no events.
        """
        write_snapshot(path, self.snapshot(batch_size, capacity))


def _largest_first(parts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(((k, v) for k, v in parts.items() if v), key=lambda item: -item[1]))
