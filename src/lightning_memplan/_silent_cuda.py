"""What a traced step asks of ``torch.cuda``: an idle card answers, whether there is one here or not.

So a step that waits, times itself, works on streams of its own or logs what is allocated runs on a machine without a
card, and on one that has a card it resets no peak, empties no cache and waits for nothing.

Source: torch/cuda/__init__.py, memory.py, streams.py and nvtx.py (2.11 to 2.14).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from lightning_memplan._record import DEVICE
from lightning_memplan._shards import Mark, NotedCard, in_place_of

FIRST = 2**10  #: the number of the first stream that a step makes: those of wrappers are lower


_NOTHING = """
    synchronize empty_cache ipc_collect init set_device manual_seed manual_seed_all
    reset_peak_memory_stats reset_accumulated_memory_stats reset_max_memory_allocated reset_max_memory_cached
""".split()


_ZERO = """
    memory_allocated max_memory_allocated memory_reserved max_memory_reserved memory_cached max_memory_cached
    current_device utilization memory_usage temperature power_draw clock_rate
""".split()


@contextmanager
def silent_cuda(mark: Mark, capability: tuple[int, int]) -> Iterator[None]:
    """``torch.cuda`` as an idle card; what is allocated on a stream is marked with the stream's number."""
    card = NotedCard(DEVICE, mark, made=FIRST)

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
