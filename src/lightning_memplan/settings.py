"""Settings that decide what a training step allocates: precision, parallelism, clipping, accumulation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

#: Fraction of a device's capacity that a plan leaves free by default: for cuDNN's workspaces, which are known only when
#: cuDNN chooses them, and for what the driver rounds up.
MARGIN = 0.05


#: Optimizer steps that a trace holds: the first, the second (with optimizer state and old gradients), a third; more
#: where they take turns
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
    """A Trainer's ``precision``, in its full form.

    >>> parse_precision(32), parse_precision("bf16"), parse_precision("16-mixed")
    ('32-true', 'bf16-mixed', '16-mixed')

    Raises:
        ValueError: a precision whose memory is not modelled.
    """
    found = _PRECISIONS.get(str(precision))
    if found is None:
        names = ", ".join(dict.fromkeys(_PRECISIONS.values()))
        raise ValueError(f"precision {precision!r} cannot be planned for: use one of {names}")
    return found


#: What NCCL takes of a card beside the allocator: 0.5 to 0.7 GB a rank were measured on A100s
NCCL = 700_000_000


@dataclass(frozen=True, slots=True)
class Parallel:
    """How several processes, a card each, train a module together.

    ``arguments`` are what the strategy makes its wrapper with; ``hook`` is the state and the function of a
    communication hook, where it registers one; ``checkpointing`` says which layers a strategy wraps to be computed
    again in the backward pass. ``rank`` is the one that is planned for: shards differ by a few bytes. ``backend`` moves
    tensors between cards.

    >>> Parallel("ddp", ranks=2, arguments={"gradient_as_bucket_view": True}).ranks
    2
    >>> Parallel("fsdp", ranks=8).shards
    True

    ``"other"`` is a strategy, by its ``name``, whose memory is not modelled.
    """

    kind: Literal["ddp", "fsdp", "model_parallel", "deepspeed", "other"]
    ranks: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    hook: tuple[Any, Any] | None = None
    checkpointing: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 0
    backend: str = "nccl"
    name: str = ""
    tensor_parallel: int = 1  #: of the ranks, how many share the work on a sample: ModelParallelStrategy's
    shard_ranks: int = 0  #: over how many of the ranks FSDP's HYBRID_SHARD shards, the others holding copies
    layer_sync: Any = None  #: Lightning's plugin that has layers compute over all ranks (``sync_batchnorm=True``)

    @property
    def nccl(self) -> int:
        """Bytes of each card that are left to NCCL, which it takes beside the allocator."""
        return NCCL if self.ranks > 1 and self.backend == "nccl" else 0

    @property
    def shards(self) -> bool:
        """Whether each rank holds a part of the parameters, which the wrapper moves to the card."""
        return self.kind in ("fsdp", "model_parallel", "deepspeed")


@dataclass(frozen=True, slots=True)
class StepSettings:
    """How a Trainer runs a step, as far as memory is concerned.

    >>> StepSettings(precision="16-mixed").capability
    (8, 6)
    """

    precision: Precision = "32-true"
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    accumulate_grad_batches: int = 1
    capability: tuple[int, int] = (8, 6)
    parallel: Parallel | None = None
