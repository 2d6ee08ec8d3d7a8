"""An estimate: what training takes at any batch size, and where it goes."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from lightning_memplan.cuda.workspaces import Choice
from lightning_memplan.memory.allocator import Move, Replay, replay
from lightning_memplan.memory.allocator_settings import AllocatorSettings
from lightning_memplan.memory.events import Event
from lightning_memplan.memory.program import Program
from lightning_memplan.memory.search import Found, largest_dividing, largest_fitting
from lightning_memplan.memory.snapshot import make_snapshot
from lightning_memplan.types import Layer, Peaks, Range

if TYPE_CHECKING:
    from lightning_memplan.memory.formula import Formula


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _of_its_batch_size(method: _Method) -> _Method:
    """What is asked of an estimate is asked of that which was traced at this very batch size, where there is one."""

    @wraps(method)
    def asked(self: Estimate, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        return method(self.exact.get(batch_size, self), batch_size, *args, **kwargs)

    return cast(_Method, asked)


@dataclass(frozen=True)
class Estimate:
    """What training a module takes, for any batch size. Bytes are ``int``.

    ``method`` is ``"probe"`` or ``"trace"``, where the events of whole training steps are replayed through a model of
    PyTorch's caching allocator, or ``"formula"``. ``formula`` is there in all; ``others`` has what else was run.

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
    others: tuple[Estimate, ...] = ()
    least: Program | None = None  #: the lower end of the step, where ``torch.compile`` compiles it
    turns: bool = False  #: whether the step loops over its samples, so that its segments are known by a range
    #: what was traced at a single batch size, where the step does something else than at those of the program
    exact: Mapping[int, Estimate] = field(default_factory=dict)
    _replays: dict[tuple[int, int | None, int | None, Choice], Replay] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The formula's rows: path, type, parameters, output shape, bytes of the feature map for one sample."""
        return self.formula.layers

    def structure(self, *settings: object) -> str:
        """A hash of the layers, of the traced events without their sizes, and of ``settings``: the same for runs alike.

        >>> import torch, lightning_memplan as mp
        >>> small, large = (mp.estimate(torch.nn.Linear(8, n), torch.zeros(4, 8)) for n in (2, 3))
        >>> small.structure() == small.structure() != large.structure() != large.structure("16-mixed")
        True
        """
        layers = ((layer.path, layer.type, layer.parameters, layer.shape) for layer in self.layers)
        events = self.program.events if self.program is not None else ()
        steps = ((event.phase, event.category, event.op) for event in events)
        return structure_hash([self.method, self.formula.input_bytes, *settings, *layers, *steps])

    @property
    def largest_seen(self) -> int:
        """The largest batch size at which the step was recorded, 0 for the formula."""
        return 0 if self.program is None else max(self.program.batch_sizes)

    @property
    def traced(self) -> Estimate | None:
        """This or another, whichever is by trace."""
        return next((one for one in (self, *self.others) if one.method == "trace"), None)

    @property
    def has_workspaces(self) -> bool:
        """Whether the step has convolutions whose workspaces are not known to the byte."""
        return self.program is not None and self.program.has_workspaces

    def peak(self, batch_size: int, capacity: int | None = None) -> int:
        """Bytes that the allocator reserves at most (``torch.cuda.max_memory_reserved``).

        Under a ``capacity`` (bytes), cached blocks are released as the allocator would when it reaches that.
        """
        _check_batch_size(batch_size)
        if self.program is None:
            return self.formula.memory(batch_size)
        return self.replay(batch_size, capacity).peak_reserved

    def methods(self, batch_size: int, capacity: int | None = None) -> Mapping[str, int]:
        """What each method that ran says of ``peak``: this estimate's own first, the formula last."""
        peaks = [(estimate.method, estimate.peak(batch_size, capacity)) for estimate in (self, *self.others)]
        return dict([*peaks, ("formula", self.formula.memory(batch_size))])

    @_of_its_batch_size
    def reserved_range(self, batch_size: int, capacity: int | None = None) -> Range:
        """``peak`` with nothing, the expected and the most that cuDNN's convolutions take for themselves.

        ``peak`` is the low end, which is known to the byte. How much is added cuDNN decides on the card (see
        ``workspaces``): more where it tries out algorithms (``cudnn.benchmark``), and never what is not there. A probe
        has measured it, so its three are one, and so are those of a step without convolutions.

        Where ``torch.compile`` compiles, ``peak`` is the upper end of what it can make of the step, and the low end is
        what cannot be fused away. Where the step loops over its samples (see ``loops``), the low
        end is what is allocated.

        >>> import torch, lightning_memplan as mp
        >>> est = mp.estimate(torch.nn.Conv2d(16, 32, 3), torch.zeros(4, 16, 64, 64), precision="16-mixed")
        >>> found = est.reserved_range(batch_size=64)
        >>> est.peak(batch_size=64) == found.low < found.expected <= found.high
        True
        """
        peak = self.peak(batch_size, capacity)
        low = peak
        if self.least is not None:
            low = min(peak, replay(self.least.at(batch_size), capacity, self.settings).peak_reserved)
        if self.turns:
            low = min(low, self.peak_allocated(batch_size))
        if not self.has_workspaces:
            return Range(low, peak, peak)
        peaks = [peak]
        choices: tuple[Choice, ...] = ("expected", "high")
        for choice in choices:
            found = self.replay(batch_size, capacity, workspaces=choice)
            most = found.peak_reserved if capacity is None or found.out_of_memory is None else capacity
            peaks.append(max(peaks[-1], most))
        return Range(low, *peaks[1:])

    @_of_its_batch_size
    def allocated_range(self, batch_size: int) -> tuple[int, int]:
        """Bytes that are allocated at most: between which two, where ``torch.compile`` compiles; else the same twice.

        The allocator gives a block of over 1 MiB up to 1 MiB more than was asked for, where that is all that is left of
        a cached one: the low end has none of that, the high end the most.

        >>> import torch, lightning_memplan as mp
        >>> est = mp.estimate(torch.nn.Linear(1000, 1000), torch.zeros(4, 1000))
        >>> est.allocated_range(batch_size=64) == (est.peak_allocated(batch_size=64),) * 2
        True
        """
        peak = self.peak_allocated(batch_size)
        if self.least is None:
            return peak, peak
        large = sum(size > 2**20 for _, size in self.alive(batch_size))
        return min(peak, self.least.peak_live_bytes(batch_size)), peak + large * 2**20

    def peak_allocated(self, batch_size: int) -> int:
        """Bytes that are allocated at most (``torch.cuda.max_memory_allocated``)."""
        _check_batch_size(batch_size)
        if self.program is None:
            return self.formula.memory(batch_size)
        return self.replay(batch_size).peak_allocated

    @_of_its_batch_size
    def fits(self, batch_size: int, capacity: int, limit: int | None = None, workspaces: Choice = "low") -> bool:
        """Whether training runs in ``capacity`` bytes: the events replayed in no more than that.

        ``limit`` is the most that the allocator may reserve, where the process has set one. ``workspaces`` is how much
        of cuDNN's convolutions must fit too: without it they run all the same, by slower algorithms.
        """
        _check_batch_size(batch_size)
        if self.program is None:
            return self.formula.memory(batch_size) <= (capacity if limit is None else min(capacity, limit))
        given = capacity if limit is None else min(capacity, limit)
        if self._beyond(batch_size) or self._most_alive(batch_size, workspaces) > given:
            return False
        return self.replay(batch_size, capacity, limit, workspaces).out_of_memory is None

    def near(self, capacity: int, workspaces: Choice = "low", most: int | None = None) -> int | None:
        """A batch size near the largest that fits in ``capacity`` bytes, and not below it; None if none is known.

        It is the largest whose blocks fit in there, wherever they lie, and that is no larger than ``most``.
        """
        if self.program is None:
            return None
        try:
            return largest_fitting(
                lambda size: not self._beyond(size) and self._most_alive(size, workspaces) <= capacity,
                near=most or None,
                max_batch_size=most or None,
            ).batch_size
        except ValueError:  # it does not grow
            return None

    @_of_its_batch_size
    def _most_alive(self, batch_size: int, workspaces: Choice) -> int:
        return self._program().peak_live_bytes(batch_size, workspaces)

    @cached_property
    def _settled(self) -> Program:
        return self._program().at_steady_state()

    @cached_property
    def _stretches(self) -> tuple[int, ...]:
        return self._settled.phases()

    def steps(self, batch_size: int, capacity: int | None = None) -> tuple[tuple[int, int], ...]:
        """Peak ``(allocated, reserved)`` bytes of each step: the first, the second, and so on; later ones are as the
        last.

        The first has neither old gradients nor optimizer state; from the second on they coexist with the forward pass.
        """
        _check_batch_size(batch_size)
        if self.program is None:
            return ((self.formula.memory(batch_size),) * 2,)
        return tuple((peaks.allocated, peaks.reserved) for peaks in self.step_peaks(batch_size, capacity))

    def phases(self, batch_size: int) -> Mapping[str, int]:
        """Bytes that are allocated at most in each phase, over all steps, in a step's order.

        >>> import torch, lightning_memplan as mp
        >>> phases = mp.estimate(torch.nn.Linear(1000, 1000), torch.zeros(4, 1000)).phases(batch_size=64)
        >>> list(phases)
        ['batch', 'forward', 'backward', 'optimizer']
        """
        steps = self.step_peaks(batch_size)
        names = dict.fromkeys(name for step in steps for name in step.phases)
        return {name: max(step.phases.get(name, 0) for step in steps) for name in names}

    @_of_its_batch_size
    def step_peaks(self, batch_size: int, capacity: int | None = None) -> tuple[Peaks, ...]:
        """Peak bytes of each step, and of its phases: the first, the second, and so on; later ones are as the last."""
        _check_batch_size(batch_size)
        if self.program is None:
            return (Peaks(self.formula.memory(batch_size), self.formula.memory(batch_size)),)
        steps: dict[int, Peaks] = {}
        for begin, (allocated, reserved) in zip(self._stretches, self.replay(batch_size, capacity).peaks, strict=False):
            event = self._settled.events[begin]
            if event.step:
                before = steps.get(event.step, Peaks(0, 0))
                phases = {**before.phases, event.phase: max(allocated, before.phases.get(event.phase, 0))}
                peaks = Peaks(max(allocated, before.allocated), max(reserved, before.reserved), phases)
                steps[event.step] = peaks
        return tuple(steps.values())

    @_of_its_batch_size
    def phase(self, batch_size: int) -> str:
        """The phase in which the peak of the allocated bytes falls: "forward", "backward" or "optimizer"."""
        _check_batch_size(batch_size)
        if self.program is None:
            return "backward"
        return self._settled.events[self.replay(batch_size).peak_at].phase

    def breakdown(self, batch_size: int) -> Mapping[str, int]:
        """Bytes by category at the peak of the allocated bytes, largest first.

        What the allocator rounds up is under ``"rounding"``, so that the parts add up to ``peak_allocated``.
        """
        _check_batch_size(batch_size)
        if self.program is None:
            parts = {
                "parameters": self.formula.parameter_bytes,
                "gradients": self.formula.gradient_bytes,
                "batch": batch_size * self.formula.input_bytes,
                "activations": 2 * batch_size * self.formula.feature_bytes,
            }
            return _largest_first(parts)
        sums: dict[str, int] = {}
        for event, size in self.alive(batch_size):
            sums[event.category] = sums.get(event.category, 0) + size
        sums["rounding"] = self.peak_allocated(batch_size) - sum(sums.values())
        return _largest_first(sums)

    @_of_its_batch_size
    def alive(self, batch_size: int) -> list[tuple[Event, int]]:
        """The blocks in use at the peak of the allocated bytes: the event that made each, and the bytes asked for."""
        program, last = self._settled, self.replay(batch_size).peak_at
        live: dict[int, tuple[Event, int]] = {}
        for event, (block, size, _) in zip(program.events[: last + 1], program.at(batch_size), strict=False):
            if size < 0:
                live.pop(block, None)
            else:
                live[block] = event, size
        return list(live.values())

    @_of_its_batch_size
    def journal(self, batch_size: int, capacity: int | None = None) -> list[Move]:
        """What the allocator does at that batch size, move by move (see ``_allocator.replay``)."""
        _check_batch_size(batch_size)
        journal: list[Move] = []
        replay(self._program().at(batch_size), capacity, self.settings, total=capacity or 2**40, journal=journal)
        return journal

    @_of_its_batch_size
    def snapshot(self, batch_size: int, capacity: int | None = None) -> dict[str, Any]:
        """What ``torch.cuda.memory._snapshot()`` would return after the traced steps (see ``save_snapshot``).

        >>> import torch, lightning_memplan as mp
        >>> found = mp.estimate(torch.nn.Linear(1000, 1000), torch.zeros(4, 1000)).snapshot(batch_size=64)
        >>> first = found["device_traces"][0][1]
        >>> first["action"], first["size"], first["frames"][-1]["name"]
        ('alloc', 4000000, 'parameters')

        Raises:
            ValueError: the estimate is by the formula, which has no events.
        """
        journal = self.journal(batch_size, capacity)
        program = self._program()
        return make_snapshot(program.events, program.at(batch_size), journal, self.settings, capacity)

    def save_snapshot(self, path: str | os.PathLike[str], batch_size: int, capacity: int | None = None) -> None:
        """Write a predicted snapshot, which https://pytorch.org/memory_viz opens like a real one.

        It has every block of the traced steps at that batch size, with the operator, the modules around it, the phase
        and the category where a real one has the stack. Under a ``capacity`` (bytes) in which the steps do not fit, it
        ends where memory runs out.

        Raises:
            ValueError: the estimate is by the formula, which has no events.
        """
        snapshot = self.snapshot(batch_size, capacity)
        with Path(path).open("wb") as file:
            pickle.dump(snapshot, file)

    def _beyond(self, batch_size: int) -> bool:
        """Whether the step was recorded at a single batch size, the largest that ran, and this is a larger one."""
        return self._program().batch_sizes == (1,) and batch_size > 1

    @_of_its_batch_size
    def replay(
        self, batch_size: int, capacity: int | None = None, limit: int | None = None, workspaces: Choice = "low"
    ) -> Replay:
        """The allocator's replay at that batch size (see ``_allocator.replay``); ``peaks`` are by step and phase.

        It goes on beyond the recorded steps, until these leave what they find (``Program.settled``).
        """
        if self._beyond(batch_size):
            raise ValueError(
                f"nothing is known of batch size {batch_size}: a probe of 2 samples ran out of memory, and one sample "
                "does not tell how memory grows; ask for method='trace'"
            )
        key = (batch_size, capacity, limit, workspaces)
        if key not in self._replays:
            entries = self._settled.at(batch_size, workspaces)
            self._replays[key] = replay(entries, capacity, self.settings, limit, self._stretches[1:-1])
        return self._replays[key]

    def _program(self) -> Program:
        if self.program is None:
            raise ValueError("the formula has no events to replay: ask for method='trace'")
        return self.program


