"""Prepare a deep copy of a module: find what a copy would reach, and replace objects that cannot be copied."""

from __future__ import annotations

import collections
import copy
import copyreg
import threading
import traceback
import types
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import SemLock
from types import FunctionType
from typing import Any

import torch
from torch import nn

from lightning_memplan.errors import TraceError

#: A replica shares these with its module: a step uses them, and does not advance them
_SHARED = (
    type(threading.Lock()),
    type(threading.RLock()),
    SemLock,
    types.ModuleType,
    threading.Thread,
    *(getattr(torch, name) for name in ("Stream", "Event") if hasattr(torch, name)),
    *(getattr(torch._C, name) for name in ("_CudaStreamBase", "_CudaEventBase") if hasattr(torch._C, name)),
)

_ATOMIC = (
    *(type(None), type(Ellipsis), type(NotImplemented), bool, int, float, complex, str, bytes, range, type, property),
    *(types.BuiltinFunctionType, types.CodeType, torch.dtype, torch.device),
)

_CONTAINERS = (list, tuple, set, frozenset, collections.deque)

_LATE_FAILURES = 20  #: objects that may refuse only while they are copied


class Uncopied:
    """Stand in a replica for an object of the module that cannot be copied. Any use of it raises a TraceError.

    >>> Uncopied("self.rows", (n for n in range(3)))
    <Uncopied self.rows, of type generator>
    >>> next(Uncopied("self.rows", (n for n in range(3))))
    Traceback (most recent call last):
    ...
    lightning_memplan.errors.TraceError: the step uses self.rows, of type generator, which cannot be copied: make it \
in on_train_epoch_start(), where a replica makes its own
    """

    def __init__(self, path: str, value: object) -> None:
        self.__dict__["_what"] = f"{path}, of type {type(value).__name__}"

    def __repr__(self) -> str:
        return f"<Uncopied {self.__dict__['_what']}>"

    def __bool__(self) -> bool:
        return True

    def __deepcopy__(self, memo: object) -> Uncopied:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TraceError(
            f"the step uses {self.__dict__['_what']}, which cannot be copied: make it in on_train_epoch_start(), "
            "where a replica makes its own",
            reason="not_copyable",
        )

    __call__ = __iter__ = __next__ = __len__ = __getitem__ = __setitem__ = __contains__ = _refuse
    __enter__ = __exit__ = __setattr__ = __delattr__ = _refuse


class _Reference:
    """Stand for a weak reference: it refers to the copy of its object, once there is one."""

    def __init__(self, reference: Callable[[], Any]) -> None:
        self._reference = reference

    def follow(self, memo: dict[int, Any]) -> None:
        """Refer to the copy."""
        copied = memo.get(id(self._reference()))
        if copied is not None:
            self._reference = weakref.ref(copied)

    def __call__(self) -> Any:
        return self._reference()


