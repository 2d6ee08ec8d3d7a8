"""Public results: frozen values, bytes as ``int``, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True, slots=True)
class Filters:
    """``count`` equal filters of a layer: ``inputs`` weights for each place of the ``kernel``, and ``biases`` each.

    A Conv3d with a kernel of 3 x 3 x 3 from 1 channel to 30, by both of the textbook's methods:

    >>> filters = Filters(kernel=27, inputs=1, biases=1, count=30)
    >>> filters.per_filter, filters.apart
    (840, 840)
    """

    kernel: int
    inputs: int
    biases: int
    count: int

    @property
    def per_filter(self) -> int:
        """Count one filter first: (kernel · inputs + biases) · count."""
        return (self.kernel * self.inputs + self.biases) * self.count

    @property
    def apart(self) -> int:
        """Count weights and biases apart: kernel · inputs · count + all biases."""
        weights = self.kernel * self.inputs * self.count
        total_biases = self.biases * self.count
        return weights + total_biases


@dataclass(frozen=True, slots=True)
class Layer:
    """One row of the formula: a leaf module, or one call of it.

    ``filters`` are the textbook's count of its parameters, in which each filter reads all input channels and has a
    bias. Where that is not what the tensors hold, ``differs`` says why.

    >>> conv = Layer("conv", "Conv3d", 840, 3360, 3360, (30, 191, 227, 191), 993742440, (Filters(27, 1, 1, 30),))
    >>> conv.parameters == sum(each.per_filter for each in conv.filters), conv.feature_bytes / 10**6
    (True, 993.74244)
    """

    path: str
    type: str
    parameters: int  #: numbers in its tensors, each tensor counted in the first row that has it
    parameter_bytes: int
    gradient_bytes: int
    shape: tuple[int, ...]  #: of the output, without the batch
    feature_bytes: int  #: bytes of the output for one sample
    filters: tuple[Filters, ...] = ()  #: empty for a layer that is not made of filters
    differs: str = ""  #: why ``filters`` have another count than ``parameters``


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or the host: its memory in bytes, and how much of it a training process can have.

    >>> device = Device("my GPU", total=25446711296, context=1288490188)
    >>> device.capacity
    24158221108
    """

    name: str
    total: int  #: bytes of memory, as CUDA reports them
    free: int | None = None  #: bytes that no other process holds; None means ``total``
    context: int = 0  #: of the free bytes, those that CUDA takes before the allocator gets any
    index: int | None = None
    uuid: str | None = None
    capability: tuple[int, int] | None = None
    limit: int | None = None  #: most bytes to reserve, if ``torch.cuda.set_per_process_memory_fraction`` set a limit
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
        """Bytes that the allocator can reserve: the free ones, less the context, and never over the limit."""
        free = self.total if self.free is None else self.free
        capacity = max(0, free - self.context)
        return capacity if self.limit is None else min(capacity, self.limit)


class Range(NamedTuple):
    """A range of bytes, where cuDNN chooses its algorithms and ``torch.compile`` chooses what to fuse.

    >>> Range(low=20, expected=22, high=25).expected
    22
    """

    low: int  #: convolutions need no workspace, and all operators are fused that can be
    expected: int  #: convolutions use their usual algorithms
    high: int  #: convolutions use the common algorithms with the largest workspace


@dataclass(frozen=True, slots=True)
class Plan:
    """A planned batch size, and the memory that it is predicted to take, in bytes.

    ``limited_by`` tells why the batch size is not larger: ``"memory"``, ``"max_batch_size"``, ``"dataset"``,
    ``"effective_batch_size"``, ``"step"`` (the training step refuses a larger batch), ``"validation"`` (whose batches
    grow with those of training, and would not fit) or ``"checkpoint"`` (kept from the run that is resumed). An
    effective batch size is the number of samples in one optimizer step: ``batch_size`` on each device, times
    ``accumulate_grad_batches``, times the number of devices.

    >>> plan = Plan(batch_size=8, device=Device("GPU", total=2**34), budget=2**33, margin=0.5, limited_by="memory",
    ...             method="trace", peak_reserved=2**32, peak_allocated=2**31, formula_peak=2**31)
    >>> plan.accumulate_grad_batches
    1
    """

    batch_size: int
    device: Device
    budget: int  #: bytes that the plan may reserve: the device's capacity less the margin
    margin: float
    limited_by: Literal[
        "memory", "max_batch_size", "dataset", "effective_batch_size", "step", "validation", "checkpoint"
    ]
    method: Literal["trace", "formula", "probe"]
    peak_reserved: int  #: peak bytes reserved by the allocator, which must fit
    peak_allocated: int  #: peak bytes allocated
    formula_peak: int  #: peak bytes by the formula
    phase: str = ""  #: phase of the step in which the allocated bytes peak
    breakdown: Mapping[str, int] = field(default_factory=dict)  #: bytes by category at that peak
    accumulate_grad_batches: int = 1
    notes: tuple[str, ...] = ()
    methods: Mapping[str, int] = field(default_factory=dict)  #: peak bytes reserved by each method that ran
    effective_batch_size: int | None = None  #: samples in each optimizer step, over all devices, if one was asked for
    confirmed: int | None = None  #: peak bytes reserved in real steps of that batch size, if they were run
    needed: int = 0  #: peak bytes reserved by an allocator that has no more than the budget; 0 where it is not known
    reserved_range: Range | None = None  #: peak bytes reserved, by the workspaces of cuDNN's convolutions
    nccl: int = 0  #: bytes left to NCCL beside the allocator, an allowance that is part of ``device.context``


