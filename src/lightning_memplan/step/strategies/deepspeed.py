"""Partition with ZeRO: DeepSpeed's own engine around a replica, where DeepSpeed is installed.

The engine casts, flattens, partitions, gathers and reduces by itself, in a fake process group. In a trace its
accelerator is a fake GPU, whose streams are only recorded. Each rank makes the optimizer first, as Lightning does, and
the engine takes it over.

Source: deepspeed (0.19): ``runtime/engine.py``, ``runtime/zero/stage_1_and_2.py`` and ``stage3.py``, ``comm/torch.py``;
pytorch_lightning/strategies/deepspeed.py and plugins/precision/deepspeed.py (2.6).
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from lightning_memplan.errors import TraceError
from lightning_memplan.memory.events import Event
from lightning_memplan.settings import Precision, StepSettings
from lightning_memplan.step.backend import StepBackend
from lightning_memplan.step.context import EventContext
from lightning_memplan.step.fake_cuda import FakeDeviceModule
from lightning_memplan.step.patch import patched
from lightning_memplan.step.precision import AUTOCAST_DTYPE
from lightning_memplan.step.setup import traced_microbatches
from lightning_memplan.step.strategies.base import Configure
from lightning_memplan.step.strategies.sharding import ShardingStrategy

_HALF: Mapping[str, str] = {"16-mixed": "fp16", "16-true": "fp16", "bf16-mixed": "bf16", "bf16-true": "bf16"}


_NAME = "DeepSpeedStrategy"


class DeepSpeedStrategy(ShardingStrategy):
    """Let DeepSpeed's engine train the replica: it is the wrapper, and it steps by itself."""

    def _enter(self, stack: ExitStack, backend: StepBackend) -> None:
        stack.enter_context(_fake_engine(backend.device, backend.context))
        super()._enter(stack, backend)

    def setup(
        self, replica: nn.Module, backend: StepBackend, settings: StepSettings, configure: Configure
    ) -> list[torch.optim.Optimizer]:
        backend.context.update(category="optimizer", path="")
        optimizers = configure()
        if not getattr(replica, "automatic_optimization", True):
            raise TraceError(f"manual optimization with {_NAME} is not modelled")
        if len(optimizers) != 1:
            raise TraceError(f"DeepSpeed takes one optimizer, and configure_optimizers gives {len(optimizers)}")
        config = _config(self.parallel.arguments, settings)
        backend.context.update(category="parameters")
        self.wrapper = self.engine = _make_engine(replica, optimizers[0], config, is_gpu=backend.is_gpu)
        _label(self.engine.optimizer, backend.context)
        return [self.engine.optimizer]

    def release(self, backend: StepBackend) -> None:
        if backend.is_gpu:
            self.engine.destroy()  # its hooks would hold the replica, and the replica the GPU's memory

    def forward_context(self, precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext()  # the parameters are in half precision, and so is the batch

    def input_dtype(self, precision: Precision) -> torch.dtype | None:
        return super().input_dtype(precision) or AUTOCAST_DTYPE.get(precision)  # DeepSpeedPrecision.convert_input

    def normalize(self, loss: torch.Tensor, microbatches: int) -> torch.Tensor:
        return loss  # the engine divides it

    def scales_loss(self, precision: Precision) -> bool:
        return False  # the engine scales it

    def notes(self, events: Sequence[Event]) -> tuple[str, ...]:
        """Say which engine was traced."""
        stage = (self.parallel.arguments.get("zero_optimization") or {}).get("stage")
        engine = f"ZeRO stage {stage}, as the engine of DeepSpeed {_import('deepspeed').__version__.strip()} runs it"
        return (f"{engine}: where the host runs ahead of the GPU, it may reserve more",)


def _make_engine(replica: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], *, is_gpu: bool) -> Any:
    """Return the engine that trains ``replica``, whose parameters are on the host; in ``_fake_engine`` only."""
    own: dict[str, Any] = {}
    if not is_gpu:
        own = {"to": partial(_move, replica)}  # Module.to would replace a fake tensor by another
        own["half"] = partial(_move, replica, torch.half)  # DeepSpeed 0.16 calls this and the next
        own["bfloat16"] = partial(_move, replica, torch.bfloat16)
        replica.__dict__.update(own)
    engine, *_ = _import("deepspeed").initialize(
        config=config,
        model=replica,
        model_parameters=[p for p in replica.parameters() if p.requires_grad],
        optimizer=optimizer,
        dist_init_required=False,
    )
    for name in own:
        del replica.__dict__[name]
    if not is_gpu:
        engine.step = partial(_step_without_values, engine.step)
    return engine


