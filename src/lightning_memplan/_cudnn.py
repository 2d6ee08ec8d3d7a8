"""The workspaces that cuDNN chooses, asked of cuDNN itself, for a card that need not be there.

From 9.8 on cuDNN plans for a card that is only described to it, which is made for compiling ahead of time
(``CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR``, cudnn_graph_v9.h). torch's convolutions run the first plan that cuDNN's
heuristics propose (aten/src/ATen/native/cudnn/Conv_v8.cpp, 2.11: ``get_generator_sources``, mode INSTANT, then
FALLBACK), so that plan's workspace is what a convolution takes. Every CUDA build of torch comes with cuDNN, and neither
GPU nor driver is asked for.

Some plans are not proposed without a card: products of matrices by cuBLAS, and Winograd's in float32. So pointwise
convolutions, and those without tensor cores, are left to the rules of ``_workspaces``.

cuDNN runs in a process of its own, this file as a program: what goes wrong there costs no more than the answers. It
ends when nobody has asked for a while, and with its parent. Checked on cuDNN 9.19 and 9.24.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import select
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from ctypes import c_char, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

FORWARD, INPUT, FILTER = range(3)  #: what is computed: the results, or the gradient of the input or of the filter


PLAIN, MOVED, LAST = range(3)  #: no tensor cores; tensor cores and channels first, which are moved; channels last


class Question(NamedTuple):
    """A convolution on a card, in one, two or three dimensions, of ``n`` samples.

    ``capability`` is the card's, as 86; ``kind`` cuDNN's number of the operands' type; ``deterministic`` 1 where only
    algorithms are allowed that always have the same result; ``layout`` PLAIN, MOVED or LAST. The last six are of each
    dimension.
    """

    capability: int
    part: int
    kind: int
    deterministic: int
    layout: int
    n: int
    c: int
    k: int
    groups: int
    size: tuple[int, ...]
    results: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Question:
        """Of one number after another, as it is recorded: the last six are as many as there are dimensions."""
        edges, step = numbers[9:], (len(numbers) - 9) // 6
        return cls._make([*numbers[:9], *(tuple(edges[at : at + step]) for at in range(0, len(edges), step))])


KINDS = {"torch.float32": 0, "torch.float64": 1, "torch.float16": 2, "torch.bfloat16": 9}  #: cudnnDataType_t


_IDLE = 30.0  # seconds until the process ends by itself


_PATIENCE = 20.0  # seconds in which it has to answer


def workspace(question: Question) -> int | None:
    """Bytes of the plan that cuDNN would run first; None where it cannot be asked, or has none.

    It is the installed cuDNN, or the ``libcudnn.so.9`` that ``MEMPLAN_CUDNN`` in the environment names: that of another
    torch, with which training is to run. ``MEMPLAN_CUDNN=off`` asks none, so that plans are the same everywhere.

    Of a ResNet's 3×3 convolution, 256 images in float16 with channels first: all operands with channels last.

    >>> of_resnet = Question(86, FORWARD, 2, 0, MOVED, 256, 64, 64, 1, *[(56, 56)] * 2, (3, 3), *[(1, 1)] * 3)
    >>> found = workspace(of_resnet)
    >>> found is None or found - 2 * (256 * 128 * 56**2 + 64 * 64 * 9) < 1024
    True
    """
    path = _library()
    if path is None:
        return None
    if (path, question) not in _answers:
        _answers[path, question] = _asked(path, question)
    return _answers[path, question]


def get_ready() -> None:
    """Start the process that is asked, which takes a while, if there is one to be."""
    if (path := _library()) is not None and path not in _broken and (os.getpid(), path) not in _processes:
        with _lock, suppress(OSError):
            _processes[os.getpid(), path] = _started(path)


def check_named() -> None:
    """See that ``MEMPLAN_CUDNN`` names a file, where it names one.

    Raises:
        ValueError: there is none.
    """
    path = os.environ.get("MEMPLAN_CUDNN") or "off"
    if path != "off" and not Path(path).is_file():
        raise ValueError(f"MEMPLAN_CUDNN is {path!r}, and there is no such file: name a libcudnn.so.9, or say off")


def _library() -> str | None:
    path = os.environ.get("MEMPLAN_CUDNN") or _installed()
    return None if path in ("", "off") else path


_answers: dict[tuple[str, Question], int | None] = {}


_processes: dict[tuple[int, str], subprocess.Popen[bytes]] = {}  # by who asks, since a fork has its own, and library


_broken: set[str] = set()


_lock = threading.Lock()


@cache
def _installed() -> str:
    """The cuDNN that came with torch; empty where there is none."""
    try:
        spec = find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        return ""
    folders = (spec and spec.submodule_search_locations) or ()
    return next((str(path) for folder in folders if (path := Path(folder, "lib", "libcudnn.so.9")).exists()), "")


def _asked(path: str, question: Question) -> int | None:
    who = os.getpid(), path
    with _lock:
        if path in _broken:
            return None
        for _ in range(2):  # it may have ended for want of questions
            with suppress(OSError):
                if who not in _processes:
                    _processes[who] = _started(path)
                if answer := _answer(_processes[who], question):
                    return None if answer == "none" else int(answer)
            if who in _processes:
                _ended(_processes.pop(who))
        _broken.add(path)
        if os.environ.get("MEMPLAN_CUDNN"):
            warnings.warn(
                f"MEMPLAN_CUDNN is {path!r}, which is no libcudnn.so.9 of version 9.8 or later that can be asked for "
                "workspaces: they are taken by rule",
                stacklevel=2,
            )
        return None


def _started(path: str) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-I", "-S", __file__, path]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )


@atexit.register
def _close() -> None:
    for (asker, _), process in _processes.items():
        if asker == os.getpid():
            _ended(process)


def _ended(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            if pipe is not None:
                pipe.close()


def _answer(process: subprocess.Popen[bytes], question: Question) -> str | None:
    """A line of the process; None where it has ended, or does not answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(question).encode() + b"\n")
    process.stdin.flush()
    if not select.select([process.stdout], [], [], _PATIENCE)[0]:
        return None
    return process.stdout.readline().decode().strip() or None