class Preparation:
    """Prepare ``memo`` for deep copies: what cannot be copied is shared, or gets an ``Uncopied`` in its place.

    ``replace`` may return a replacement for any other object, None for none.

    >>> memo = {}
    >>> numbers, lock = (n for n in range(3)), threading.Lock()
    >>> Preparation(memo).visit({"numbers": numbers, "lock": lock}, "self")
    >>> memo[id(numbers)], memo[id(lock)] is lock
    (<Uncopied self['numbers'], of type generator>, True)
    """

    def __init__(self, memo: dict[int, Any], replace: Callable[[Any], Any] = lambda value: None) -> None:
        self._memo, self._replace = memo, replace
        self._seen: dict[int, tuple[str, Any]] = {}  # path and object, whose id stays its own so
        self._copied_by_themselves: list[tuple[str, Any]] = []
        self._references: list[_Reference] = []
        self.closed_over: list[Any] = []  #: modules and tensors to which a function refers, that are copied as well

    def visit(self, root: Any, name: str) -> None:
        """Prepare the copy of an object that messages call ``name``."""
        stack = [(name, root)]
        while stack:
            path, value = stack.pop()
            if type(value) is FunctionType:
                stack += self._closed_over(path, value)
                continue
            if type(value) in _ATOMIC or isinstance(value, type) or id(value) in self._seen or id(value) in self._memo:
                continue
            self._seen[id(value)] = path, value
            replacement = value if isinstance(value, _SHARED) else self._replace(value)
            if replacement is not None:
                self._memo[id(value)] = replacement
            elif isinstance(value, (weakref.ref, _Reference)):
                self._memo[id(value)] = reference = _Reference(value)
                self._references.append(reference)
            elif not isinstance(value, torch.Tensor):
                stack += self._parts(path, value)

    def copy_by_themselves(self) -> None:
        """Copy objects that have a ``__deepcopy__`` of their own, now that everything else is prepared."""
        for path, value in self._copied_by_themselves:
            before = dict(self._memo)
            try:
                copy.deepcopy(value, self._memo)
            except Exception:  # noqa: BLE001 - whatever a class of the user's raises
                self._memo.clear()
                self._memo.update(before)
                self._memo[id(value)] = Uncopied(path, value)

    def copied(self, root: Any) -> Any:
        """Return a copy of an object, and copy what functions close over. What fails only now is replaced, too."""
        for _ in range(_LATE_FAILURES):
            before = dict(self._memo)
            try:
                made = copy.deepcopy(root, self._memo)
                for value in self.closed_over:
                    copy.deepcopy(value, self._memo)
            except Exception as error:
                value = _refuses_late(error)
                if value is None or value is root:
                    raise
                self._memo.clear()
                self._memo.update(before)
                path, _ = self._seen.setdefault(id(value), ("self", value))
                self._memo[id(value)] = Uncopied(path, value)
            else:
                return made
        raise TypeError(f"more than {_LATE_FAILURES} of its parts cannot be copied")

    def follow_references(self) -> None:
        """Let weak references refer to copies, now that these are there."""
        for reference in self._references:
            reference.follow(self._memo)

    def _closed_over(self, path: str, function: FunctionType) -> Iterator[tuple[str, Any]]:
        """Find modules and tensors on the host to which a function refers, by closure or by default."""
        if id(function) in self._seen:
            return
        self._seen[id(function)] = path, function
        for value in referred(function):
            found = value.__self__ if isinstance(value, types.MethodType) else value
            tensors = [found] if isinstance(found, torch.Tensor) else []
            if isinstance(found, nn.Module):
                tensors = [*found.parameters(), *found.buffers()]
            if tensors and all(tensor.device.type == "cpu" for tensor in tensors):
                self.closed_over.append(found)
                yield path, found
            elif type(found) is FunctionType:
                yield path, found

    def _parts(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        kind = type(value)
        if kind is dict or kind in _CONTAINERS:
            yield from _items(path, value)
        elif isinstance(value, types.MethodType):
            yield path, value.__self__
        elif isinstance(value, (nn.Module, torch.optim.Optimizer)):
            yield from _attributes(path, value.__dict__)
        elif hasattr(kind, "fileno") or hasattr(kind, "__del__"):  # a copy would release what it refers to, at its end
            self._memo[id(value)] = Uncopied(path, value)
        elif hasattr(kind, "__deepcopy__"):
            self._copied_by_themselves.append((path, value))
        else:
            try:
                reducer = copyreg.dispatch_table.get(kind)
                reduced: Any = value.__reduce_ex__(4) if reducer is None else reducer(value)
                if isinstance(kind.__new__, FunctionType) or hasattr(kind, "__setstate__"):  # they may refuse a copy
                    copy.copy(value)
                _check_iterated(reduced)
            except Exception:  # noqa: BLE001 - whatever a class of the user's raises
                self._memo[id(value)] = Uncopied(path, value)
                return
            if isinstance(reduced, tuple):
                self._seen[id(reduced)] = path, reduced  # its parts may be made for it alone
                _, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
                for made in (arguments, list(items or ()), list(pairs or ())):
                    yield from _items(path, made)
                if isinstance(state, dict):
                    yield from _attributes(path, state)
                elif state is not None:
                    yield path, state


def _refuses_late(error: Exception) -> Any:
    """Return the object whose copy failed: the innermost one that is no plain container."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code is copy.deepcopy.__code__:
            value = frame.f_locals.get("x")
            if type(value) not in (dict, *_CONTAINERS):
                found = value
    return found


def _check_iterated(reduced: Any) -> None:
    """Raise for an iterator over another one that cannot be copied (``map`` over a generator)."""
    for iterated in reduced[1] if isinstance(reduced, tuple) else ():
        if hasattr(type(iterated), "__next__"):
            _check_iterated(iterated.__reduce_ex__(4))


def referred(function: FunctionType) -> Iterator[Any]:
    """Yield the values in a function's closure and its defaults."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it is empty as yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()


def _items(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if type(value) is dict:
        for key, item in value.items():
            yield f"{path}[{key!r}]" if type(key) is str else path, item
            yield path, key
    else:
        for item in value:
            if type(item) not in _ATOMIC:
                yield path, item


def _attributes(path: str, own: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, item in own.items():
        if name in ("_modules", "_parameters", "_buffers") and type(item) is dict:
            yield from ((f"{path}.{key}", each) for key, each in item.items())
        else:
            yield f"{path}.{name}", item