def largest_on_card(
    estimate_at: Callable[[int], Estimate],
    budget: int,
    capacity: int,
    *,
    share: int | None = None,
    allowed: Callable[[int], bool] = lambda batch_size: True,
    **limits: Any,
) -> Found:
    """The largest batch size within ``limits`` that fits on a card.

    In the ``budget`` (bytes) must fit what is known to the byte, and in all of its ``capacity`` what is expected of
    cuDNN's workspaces as well; where that leaves no batch size they go without. With a ``share`` it divides that.

    >>> import torch, lightning_memplan as mp
    >>> est = mp.estimate(torch.nn.Conv2d(16, 32, 3), torch.zeros(4, 16, 64, 64), precision="16-mixed")
    >>> tight, ample = (largest_on_card(lambda size: est, 2**30, card, max_batch_size=9999) for card in (2**30, 2**32))
    >>> 0 < tight.batch_size < ample.batch_size
    True
    """

    def search(workspaces: Choice) -> Found:
        def fits(batch_size: int) -> bool:
            if not allowed(batch_size):
                return False
            found = estimate_at(batch_size)
            if not found.fits(batch_size, budget):
                return False
            return not found.has_workspaces or found.fits(batch_size, capacity, workspaces=workspaces)

        if share is not None:
            return largest_dividing(fits, share, **limits)
        any_size = estimate_at(limits.get("min_batch_size", 1))
        return largest_fitting(fits, near=any_size.near(capacity, workspaces, any_size.near(budget)), **limits)

    found = search("expected")
    # without room for the workspaces convolutions run all the same, by slower algorithms: better than not at all
    return found if found.batch_size else search("low")


def _largest_first(parts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(((k, v) for k, v in parts.items() if v), key=lambda item: -item[1]))


def _check_batch_size(batch_size: object) -> None:
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"a batch size is an int of at least 1, not {batch_size!r}")


def structure_hash(parts: Iterable[object]) -> str:
    """Twelve hexadecimal digits that stand for a module's structure and a step's settings, wherever in memory they are.

    >>> structure_hash(["Linear", (3, 4)]) == structure_hash(["Linear", (3, 4)]) != structure_hash(["Linear", (4, 3)])
    True
    """
    text = "\n".join(re.sub(r" at 0x[0-9a-f]+", "", repr(part)) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