def _config(given: Mapping[str, Any], settings: StepSettings) -> dict[str, Any]:
    """Complete DeepSpeed's configuration as Lightning does (``DeepSpeedStrategy._format_config``).

    Raises:
        TraceError: it asks for what is not modelled.
    """
    precision = settings.precision
    zero = given.get("zero_optimization") or {}
    named = [name for name in _OFFLOADED if (zero.get(name) or {}).get("device", "none") != "none"]
    named += [f"{name!r} of DeepSpeed's configuration" for name in _NOT_MODELLED if given.get(name)]
    if zero.get("stage", 0) not in (1, 2, 3):
        named.append(f"stage {zero.get('stage', 0)}")
    if named:
        raise TraceError(f"the memory of {_NAME} with {', '.join(named)} is not modelled: plan without it")
    if precision != "32-true" and precision not in _HALF:
        raise TraceError(f"DeepSpeed does not train in precision {precision!r}")
    config = copy.deepcopy(dict(given))
    config.pop("train_batch_size", None)
    config.update(gradient_accumulation_steps=traced_microbatches(settings), train_micro_batch_size_per_gpu=1)
    config.setdefault("gradient_clipping", settings.gradient_clip_val or 0.0)
    if precision in _HALF:
        config.setdefault(_HALF[precision], {"enabled": True})
    return config


_OFFLOADED = ("offload_optimizer", "offload_param")


#: DeepSpeed's own optimizers are kernels that it compiles; the others split a module in other ways than ZeRO
_NOT_MODELLED = ("optimizer", "pipeline", "tensor_parallel", "sequence_parallel_size", "compression_training")


def _move(module: nn.Module, to: torch.device | torch.dtype) -> None:
    """Move the module to a device, or its floating-point tensors to a type, in place."""
    for child in module.children():
        _move(child, to)
    for parameter in module._parameters.values():
        if parameter is not None and (parameter.is_floating_point() or isinstance(to, torch.device)):
            parameter.data = parameter.data.to(to)
    for name, buffer in module._buffers.items():
        if buffer is not None and (buffer.is_floating_point() or isinstance(to, torch.device)):
            module._buffers[name] = buffer.to(to)


def _step_without_values(step: Callable[[], None]) -> None:
    """Answer 0 where the engine's step reads values (of norms, of what is not finite): fake tensors have none."""
    read = {name: getattr(torch.Tensor, name) for name in ("item", "__float__", "__bool__")}
    zero = {"item": 0, "__float__": 0.0, "__bool__": False}

    def answer(name: str, tensor: torch.Tensor) -> Any:
        return zero[name] if isinstance(tensor, FakeTensor) else read[name](tensor)

    with ExitStack() as stack:
        for name in read:
            stack.enter_context(patched(torch.Tensor, name, lambda tensor, name=name: answer(name, tensor)))
        step()


def _label(optimizer: Any, context: EventContext) -> None:
    """Correct the categories of what the engine has made, and of the buckets that stages 1 and 2 make in every step."""
    for state in optimizer.state.values():
        for tensor in state.values():
            context.label(tensor, "optimizer")
    context.label(getattr(optimizer, "grad_partitions_flat_buffer", None), "gradients")  # stage 3's
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        context.label(bucket.buffer, "communication")
    make = getattr(optimizer, "setup_buckets", None)
    if make is None:
        return

    def setup_buckets() -> None:
        with context.within("communication"):
            make()

    optimizer.setup_buckets = setup_buckets


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise TraceError(f"{_NAME} is traced with DeepSpeed's own engine: pip install 'deepspeed>=0.16'") from error


@contextmanager
def _fake_engine(device: torch.device, context: EventContext) -> Iterator[None]:
    """Let an engine run in one process, in a fake process group. All that is patched is restored afterwards.

    Raises:
        TraceError: DeepSpeed is not installed.
    """
    _import("deepspeed")
    comm, groups = _import("deepspeed.comm.comm"), _import("deepspeed.utils.groups")
    logger = _import("deepspeed.utils.logging").logger
    with ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(patched(owner, name, value))

        patch(comm, "cdb", _backend())
        for name in ("_WORLD_GROUP", "_ZERO_PARAM_INTRA_PARALLEL_GROUP", "mpu"):
            patch(groups, name, None)
        patch(logger, "disabled", True)
        patch(nn.functional, "linear", nn.functional.linear)  # stage 3 leaves its own there
        if device.type != "cuda":
            patch(_import("deepspeed.accelerator.real_accelerator"), "ds_accelerator", _accelerator(device, context))
            patch(torch.Tensor, "record_stream", lambda *_: None)  # no stream has work
        utils = _import("deepspeed.runtime.zero.utils")  # it compares lists across ranks
        patch(utils, "assert_lst_len_same_as_other_ranks", lambda _: None)
        patch(utils, "get_lst_from_rank0", list)
        stack.enter_context(_local_rank(device.index or 0))
        stack.callback(_import("deepspeed.utils.debug").debug_clear_module_and_param_names)  # they hold the replica
        yield


