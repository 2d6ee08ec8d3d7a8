"""Find the parts of a module that ``torch.compile`` compiles."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

#: Batch sizes of traces: which tensors a graph saves depends on their sizes, and differs for a few samples
COMPILED_SIZES = (16, 24, 40)


class Part(NamedTuple):
    """A compiled function: the attribute ``name`` of ``owner``, or the global of that name that a method calls."""

    owner: nn.Module
    name: str
    compiled: Any
    method: str = ""  #: the method of ``owner`` that calls it, if it is a global

    @property
    def function(self) -> Callable[..., Any]:
        """The function as it is written."""
        function: Any = self.compiled._torchdynamo_orig_callable
        if self.method or self.name in self.owner.__dict__:
            return function  # type: ignore[no-any-return]
        return MethodType(function, self.owner)

    @property
    def modules(self) -> list[nn.Module]:
        """The modules whose parameters the function reads."""
        return list(_modules(self.function))


def _modules(value: Any) -> Iterator[nn.Module]:
    """Find the module that a function is a method of, and those in its closure."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, MethodType):
        yield from _modules(value.__self__)
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # nothing in it yet
                yield from _modules(cell.cell_contents)


def compiled_parts(module: nn.Module) -> list[Part]:
    """Find what is compiled of a module: itself, its submodules, their methods, functions that are their attributes,
    and global functions that their methods call."""
    if "torch._dynamo" not in sys.modules:
        return []
    found = []
    for child in module.modules():
        own = child.__dict__
        found += [Part(child, name, value) for name, value in own.items() if _is_compiled(value)]
        seen = set(own)
        for kind in type(child).__mro__[: type(child).__mro__.index(nn.Module)]:
            for name, value in vars(kind).items():
                if name in seen or not isinstance(value, FunctionType):
                    continue
                seen.add(name)
                if _is_compiled(value):
                    found.append(Part(child, name, value))
                elif (value.__module__ or "").partition(".")[0] not in _LIBRARIES:
                    named = {n: value.__globals__.get(n) for n in _names(value.__code__)}
                    found += [Part(child, n, one, name) for n, one in named.items() if _is_compiled(one)]
    return found


def _is_compiled(value: Any) -> bool:
    return (
        isinstance(value, FunctionType)
        and hasattr(value, "_torchdynamo_orig_callable")
        and not hasattr(value, "_torchdynamo_disable")
    )


def _names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(one) for one in code.co_consts if isinstance(one, CodeType)))


_LIBRARIES = ("torch", "pytorch_lightning", "lightning", "lightning_fabric")


TRIED = "the first step may take more than a probe shows, since torch.compile tries out kernels in it"


def within_graphs(module: nn.Module) -> set[nn.Module]:
    """Find the modules that run inside compiled functions, where a hook would be compiled too, or break a graph."""
    return {inner for part in compiled_parts(module) for one in part.modules for inner in one.modules()}


def forget_compiled() -> None:
    """Reset torch.compile, so that it compiles for the next batch size alone.

    It compiles for any size once it has seen a second one. And the module itself would run what was compiled for a
    replica, since both have the same code objects.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]:
        torch.compiler.reset()


@contextmanager
def as_written() -> Iterator[None]:
    """Run compiled functions as they are written."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
