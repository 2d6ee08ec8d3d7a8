"""The changes that advice tries: precision, checkpointing, optimizer, layout, sharding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_memplan.data.batches import tensors
from lightning_memplan.errors import TraceError
from lightning_memplan.lightning.compat import (
    apply_to_collection,
    configured_optimizers,
    is_lightning_module,
    is_overridden,
)
from lightning_memplan.lightning.trainer import parallel_named, sharding
from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.memory.fitting import largest_on_device
from lightning_memplan.memory.loops import scale_with_loops
from lightning_memplan.memory.search import SizeLimits
from lightning_memplan.planning.job import TrainingJob
from lightning_memplan.settings import StepSettings, parse_precision
from lightning_memplan.trace.detached import detached_copy
from lightning_memplan.trace.fake_tensors import fake_mode
from lightning_memplan.trace.tracer import trace_steps

_MUCH = 0.1  #: what takes more GPUs saves as much, or makes a batch fit


_CARDS = (2, 4, 8)


_SHARDED = ("parameters", "gradients", "optimizer", "communication")


_MOST = 2**20  # samples in a batch: beyond, no larger batch is looked for


ChangeOptimizer = Callable[[torch.optim.Optimizer], torch.optim.Optimizer]


@dataclass(frozen=True)
class TracedJob:
    """A training job, the estimate that its trace gave, and the batches of the trace."""

    job: TrainingJob
    found: Estimate
    batches: Sequence[tuple[int, Any]]

    @property
    def module(self) -> nn.Module:
        """The module that is trained."""
        return self.job.module

    @property
    def settings(self) -> StepSettings:
        """The settings of the step."""
        return self.job.settings

    def again(self, *, batches: Sequence[tuple[int, Any]] | None = None, **changes: Any) -> Estimate:
        """Return the estimate of the job with other batches, or with some of its fields changed."""
        job = replace(self.job, **changes)
        result = trace_steps(job.setup, self.batches if batches is None else batches, beginning=job.beginning())
        program, _ = scale_with_loops(result.traces)
        return replace(self.found, program=program)


@dataclass(frozen=True)
class _Change:
    kind: str
    text: str
    cost: str
    make: Callable[[], Estimate]
    parts: int = 1  #: into how many the batch is divided
    nccl: int = 0  #: bytes of the GPU that are no longer there for the allocator


class DoesNotApplyError(Exception):
    pass


def largest(after: Estimate, budget: int, capacity: int) -> int:
    return largest_on_device(lambda _: after, budget, capacity, SizeLimits(max_batch_size=_MOST)).batch_size


def changes(job: TracedJob, batch_size: int) -> Iterator[_Change]:
    settings = job.settings
    for precision, cost in _precisions(settings):
        changed = replace(settings, precision=parse_precision(precision))
        yield _Change("precision", f"precision={precision!r}", cost, partial(job.again, settings=changed))
    if models := checkpoint_themselves(job.module):
        text = " and ".join(f"{path}.".lstrip(".") + _ENABLE for path, _ in models)
        yield _Change("checkpointing", text, "their forward runs twice", partial(_with_own_checkpoints, job, models))
    elif blocks := checkpointed(job.module):
        text = f"torch.utils.checkpoint around each of {_named(blocks)}, use_reentrant=False"
        yield _Change("checkpointing", text, "their forward runs twice", partial(_with_checkpoints, job, blocks))
    for text, cost, change in (
        ("the optimizer with fused=True", "none: the same steps, in one kernel", _fused),
        ("the optimizer with foreach=False", "more, smaller kernels: a slower optimizer step", _one_by_one),
        (
            "bitsandbytes' optimizer of that name in 8 bits (Adam8bit, AdamW8bit, SGD8bit)",
            "its state is rounded: see that it still learns",
            _in_eight_bits,
        ),
        ("torch.optim.SGD without momentum", "another optimizer: it may train worse", _stateless),
    ):
        yield _Change("optimizer", text, cost, partial(_with_optimizer, job, change))
    if is_overridden("optimizer_zero_grad", job.module):
        text = "optimizer.zero_grad(set_to_none=True) in optimizer_zero_grad"
        yield _Change("zero_grad", text, "none", partial(_with_gradients_freed, job))
    if batch_size > 1 and not (is_lightning_module(job.module) and not job.module.automatic_optimization):
        parts = 2 * settings.accumulate_grad_batches
        changed = replace(settings, accumulate_grad_batches=parts)
        text = f"accumulate_grad_batches={parts} at batch size {batch_size // 2}"
        cost = "smaller batches use the GPU less well; batch norm sees fewer samples"
        yield _Change("accumulation", text, cost, partial(job.again, settings=changed), parts=2)
    if formats := _formats(job.module):
        text = " and ".join(f"module.to(memory_format=torch.{name})" for name in formats)
        yield _Change("layout", text, "none; with half precision it is faster", partial(_in_formats, job, formats))
    if not job.found.settings.expandable_segments:
        expandable = replace(job.found, settings=replace(job.found.settings, expandable_segments=True))
        text = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
        yield _Change("allocator", text, "none on Linux", lambda: expandable)
    if size := _sample_size(job.batches[0][1]):
        halves = tuple(n // 2 for n in size)
        text = f"samples of {_by(halves)} in place of {_by(size)}"
        yield _Change("samples", text, "each sees less", partial(_with_smaller_samples, job, size, halves))


# --- precision
def _precisions(settings: StepSettings) -> Iterator[tuple[str, str]]:
    half = "bf16" if settings.capability >= (8, 0) else "16"
    if settings.precision == "64-true":
        yield "32-true", "single precision"
    if settings.precision in ("64-true", "32-true"):
        yield f"{half}-mixed", "half-precision arithmetic where autocast allows it"
    if not settings.precision.endswith("16-true"):
        yield f"{half}-true", "weights and optimizer state in half precision: see that it still learns"


# --- the module, copied: the original stays as it is
def _copied(job: TracedJob) -> Any:
    return detached_copy(job.module, fake_mode(), trainer=job.job.trainer)


_ENABLE = "gradient_checkpointing_enable({'use_reentrant': False})"


def checkpoint_themselves(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the models of transformers in a module, with their paths: they checkpoint their own blocks.

    A block of theirs fills a cache of keys and values, which a second forward would fill again: their own checkpoints
    leave it out (``GradientCheckpointingLayer`` in transformers/modeling_layers.py, 5.24).
    """
    found: dict[str, nn.Module] = {}
    for path, child in module.named_modules():
        can = getattr(child, "supports_gradient_checkpointing", False) and hasattr(
            child, "gradient_checkpointing_enable"
        )
        if can and not any(not outer or path.startswith(f"{outer}.") for outer in found):
            found[path] = child
    return list(found.items())


