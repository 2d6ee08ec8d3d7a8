"""Record what the kernel of an operator allocates, by the rules of one GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch

from lightning_memplan.cuda.kernel_sizes import kernel_bytes
from lightning_memplan.cuda.rule_set import (
    Allocation,
    Call,
    KernelCall,
    Operator,
    Output,
    Outputs,
    Rules,
    Scope,
    Scratch,
    Workspace,
)
from lightning_memplan.memory.events import Category


class Allocate(Protocol):
    """Record a block that is allocated, and return its number; ``rule`` is the kernel's, where its size has one."""

    def __call__(self, size: int, category: Category, func: Operator, rule: tuple[str | int, ...] = ()) -> int: ...


class Free(Protocol):
    """Record a block that is freed."""

    def __call__(self, block: int, func: Operator) -> None: ...


class See(Protocol):
    """Record the block of an output that has none yet; ``itemsize`` replaces the bytes of its elements."""

    def __call__(self, tensor: torch.Tensor, func: Operator, itemsize: int | None = None, /) -> None: ...


class KernelEvents:
    """Record the kernels of operators: their outputs, their scratch memory, and the workspaces of their libraries."""

    def __init__(self, rules: Rules, see: See, allocate: Allocate, free: Free) -> None:
        self.workspaces: Mapping[Operator, Workspace] = rules.workspaces
        self._rules, self._gpu = rules.allocations, rules.gpu
        self._see, self._allocate, self._free = see, allocate, free
        self.kept: set[tuple[str, bool]] = set()  #: workspaces by name, and whether autograd's thread has them

    def record(self, func: Operator, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Record the outputs of one call, and the scratch memory of its kernel."""
        rule = self._rules.get(func)
        if rule is None:
            self.see_outputs(func, out)
        else:
            self._record_scope(rule(Call(args, kwargs, out), self._gpu), func, out)

    def see_outputs(self, func: Operator, out: Any) -> None:
        """Record the outputs alone, one after the other."""
        if isinstance(out, torch.Tensor):
            self._see(out, func)
        elif isinstance(out, (tuple, list)):
            for one in out:
                self.see_outputs(func, one)

    def keep_workspace(self, func: Operator, in_backward: bool) -> None:
        """Record the workspace of the operator's library at its first call in a thread; autograd has its own thread."""
        workspace = self.workspaces.get(func)
        if workspace is None:
            return
        key = workspace.name, in_backward and workspace.of_each_thread
        if key not in self.kept:
            self.kept.add(key)
            self._allocate(workspace.size, "workspaces", func)

    def _record_scope(self, allocations: Iterable[Allocation], func: Operator, out: Any) -> None:
        """Record allocations in their order, and at the end free the scratch memory among them, the last first."""
        blocks = []
        for allocation in allocations:
            match allocation:
                case Scratch(size):
                    blocks.append(self._allocate_scratch(size, func))
                case Outputs():
                    self.see_outputs(func, out)
                case Output(index, itemsize):
                    if isinstance(out[index], torch.Tensor):
                        self._see(out[index], func, itemsize)
                case Scope(inner):
                    self._record_scope(inner, func, out)
        for block in reversed(blocks):
            self._free(block, func)

    def _allocate_scratch(self, size: int | KernelCall, func: Operator) -> int:
        if isinstance(size, KernelCall):
            return self._allocate(kernel_bytes(size.recorded), "temporaries", func, size.recorded)
        return self._allocate(size, "temporaries", func)
