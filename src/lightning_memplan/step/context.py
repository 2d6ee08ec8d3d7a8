"""Record where a step is: phase, category, module path."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from lightning_memplan.memory.events import Category


class HasPath(Protocol):
    """What is told which submodule is running."""

    path: str


@contextmanager
def module_paths(
    module: torch.nn.Module, recorder: HasPath, without: Collection[torch.nn.Module] = ()
) -> Iterator[None]:
    """Stamp events with the dotted name of the submodule whose forward is running; of none of those ``without``."""
    stack: list[str] = []
    handles = []
    for path, child in module.named_modules():
        if child in without:
            continue

        def enter(_: Any, __: Any, path: str = path) -> None:
            stack.append(recorder.path)
            recorder.path = path

        def leave(_: Any, __: Any, ___: Any) -> None:
            recorder.path = stack.pop() if stack else ""

        handles.append(child.register_forward_pre_hook(enter))
        # whatever is raised: checkpointing stops a recomputation by an exception, when it has what it needs
        handles.append(child.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class EventContext(Protocol):
    """What is told which kind of memory is taken from here on, and on which stream."""

    category: Category
    stream: int

    def empty_cache(self) -> None: ...

    def label(self, tensor: Any, category: Category) -> None: ...


@contextmanager
def in_place_of(owner: Any, name: str, other: Any) -> Iterator[None]:
    """``owner`` has ``other`` by that name, until what it had is put back."""
    own, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, other)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)