def _with_own_checkpoints(job: TracedJob, models: Sequence[tuple[str, nn.Module]]) -> Estimate:
    replica = _copied(job)
    for path, _ in models:
        replica.get_submodule(path).gradient_checkpointing_enable({"use_reentrant": False})
    return job.again(module=replica)


def checkpointed(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules to checkpoint, with their paths: blocks that repeat, else the network's own parts.

    >>> down, up = (torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(2))
    >>> [path for path, _ in checkpointed(torch.nn.ModuleDict({"down": down, "up": up, "head": torch.nn.Linear(8, 2)}))]
    ['down', 'up']
    """
    if blocks := _repeated_blocks(module):
        return blocks
    path = ""
    while len(parts := [(name, child) for name, child in module.named_children() if any(child.children())]) == 1:
        path, module = f"{path}{parts[0][0]}.", parts[0][1]
    return [(path + name, child) for name, child in parts if not isinstance(child, (nn.ModuleList, nn.ModuleDict))]


def _named(blocks: Sequence[tuple[str, nn.Module]]) -> str:
    """Blocks by their classes, or by their paths where classes say little."""
    classes = {type(block) for _, block in blocks}
    if len(classes) == len(blocks) or nn.Sequential in classes:
        return ", ".join(path for path, _ in blocks)
    return f"the {len(blocks)} blocks ({', '.join(sorted(kind.__name__ for kind in classes))})"


def _repeated_blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the outermost modules with parts that stand twice or more, of one class, in a Sequential or ModuleList."""
    found: dict[str, nn.Module] = {}
    for path, container in module.named_modules():
        if not isinstance(container, (nn.Sequential, nn.ModuleList)) or any(path.startswith(f"{p}.") for p in found):
            continue
        blocks = [(name, child) for name, child in container.named_children() if any(child.children())]
        classes = [type(child) for _, child in blocks]
        found.update(
            (f"{path}.{name}" if path else name, child)
            for name, child in blocks
            if classes.count(type(child)) > 1 and not isinstance(child, (nn.Sequential, nn.ModuleList))
        )
    return list(found.items())


def _with_checkpoints(job: TracedJob, blocks: Sequence[tuple[str, nn.Module]]) -> Estimate:
    replica = _copied(job)
    for path, _ in blocks:
        _checkpoint(replica.get_submodule(path))
    return job.again(module=replica)


def _checkpoint(block: nn.Module) -> None:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(partial(type(block).forward, block), *args, use_reentrant=False, **kwargs)

    block.__dict__["forward"] = forward


def _with_gradients_freed(job: TracedJob) -> Estimate:
    replica = _copied(job)
    replica.__dict__["optimizer_zero_grad"] = lambda epoch, batch_idx, optimizer: optimizer.zero_grad(set_to_none=True)
    return job.again(module=replica)


_FORMATS = {4: "channels_last", 5: "channels_last_3d"}


_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _formats(module: nn.Module) -> list[str]:
    """Return the memory formats of convolutions that this module's parameters do not have."""
    weights = [m.weight for m in module.modules() if isinstance(m, _CONVOLUTIONS)]
    return sorted(
        {
            name
            for dim, name in _FORMATS.items()
            if any(w.dim() == dim and not w.is_contiguous(memory_format=getattr(torch, name)) for w in weights)
        }
    )


def _in_formats(job: TracedJob, formats: Sequence[str]) -> Estimate:
    replica = _copied(job)
    with torch.no_grad():
        for parameter in replica.parameters():  # ``Module.to`` cannot exchange fake ones
            name = _FORMATS.get(parameter.dim(), "")
            if name in formats:
                parameter.data = parameter.detach().contiguous(memory_format=getattr(torch, name))
    return job.again(module=replica)


# --- more GPUs
def sharding_changes(job: TracedJob, batch_size: int, budget: int) -> Iterator[_Change]:
    """FSDP on the fewest GPUs with which the batch fits, else on the most; on as many as there are, with DDP.

    Where all that is sharded is no more than what NCCL takes and what would be worth it, nothing is traced.
    """
    ddp = job.settings.parallel
    if ddp is not None and ddp.kind != "ddp":
        return
    counts = _CARDS if ddp is None else (ddp.ranks,)
    parts, peak, fitted = (
        job.found.breakdown(batch_size),
        job.found.peak(batch_size),
        job.found.fits(batch_size, budget),
    )
    units = {type(block) for _, block in _repeated_blocks(job.module)}
    for cards in counts:
        parallel = parallel_named(sharding(units), cards)
        assert parallel is not None
        nccl = parallel.nccl - (0 if ddp is None else ddp.nccl)
        if sum(parts.get(name, 0) for name in _SHARDED) - nccl < _MUCH * peak:
            return
        try:
            after = job.again(settings=replace(job.settings, parallel=parallel))
        except TraceError:
            return
        fits = after.fits(batch_size, budget - nccl)
        helps = (fits and not fitted) or peak - after.peak(batch_size) - nccl >= _MUCH * peak
        if helps and (fits or cards == counts[-1]):
            names = ", ".join(sorted(kind.__name__ for kind in units))
            policy = f"auto_wrap_policy={{{names}}}" if units else ""
            text = f"sharded over {cards} GPUs: strategy=FSDPStrategy({policy}), devices={cards}"
            cost = "GPUs, which wait for one another's parameters in each forward and backward pass"
            yield _Change("sharding", text, cost, lambda after=after: after, nccl=nccl)  # type: ignore[misc]
            return


# --- the samples
_SMALLEST = 16  # pixels or tokens: what measures less is no image and no text, or cannot be halved


def _sample_size(batch: Any) -> tuple[int, ...]:
    """Return the size of images or volumes, or the length of token sequences; empty where a batch has neither.

    >>> _sample_size((torch.zeros(2, 3, 64, 96), torch.zeros(2))), _sample_size({"ids": torch.zeros(2, 128).long()})
    ((64, 96), (128,))
    """
    found = tensors(batch)
    images = [t.shape[2:] for t in found if t.dim() >= 4 and t.is_floating_point()]
    tokens = [t.shape[1:] for t in found if t.dim() == 2 and not t.is_floating_point()]
    size = max(images or tokens, key=lambda size: size.numel(), default=())
    return tuple(size) if size and min(size) >= _SMALLEST else ()


def _with_smaller_samples(job: TracedJob, size: tuple[int, ...], halves: tuple[int, ...]) -> Estimate:
    def cut(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() <= len(size) or tensor.shape[-len(size) :] != size:
            return tensor
        for place, length in enumerate(halves, tensor.dim() - len(halves)):
            tensor = tensor.narrow(place, 0, length)
        return tensor.clone()

    smaller = partial(apply_to_collection, dtype=torch.Tensor, function=cut, allow_frozen=True)
    return job.again(batches=[(k, smaller(batch)) for k, batch in job.batches])


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size)) if len(size) > 1 else f"{size[0]} tokens"


