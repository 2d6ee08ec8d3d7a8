"""Ask cuDNN itself for the workspaces that it chooses, for a GPU that this machine need not have.

From 9.8 on cuDNN plans for a GPU that is only described to it, a feature for compiling ahead of time
(``CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR``, cudnn_graph_v9.h). torch's convolutions run the first plan that cuDNN's
heuristics propose (aten/src/ATen/native/cudnn/Conv_v8.cpp, 2.11: ``get_generator_sources``, mode INSTANT, then
FALLBACK), so a convolution takes that plan's workspace. Every CUDA build of torch comes with cuDNN, and neither GPU nor
driver is needed.

Some plans are not proposed without a GPU: products of matrices by cuBLAS, and Winograd's in float32. So pointwise
convolutions, and those without tensor cores, are left to the rules of `cuda.workspaces`.

cuDNN runs in a process of its own, `cuda.cudnn_process`: a failure there costs no more than the answers. The process
ends after a while without questions, and with its parent. Checked on cuDNN 9.19 and 9.24.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from lightning_memplan.cuda import cudnn_process
from lightning_memplan.cuda.cudnn_process import Question

KINDS = {"torch.float32": 0, "torch.float64": 1, "torch.float16": 2, "torch.bfloat16": 9}  #: cudnnDataType_t


_PATIENCE = 20.0  # seconds in which it has to answer


def workspace(question: Question) -> int | None:
    """Return the bytes of the plan that cuDNN would run first; None if it cannot be asked, or has no plan.

    The installed cuDNN is asked, or the ``libcudnn.so.9`` that ``MEMPLAN_CUDNN`` in the environment names: that of
    another torch, with which training is to run. ``MEMPLAN_CUDNN=off`` asks none, so that plans are the same on any
    machine.

    A ResNet's 3×3 convolution of 256 images, in float16 with channels first, copies all operands with channels last.

    >>> from lightning_memplan.cuda.cudnn_process import FORWARD, MOVED
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
    """Start the process of an installed cuDNN, which takes a while."""
    if (path := _library()) is not None and path not in _broken and (os.getpid(), path) not in _processes:
        with _lock, suppress(OSError):
            _processes[os.getpid(), path] = _started(path)


def check_named() -> None:
    """Check that the file which ``MEMPLAN_CUDNN`` names is there.

    Raises:
        ValueError: it is not.
    """
    path = os.environ.get("MEMPLAN_CUDNN") or "off"
    if path != "off" and not Path(path).is_file():
        raise ValueError(f"MEMPLAN_CUDNN is {path!r}, and there is no such file: name a libcudnn.so.9, or say off")


def _library() -> str | None:
    path = os.environ.get("MEMPLAN_CUDNN") or _installed()
    return None if path in ("", "off") else path


_answers: dict[tuple[str, Question], int | None] = {}


_processes: dict[tuple[int, str], subprocess.Popen[bytes]] = {}  # by asking process and library


_broken: set[str] = set()


_lock = threading.Lock()


@cache
def _installed() -> str:
    """Return the path of the cuDNN that came with torch; empty if there is none."""
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
        for _ in range(2):  # it may have ended, after a while without questions
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
    command = [sys.executable, "-I", "-S", cudnn_process.__file__, path]
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
    """Return a line of the process; None if it has ended, or does not answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(question).encode() + b"\n")
    process.stdin.flush()
    if not select.select([process.stdout], [], [], _PATIENCE)[0]:
        return None
    return process.stdout.readline().decode().strip() or None