@dataclass(frozen=True, slots=True)
class EstimateRow:
    """The estimate at one batch size; sizes in bytes.

    >>> import lightning_memplan as mp, torch
    >>> row = mp.estimate(torch.nn.Linear(100, 100), torch.zeros(4, 100)).row(batch_size=8)
    >>> sum(row.breakdown.values()) == row.peak_allocated <= row.peak_reserved, row.phase
    (True, 'backward')
    """

    batch_size: int
    peak_reserved: int
    peak_allocated: int
    formula_peak: int
    phase: str  #: phase of the step in which the allocated bytes peak
    breakdown: Mapping[str, int]  #: bytes by category at that peak
    phases: Mapping[str, int]  #: peak bytes allocated in each phase
    reserved_range: Range  #: peak bytes reserved, by the workspaces of cuDNN's convolutions


class Length(NamedTuple):
    """One point of the curve over lengths: the largest batch size for samples of this length.

    ``batch_size`` is 0 if not even one sample fits; ``peak`` is then the peak of that one sample.

    >>> Length(length=512, batch_size=20, peak=2**33, limited_by="memory").tokens
    10240
    """

    length: int
    batch_size: int
    peak: int  #: peak bytes reserved by the allocator
    limited_by: Literal["memory", "max_batch_size"]

    @property
    def tokens(self) -> int:
        """Tokens in a batch: length times batch size."""
        return self.length * self.batch_size


@dataclass(frozen=True, slots=True)
class Lengths:
    """The largest batch size at each length, shortest first, and one budget in tokens for all lengths.

    >>> short, long = Length(128, 64, 2**33, "max_batch_size"), Length(2048, 4, 2**33, "memory")
    >>> Lengths((short, long), Device("GPU", total=2**34), budget=2**33).token_budget
    8192
    """

    rows: tuple[Length, ...]
    device: Device
    budget: int  #: bytes that a step may reserve: the device's capacity less the margin

    @property
    def token_budget(self) -> int:
        """The largest number of tokens (length times batch size) with which a batch of any of the lengths fits.

        It holds for samples padded to one of the lengths, in batches of at most ``max_batch_size``; rows that
        ``max_batch_size`` limits do not lower it. It is 0 if some length does not fit at all.
        """
        by_memory = [row.tokens for row in self.rows if row.limited_by == "memory"]
        return min(by_memory) if by_memory else max(row.tokens for row in self.rows)


class Peaks(NamedTuple):
    """Peak bytes over a stretch of time: allocated, reserved, and allocated in each phase.

    >>> Peaks(allocated=100, reserved=120, phases={"forward": 80, "backward": 100}).phase
    'backward'
    """

    allocated: int
    reserved: int
    phases: Mapping[str, int] = {}

    @property
    def phase(self) -> str:
        """The phase with the highest peak; empty if the phases are unknown."""
        return max(self.phases, key=self.phases.__getitem__, default="")


