"""Answer what a traced step asks of ``torch.cuda`` as an idle GPU would, whether this machine has one or not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from lightning_memplan.memory.events import Stream
from lightning_memplan.step.context import EventContext
from lightning_memplan.step.patch import patched

DEVICE = torch.device("cpu", 0)  #: stands for the GPU: traced tensors lie on it


class FakeDeviceModule:
    """Stand for ``torch.cuda``. Streams are numbered in the order in which they are made, after ``streams`` others."""

    def __init__(self, device: torch.device, context: EventContext, streams: int = Stream.DEFAULT) -> None:
        self._device, self._context, self._streams = device, context, streams

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:
        return self._device

    def current_stream(self) -> _Stream:
        return _Stream(self._context.stream)

    def default_stream(self) -> _Stream:
        return _Stream(Stream.DEFAULT)

    def Stream(self, *_: Any, **__: Any) -> _Stream:  # noqa: N802 - torch's name
        self._streams += 1
        return _Stream(self._streams)

    def Event(self, *_: Any, **__: Any) -> _Event:  # noqa: N802 - torch's name
        return _Event()

    def stream(self, stream: _Stream) -> AbstractContextManager[None]:
        return self._context.on_stream(stream.number)


class _Stream:
    """A stream without work: nothing on it has to be waited for."""

    def __init__(self, number: int) -> None:
        self.number = number

    def wait(self, *_: Any) -> None:
        """Return at once."""

    wait_stream = wait_event = synchronize = wait

    def query(self) -> bool:
        return True

    def record_event(self, *_: Any) -> _Event:
        return _Event()


class _Event:
    """An event that has happened."""

    def record(self, *_: Any) -> _Event:
        return self

    def synchronize(self) -> None:
        """Return at once."""

    wait = record

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: object) -> float:
        return 0.0


_NOTHING = """
    synchronize empty_cache ipc_collect init set_device manual_seed manual_seed_all
    reset_peak_memory_stats reset_accumulated_memory_stats reset_max_memory_allocated reset_max_memory_cached
""".split()


_ZERO = """
    memory_allocated max_memory_allocated memory_reserved max_memory_reserved memory_cached max_memory_cached
    current_device utilization memory_usage temperature power_draw clock_rate
""".split()


@contextmanager
def fake_cuda(context: EventContext, capability: tuple[int, int]) -> Iterator[None]:
    """Let ``torch.cuda`` be an idle GPU. What is allocated on a stream is recorded with the stream's number."""
    device = FakeDeviceModule(DEVICE, context, streams=Stream.STEP)

    def on(stream: Any) -> AbstractContextManager[None]:
        return nullcontext() if stream is None else device.stream(stream)

    cuda: dict[str, Any] = {
        **dict.fromkeys(_NOTHING, _always(None)),
        **dict.fromkeys(_ZERO, _always(0)),
        "Event": _made_by(device.Event),
        "Stream": _made_by(device.Stream),
        "current_stream": lambda *_, **__: device.current_stream(),
        "default_stream": lambda *_, **__: device.default_stream(),
        "get_device_capability": _always(capability),
        "mem_get_info": _always((2**40, 2**40)),
        "memory_stats": lambda *_, **__: defaultdict(int),
        "memory_summary": _always(""),
        "stream": on,
    }
    nvtx = {"mark": _always(None), "range_pop": _always(0), "range_push": _always(0)}
    with ExitStack() as stack:
        for owner, answers in ((torch.cuda, cuda), (torch.cuda.memory, cuda), (torch.cuda.nvtx, nvtx)):
            for name in answers.keys() & vars(owner).keys():
                stack.enter_context(patched(owner, name, answers[name]))
        stack.enter_context(patched(torch.Tensor, "record_stream", _always(None)))
        yield


def _made_by(make: Callable[..., Any]) -> type:
    """Return a class of that constructor, since ``isinstance`` may be asked of it."""
    return type("Made", (), {"__new__": lambda cls, *args, **kwargs: make(*args, **kwargs)})


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value
