"""Modules that hold objects of the standard library and of other libraries: processes, folders, figures, models."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import csv
import enum
import gzip
import io
import itertools
import logging
import multiprocessing
import pickle
import select
import subprocess
import sys
import tempfile
import threading
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from benchmarks.robustness.job import WIDTH, Net, job
from benchmarks.robustness.jobs.objects import held

SYSTEM = "processes, folders, shared memory, objects that release a handle"
LIBRARIES = "objects of other libraries"
TORCH = "objects of torch that are no modules"


class Released:
    """A number of a native library's, which the end of the object releases."""

    open: ClassVar[set[int]] = set()
    numbers: ClassVar[Any] = itertools.count()

    def __init__(self) -> None:
        self.number = next(self.numbers)
        self.open.add(self.number)

    def use(self) -> None:
        if self.number not in self.open:
            raise ValueError(f"handle {self.number} is released")

    def __del__(self) -> None:
        self.open.discard(self.number)


class Forgets:
    """Leaves its file out of its state, and opens it again when it is asked."""

    def __init__(self) -> None:
        self.file: Any = io.StringIO("text")

    def __getstate__(self) -> Any:
        return {"file": None}

    def read(self) -> str:
        if self.file is None:
            raise ValueError("open the file first")
        return self.file.read()


class Singleton:
    """One for the whole process."""

    one: ClassVar[Any] = None

    def __new__(cls) -> Any:
        if cls.one is None:
            cls.one = super().__new__(cls)
        return cls.one

    def check(self) -> None:
        if self is not Singleton.one:
            raise ValueError("there are two of me")


class Color(enum.Enum):
    RED = 1


def folder() -> tempfile.TemporaryDirectory[str]:
    made = tempfile.TemporaryDirectory()
    Path(made.name, "a.txt").write_text("a")
    return made


def shared() -> shared_memory.SharedMemory:
    memory = shared_memory.SharedMemory(create=True, size=16)
    memory.unlink()  # the mapping stays
    return memory


def waiting() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def gzipped() -> gzip.GzipFile:
    with gzip.open("rows.gz", "wb") as file:
        file.write(b"1\n" * 1000)
    return gzip.open("rows.gz")


def pickled_rows() -> Any:
    buffer = io.BytesIO()
    for n in range(1000):
        pickle.dump(n, buffer)
    buffer.seek(0)
    return pickle.Unpickler(buffer)


def context() -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the module keeps it open
    return stack


held(SYSTEM, "handle_released_by_its_end", Released, lambda handle: handle.use())
held(SYSTEM, "handles_in_a_list", lambda: [Released(), Released()], lambda handles: handles[1].use())
held(SYSTEM, "temporary_folder", folder, lambda made: Path(made.name, "a.txt").read_text())
held(SYSTEM, "named_temporary_file", lambda: tempfile.NamedTemporaryFile("w"), lambda file: Path(file.name).stat())  # noqa: SIM115 - the module keeps it open
held(SYSTEM, "child_process", waiting, lambda child: child.poll() or child.stdin.flush())
held(SYSTEM, "child_of_multiprocessing", lambda: multiprocessing.Process(target=id, args=(1,)), lambda p: p.name)
held(SYSTEM, "shared_memory_block", shared, lambda memory: memory.buf[0])
held(SYSTEM, "value_of_processes", lambda: multiprocessing.Value("i", 3), lambda value: value.value)
held(SYSTEM, "queue_of_processes", lambda: multiprocessing.Queue(), lambda waiting: (waiting.put(1), waiting.get()))
held(SYSTEM, "timer_of_threads", lambda: threading.Timer(100, id), lambda timer: timer.is_alive())
held(SYSTEM, "barrier", lambda: threading.Barrier(1), lambda barrier: barrier.wait())
held(SYSTEM, "future", concurrent.futures.Future, lambda future: future.done())
held(SYSTEM, "lock_of_asyncio", asyncio.Lock, lambda lock: lock.locked())
held(SYSTEM, "memory_view", lambda: memoryview(bytearray(8)), lambda view: view[0])
held(SYSTEM, "poll_object", select.epoll, lambda poll: poll.fileno())
held(SYSTEM, "gzip_file", gzipped, lambda file: int(file.readline()))
held(SYSTEM, "csv_reader", lambda: csv.reader(["1,2"] * 1000), next)
held(SYSTEM, "unpickler", pickled_rows, lambda rows: rows.load())
held(SYSTEM, "exit_stack", context)
held(SYSTEM, "zip_of_iterators", lambda: zip(range(1000), itertools.count(), strict=False), next)
held(SYSTEM, "asynchronous_generator", lambda: (n async for n in numbers()), repr)
held(SYSTEM, "logger_with_a_file", lambda: with_a_file(), lambda log: log.info("a step"))
held(SYSTEM, "forgets_its_file", Forgets, lambda thing: thing.read())
held(SYSTEM, "singleton", Singleton, lambda one: one.check())
held(SYSTEM, "enumerations", lambda: {Color.RED: Color}, lambda colors: colors[Color.RED].RED.value)
held(SYSTEM, "dequeue_of_tensors", lambda: collections.deque([torch.ones(2)], 3), lambda q: q.append(torch.ones(2)))