class Measurement(NamedTuple):
    """One training step: predicted peaks, and those that the allocator reported, in bytes.

    >>> Measurement(step=3, predicted_allocated=99, predicted_reserved=110, allocated=100, reserved=110).error_percent
    -1.0
    """

    step: int
    predicted_allocated: int
    predicted_reserved: int
    allocated: int
    reserved: int
    predicted_phases: Mapping[str, int] = {}  #: predicted peak allocated in each phase
    phases: Mapping[str, int] = {}  #: measured peak allocated in each phase; empty if phases were not measured
    floor: int = 0  #: bytes still allocated when the step has ended
    retries: int = 0  #: times since the step before that the allocator freed its cache to serve a request
    device_allocations: int = 0  #: times since the step before that it called cudaMalloc
    process: int | None = None  #: bytes of this process by NVML, at the end of the step
    card: int | None = None  #: bytes in use on the GPU by NVML, of all processes

    @property
    def error_percent(self) -> float:
        """Predicted less actual peak allocated, in percent of the actual."""
        return 100.0 * (self.predicted_allocated - self.allocated) / self.allocated if self.allocated else 0.0


Outcome = Literal["done", "out of memory", "stopped"]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One training run in the history: its predicted and measured peaks.

    ``predicted`` and ``measured`` map ``"first"`` (the first step) and ``"steady"`` (all later ones), as far as they
    ran, to peaks ``(allocated, reserved)`` in bytes. ``phases`` maps each measured phase to its peak allocated
    ``(predicted, measured)``. ``outcome`` is ``"out of memory"`` if a training step ran out of memory.

    >>> RunRecord("a1", "Net", "T4", 2**34, 2**34, "trace", 8, {"first": (100, 200)}, {"first": (90, 200)}).outcome
    'done'
    """

    structure: str  #: a hash of the module's layers, its step and its settings
    model: str
    device: str
    total: int  #: bytes of the device
    capacity: int  #: bytes that the allocator could reserve
    method: str
    batch_size: int
    predicted: Mapping[str, tuple[int, int]]
    measured: Mapping[str, tuple[int, int]]
    outcome: Outcome = "done"
    steps: int = 0
    retries: int = 0  #: times that the allocator freed its cache to serve a request
    margin: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)  #: of lightning-memplan, torch and the driver
    time: str = ""  #: end of the run, in UTC
    rank: int = 0  #: each rank of a run has a record of its own
    ranks: int = 1
    phases: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Advice:
    """A change that saves memory, traced with that very change; sizes in bytes.

    >>> advice = Advice("precision", "precision='bf16-mixed'", "half-precision arithmetic", 8, 2**30, 2**31, 2**30)
    >>> advice.saved
    1073741824
    """

    #: "precision", "checkpointing", "optimizer", "zero_grad", "accumulation", "layout", "allocator", "sharding" or
    #: "samples"
    kind: str
    change: str  #: code or setting to write
    cost: str  #: price of the change other than memory
    batch_size: int  #: batch size of the trace
    saved: int  #: bytes saved of the peak reserved
    peak_reserved: int
    peak_allocated: int
    largest_batch_size: int | None = None  #: largest batch size that then fits, if a device was named
    nccl: int = 0  #: bytes that the change leaves to NCCL on each GPU, an allowance


# --- JSON
#: The result types, and the properties of each that are part of its data
_RESULTS: Mapping[type, tuple[str, ...]] = {
    Advice: (),
    Device: ("capacity",),
    EstimateRow: (),
    Filters: ("per_filter", "apart"),
    Layer: (),
    Length: ("tokens",),
    Lengths: ("token_budget",),
    Measurement: ("error_percent",),
    Peaks: ("phase",),
    Plan: (),
    Range: (),
    RunRecord: (),
}


def as_dict(result: object) -> dict[str, Any]:
    """Return a result as plain data for ``json.dumps``: every field by its name, and sizes in bytes as ``int``.

    Results within it are dictionaries too, and tuples are lists.

    >>> as_dict(Range(low=20, expected=22, high=25))
    {'low': 20, 'expected': 22, 'high': 25}
    >>> found = as_dict(Device("GPU", total=2**34, context=2**30, capability=(8, 6)))
    >>> found["total"], found["capacity"], found["capability"]
    (17179869184, 16106127360, [8, 6])

    Raises:
        TypeError: it is no result, such as a Plan or a Measurement.
    """
    names = _names(type(result))
    if not names:
        raise TypeError(f"{result!r:.80} is no result: give a {', '.join(kind.__name__ for kind in _RESULTS)}")
    return {name: _plain(getattr(result, name)) for name in names}


def _names(kind: type) -> tuple[str, ...]:
    """Return the names in a result's data; nothing if ``kind`` is no type of result."""
    if kind not in _RESULTS:
        return ()
    own: tuple[str, ...] = getattr(kind, "_fields", ()) or tuple(each.name for each in fields(kind))
    return own + _RESULTS[kind]


def _plain(value: object) -> object:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if type(value) in _RESULTS:
        return as_dict(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return str(value)  # a setting that the user made
