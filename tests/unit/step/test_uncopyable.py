"""Objects that a deep copy would refuse, or that it would break: shared, replaced, or copied all the same."""

from __future__ import annotations

import contextvars
import copy
import functools
import itertools
import math
import multiprocessing
import random
import socket
import sqlite3
import tempfile
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_memplan.errors import TraceError
from lightning_memplan.step.module_copy import replicate
from lightning_memplan.step.uncopyable import Preparation, Uncopied

CPU = torch.device("cpu")


def numbers():
    yield from range(10)


class Refuses:
    def __deepcopy__(self, memo):
        raise TypeError("no copies of me")


class RefusesToBeReduced:
    def __reduce_ex__(self, protocol):
        raise RuntimeError("not to be pickled")


SHARED: dict[str, Callable[[], Any]] = {
    "a lock": threading.Lock,
    "a lock that is taken": lambda: _taken(threading.RLock()),
    "a module object": lambda: math,
    "a thread": threading.Thread,
    "a semaphore between processes": multiprocessing.Semaphore,
    "a stream": lambda: torch.Stream(device="cpu"),
}

REPLACED: dict[str, Callable[[], Any]] = {
    "a generator": numbers,
    "a file": tempfile.TemporaryFile,
    "a socket": socket.socket,
    "a cursor": lambda: sqlite3.connect(":memory:").cursor(),
    "a connection": lambda: sqlite3.connect(":memory:"),
    "an end of a pipe": lambda: Pipe()[0],
    "a loader's iterator": lambda: iter(DataLoader(range(4))),  # type: ignore[arg-type]
    "a context variable": lambda: contextvars.ContextVar("name"),
    "an object whose __deepcopy__ raises": Refuses,
    "an object that cannot be pickled": RefusesToBeReduced,
}

COPIED: dict[str, Callable[[], Any]] = {
    "an event": threading.Event,
    "a condition": threading.Condition,
    "a list iterator": lambda: iter([1, 2]),
    "a count": lambda: itertools.count(3),
    "a random state": lambda: random.Random(1),
    "a generator of torch's": torch.Generator,
    "a partial function": lambda: functools.partial(max, 1),
    "a pool of threads": lambda: ThreadPoolExecutor(1),
    "a module in a list": lambda: [nn.Linear(1, 1)],
}


def _taken(lock: Any) -> Any:
    lock.acquire()
    return lock


def nested(kind: int, value: Any) -> Any:
    """Put a value where people keep one: an attribute, a list of dictionaries, a tuple, an object, a submodule."""
    holder = nn.Module()
    holder.inner = value
    return [value, [{"deep": value}], (1, value), {"key": [value]}, holder][kind]


def inner(kind: int, value: Any) -> Any:
    return [lambda v: v, lambda v: v[0]["deep"], lambda v: v[1], lambda v: v["key"][0], lambda v: v.inner][kind](value)


def replica_with(value: Any) -> nn.Module:
    net = nn.Linear(2, 1)
    net.own = value
    return replicate(net, {}, trainer=None, device=CPU)


@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize("name", SHARED)
def test_what_a_step_cannot_advance_is_shared(name, kind):
    value = SHARED[name]()
    assert inner(kind, replica_with(nested(kind, value)).own) is value


@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize("name", REPLACED)
def test_what_cannot_be_copied_is_replaced_and_its_use_is_an_error(name, kind):
    value = REPLACED[name]()
    found = inner(kind, replica_with(nested(kind, value)).own)
    assert isinstance(found, Uncopied)
    with pytest.raises(TraceError, match=rf"the step uses self\.own.*, of type {type(value).__name__}") as error:
        found.read()
    assert error.value.reason == "not_copyable"
    if hasattr(value, "close"):
        value.close()


@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize("name", COPIED)
def test_what_can_be_copied_is_copied(name, kind):
    value = COPIED[name]()
    found = inner(kind, replica_with(nested(kind, value)).own)
    assert found is not value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "use",
    [next, iter, len, list, lambda it: it(), lambda it: it[0], lambda it: 1 in it, lambda it: it.__enter__()],
)
def test_every_use_of_a_stand_in_is_an_error(use):
    with pytest.raises(TraceError, match=r"make it in on_train_epoch_start\(\)"):
        use(Uncopied("self.file", numbers()))