async def numbers() -> Any:
    yield 1


def with_a_file() -> Any:
    log = logging.getLogger("robust.file")
    log.addHandler(logging.FileHandler("own.log"))
    return logging.LoggerAdapter(log, {})


# ----------------------------------------------------------------------------------------------------- libraries


def figure() -> Any:
    import matplotlib.pyplot as plt

    return plt.subplots()


def opened_image() -> Any:
    from PIL import Image

    Image.new("L", (4, 4)).save("image.png")
    return Image.open("image.png")


def scaler() -> Any:
    from sklearn.preprocessing import StandardScaler

    return StandardScaler().fit(np.ones((4, WIDTH)))


def sparse_matrix() -> Any:
    from scipy.sparse import eye

    return eye(WIDTH, format="csr")


def graph() -> Any:
    import networkx

    return networkx.path_graph(5)


def attributes() -> Any:
    import attr

    return attr.make_class("Config", ["size", "net"], frozen=True, slots=True)(4, nn.Linear(2, 2))


def validated() -> Any:
    import pydantic

    return pydantic.create_model("Config", size=(int, 4))()


def console() -> Any:
    from rich.console import Console

    return Console(file=io.StringIO())


def bar() -> Any:
    from tqdm import tqdm

    return tqdm(total=1000, file=io.StringIO())


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))


def archive() -> Any:
    np.savez("rows.npz", rows=np.ones(4))
    return np.load("rows.npz")


held(LIBRARIES, "matplotlib_figure", figure, lambda pair: pair[1].plot([1, 2]))
held(LIBRARIES, "image_that_is_open", opened_image, lambda image: image.getpixel((0, 0)))
held(LIBRARIES, "fitted_scaler", scaler, lambda fitted: fitted.transform(np.ones((1, WIDTH))))
held(LIBRARIES, "scipy_matrix", sparse_matrix, lambda matrix: matrix @ np.ones(WIDTH))
held(LIBRARIES, "networkx_graph", graph, lambda kept: kept.degree[1])
held(LIBRARIES, "attrs_class_with_a_module", attributes, lambda config: config.size + 1)
held(LIBRARIES, "pydantic_model", validated, lambda config: config.size + 1)
held(LIBRARIES, "rich_console", console, lambda printer: printer.print("a step"))
held(LIBRARIES, "tqdm_bar", bar, lambda progress: progress.update())
held(LIBRARIES, "tokenizer_in_rust", tokenizer, lambda words: words.encode("a b").ids)
held(LIBRARIES, "numpy_archive", archive, lambda file: file["rows"].sum())

# --------------------------------------------------------------------------------------------------------- torch

held(TORCH, "profiler_of_torch", lambda: torch.profiler.profile(), repr)
held(TORCH, "cuda_graph", torch.cuda.CUDAGraph, repr)
held(TORCH, "future_of_torch", torch.futures.Future, lambda future: future.done())
held(TORCH, "graph_module", lambda: torch.fx.symbolic_trace(nn.Linear(WIDTH, 2)), lambda net: len(net.code))
held(TORCH, "distribution", lambda: torch.distributions.Normal(0.0, 1.0), lambda normal: normal.sample())
held(TORCH, "grad_scaler_of_its_own", lambda: torch.amp.GradScaler("cuda"), lambda scaler: scaler.get_scale())
held(TORCH, "cuda_generator", lambda: torch.Generator("cuda"), lambda own: own.initial_seed())
held(TORCH, "state_dictionary", lambda: nn.Linear(2, 2).state_dict(), lambda state: state["weight"].sum())
held(TORCH, "storage", lambda: torch.ones(4).untyped_storage(), lambda storage: storage.nbytes())
held(TORCH, "meta_tensor", lambda: torch.ones(4, device="meta"), lambda tensor: tensor.shape)
held(TORCH, "tensor_on_the_gpu", lambda: torch.ones(4, device="cuda"), lambda tensor: tensor.sum())
held(TORCH, "hook_handle", lambda: nn.Linear(2, 2).register_forward_hook(id), lambda handle: handle.id)
held(TORCH, "compiled_function", lambda: torch.compile(torch.sin, backend="eager"), lambda sine: sine(torch.ones(2)))


@job(TORCH)
def exported_program() -> Any:
    class Exports(Net):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = torch.export.export(nn.Linear(WIDTH, 2), (torch.ones(2, WIDTH),))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert len(self.frozen.graph.nodes) > 2
            return super().training_step(batch, batch_idx)

    return Exports()


@job(TORCH)
def optimizer_kept_on_the_module() -> Any:
    class Keeps(Net):
        def __init__(self) -> None:
            super().__init__()
            self.optimizer = torch.optim.Adam(self.parameters())
            self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)

        def configure_optimizers(self) -> Any:
            return [self.optimizer], [self.scheduler]

    return Keeps()
