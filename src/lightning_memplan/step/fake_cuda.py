"""Answer what a traced step asks of ``torch.cuda`` as an idle GPU would, with or without one here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from lightning_memplan.memory.events import Stream
from lightning_memplan.step.context import EventContext, in_place_of

DEVICE = torch.device("cpu", 0)  #: where traced tensors lie: the stand-in for the GPU


class FakeDeviceModule:
    """What FSDP asks of ``torch.cuda``; streams are numbered in the order in which they are made."""

    def __init__(self, device: torch.device, mark: EventContext, made: int = Stream.DEFAULT) -> None:
        self._device, self._mark, self._made = device, mark, made

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:
        return self._device

    def current_stream(self) -> _Stream:
        return _Stream(self._mark.stream)

    def default_stream(self) -> _Stream:
        return _Stream(Stream.DEFAULT)

    def Stream(self, *_: Any, **__: Any) -> _Stream:  # noqa: N802 - torch's name
        self._made += 1
        return _Stream(self._made)

    def Event(self, *_: Any, **__: Any) -> _Event:  # noqa: N802 - torch's name
        return _Event()

    @contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        before, self._mark.stream = self._mark.stream, stream.number
        try:
            yield
        finally:
            self._mark.stream = before


class _Stream:
    def __init__(self, number: int) -> None:
        self.number = number

    def nothing(self, *_: Any) -> None:
        """No work is under way that could be waited for."""

    wait_stream = wait_event = synchronize = nothing

    def query(self) -> bool:
        return True

    def record_event(self, *_: Any) -> _Event:
        return _Event()


class _Event:
    def record(self, *_: Any) -> _Event:
        return self

    def synchronize(self) -> None:
        """No work is under way that could be waited for."""

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
def fake_cuda(mark: EventContext, capability: tuple[int, int]) -> Iterator[None]:
    """``torch.cuda`` as an idle card; what is allocated on a stream is marked with the stream's number."""
    card = FakeDeviceModule(DEVICE, mark, made=Stream.STEP)

    def on(stream: Any) -> AbstractContextManager[None]:
        return nullcontext() if stream is None else card.stream(stream)

    cuda: dict[str, Any] = {
        **dict.fromkeys(_NOTHING, _always(None)),
        **dict.fromkeys(_ZERO, _always(0)),
        "Event": _made_by(card.Event),
        "Stream": _made_by(card.Stream),
        "current_stream": lambda *_, **__: card.current_stream(),
        "default_stream": lambda *_, **__: card.default_stream(),
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
                stack.enter_context(in_place_of(owner, name, answers[name]))
        stack.enter_context(in_place_of(torch.Tensor, "record_stream", _always(None)))
        yield


def _made_by(make: Callable[..., Any]) -> type:
    """A class, which others may ask of things whether they are of it."""
    return type("Made", (), {"__new__": lambda cls, *args, **kwargs: make(*args, **kwargs)})


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value