# --------------------------------------------------------------------------------------------------- the process itself

# cudnnBackendDescriptorType_t, cudnnBackendAttributeType_t and cudnnBackendAttributeName_t of cudnn_graph_v9.h
_CONVOLUTION, _ENGINE, _CONFIG, _HEURISTICS, _PLAN, _GRAPH, _TENSOR, _CARD = 1, 2, 3, 4, 5, 15, 17, 38


_OPERATION = {FORWARD: (10, 700), FILTER: (11, 712), INPUT: (12, 706)}  # and the first of its attributes


_TYPE, _INT64, _FLOAT, _MODE, _HEURISTIC, _NOTE, _DESCRIPTOR, _CHAR = 1, 3, 4, 7, 8, 11, 15, 24


_INSTANT, _FALLBACK = 0, 2  # cudnnBackendHeurMode_t


_ROUNDS_INPUTS, _NONDETERMINISTIC = 1, 4  # cudnnBackendNumericalNote_t; torch's filterEngineConfigs passes over them


_CANDIDATES = 8  # plans that are looked at, where the first is refused


class CudnnError(Exception):
    """cuDNN refuses something."""


class Cudnn:
    """The calls of cuDNN's backend that planning a convolution takes."""

    def __init__(self, library: str) -> None:
        self.calls = ctypes.CDLL(library)
        self.calls.cudnnGetVersion.restype = c_size_t
        if self.calls.cudnnGetVersion() < 90800:
            raise CudnnError("cuDNN 9.8 or later is needed")
        self.made: list[c_void_p] = []
        self.cards: dict[int, c_void_p] = {}

    def check(self, status: int) -> None:
        if status:
            raise CudnnError(status)

    def new(self, kind: int) -> c_void_p:
        descriptor = c_void_p()
        self.check(self.calls.cudnnBackendCreateDescriptor(kind, ctypes.byref(descriptor)))
        self.made.append(descriptor)
        return descriptor

    def make(self, kind: int, *attributes: tuple[int, int, Any]) -> c_void_p:
        """A finished descriptor; an attribute is its name, its type and an array of C's."""
        descriptor = self.new(kind)
        for name, typed, array in attributes:
            self.check(
                self.calls.cudnnBackendSetAttribute(descriptor, name, typed, c_int64(len(array)), ctypes.byref(array))
            )
        self.check(self.calls.cudnnBackendFinalize(descriptor))
        return descriptor

    def get(self, descriptor: c_void_p, name: int, typed: int, array: Any) -> int:
        """Fill the array; how many there are."""
        count = c_int64()
        found = self.calls.cudnnBackendGetAttribute(
            descriptor, name, typed, c_int64(len(array)), ctypes.byref(count), ctypes.byref(array)
        )
        self.check(found)
        return min(count.value, len(array))

    def drop(self) -> None:
        for descriptor in reversed(self.made):
            self.calls.cudnnBackendDestroyDescriptor(descriptor)
        self.made.clear()

    def card(self, capability: int) -> c_void_p:
        if capability not in self.cards:
            text = json.dumps(_described(capability)).encode()
            self.cards[capability] = self.make(_CARD, (2702, _CHAR, (c_char * len(text)).from_buffer_copy(text)))
            self.made.pop()  # it stays
        return self.cards[capability]

    def tensor(self, name: int, kind: int, sizes: Sequence[int], layout: int) -> Any:
        order = [0, *range(2, len(sizes)), 1] if layout == LAST else list(range(len(sizes)))
        strides, step = [0] * len(sizes), 1
        for dimension in reversed(order):
            strides[dimension] = step
            step *= sizes[dimension]
        made = self.make(
            _TENSOR,
            (901, _TYPE, (c_int * 1)(kind)),
            (902, _INT64, _numbers(sizes)),
            (903, _INT64, _numbers(strides)),
            (906, _INT64, _numbers([name])),
            (900, _INT64, _numbers([16])),  # bytes to which addresses are aligned
        )
        return _descriptors(made)

    def workspace(self, question: Question) -> int | None:
        try:
            return self._workspace(question)
        finally:
            self.drop()

    def _workspace(self, q: Question) -> int | None:
        card = _descriptors(self.card(q.capability))
        kind, begin = _OPERATION[q.part]
        size, results, kernel, stride, padding, dilation = q[-6:]
        if len(size) == 1:  # torch makes it one of images of one row
            size, results, kernel, stride, dilation = ((1, *edge) for edge in (size, results, kernel, stride, dilation))
            padding = (0, *padding)
        convolution = self.make(
            _CONVOLUTION,
            (100, _TYPE, (c_int * 1)(0)),  # computed in float32
            (101, _MODE, (c_int * 1)(1)),  # CUDNN_CROSS_CORRELATION
            (106, _INT64, _numbers([len(size)])),
            (105, _INT64, _numbers(padding)),
            (104, _INT64, _numbers(padding)),
            (102, _INT64, _numbers(dilation)),
            (103, _INT64, _numbers(stride)),
        )
        x = self.tensor(0, q.kind, (q.n, q.c, *size), q.layout)
        w = self.tensor(1, q.kind, (q.k, q.c // q.groups, *kernel), q.layout)
        y = self.tensor(2, q.kind, (q.n, q.k, *results), q.layout)
        operation = self.make(
            kind,
            (begin, _FLOAT, (c_float * 1)(1.0)),
            (begin + 1, _FLOAT, (c_float * 1)(0.0)),
            (begin + 2, _DESCRIPTOR, _descriptors(convolution)),
            (begin + 3, _DESCRIPTOR, w),
            (begin + 4, _DESCRIPTOR, x),
            (begin + 5, _DESCRIPTOR, y),
        )
        graph = self.make(_GRAPH, (801, _DESCRIPTOR, _descriptors(operation)))
        for mode in (_INSTANT, _FALLBACK):
            heuristics = self.make(
                _HEURISTICS,
                (201, _DESCRIPTOR, _descriptors(graph)),
                (200, _HEURISTIC, (c_int * 1)(mode)),
                (204, _DESCRIPTOR, card),
            )
            configs = [self.new(_CONFIG) for _ in range(_CANDIDATES)]
            count = self.get(heuristics, 202, _DESCRIPTOR, _descriptors(*configs))
            for config in configs[:count]:
                found = self.plan(config, card, q.deterministic)
                if found is not None:
                    return found
        return None

    def plan(self, config: c_void_p, card: Any, deterministic: int) -> int | None:
        """The workspace of a plan that torch would run; None where it passes over it, or cuDNN has none."""
        engine, notes, bytes_ = self.new(_ENGINE), (c_int * 16)(), (c_int64 * 1)()
        self.get(config, 300, _DESCRIPTOR, _descriptors(engine))
        noted = notes[: self.get(engine, 1303, _NOTE, notes)]
        if _ROUNDS_INPUTS in noted or (deterministic and _NONDETERMINISTIC in noted):
            return None
        try:
            plan = self.make(_PLAN, (401, _DESCRIPTOR, _descriptors(config)), (407, _DESCRIPTOR, card))
            self.get(plan, 402, _INT64, bytes_)
        except CudnnError:
            return None
        return bytes_[0]


def _numbers(values: Sequence[int]) -> Any:
    return (c_int64 * len(values))(*values)


def _descriptors(*descriptors: c_void_p) -> Any:
    return (c_void_p * len(descriptors))(*[d.value for d in descriptors])


def _described(capability: int) -> dict[str, object]:
    """A card, as cuDNN writes one (``CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION``): an RTX 3090, but for its capability.

    Of the other figures none that was tried changes a workspace (tests/test_cudnn.py).
    """
    return {
        "deviceVer": 10 * capability,
        "deviceName": "NVIDIA GeForce RTX 3090",
        "cudaDeviceId": 0,
        "deviceId": 0,
        "pciDeviceId": 0x2204,
        "driverVer": 13000,
        "totalGlobalMem": 25446711296,
        "multiProcessorCount": 82,
        "smCountOrigin": 0,
        "warpSize": 32,
        "maxGridSize": [2147483647, 65535, 65535],
        "maxBlockSize": [1024, 1024, 64],
        "regsPerBlock": 65536,
        "maxRegistersPerSM": 65536,
        "maxThreadsPerBlock": 1024,
        "maxThreadsPerSM": 1536,
        "maxCtasPerSM": 16,
        "maxSharedMemoryPerBlock": 49152,
        "maxSharedMemoryPerBlockOptin": 101376,
        "reservedSharedMemoryPerBlock": 1024,
        "smClockRateKHz": 1695000,
        "memClockRateKHz": 9751000,
        "l2CacheSize": 6291456,
        "isTccDriver": 0,
        "supportCoopLaunch": 1,
    }


def main(library: str) -> None:
    """Answer questions, a line each, until nobody asks any more."""
    cudnn, pending = Cudnn(library), b""
    with suppress(CudnnError):  # the first one takes long
        cudnn.workspace(Question(80, FORWARD, 2, 0, MOVED, 1, 8, 8, 1, (8, 8), (8, 8), (3, 3), (1, 1), (1, 1), (1, 1)))
    while select.select([0], [], [], _IDLE)[0]:
        read = os.read(0, 2**16)
        if not read:
            return
        *lines, pending = (pending + read).split(b"\n")
        for line in lines:
            question = Question._make(tuple(f) if isinstance(f, list) else f for f in json.loads(line))
            try:
                found = cudnn.workspace(question)
            except CudnnError:
                found = None
            os.write(1, b"none\n" if found is None else b"%d\n" % found)


if __name__ == "__main__":
    main(sys.argv[1])
