"""Describe the settings that decide what a training step allocates: precision, parallelism, clipping, accumulation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

#: Fraction of a device's capacity that a plan leaves free by default: for cuDNN's workspaces, which are known only when
#: cuDNN chooses them, and for what the driver rounds up.
MARGIN = 0.05

#: Optimizer steps in a trace: the first, the second (with optimizer state and old gradients) and a third; more if they
#: alternate
STEPS = 3

Precision = Literal["32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true"]

_PRECISIONS: Mapping[str, Precision] = {
    "32-true": "32-true",
    "32": "32-true",
    "64-true": "64-true",
    "64": "64-true",
    "16-mixed": "16-mixed",
    "16": "16-mixed",
    "bf16-mixed": "bf16-mixed",
    "bf16": "bf16-mixed",
    "16-true": "16-true",
    "bf16-true": "bf16-true",
}


def parse_precision(precision: str | int) -> Precision:
    """Return a Trainer's ``precision`` in its full form.

    >>> parse_precision(32), parse_precision("bf16"), parse_precision("16-mixed")
    ('32-true', 'bf16-mixed', '16-mixed')

    Raises:
        ValueError: The memory of this precision is not modelled.
    """
    found = _PRECISIONS.get(str(precision))
    if found is None:
        names = ", ".join(dict.fromkeys(_PRECISIONS.values()))
        raise ValueError(f"precision {precision!r} cannot be planned for: use one of {names}")
    return found


#: Bytes that NCCL takes on each GPU beside the allocator: 0.5 to 0.7 GB a rank were measured on A100s
NCCL = 700_000_000


@dataclass(frozen=True, slots=True)
class Parallel:
    """Describe how several ranks, one GPU each, train a module together.

    >>> Parallel("ddp", ranks=2, arguments={"gradient_as_bucket_view": True}).ranks
    2
    >>> Parallel("fsdp", ranks=8).shards
    True
    """

    kind: Literal["ddp", "fsdp", "model_parallel", "deepspeed", "other"]  #: the memory of "other" is not modelled
    ranks: int
    arguments: Mapping[str, Any] = field(default_factory=dict)  #: arguments of the strategy's wrapper
    hook: tuple[Any, Any] | None = None  #: state and function of a communication hook
    checkpointing: Mapping[str, Any] = field(default_factory=dict)  #: layers to compute again in the backward pass
    rank: int = 0  #: the rank to plan for: shards differ by a few bytes
    backend: str = "nccl"  #: library that moves tensors between GPUs
    name: str = ""  #: class of the strategy, for messages
    tensor_parallel: int = 1  #: ranks that share the work on one sample, in ModelParallelStrategy
    shard_ranks: int = 0  #: ranks over which FSDP's HYBRID_SHARD shards; the other ranks hold replicas of the shards
    layer_sync: Any = None  #: Lightning's plugin that synchronizes layers over all ranks (``sync_batchnorm=True``)

    @property
    def nccl(self) -> int:
        """Bytes to leave to NCCL on each GPU, beside the allocator."""
        return NCCL if self.ranks > 1 and self.backend == "nccl" else 0

    @property
    def shards(self) -> bool:
        """True if each rank holds a shard of the parameters, which the wrapper moves to the GPU."""
        return self.kind in ("fsdp", "model_parallel", "deepspeed")


@dataclass(frozen=True, slots=True)
class StepSettings:
    """Describe how a Trainer runs a step.

    >>> StepSettings(precision="16-mixed").capability
    (8, 6)
    """

    precision: Precision = "32-true"
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    accumulate_grad_batches: int = 1
    capability: tuple[int, int] = (8, 6)  #: compute capability of the device, which decides what kernels allocate
    parallel: Parallel | None = None