@contextmanager
def _local_rank(rank: int) -> Iterator[None]:
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        yield
    finally:
        with suppress(KeyError):
            del os.environ["LOCAL_RANK"]
        if before is not None:
            os.environ["LOCAL_RANK"] = before


def _backend() -> Any:
    """Return DeepSpeed's way to torch.distributed, kept to the default group."""
    base: Any = _import("deepspeed.comm.torch").TorchBackend

    class Backend(base):  # type: ignore[misc]
        def new_group(self, ranks: Any) -> Any:
            if len(ranks) != torch.distributed.get_world_size():
                raise TraceError(f"the memory of {_NAME} that talks to some of the ranks only is not modelled")
            return torch.distributed.group.WORLD

    backend = Backend.__new__(Backend)  # its constructor would compile, and connect
    backend.shm_comm_op = None
    backend.has_all_reduce_coalesced = backend.has_coalescing_manager = backend.initialized = True
    backend.all_gather_function = Backend.get_all_gather_function()
    backend.reduce_scatter_function = Backend.get_reduce_scatter_function()
    backend.name, backend.using_mpi, backend.single_gpu_mode = "torch", False, True
    return backend


def _accelerator(device: torch.device, context: EventContext) -> Any:
    """Return the accelerator that DeepSpeed asks, where ``device`` stands for a GPU."""
    base: Any = _import("deepspeed.accelerator.cuda_accelerator").CUDA_Accelerator
    cuda = FakeDeviceModule(device, context)
    kind: Any = type("Accelerator", (base,), _answers(device, context, cuda))
    made = kind.__new__(kind)  # its constructor would connect
    made._name, made._communication_backend_name, made._compile_backend = "cuda", "nccl", "inductor"
    return made


def _answers(device: torch.device, context: EventContext, cuda: FakeDeviceModule) -> dict[str, Any]:
    """Return the methods and properties of the accelerator (deepspeed/accelerator/cuda_accelerator.py)."""

    def always(value: Any) -> Any:
        return lambda *_, **__: value

    def tensor_of(dtype: torch.dtype) -> Any:
        return property(always(partial(torch.tensor, dtype=dtype, device=device)))

    dtypes = {"BFloat16": torch.bfloat16, "Half": torch.half, "Float": torch.float, "Double": torch.double}
    dtypes |= {"Byte": torch.uint8, "Int": torch.int, "Long": torch.long}
    bytes_of = ("allocated", "cached", "reserved")
    counters = [f"{what}memory_{of}" for what in ("", "max_", "reset_max_") for of in bytes_of]
    counters.append("reset_peak_memory_stats")
    return {
        **dict.fromkeys(("device_name", "current_device_name"), always(str(device))),
        **dict.fromkeys(("set_device", "synchronize", "range_push", "range_pop"), always(None)),
        **dict.fromkeys(("is_available", "is_bf16_supported", "is_fp16_supported"), always(True)),
        **dict.fromkeys(("is_triton_supported", "is_pinned"), always(False)),
        **dict.fromkeys(("total_memory", "available_memory"), always(2**60)),
        **dict.fromkeys(counters, always(0)),
        **{f"{name}Tensor": tensor_of(dtype) for name, dtype in dtypes.items()},
        "device": always(device),
        "current_device": always(0),
        "device_count": always(1),
        "memory_stats": always({}),
        "Stream": property(always(cuda.Stream)),
        "Event": property(always(cuda.Event)),
        "stream": lambda _, stream: cuda.stream(stream),
        "current_stream": lambda *_: cuda.current_stream(),
        "default_stream": lambda *_: cuda.default_stream(),
        "empty_cache": lambda _: context.empty_cache(),
        "on_accelerator": lambda _, tensor: tensor.device == device,
        "pin_memory": lambda _, tensor, *__, **___: tensor,
    }