# --- the optimizer
def _with_optimizer(job: TracedJob, change: ChangeOptimizer) -> Estimate:
    if not is_lightning_module(job.module):
        make = job.job.optimizer
        if make is None:
            raise DoesNotApplyError
        return job.again(optimizer=lambda parameters: change(make(parameters)))
    replica = _copied(job)
    if not replica.automatic_optimization:
        raise DoesNotApplyError

    def configure_optimizers() -> list[torch.optim.Optimizer]:
        del replica.__dict__["configure_optimizers"]  # the copy's own, from here on
        return [change(optimizer) for optimizer in configured_optimizers(replica)[0]]

    replica.__dict__["configure_optimizers"] = configure_optimizers
    return job.again(module=replica)


def _fused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return _with_option(optimizer, fused=True, foreach=False)


def _one_by_one(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return _with_option(optimizer, foreach=False)


def _with_option(optimizer: torch.optim.Optimizer, **options: bool) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        if any(name not in group for name in options) or all(group[name] is value for name, value in options.items()):
            raise DoesNotApplyError
        group.update(options)
    return optimizer


def _stateless(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    if isinstance(optimizer, torch.optim.SGD) and not any(group["momentum"] for group in optimizer.param_groups):
        raise DoesNotApplyError
    return torch.optim.SGD([{"params": group["params"]} for group in optimizer.param_groups], lr=1e-3)


_STATES = {torch.optim.Adam: 2, torch.optim.AdamW: 2, torch.optim.SGD: 1}  #: tensors for each parameter


def _in_eight_bits(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    states = _STATES.get(type(optimizer), 0)
    if not states or not all(group.get("momentum", True) for group in optimizer.param_groups):
        raise DoesNotApplyError
    return _EightBit([{"params": group["params"]} for group in optimizer.param_groups], states)


class _EightBit(torch.optim.Optimizer):
    """Allocate what bitsandbytes' 8-bit optimizers do, without their arithmetic, which needs no memory.

    Source: bitsandbytes 0.50, ``optim/optimizer.py``, ``init_state``: a byte for each value and a float32 for 256 of
    them, and float32 where a parameter has less than 4096.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], states: int) -> None:
        super().__init__(groups, {})
        self._states = states
        self._maps: list[torch.Tensor] = []  # from bytes to values: one for each state, shared by all parameters

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self._begin(parameter)
        return value

    def _begin(self, parameter: torch.Tensor) -> None:
        state, size, small = self.state[parameter], parameter.numel(), parameter.numel() < 4096
        if not small and not self._maps:
            self._maps += [torch.zeros(256, device=parameter.device) for _ in range(self._states)]
        for k in range(self._states):
            state[f"state{k}"] = torch.zeros_like(parameter, dtype=torch.float32 if small else torch.uint8)
        for k in range(0 if small else self._states):
            state[f"absmax{k}"] = torch.zeros(-(-size // 256), device=parameter.device)
