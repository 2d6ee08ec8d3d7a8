"""Matrix products: cuBLAS's workspaces, and operands that it needs copied."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_memplan.cuda.layout import Rule, nbytes
from lightning_memplan.cuda.rule_set import VERSION, aten

# ---------------------------------------------------------------------------------------------- memory beside outputs
CUBLAS = [aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.addmm_.default]


CUBLAS += [aten.addmv.default, aten.mv.default, aten.addbmm.default, aten._addmm_activation.default]


#: torch 2.15 takes cuBLAS's workspace anew for every call; before, each thread kept the first (seen on 2.14 and 2.15)
WORKSPACE_PER_CALL = VERSION >= (2, 15)


_CUBLASLT_WORKSPACE = 2**20  # aten/src/ATen/cuda/CUDABlas.cpp, 2.15: 1 MiB where the product adds a bias


def cublas_workspace(capability: tuple[int, int]) -> int:
    """aten/src/ATen/cuda/CublasHandlePool.cpp, ``getChosenWorkspaceSize``: ``:4096:2:16:8`` (KiB times count) is
    2·4096 KiB + 8·16 KiB = 8,519,680 bytes; 32 MiB on compute capability 9.0 and later, or as CUBLAS_WORKSPACE_CONFIG
    says."""
    pairs = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if pairs:
        return sum(int(size) * int(count) for size, count in pairs) * 2**10
    return 32 * 2**20 if capability >= (9, 0) else (2 * 4096 + 8 * 16) * 2**10


def _matrices(a: torch.Tensor, b: torch.Tensor) -> tuple[int, ...]:
    """aten/src/ATen/native/cuda/cuBlasCommonArgs.h, ``prepare_matrix_for_cublas``: an operand that is neither dense nor
    has rows or columns of its own is copied; the second first, since the result has its rows as cuBLAS has columns."""
    return tuple(nbytes(operand) for operand in (b, a) if not _is_matrix(operand))


def _is_matrix(tensor: torch.Tensor) -> bool:
    (rows, columns), (down, right) = tensor.shape, tensor.stride()
    if (down == 1 and right >= max(1, rows)) or (right == 1 and down >= max(1, columns)):
        return True
    return bool(aten.is_non_overlapping_and_dense.default(tensor))


def _batches(a: torch.Tensor, b: torch.Tensor) -> tuple[int, ...]:
    """aten/src/ATen/native/cuda/Blas.cpp, ``prepare_batch_matrix_for_cublas``; outer products go another way (seen on
    2.14)."""
    if a.size(2) == 1:
        return ()
    (rows, inner), columns = a.shape[1:], b.size(2)
    swapped = columns != 1  # whether the result has its rows as cuBLAS has columns
    m, n = (columns, rows) if swapped else (rows, columns)
    first, second = (b, a) if swapped else (a, b)
    copied = (x for x, sizes in ((first, (m, inner)), (second, (inner, n))) if not _is_batch(x, *sizes, swapped))
    return tuple(map(nbytes, copied))


def _is_batch(tensor: torch.Tensor, m: int, n: int, swapped: bool) -> bool:
    fast, leading = tensor.stride()[1:] if not swapped else tensor.stride()[:0:-1]
    if (fast == 1 and leading >= max(1, m)) or (leading == 1 and fast >= max(1, n)):
        return True
    return tensor.is_contiguous() and 0 not in (fast, leading)


def _matrix_and_vector(matrix: torch.Tensor, vector: torch.Tensor) -> tuple[int, ...]:
    """aten/src/ATen/native/cuda/Blas.cpp, ``addmv_out_cuda``."""
    (rows, columns), (down, right) = matrix.shape, matrix.stride()
    laid = (down == 1 and right >= max(1, rows)) or (right == 1 and down >= max(1, columns)) or matrix.is_contiguous()
    return (*((nbytes(vector),) if vector.stride(0) == 0 else ()), *(() if laid else (nbytes(matrix),)))


#: Copies of operands that cuBLAS cannot read as they lie
OPERANDS: dict[Any, Rule] = {
    aten.mm.default: lambda args, kwargs, out: _matrices(*args[:2]),
    aten.addmm.default: lambda args, kwargs, out: _matrices(*args[1:3]),
    aten.addmm_.default: lambda args, kwargs, out: _matrices(*args[1:3]),
    aten._addmm_activation.default: lambda args, kwargs, out: _matrices(*args[1:3]),
    aten.bmm.default: lambda args, kwargs, out: _batches(*args[:2]),
    aten.baddbmm.default: lambda args, kwargs, out: _batches(*args[1:3]),
    aten.mv.default: lambda args, kwargs, out: _matrix_and_vector(*args[:2]),
    aten.addmv.default: lambda args, kwargs, out: _matrix_and_vector(*args[1:3]),
}


def with_workspace(op: Any, rule: Rule | None, size: int) -> Rule:
    def both(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Sequence[Any]:
        copies = () if rule is None else rule(args, kwargs, out)
        biased = op is aten.addmm.default and _adds_bias(*args[:3])
        return (*copies, _CUBLASLT_WORKSPACE if biased else size)

    return both


def _adds_bias(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> bool:
    # aten/src/ATen/native/cuda/Blas.cpp, isInputCompliesAddmmCudaLt
    return bias.dim() == 1 and bias.is_contiguous() and bias.size(0) == b.size(1) and b.size(0) > 1 and b.size(1) > 1
