"""The rules that turn a trace on the CPU into a trace on CUDA, and the decorators that register them.

torch's fake tensors show which outputs an operator has, as the CPU lays them out. A rule stands beside its operator and
says what a CUDA kernel does otherwise:

* `allocates`: the order of its allocations, with scratch memory that it frees before it returns;
* `keeps_workspace`: a workspace that its library keeps;
* `output_metas`: shapes and strides of its outputs;
* `decomposes`: other operators, which together allocate what the kernel allocates;
* `decomposes_sparse`: the same for calls with a sparse tensor;
* `upper_bound`: an output whose size depends on values, at its largest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import torch

aten = torch.ops.aten

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])

Operator: TypeAlias = Any  #: an OpOverload, which torch's stubs do not type
RuleT = TypeVar("RuleT", bound=Callable[..., Any])


def exists(name: str) -> bool:
    """Check that this version of torch has an operator.

    >>> exists("mm"), exists("pow.Tensor_Scalar"), exists("no_such_operator")
    (True, True, False)
    """
    packet, _, overload = name.partition(".")
    return hasattr(aten, packet) and hasattr(getattr(aten, packet), overload or "default")


def operator(name: str) -> Operator:
    """Return the operator of a name with or without an overload.

    >>> operator("mm"), operator("pow.Tensor_Scalar")
    (<OpOverload(op='aten.mm', overload='default')>, <OpOverload(op='aten.pow', overload='Tensor_Scalar')>)
    """
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def installed(names: str) -> list[Operator]:
    """Return the operators of these names that this version of torch has.

    >>> installed("mm no_such_operator")
    [<OpOverload(op='aten.mm', overload='default')>]
    """
    return [operator(name) for name in names.split() if exists(name)]


# ------------------------------------------------------------------------------------------------- one call of a kernel


@dataclass(frozen=True)
class Gpu:
    """The properties of a GPU on which the allocations of its kernels depend; the defaults are an RTX 3090's.

    >>> Gpu(capability=(9, 0), multiprocessors=132, threads=2048).capability
    (9, 0)
    """

    capability: tuple[int, int] = (8, 6)
    multiprocessors: int = 82
    threads: int = 1536  #: that one multiprocessor runs at once


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an operator, with what it returned.

    >>> call = Call((torch.zeros(2, 3), [1]), {"keepdim": True}, torch.zeros(2, 1))
    >>> call.input.shape, call.argument(1, "dim"), call.argument(2, "keepdim"), call.argument(3, "dtype")
    (torch.Size([2, 3]), [1], True, None)
    """

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    out: Any

    @property
    def input(self) -> Any:
        """The first argument."""
        return self.args[0]

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Return the argument of a place in the operator's schema, which may be given by its name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)


# ------------------------------------------------------------------------------------------ what a kernel may allocate


@dataclass(frozen=True, slots=True)
class KernelCall:
    """A size that is no polynomial of the batch size: a function of `cuda.kernel_sizes`, and its arguments.

    The arguments are scaled to another batch size, where the function is called again.

    >>> KernelCall("scan", (3072, 100_000, 320)).recorded
    ('scan', 3072, 100000, 320)
    """

    name: str
    arguments: tuple[int, ...]

    @property
    def recorded(self) -> tuple[str | int, ...]:
        """The name and the arguments, as an event carries them."""
        return self.name, *self.arguments


@dataclass(frozen=True, slots=True)
class Scratch:
    """Memory that a kernel allocates for itself, and frees at the end of its scope: by default when it returns.

    >>> Scratch(4096).size
    4096
    """

    size: int | KernelCall


@dataclass(frozen=True, slots=True)
class Output:
    """The place at which a kernel allocates one of several outputs.

    >>> Output(1, itemsize=4)  # float32 on CUDA, whatever the fake tensor is
    Output(index=1, itemsize=4)
    """

    index: int
    itemsize: int | None = None  #: bytes of an element, where they differ from the fake tensor's


