"""Ask cuDNN for the workspace of a convolution, in a process of its own.

Stand-alone: it imports nothing of the package.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import sys
from collections.abc import Sequence
from contextlib import suppress
from ctypes import c_char, c_float, c_int, c_int64, c_size_t, c_void_p
from typing import Any, NamedTuple

FORWARD, INPUT, FILTER = range(3)  #: the results, or the gradient of the input or of the filter


PLAIN, MOVED, LAST = range(3)  #: no tensor cores; tensor cores and channels first, which are moved; channels last


class Question(NamedTuple):
    """A convolution on a GPU, in one, two or three dimensions, of ``n`` samples.

    ``capability`` is the GPU's, as 86; ``kind`` is cuDNN's number of the operands' type; ``deterministic`` is 1 for
    algorithms with reproducible results alone; ``layout`` is PLAIN, MOVED or LAST. The last six have a number for each
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
        """Read a recorded question, one number after another: the last six have as many as there are dimensions."""
        edges, step = numbers[9:], (len(numbers) - 9) // 6
        return cls._make([*numbers[:9], *(tuple(edges[at : at + step]) for at in range(0, len(edges), step))])


_IDLE = 30.0  # seconds until the process ends by itself


# --------------------------------------------------------------------------------------------------- the process itself

# cudnnBackendDescriptorType_t, cudnnBackendAttributeType_t and cudnnBackendAttributeName_t of cudnn_graph_v9.h
_CONVOLUTION, _ENGINE, _CONFIG, _HEURISTICS, _PLAN, _GRAPH, _TENSOR, _DEVICE = 1, 2, 3, 4, 5, 15, 17, 38


_OPERATION = {FORWARD: (10, 700), FILTER: (11, 712), INPUT: (12, 706)}  # and the first of its attributes


_TYPE, _INT64, _FLOAT, _MODE, _HEURISTIC, _NOTE, _DESCRIPTOR, _CHAR = 1, 3, 4, 7, 8, 11, 15, 24


_INSTANT, _FALLBACK = 0, 2  # cudnnBackendHeurMode_t


_ROUNDS_INPUTS, _NONDETERMINISTIC = 1, 4  # cudnnBackendNumericalNote_t; torch's filterEngineConfigs passes over them


_CANDIDATES = 8  # plans that are looked at, where the first is refused


class CudnnError(Exception):
    """cuDNN refuses a call."""


class Cudnn:
    """The calls of cuDNN's backend that plan a convolution."""

    def __init__(self, library: str) -> None:
        self.calls = ctypes.CDLL(library)
        self.calls.cudnnGetVersion.restype = c_size_t
        if self.calls.cudnnGetVersion() < 90800:
            raise CudnnError("cuDNN 9.8 or later is needed")
        self.made: list[c_void_p] = []
        self.devices: dict[int, c_void_p] = {}

    def check(self, status: int) -> None:
        if status:
            raise CudnnError(status)

    def new(self, kind: int) -> c_void_p:
        descriptor = c_void_p()
        self.check(self.calls.cudnnBackendCreateDescriptor(kind, ctypes.byref(descriptor)))
        self.made.append(descriptor)
        return descriptor

    def make(self, kind: int, *attributes: tuple[int, int, Any]) -> c_void_p:
        """Make a finished descriptor; an attribute is its name, its type and a C array."""
        descriptor = self.new(kind)
        for name, typed, array in attributes:
            self.check(
                self.calls.cudnnBackendSetAttribute(descriptor, name, typed, c_int64(len(array)), ctypes.byref(array))
            )
        self.check(self.calls.cudnnBackendFinalize(descriptor))
        return descriptor

    def get(self, descriptor: c_void_p, name: int, typed: int, array: Any) -> int:
        """Fill the array, and return how many values there are."""
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

    def device(self, capability: int) -> c_void_p:
        if capability not in self.devices:
            text = json.dumps(_described(capability)).encode()
            self.devices[capability] = self.make(_DEVICE, (2702, _CHAR, (c_char * len(text)).from_buffer_copy(text)))
            self.made.pop()  # it stays
        return self.devices[capability]

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
        device = _descriptors(self.device(q.capability))
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
                (204, _DESCRIPTOR, device),
            )
            configs = [self.new(_CONFIG) for _ in range(_CANDIDATES)]
            count = self.get(heuristics, 202, _DESCRIPTOR, _descriptors(*configs))
            for config in configs[:count]:
                found = self.plan(config, device, q.deterministic)
                if found is not None:
                    return found
        return None

    def plan(self, config: c_void_p, device: Any, deterministic: int) -> int | None:
        """Return the workspace of a plan; None if torch passes over it, or cuDNN cannot make it."""
        engine, notes, bytes_ = self.new(_ENGINE), (c_int * 16)(), (c_int64 * 1)()
        self.get(config, 300, _DESCRIPTOR, _descriptors(engine))
        noted = notes[: self.get(engine, 1303, _NOTE, notes)]
        if _ROUNDS_INPUTS in noted or (deterministic and _NONDETERMINISTIC in noted):
            return None
        try:
            plan = self.make(_PLAN, (401, _DESCRIPTOR, _descriptors(config)), (407, _DESCRIPTOR, device))
            self.get(plan, 402, _INT64, bytes_)
        except CudnnError:
            return None
        return bytes_[0]


def _numbers(values: Sequence[int]) -> Any:
    return (c_int64 * len(values))(*values)


def _descriptors(*descriptors: c_void_p) -> Any:
    return (c_void_p * len(descriptors))(*[d.value for d in descriptors])


def _described(capability: int) -> dict[str, object]:
    """Describe a GPU as cuDNN does (``CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION``): an RTX 3090 of another capability.

    No other figure that was tried changes a workspace (tests/unit/cuda/test_cudnn.py).
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
    """Answer questions, a line each, until none has come for a while."""
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
