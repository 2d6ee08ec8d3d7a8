"""ZeRO: DeepSpeed's own engine around a copy of the module, where DeepSpeed is installed.

It casts, flattens, partitions, gathers and reduces by itself, in a group of ranks that says nothing. In a trace its
accelerator is a card of which streams are only noted. Each rank makes the optimizer first, as Lightning does, and the
engine takes it over.

Source: deepspeed (0.19): ``runtime/engine.py``, ``runtime/zero/stage_1_and_2.py`` and ``stage3.py``, ``comm/torch.py``;
pytorch_lightning/strategies/deepspeed.py and plugins/precision/deepspeed.py (2.6).
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from lightning_memplan.errors import TraceError
from lightning_memplan.settings import Parallel, Precision
from lightning_memplan.step.context import EventContext, in_place_of
from lightning_memplan.step.fake_cuda import FakeDeviceModule

_HALF: Mapping[str, str] = {"16-mixed": "fp16", "16-true": "fp16", "bf16-mixed": "bf16", "bf16-true": "bf16"}


_NAME = "DeepSpeedStrategy"


def engine_around(
    twin: nn.Module,
    parallel: Parallel,
    optimizers: list[torch.optim.Optimizer],
    device: torch.device,
    mark: EventContext,
    *,
    precision: Precision,
    gradient_clip_val: float | None,
    parts: int,
) -> Any:
    """The engine that trains ``twin``, whose parameters are on the host; in ``silent_engine`` only.

    Raises:
        TraceError: what DeepSpeed is asked for is not modelled; says what.
    """
    if not getattr(twin, "automatic_optimization", True):
        raise TraceError(f"manual optimization with {_NAME} is not modelled")
    if len(optimizers) != 1:
        raise TraceError(f"DeepSpeed takes one optimizer, and configure_optimizers gives {len(optimizers)}")
    config = _config(parallel.arguments, precision, gradient_clip_val, parts)
    mark.category = "parameters"
    if device.type != "cuda":
        own = {"to": partial(_moved, twin)}  # a module's own puts a fake tensor in the place of the other
        own |= {"half": partial(_moved, twin, torch.half), "bfloat16": partial(_moved, twin, torch.bfloat16)}  # 0.16's
        twin.__dict__.update(own)
    engine, *_ = _import("deepspeed").initialize(
        config=config,
        model=twin,
        model_parameters=[p for p in twin.parameters() if p.requires_grad],
        optimizer=optimizers[0],
        dist_init_required=False,
    )
    if device.type != "cuda":
        for name in own:
            del twin.__dict__[name]
        engine.step = partial(_unread, engine.step)
    _label(engine.optimizer, mark)
    return engine


def _config(
    given: Mapping[str, Any], precision: Precision, gradient_clip_val: float | None, parts: int
) -> dict[str, Any]:
    """DeepSpeed's configuration, as Lightning completes it (``DeepSpeedStrategy._format_config``)."""
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
    config.update(gradient_accumulation_steps=parts, train_micro_batch_size_per_gpu=1)
    config.setdefault("gradient_clipping", gradient_clip_val or 0.0)
    if precision in _HALF:
        config.setdefault(_HALF[precision], {"enabled": True})
    return config


_OFFLOADED = ("offload_optimizer", "offload_param")


#: DeepSpeed's own optimizers are kernels that it compiles; the others split a module in other ways than ZeRO
_NOT_MODELLED = ("optimizer", "pipeline", "tensor_parallel", "sequence_parallel_size", "compression_training")


def _moved(module: nn.Module, device: torch.device | torch.dtype) -> None:
    """The module on a device, or its floating-point tensors in a type."""
    for child in module.children():
        _moved(child, device)
    for parameter in module._parameters.values():
        if parameter is not None and (parameter.is_floating_point() or isinstance(device, torch.device)):
            parameter.data = parameter.data.to(device)
    for name, buffer in module._buffers.items():
        if buffer is not None and (buffer.is_floating_point() or isinstance(device, torch.device)):
            module._buffers[name] = buffer.to(device)


def _unread(step: Any) -> None:
    """A step that asks for values, of norms and of what is not finite, and is told 0: a trace has none."""
    read = {name: getattr(torch.Tensor, name) for name in ("item", "__float__", "__bool__")}
    zero = {"item": 0, "__float__": 0.0, "__bool__": False}

    def told(name: str, tensor: torch.Tensor) -> Any:
        return zero[name] if isinstance(tensor, FakeTensor) else read[name](tensor)

    with ExitStack() as stack:
        for name in read:
            stack.enter_context(in_place_of(torch.Tensor, name, lambda tensor, name=name: told(name, tensor)))
        step()