def test_a_stand_in_is_true_and_its_own_copy():
    stand_in = Uncopied("self.file", numbers())
    assert stand_in
    assert copy.deepcopy(stand_in) is stand_in
    assert not hasattr(stand_in, "__array__")


def test_a_weak_reference_refers_to_the_copy():
    net = nn.Sequential(nn.Linear(2, 1))
    net[0].owner = weakref.ref(net)
    replica = replicate(net, {}, trainer=None, device=CPU)
    assert net[0].owner() is net
    assert replica[0].owner() is replica
    again = replicate(replica, {}, trainer=None, device=CPU)
    assert again[0].owner() is again


def test_objects_that_are_referred_to_twice_are_copied_once():
    shared = {"lock": threading.Lock(), "numbers": [1, 2]}
    replica = replica_with([shared, shared])
    assert replica.own[0] is replica.own[1]
    assert replica.own[0] is not shared


def test_preparing_consumes_nothing():
    values, made = iter([1, 2, 3]), numbers()
    Preparation({}).visit([values, made], "self")
    assert (next(values), next(made)) == (1, 0)


def test_a_copy_of_a_pipe_does_not_close_it():
    ours, theirs = Pipe()
    replica = replica_with(ours)
    del replica
    ours.send("still open")
    assert theirs.recv() == "still open"


def test_a_copy_that_fails_half_way_leaves_nothing_behind():
    class HalfWay:
        def __init__(self, other):
            self.other = other

        def __deepcopy__(self, memo):
            copy.deepcopy(self.other, memo)
            raise TypeError("no copies of me")

    shared = [1, 2]
    replica = replica_with([HalfWay(shared), shared])
    assert isinstance(replica.own[0], Uncopied)
    assert replica.own[1] == [1, 2]
    assert replica.own[1] is not shared


def test_a_module_that_a_function_closes_over_is_copied():
    teacher = nn.Linear(2, 1)
    replica = replica_with(lambda x: teacher.to("meta")(x))
    with pytest.raises(RuntimeError, match="on device meta"):
        replica.own(torch.zeros(1, 2))
    assert teacher.weight.device == CPU  # it was the copy that moved


def test_a_module_that_is_a_default_argument_is_the_replica():
    net = nn.Linear(2, 1)
    net.own = lambda x, module=net, *, also=net: (module, also)
    replica = replicate(net, {}, trainer=None, device=CPU)
    assert replica.own(None) == (replica, replica)
    assert net.own(None) == (net, net)


def test_an_iterator_over_what_cannot_be_copied_is_replaced():
    assert isinstance(replica_with(map(int, numbers())).own, Uncopied)


def test_classes_of_any_kind_and_handles_of_hooks_are_kept():
    class WithArguments:
        def __new__(cls, value):
            return super().__new__(cls)

        def __init__(self, value):
            self.value = value

    handle = nn.Linear(2, 2).register_forward_hook(lambda *_: None)  # of a module that is gone
    found = replica_with([Refuses, contextvars.Context, handle, WithArguments(1)]).own
    assert found[:2] == [Refuses, contextvars.Context]
    assert isinstance(found[3], Uncopied)


def test_an_object_that_releases_something_at_its_end_is_not_copied():
    released = []

    class Handle:
        def __del__(self):
            released.append(1)

    handle = Handle()
    replica = replica_with([handle])
    assert isinstance(replica.own[0], Uncopied)
    del replica
    assert released == []


def test_what_refuses_only_when_it_is_copied_is_replaced():
    class Wrapper:  # as tempfile's wrap a file
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.__dict__["inner"], name)

    replica = replica_with({"wrapped": Wrapper(1), "list": [1]})
    assert isinstance(replica.own["wrapped"], Uncopied)
    assert replica.own["list"] == [1]
    with pytest.raises(TraceError, match=r"the step uses self\.own\['wrapped'\], of type Wrapper"):
        replica.own["wrapped"].read()
