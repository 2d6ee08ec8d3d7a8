"""A training step without Lightning, recorded: the loops that published measurements were made with.

The package plans for Lightning's steps. The tables in ``rows`` were measured with loops written out, on older versions
of torch, so here the same recorder runs those loops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_memplan.cuda import autocast
from lightning_memplan.cuda.dispatch import cuda_semantics
from lightning_memplan.cuda.rule_set import Gpu, Workspace
from lightning_memplan.cuda.rules import rules_for
from lightning_memplan.memory.events import EMPTY, FREE, Trace, labelled
from lightning_memplan.memory.program import Kernel, Polynomial, Program, scale
from lightning_memplan.step.context import module_paths
from lightning_memplan.trace.autograd import GradientAccumulation
from lightning_memplan.trace.detached import detached_copy, setup_order
from lightning_memplan.trace.isolation import no_collection
from lightning_memplan.trace.recorder import Recorder

#: cuBLAS's workspace for compute capability 8.x, which each thread that multiplies matrices keeps
CUBLAS = (2 * 4096 + 8 * 16) * 1024
_ATEN = torch.ops.aten
_MATRIX_PRODUCTS = [_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm, _ATEN.addbmm, _ATEN.addmv, _ATEN.mv]


#: a batch size at which one trace tells all sizes: what is divisible by this prime grows with the batch, the rest does
#: not grow at all
PRIME = 7919


class Loop(NamedTuple):
    """What a loop does in each step.

    ``loss`` gets the model and a batch. ``autocast`` is the type in which CUDA's autocast computes, its cache of cast
    weights on; the backward pass is run inside it where ``backward_inside`` says so.
    """

    batch: Callable[[int], Any]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
    autocast: torch.dtype | None = None
    backward_inside: bool = False
    keep_gradients: bool = False  #: ``zero_grad(set_to_none=False)``
    new_batches: bool = False  #: each step moves a batch of its own to the GPU; else the first serves all
    old: bool = False  #: torch 1.12's autograd and autocast


def trace_loop(
    model: nn.Module,
    loop: Loop,
    *,
    sizes: tuple[int, ...] = (PRIME,),
    steps: int = 2,
    capability: tuple[int, int] = (8, 6),
) -> Program:
    """The loop's events at any batch size.

    By default from one trace at a prime batch size, for speed; several sizes are scaled as the package does it.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with no_collection(), _isolated(), _old_torch(loop.old), cuda_semantics(capability):
        traces = [_record(model, loop, mode, size, steps, capability) for size in sizes]
    return scale(traces) if len(traces) > 1 else _scale_prime(traces[0])


def _scale_prime(trace: Trace) -> Program:
    entries: dict[object, int] = {}
    table: list[Polynomial | Kernel] = []
    sizes = []
    for event in trace.events:
        if event.size < 0:
            sizes.append((EMPTY, FREE).index(event.size))
            continue
        rule = event.rule
        key = rule or event.size
        if key not in entries:
            table.append(Kernel(str(rule[0]), tuple(map(_grown, rule[1:]))) if rule else _grown(event.size))
            entries[key] = len(table) + 1
        sizes.append(entries[key])
    return Program(trace.events, tuple(sizes), tuple(table), (trace.batch_size,))


def _grown(value: Any) -> Polynomial:
    degree = 0
    while value and value % PRIME == 0:
        value, degree = value // PRIME, degree + 1
    return Polynomial((0,) * degree + (value,))


@contextmanager
def _old_torch(old: bool) -> Iterator[None]:
    """Let CUDA's autocast leave interpolation in half precision, as torch 1.12 does (ATen/autocast_mode.cpp)."""
    if not old:
        yield
        return
    lists = autocast.FP32
    autocast.FP32 = [name for name in lists if "upsample" not in name]
    try:
        yield
    finally:
        autocast.FP32 = lists


def _record(
    model: nn.Module, loop: Loop, mode: FakeTensorMode, size: int, steps: int, capability: tuple[int, int]
) -> Trace:
    products = [getattr(packet, name) for packet in _MATRIX_PRODUCTS for name in packet.overloads()]
    rules = rules_for(Gpu(capability))
    own = {op: rule for op, rule in rules.allocations.items() if op not in products}
    workspaces = dict.fromkeys(products, Workspace("cublas", CUBLAS))
    rules = replace(rules, allocations=own, workspaces=workspaces, sparse_decompositions={})
    # torch 1.12's autograd adds gradients up out of place (torch/csrc/autograd/input_buffer.cpp)
    recorder = Recorder(mode, rules, GradientAccumulation(in_place=not loop.old))
    twin = detached_copy(model, mode)
    with recorder, module_paths(twin, recorder):
        for tensor, category, path in setup_order(twin):
            recorder.category, recorder.path = category, path
            recorder.adopt(tensor)
        recorder.category, recorder.path = "optimizer", ""
        optimizer = loop.optimizer(twin.parameters())
        batch = None
        for index in range(steps):
            recorder.step = index + 1
            recorder.phase, recorder.category = "batch", "batch"
            if batch is None or loop.new_batches:
                batch = loop.batch(size)
            recorder.phase, recorder.category = "forward", "activations"
            optimizer.zero_grad(set_to_none=not loop.keep_gradients)
            inside = torch.autocast("cpu", dtype=loop.autocast) if loop.autocast else nullcontext()
            with inside:
                loss = loop.loss(twin, batch)
                if loop.backward_inside:
                    recorder.phase, recorder.category, recorder.path = "backward", "temporaries", ""
                    loss.backward()
            if not loop.backward_inside:
                recorder.phase, recorder.category, recorder.path = "backward", "temporaries", ""
                loss.backward()
            del loss
            recorder.phase, recorder.category = "optimizer", "optimizer"
            optimizer.step()
        recorder.stop()
    return Trace(size, labelled(recorder.events))


@contextmanager
def _isolated() -> Iterator[None]:
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
