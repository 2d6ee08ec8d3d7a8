"""Say where a step is: its phase, the kind of memory it takes, the submodule that runs, the stream."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_memplan.memory.events import Category, Phase, Stream


class EventContext:
    """The place of a step. A recorder stamps its events with this.

    Steps move on with ``update``, never by assignment: a recorder may have to note the move.

    >>> context = EventContext()
    >>> context.update(phase="forward", category="activations")
    >>> with context.within(category="communication"):
    ...     context.category
    'communication'
    >>> context.phase, context.category, context.path
    ('forward', 'activations', '')
    """

    phase: Phase = "setup"
    category: Category = "other"
    path: str = ""  #: dotted name of the submodule whose forward is running
    step: int = 0  #: 0 before training, then the number of the batch
    stream: int = Stream.DEFAULT
    lengths_taken: int = 0  #: how many results were as long as values say, and were taken at their longest

    def update(
        self,
        *,
        phase: Phase | None = None,
        category: Category | None = None,
        path: str | None = None,
        step: int | None = None,
        stream: int | None = None,
    ) -> None:
        """Move on: what is given holds from here on, the rest stays."""
        self.phase = self.phase if phase is None else phase
        self.category = self.category if category is None else category
        self.path = self.path if path is None else path
        self.step = self.step if step is None else step
        self.stream = self.stream if stream is None else stream

    @contextmanager
    def within(self, category: Category) -> Iterator[None]:
        """Take memory of another category for a while."""
        before = self.category
        self.update(category=category)
        try:
            yield
        finally:
            self.update(category=before)

    @contextmanager
    def on_stream(self, stream: int) -> Iterator[None]:
        """Take memory on another stream for a while."""
        before = self.stream
        self.update(stream=stream)
        try:
            yield
        finally:
            self.update(stream=before)

    def empty_cache(self) -> None:
        """Give the allocator's cache back to the GPU, or record that this happens."""

    def label(self, tensor: Any, category: Category) -> None:
        """Correct the category of a tensor that was made before, where the recorder can."""


@contextmanager
def module_paths(
    module: torch.nn.Module, context: EventContext, without: Collection[torch.nn.Module] = ()
) -> Iterator[None]:
    """Tell ``context`` the dotted name of the submodule whose forward is running, except for those ``without``."""
    stack: list[str] = []
    handles = []
    for path, child in module.named_modules():
        if child in without or isinstance(child, torch.jit.ScriptModule):  # TorchScript takes no hooks
            continue

        def enter(_: Any, __: Any, path: str = path) -> None:
            if torch.compiler.is_compiling():  # what is compiled now runs without this hook
                return
            stack.append(context.path)
            context.update(path=path)

        def leave(_: Any, __: Any, ___: Any) -> None:
            if torch.compiler.is_compiling():
                return
            context.update(path=stack.pop() if stack else "")

        handles.append(child.register_forward_pre_hook(enter))
        # always_call: checkpointing ends a recomputation by an exception, once it has what it needs
        handles.append(child.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
