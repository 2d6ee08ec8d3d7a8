"""Modules that hold objects which cannot be deep-copied, or of which a copy is another thing."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextvars
import ctypes
import logging
import math
import mmap
import multiprocessing
import queue
import random
import re
import socket
import sqlite3
import tempfile
import threading
import types
import weakref
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.robustness.job import Net, Rows, job

SHARED = "locks, streams, events, module objects"
STAND_INS = "files, sockets, cursors, iterators, generators"
COPIES = "other objects, some of which refuse to be copied"


class Holds(Net):
    """Keeps a thing, and uses it in each step."""

    def __init__(self, thing: Any, use: Callable[[Any], Any]) -> None:
        super().__init__()
        self.thing, self.use = thing, use

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.use(self.thing)
        return super().training_step(batch, batch_idx)


def held(kind: str, name: str, thing: Callable[[], Any], use: Callable[[Any], Any] = id) -> None:
    job(kind, name=name)(lambda: Holds(thing(), use))


def entered(thing: Any) -> None:
    with thing:
        pass


def file_of_numbers() -> Any:
    file = tempfile.TemporaryFile("w+")  # noqa: SIM115 - the module keeps it open
    file.writelines(f"{n}\n" for n in range(1000))
    file.seek(0)
    return file


def cursor() -> sqlite3.Cursor:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table t (n)")
    connection.executemany("insert into t values (?)", [(n,) for n in range(1000)])
    return connection.execute("select n from t")


def mapped_file() -> mmap.mmap:
    mapped = mmap.mmap(-1, 4096)
    mapped.write(b"abc")
    return mapped


def zip_file() -> zipfile.ZipFile:
    archive = zipfile.ZipFile(tempfile.TemporaryFile(), "w")  # noqa: SIM115 - the module keeps it open
    archive.writestr("a.txt", "text")
    return archive


class RefusesCopies:
    value = 1.0

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("there is one of me")


class RefusesPickling:
    value = 1.0

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotImplementedError("not over the wire")


class ComparedByIdentity:
    """Registered by identity, as handles of native libraries are."""

    known: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.known.add(self)

    def check(self) -> None:
        if not any(each is self for each in self.known):
            raise ValueError("an unknown handle")


class Point(ctypes.Structure):
    _fields_ = (("x", ctypes.c_double), ("next", ctypes.c_void_p))


held(SHARED, "lock", threading.Lock, entered)
held(SHARED, "reentrant_lock", threading.RLock, entered)
held(SHARED, "condition", threading.Condition, entered)
held(SHARED, "semaphore_of_processes", lambda: multiprocessing.get_context("spawn").Semaphore(), entered)
held(SHARED, "event_of_threads", threading.Event, lambda event: event.is_set())
held(SHARED, "locks_in_a_dictionary", lambda: {"a": [threading.Lock()]}, lambda locks: entered(locks["a"][0]))
held(SHARED, "module_objects", lambda: (math, np), lambda modules: modules[0].sqrt(2))
held(SHARED, "cuda_stream", torch.cuda.Stream, lambda stream: stream.wait_stream(torch.cuda.current_stream()))
held(SHARED, "cuda_events", lambda: [torch.cuda.Event(enable_timing=True)], lambda events: events[0].record())
held(SHARED, "thread_local_storage", threading.local, lambda own: setattr(own, "last", 1))
held(SHARED, "context_variable", lambda: contextvars.ContextVar("v", default=1), lambda var: var.get())
held(SHARED, "logger_of_its_own", lambda: logging.getLogger("robust"), lambda log: log.debug("a step"))
held(SHARED, "file_handler", lambda: logging.FileHandler("steps.log"), lambda handler: handler.format)

held(STAND_INS, "open_file_read", file_of_numbers, lambda file: int(file.readline()))
held(STAND_INS, "open_file_written", lambda: open("log.txt", "w"), lambda file: file.write("a step\n"))  # noqa: SIM115
held(STAND_INS, "open_file_unused", file_of_numbers)
held(STAND_INS, "socket_pair", socket.socketpair, lambda pair: (pair[0].send(b"a"), pair[1].recv(1)))
held(STAND_INS, "database_cursor", cursor, lambda rows: rows.fetchone()[0])
held(STAND_INS, "database_connection", lambda: sqlite3.connect(":memory:"), lambda base: base.execute("select 1"))
held(STAND_INS, "iterator_of_a_list", lambda: iter(list(range(1000))), next)
held(STAND_INS, "generator", lambda: (n for n in range(1000)), next)
held(STAND_INS, "generator_unused", lambda: (n for n in range(1000)))
held(STAND_INS, "iterator_of_a_file", lambda: map(int, file_of_numbers()), next)
held(STAND_INS, "iterator_of_a_loader", lambda: iter(DataLoader(Rows(1000))), next)
held(STAND_INS, "mapped_file", mapped_file, lambda mapped: mapped[:3])
held(STAND_INS, "zip_archive", zip_file, lambda archive: archive.namelist())
held(STAND_INS, "queue", lambda: queue.Queue(), lambda waiting: (waiting.put(1), waiting.get()))
held(STAND_INS, "pipe_of_processes", multiprocessing.Pipe, lambda ends: (ends[0].send(1), ends[1].recv()))
held(STAND_INS, "event_loop", asyncio.new_event_loop, lambda loop: loop.time())

held(COPIES, "refuses_deepcopy", RefusesCopies, lambda thing: thing.value)
held(COPIES, "refuses_pickling", RefusesPickling, lambda thing: thing.value)
held(COPIES, "weak_reference", lambda: weakref.ref(RefusesCopies), lambda reference: reference().value)
held(COPIES, "weak_dictionary", lambda: weakref.WeakValueDictionary(a=re), lambda known: known["a"].compile("a"))
held(COPIES, "thread_pool", lambda: concurrent.futures.ThreadPoolExecutor(1), lambda pool: pool.submit(id, 1).result())
held(COPIES, "ctypes_pointer", lambda: ctypes.pointer(ctypes.c_int(3)), lambda pointer: pointer.contents.value)
held(COPIES, "ctypes_structure", Point, lambda point: setattr(point, "x", 1.0))
held(COPIES, "ctypes_library", lambda: ctypes.CDLL(None), lambda library: library.getpid())
held(COPIES, "handle_compared_by_identity", ComparedByIdentity, lambda handle: handle.check())
held(COPIES, "random_generators", lambda: (random.Random(1), np.random.default_rng(1)), lambda pair: pair[0].random())
held(COPIES, "torch_generator", lambda: torch.Generator().manual_seed(1), lambda own: torch.rand(2, generator=own))
held(COPIES, "default_dictionary", lambda: collections.defaultdict(lambda: 0), lambda counts: counts["a"])
held(COPIES, "frame", lambda: types.SimpleNamespace(match=re.match("a", "a")), lambda kept: kept.match.group())
held(COPIES, "tensor_with_history", lambda: torch.ones(2, requires_grad=True) * 2, lambda tensor: tensor.sum())
held(COPIES, "summary_writer", lambda: summary_writer(), lambda writer: writer.add_scalar("a", 1.0))
held(COPIES, "bound_methods", lambda: [threading.Lock().acquire, [].append], lambda methods: methods[1](1))


def summary_writer() -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter("own_runs")


@job(COPIES)
def module_refuses_deepcopy() -> Any:
    class Once(Net):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("this module wraps a native handle")

    return Once()


@job(COPIES)
def submodule_refuses_deepcopy() -> Any:
    class Once(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("this layer wraps a native handle")

    net = Net()
    net.body = Once(16, 16)
    return net


@job(COPIES)
def own_new_with_arguments() -> Any:
    class Needs:
        def __new__(cls, value: float) -> Any:
            return super().__new__(cls)

        def __init__(self, value: float) -> None:
            self.value = value

    return Holds(Needs(1.0), lambda thing: thing.value)


@job(COPIES)
def refers_to_itself_and_its_trainer_weakly() -> Any:
    class Circular(Net):
        def __init__(self) -> None:
            super().__init__()
            self.me, self.owner = [self], weakref.ref(self)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.me[0] is not self:
                raise ValueError("a stranger")
            return self.owner()(batch).square().mean()

    return Circular()


@job(STAND_INS)
def stream_of_unlabelled_rows() -> Any:
    """Semi-supervised: a second loader's iterator is kept on the module and read in the step."""

    class Semi(Net):
        def on_fit_start(self) -> None:
            self.unlabelled = self.rows()

        def rows(self) -> Iterator[Any]:
            while True:
                yield from DataLoader(Rows(), batch_size=4)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            more = next(self.unlabelled).to(self.device)
            return super().training_step(batch, batch_idx) + self(more).mean()

    return Semi()


@job(SHARED)
def work_on_a_side_stream() -> Any:
    class Side(Net):
        def __init__(self) -> None:
            super().__init__()
            self.side, self.done = torch.cuda.Stream(), torch.cuda.Event()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                scaled = batch * 2
                self.done.record()
            self.done.wait()
            torch.cuda.current_stream().wait_stream(self.side)
            return super().training_step(scaled, batch_idx)

    return Side()