def _label(optimizer: Any, mark: EventContext) -> None:
    """Say what is what of that which the engine has made, and of the buckets that stages 1 and 2 make anew."""
    for state in optimizer.state.values():
        for tensor in state.values():
            mark.label(tensor, "optimizer")
    mark.label(getattr(optimizer, "grad_partitions_flat_buffer", None), "gradients")  # stage 3's
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        mark.label(bucket.buffer, "communication")
    make = getattr(optimizer, "setup_buckets", None)
    if make is None:
        return

    def setup_buckets() -> None:
        mark.category, before = "communication", mark.category
        make()
        mark.category = before

    optimizer.setup_buckets = setup_buckets


def rests_on(parallel: Parallel) -> tuple[str, ...]:
    """A note on what a plan with DeepSpeed rests on."""
    if parallel.kind != "deepspeed":
        return ()
    stage = (parallel.arguments.get("zero_optimization") or {}).get("stage")
    engine = f"ZeRO stage {stage}, as the engine of DeepSpeed {_import('deepspeed').__version__.strip()} runs it"
    return (f"{engine}: where the host runs ahead of the card, it may reserve more",)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise TraceError(f"{_NAME} is traced with DeepSpeed's own engine: pip install 'deepspeed>=0.16'") from error


# -------------------------------------------------------------------------------------------- an engine that is alone
@contextmanager
def silent_engine(device: torch.device, mark: EventContext) -> Iterator[None]:
    """Where an engine can run in one process, in a group that says nothing. All that is changed is put back.

    Raises:
        TraceError: DeepSpeed is not installed.
    """
    _import("deepspeed")
    comm, groups = _import("deepspeed.comm.comm"), _import("deepspeed.utils.groups")
    logger = _import("deepspeed.utils.logging").logger
    with ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(in_place_of(owner, name, value))

        put(comm, "cdb", _backend())
        for name in ("_WORLD_GROUP", "_ZERO_PARAM_INTRA_PARALLEL_GROUP", "mpu"):
            put(groups, name, None)
        put(logger, "disabled", True)
        put(nn.functional, "linear", nn.functional.linear)  # stage 3 puts its own there, and leaves it
        if device.type != "cuda":
            put(_import("deepspeed.accelerator.real_accelerator"), "ds_accelerator", _accelerator(device, mark))
            put(torch.Tensor, "record_stream", lambda *_: None)  # no work is under way on any stream
        utils = _import("deepspeed.runtime.zero.utils")  # what all ranks are asked whether they have alike
        put(utils, "assert_lst_len_same_as_other_ranks", lambda _: None)
        put(utils, "get_lst_from_rank0", list)
        stack.enter_context(_local_rank(device.index or 0))
        stack.callback(_import("deepspeed.utils.debug").debug_clear_module_and_param_names)  # which hold the copy
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
    """DeepSpeed's way to torch.distributed, in whose default group it stays."""
    base: Any = _import("deepspeed.comm.torch").TorchBackend

    class Backend(base):  # type: ignore[misc]
        def new_group(self, ranks: Any) -> Any:
            if len(ranks) != torch.distributed.get_world_size():
                raise TraceError(f"the memory of {_NAME} that talks to some of the ranks only is not modelled")
            return torch.distributed.group.WORLD

    backend = Backend.__new__(Backend)  # without what its constructor compiles and connects to
    backend.shm_comm_op = None
    backend.has_all_reduce_coalesced = backend.has_coalescing_manager = backend.initialized = True
    backend.all_gather_function = Backend.get_all_gather_function()
    backend.reduce_scatter_function = Backend.get_reduce_scatter_function()
    backend.name, backend.using_mpi, backend.single_gpu_mode = "torch", False, True
    return backend


def _accelerator(device: torch.device, mark: EventContext) -> Any:
    """What DeepSpeed asks of a card, where ``device`` stands for one."""
    base: Any = _import("deepspeed.accelerator.cuda_accelerator").CUDA_Accelerator
    card = FakeDeviceModule(device, mark)
    kind: Any = type("Accelerator", (base,), _answers(device, mark, card))
    made = kind.__new__(kind)  # without what its constructor connects to
    made._name, made._communication_backend_name, made._compile_backend = "cuda", "nccl", "inductor"
    return made


def _answers(device: torch.device, mark: EventContext, card: FakeDeviceModule) -> dict[str, Any]:
    """Methods and properties of an accelerator (deepspeed/accelerator/cuda_accelerator.py)."""

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
        "Stream": property(always(card.Stream)),
        "Event": property(always(card.Event)),
        "stream": lambda _, stream: card.stream(stream),
        "current_stream": lambda *_: card.current_stream(),
        "default_stream": lambda *_: card.default_stream(),
        "empty_cache": lambda _: mark.empty_cache(),
        "on_accelerator": lambda _, tensor: tensor.device == device,
        "pin_memory": lambda _, tensor, *__, **___: tensor,
    }