@dataclass(frozen=True, slots=True)
class Outputs:
    """The place at which a kernel allocates all of its outputs, one after the other."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Allocations whose scratch memory is freed before the kernel goes on, the last first."""

    allocations: Iterable[Allocation]


Allocation: TypeAlias = Scratch | Output | Outputs | Scope

OUTPUTS = Outputs()


def scratch(kernel: str, *arguments: int) -> Scratch:
    """Return scratch memory of a size that a function of `cuda.kernel_sizes` gives.

    >>> scratch("scan", 3072, 100_000, 320)
    Scratch(size=KernelCall(name='scan', arguments=(3072, 100000, 320)))
    """
    return Scratch(KernelCall(kernel, arguments))


class Workspace(NamedTuple):
    """Memory that a library allocates when a thread first calls it, or the first of all threads, and keeps."""

    name: str
    size: int
    of_each_thread: bool = True


class OutputMeta(NamedTuple):
    """An output of the shape and strides of ``like``, or contiguous of that size."""

    like: torch.Tensor | torch.Size
    dtype: torch.dtype


AllocationRule: TypeAlias = Callable[[Call, Gpu], Iterable[Allocation]]  #: yields every output once
WorkspaceRule: TypeAlias = Callable[[Gpu], Workspace]
Decomposition: TypeAlias = Callable[..., Any]  #: NotImplemented where the fake kernel is right
Metas: TypeAlias = Sequence[OutputMeta | None]  #: None for an output that is not asked for
MetaRule: TypeAlias = Callable[..., Metas | None]  #: None where the fake kernel must say


# ------------------------------------------------------------------------------------------------------- the registries


class Registry(Generic[RuleT]):
    """Rules of one kind, each beside its operator: a decorator that refuses a second rule for an operator.

    An operator is an overload, or a packet, which stands for its default overload.

    >>> describes = Registry("description")
    >>> @describes(aten.mm, aten.pow.Tensor_Scalar)
    ... def product(call):
    ...     return "a product"
    >>> list(describes.rules)
    [<OpOverload(op='aten.mm', overload='default')>, <OpOverload(op='aten.pow', overload='Tensor_Scalar')>]
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.rules: dict[Operator, RuleT] = {}

    def __call__(self, *operators: Operator) -> Callable[[RuleT], RuleT]:
        def register(rule: RuleT) -> RuleT:
            for packet in operators:
                overload = packet.default if isinstance(packet, torch._ops.OpOverloadPacket) else packet
                if overload in self.rules:
                    raise ValueError(
                        f"{overload} has a rule of kind {self.kind!r} already, {_named(self.rules[overload])}: "
                        f"change that one, or register {_named(rule)} for another operator"
                    )
                self.rules[overload] = rule
            return rule

        return register


def _named(rule: Callable[..., Any]) -> str:
    return f"{rule.__module__}.{rule.__qualname__}"


allocates: Registry[AllocationRule] = Registry("allocates")
keeps_workspace: Registry[WorkspaceRule] = Registry("keeps_workspace")
output_metas: Registry[MetaRule] = Registry("output_metas")
decomposes: Registry[Decomposition] = Registry("decomposes")
decomposes_sparse: Registry[Decomposition] = Registry("decomposes_sparse")
upper_bound: Registry[Decomposition] = Registry("upper_bound")


@dataclass(frozen=True)
class Rules:
    """The rules of one GPU, each keyed by its operator; without any, kernels allocate what fake tensors show.

    >>> Rules().allocations
    {}
    """

    gpu: Gpu = field(default_factory=Gpu)
    allocations: Mapping[Operator, AllocationRule] = field(default_factory=dict)
    workspaces: Mapping[Operator, Workspace] = field(default_factory=dict)
    output_metas: Mapping[Operator, MetaRule] = field(default_factory=dict)
    decompositions: Mapping[Operator, Decomposition] = field(default_factory=dict)
    sparse_decompositions: Mapping[Operator, Decomposition] = field(default_factory=dict)
    upper_bounds: Mapping[Operator, Decomposition] = field(default_factory=dict)
