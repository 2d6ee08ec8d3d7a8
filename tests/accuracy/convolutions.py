"""Convolutions as events: what each asks of cuDNN, with its sizes, so that its workspace can be chosen afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_memplan import _kernels
from lightning_memplan._scaling import ScaledProgram

from .workspaces import convolution

_ATEN = torch.ops.aten
#: the arguments of a convolution's event, after its kernel's name
FIELDS = "direction n c h w k r s p q stride dilation groups width channels_last".split()


def rules() -> Mapping[Any, Any]:
    """Each convolution, forwards and backwards, as a temporary ``("cudnn", direction, n, c, h, w, k, ...)``.

    The direction is 0 for the result, 1 for the input's gradient, 2 for the filter's.
    """
    _kernels.KERNELS["cudnn"] = _none  # type: ignore[index]  # given afterwards
    return {_ATEN.convolution.default: _forward, _ATEN.convolution_backward.default: _backward}


def _forward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    return _event((0,), args[0], args[1], out, *args[3:9])


def _backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
    grad, x, weight, _, stride, padding, dilation, transposed, output_padding, groups, mask = args
    directions = [k for k in (1, 2) if mask[k - 1]]
    return _event(tuple(directions), x, weight, grad, stride, padding, dilation, transposed, output_padding, groups)


def _event(
    directions: Sequence[int],
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Sequence[Any]:
    if transposed:  # the input's gradient of the convolution that it undoes
        x, y = y, x
        directions = [{0: 1, 1: 0, 2: 2}[k] for k in directions]
    (h, w), (p, q), (r, s) = _plane(x), _plane(y), _plane(weight)
    last = _channels_last(x) or _channels_last(weight)
    sizes = (h, w, weight.size(0), r, s, p, q, stride[-1], max(dilation), groups, x.element_size(), int(last))
    events: list[Any] = [("cudnn", direction, x.size(0), x.size(1), *sizes) for direction in directions]
    # aten/src/ATen/native/cudnn/ConvShared.cpp: operands in another layout are copied first
    form = torch.channels_last if last else torch.contiguous_format
    read = (x, weight) if directions == (0,) else (y, weight, x) if len(directions) == 2 else (y, x)
    copies = [t.numel() * t.element_size() for t in read if not t.is_contiguous(memory_format=form)]
    return [*copies, *events]


def _plane(t: torch.Tensor) -> tuple[int, int]:
    rows = 1
    for size in t.shape[2:-1]:
        rows *= size
    return rows, t.size(-1)


def _channels_last(t: torch.Tensor) -> bool:
    """By its strides, as c10/core/MemoryFormat.h tells where both layouts are the same."""
    if t.dim() != 4 or not t.is_contiguous(memory_format=torch.channels_last):
        return False
    return not t.is_contiguous() or (t.stride(1) == 1 and t.stride(3) == t.size(1) > 1)


def with_workspaces(program: ScaledProgram, batch_size: int, choice: str) -> list[tuple[int, int, int]]:
    """The program's entries, each convolution's workspace the ``"low"``, ``"expected"`` or ``"high"`` one."""
    entries = program.at(batch_size)
    sizes: dict[int, int] = {}
    for i, (event, place) in enumerate(zip(program.events, program.sizes, strict=True)):
        if not place or event.rule[:1] != ("cudnn",):
            continue
        if place not in sizes:
            values = dict(zip(FIELDS, (v.at(batch_size) for v in program.table[place - 1][1]), strict=True))  # type: ignore[index]
            del values["direction"]
            sizes[place] = getattr(convolution(**{**values, "channels_last": bool(values["channels_last"])}), choice)
        block, _, stream = entries[i]
        entries[i] = block, sizes[place], stream
    return entries


def _none(*sizes: int) -> int:
    return 0
