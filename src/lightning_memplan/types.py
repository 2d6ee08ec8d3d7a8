"""Public results: frozen values, bytes as ``int``, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True, slots=True)
class Layer:
    """One row of the formula: a leaf module, or one call of it.

    ``shape`` is the output's, without the batch; ``feature_bytes`` the bytes of that output for one sample.

    >>> Layer("conv", "Conv3d", 840, 840, 3360, 3360, (30, 191, 227, 191), 993742440).feature_bytes / 10**6
    993.74244
    """

    path: str
    type: str
    parameters: int  #: per filter: (kernel · in + bias) · out
    parameters_apart: int  #: weights and biases apart: kernel · in · out + biases
    parameter_bytes: int
    gradient_bytes: int
    shape: tuple[int, ...]
    feature_bytes: int


@dataclass(frozen=True, slots=True)
class Device:
    """A card: what it holds, and what of it a training process can have.

    ``total`` are the card's bytes as CUDA reports them; ``free`` those that no other process holds (``total`` where
    nothing is said); ``context`` those that CUDA takes of the free ones before the allocator gets any. ``limit`` is the
    most that the allocator may reserve where ``torch.cuda.set_per_process_memory_fraction`` set one.

    >>> card = Device("my card", total=25446711296, context=1288490188)
    >>> card.capacity
    24158221108
    """

    name: str
    total: int
    free: int | None = None
    context: int = 0
    index: int | None = None
    uuid: str | None = None
    capability: tuple[int, int] | None = None
    limit: int | None = None
    kind: Literal["cuda", "cpu"] = "cuda"

    def __post_init__(self) -> None:
        for name in ("total", "free", "context", "limit"):
            value = getattr(self, name)
            if value is None and name in ("free", "limit"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"a device's {name} is a number of bytes (an int, at least 0), not {value!r}")
        if self.total == 0:
            raise ValueError("a device's total is its bytes of memory: 0 is none")
        if self.free is not None and self.free > self.total:
            raise ValueError(f"{self.free} bytes free of {self.total}: a device cannot have more free than it has")

    @property
    def capacity(self) -> int:
        """Bytes that the allocator can reserve: what is free, less the context, and never over the limit."""
        free = self.total if self.free is None else self.free
        capacity = max(0, free - self.context)
        return capacity if self.limit is None else min(capacity, self.limit)


class Range(NamedTuple):
    """Bytes that are known by a range only: by how much cuDNN's convolutions take for themselves, and by how much of
    what ``torch.compile`` compiles is fused.

    >>> Range(low=20, expected=22, high=25).expected
    22
    """

    low: int  #: they take nothing, and all is fused that can be
    expected: int  #: what their usual algorithms take
    high: int  #: what the hungriest of the common ones take


@dataclass(frozen=True, slots=True)
class Plan:
    """What was decided: the batch size, and what it is predicted to take (bytes).

    ``limited_by`` is ``"memory"``, ``"max_batch_size"``, ``"dataset"``, ``"effective_batch_size"``, ``"step"`` (which
    refuses more) or ``"checkpoint"`` (kept from the run that is resumed): what kept the batch size from being larger.
    Where an effective batch size was asked for, the optimizer sees that many samples a step: ``batch_size`` on each
    device, times ``accumulate_grad_batches``, times the number of devices.

    >>> plan = Plan(batch_size=8, device=Device("card", total=2**34), budget=2**33, margin=0.5, limited_by="memory",
    ...             method="trace", predicted_peak=2**32, predicted_allocated=2**31, formula_peak=2**31)
    >>> plan.accumulate_grad_batches
    1
    """

    batch_size: int
    device: Device
    budget: int  #: bytes that the plan may reserve: the device's capacity less the margin
    margin: float
    limited_by: Literal["memory", "max_batch_size", "dataset", "effective_batch_size", "step", "checkpoint"]
    method: Literal["trace", "formula", "probe"]
    predicted_peak: int  #: peak bytes reserved by the allocator: what must fit
    predicted_allocated: int  #: peak bytes allocated
    formula_peak: int  #: what the formula says of that batch size
    phase: str = ""  #: the phase in which the peak of the allocated bytes falls
    breakdown: Mapping[str, int] = field(default_factory=dict)  #: bytes by category at that peak
    accumulate_grad_batches: int = 1
    notes: tuple[str, ...] = ()
    methods: Mapping[str, int] = field(default_factory=dict)  #: peak bytes reserved by each method that ran
    effective_batch_size: int | None = None  #: samples that the optimizer sees a step, over all devices, if asked for
    confirmed: int | None = None  #: peak bytes reserved in real steps of that batch size, where they were run
    reserved_range: Range | None = None  #: peak bytes reserved, by what cuDNN's convolutions take beside their operands
    nccl: int = 0  #: bytes of the card that are left to NCCL, beside the allocator: an allowance, in ``device.context``


class Length(NamedTuple):
    """One point of the curve over lengths: the largest batch size whose samples have this length.

    ``batch_size`` is 0 where not even one sample fits; ``peak`` is then what that one takes.

    >>> Length(length=512, batch_size=20, peak=2**33, limited_by="memory").tokens
    10240
    """

    length: int
    batch_size: int
    peak: int  #: bytes that the allocator reserves at most
    limited_by: Literal["memory", "max_batch_size"]

    @property
    def tokens(self) -> int:
        """Tokens of such a batch: length times batch size."""
        return self.length * self.batch_size


@dataclass(frozen=True, slots=True)
class Lengths:
    """The largest batch size at each of some lengths, the shortest first, and a budget in tokens for all of them.

    >>> short, long = Length(128, 64, 2**33, "max_batch_size"), Length(2048, 4, 2**33, "memory")
    >>> Lengths((short, long), Device("card", total=2**34), budget=2**33).token_budget
    8192
    """

    rows: tuple[Length, ...]
    device: Device
    budget: int  #: bytes that a step may reserve: the device's capacity less the margin

    @property
    def token_budget(self) -> int:
        """The most tokens (length times batch size) with which a batch fits, whichever of the lengths it has.

        It holds for the lengths that were asked for, and so for samples that are padded to one of them, in batches of
        at most ``max_batch_size`` where one was named: rows that this limits need no budget. 0 where some length does
        not fit at all.
        """
        by_memory = [row.tokens for row in self.rows if row.limited_by == "memory"]
        return min(by_memory) if by_memory else max(row.tokens for row in self.rows)


class Peaks(NamedTuple):
    """Peak bytes of a stretch of time: in tensors, held by the allocator, and in tensors in each phase of it.

    >>> Peaks(allocated=100, reserved=120, phases={"forward": 80, "backward": 100}).phase
    'backward'
    """

    allocated: int
    reserved: int
    phases: Mapping[str, int] = {}

    @property
    def phase(self) -> str:
        """The phase with the highest peak; empty where phases are not known."""
        return max(self.phases, key=self.phases.__getitem__, default="")


class Measurement(NamedTuple):
    """One training step: what was predicted, and what the card's allocator reported (bytes).

    >>> Measurement(step=3, predicted_allocated=99, predicted_reserved=110, allocated=100, reserved=110).error_percent
    -1.0
    """

    step: int
    predicted_allocated: int
    predicted_reserved: int
    allocated: int
    reserved: int
    predicted_phases: Mapping[str, int] = {}  #: peak allocated in each phase
    phases: Mapping[str, int] = {}  #: likewise measured; empty where phases were not
    floor: int = 0  #: allocated when the step had ended: what it leaves
    retries: int = 0  #: times that the allocator gave back its cache to serve a request, since the step before
    device_allocations: int = 0  #: times that it asked the card for memory (cudaMalloc), since the step before
    process: int | None = None  #: bytes that NVML books on this process, at the end of the step
    card: int | None = None  #: bytes in use on the card by NVML, of all processes

    @property
    def error_percent(self) -> float:
        """Predicted against actual peak allocated, in percent of the actual."""
        return 100.0 * (self.predicted_allocated - self.allocated) / self.allocated if self.allocated else 0.0


Outcome = Literal["done", "out of memory", "stopped"]


@dataclass(frozen=True, slots=True)
class Run:
    """One training run, as history keeps it: what was predicted, and what came.

    ``predicted`` and ``measured`` are peaks ``(allocated, reserved)``, in bytes, of the ``"first"`` step and of the
    ``"steady"`` ones, as far as they ran; ``phases`` are peaks allocated, ``(predicted, measured)``, in the phases of
    the steps in which these were measured. ``outcome`` is ``"out of memory"`` where a training step was refused memory.

    >>> Run("a1", "Net", "T4", 2**34, 2**34, "trace", 8, {"first": (100, 200)}, {"first": (90, 200)}).outcome
    'done'
    """

    structure: str  #: a hash of the module's layers, its step and its settings
    model: str
    device: str
    total: int  #: bytes of the card
    capacity: int  #: of these, what the allocator could reserve
    method: str
    batch_size: int
    predicted: Mapping[str, tuple[int, int]]
    measured: Mapping[str, tuple[int, int]]
    outcome: Outcome = "done"
    steps: int = 0
    retries: int = 0  #: times that the allocator gave back its cache to serve a request
    margin: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)  #: of lightning-memplan, torch and the driver
    time: str = ""  #: when it ended, in UTC
    rank: int = 0  #: each rank of a run is on record
    ranks: int = 1
    phases: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Advice:
    """A change that takes less memory, by a trace of that very change (bytes).

    ``batch_size`` is the one that it was traced for; ``largest_batch_size`` the largest that would then fit, where a
    device was named.

    >>> advice = Advice("precision", "precision='bf16-mixed'", "half-precision arithmetic", 8, 2**30, 2**31, 2**30)
    >>> advice.saved
    1073741824
    """

    #: "precision", "checkpointing", "optimizer", "zero_grad", "accumulation", "layout", "allocator", "sharding" or
    #: "samples"
    kind: str
    change: str  #: what to write
    cost: str  #: what it costs other than memory
    batch_size: int
    saved: int  #: of the peak of the reserved bytes
    peak_reserved: int
    peak_allocated: int
    largest_batch_size: int | None = None
    nccl: int = 0  #: bytes of each card that it leaves to NCCL: an allowance
