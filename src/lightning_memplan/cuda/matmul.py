"""Matrix products: cuBLAS's workspaces, and copies of operands that it cannot read as they lie."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import torch

from lightning_memplan.cuda.layout import copy_of
from lightning_memplan.cuda.rule_set import (
    OUTPUTS,
    VERSION,
    Allocation,
    Call,
    Gpu,
    Scratch,
    Workspace,
    allocates,
    aten,
    keeps_workspace,
)

#: torch 2.15 takes cuBLAS's workspace anew for every call; before, each thread kept the first (seen on 2.14 and 2.15)
WORKSPACE_PER_CALL = VERSION >= (2, 15)

#: Operators that call cuBLAS
PRODUCTS = (
    aten.mm.default,
    aten.addmm.default,
    aten.addmm_.default,
    aten._addmm_activation.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.addbmm.default,
    aten.mv.default,
    aten.addmv.default,
)

_CUBLASLT_WORKSPACE = 2**20  # aten/src/ATen/cuda/CUDABlas.cpp, 2.15: 1 MiB where the product adds a bias


def cublas_workspace(capability: tuple[int, int]) -> int:
    """Return the bytes of cuBLAS's workspace.

    ``:4096:2:16:8`` (KiB times count) is 2·4096 KiB + 8·16 KiB = 8,519,680 bytes; on compute capability 9.0 and later
    it is 32 MiB. CUBLAS_WORKSPACE_CONFIG sets another.

    Source: aten/src/ATen/cuda/CublasHandlePool.cpp, ``getChosenWorkspaceSize`` (2.14).
    """
    pairs = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if pairs:
        return sum(int(size) * int(count) for size, count in pairs) * 2**10
    return 32 * 2**20 if capability >= (9, 0) else (2 * 4096 + 8 * 16) * 2**10


def kept_workspace(gpu: Gpu) -> Workspace:
    """Return cuBLAS's workspace, which the first matrix product in each thread allocates and keeps (up to 2.14)."""
    return Workspace("cublas", cublas_workspace(gpu.capability))


if not WORKSPACE_PER_CALL:
    keeps_workspace(*PRODUCTS)(kept_workspace)


def _workspace_of_call(gpu: Gpu, biased: bool = False) -> Iterator[Scratch]:
    """Yield the workspace that each call takes from 2.15 on: cuBLASLt's where the product adds a bias."""
    if WORKSPACE_PER_CALL:
        yield Scratch(_CUBLASLT_WORKSPACE if biased else cublas_workspace(gpu.capability))


@allocates(aten.mm)
def mm(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    yield OUTPUTS
    yield from _copied_matrices(*call.args[:2])
    yield from _workspace_of_call(gpu)


@allocates(aten.addmm)
def addmm(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    yield OUTPUTS
    yield from _copied_matrices(*call.args[1:3])
    yield from _workspace_of_call(gpu, biased=_adds_bias(*call.args[:3]))


@allocates(aten.addmm_, aten._addmm_activation)
def addmm_without_cublaslt(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    yield OUTPUTS
    yield from _copied_matrices(*call.args[1:3])
    yield from _workspace_of_call(gpu)


@allocates(aten.bmm)
def bmm(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    yield OUTPUTS
    yield from _copied_batches(*call.args[:2])
    yield from _workspace_of_call(gpu)


@allocates(aten.baddbmm)
def baddbmm(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    yield OUTPUTS
    yield from _copied_batches(*call.args[1:3])
    yield from _workspace_of_call(gpu)


@allocates(aten.addbmm)
def addbmm(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    yield OUTPUTS
    yield from _workspace_of_call(gpu)


@allocates(aten.mv)
def mv(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    yield OUTPUTS
    yield from _copied_matrix_and_vector(*call.args[:2])
    yield from _workspace_of_call(gpu)


@allocates(aten.addmv)
def addmv(call: Call, gpu: Gpu) -> Iterator[Allocation]:
    yield OUTPUTS
    yield from _copied_matrix_and_vector(*call.args[1:3])
    yield from _workspace_of_call(gpu)


# ---------------------------------------------------------------------------------- operands that cuBLAS needs copied


def _copied_matrices(a: torch.Tensor, b: torch.Tensor) -> Iterator[Scratch]:
    """Yield a copy of each operand that is neither dense nor has contiguous rows or columns.

    The second operand comes first: the rows of the result are columns to cuBLAS.

    Source: aten/src/ATen/native/cuda/cuBlasCommonArgs.h, ``prepare_matrix_for_cublas`` (2.14).
    """
    for operand in (b, a):
        if not _has_rows(operand) and not aten.is_non_overlapping_and_dense.default(operand):
            yield copy_of(operand)


def _has_rows(matrix: torch.Tensor) -> bool:
    """Check that a matrix has contiguous rows or contiguous columns."""
    (rows, columns), (down, right) = matrix.shape, matrix.stride()
    return (down == 1 and right >= max(1, rows)) or (right == 1 and down >= max(1, columns))


def _copied_batches(a: torch.Tensor, b: torch.Tensor) -> Iterator[Scratch]:
    """Yield a copy of each operand of a batched product that has neither contiguous rows nor columns.

    An outer product is computed otherwise (seen on 2.14).

    Source: aten/src/ATen/native/cuda/Blas.cpp, ``prepare_batch_matrix_for_cublas`` (2.14).
    """
    if a.size(2) == 1:
        return
    (rows, inner), columns = a.shape[1:], b.size(2)
    swapped = columns != 1  # the rows of the result are columns to cuBLAS
    m, n = (columns, rows) if swapped else (rows, columns)
    first, second = (b, a) if swapped else (a, b)
    for operand, sizes in ((first, (m, inner)), (second, (inner, n))):
        if not _is_batch(operand, *sizes, swapped):
            yield copy_of(operand)


def _is_batch(tensor: torch.Tensor, m: int, n: int, swapped: bool) -> bool:
    fast, leading = tensor.stride()[1:] if not swapped else tensor.stride()[:0:-1]
    if (fast == 1 and leading >= max(1, m)) or (leading == 1 and fast >= max(1, n)):
        return True
    return tensor.is_contiguous() and 0 not in (fast, leading)


def _copied_matrix_and_vector(matrix: torch.Tensor, vector: torch.Tensor) -> Iterator[Scratch]:
    """Source: aten/src/ATen/native/cuda/Blas.cpp, ``addmv_out_cuda`` (2.14)."""
    if vector.stride(0) == 0:
        yield copy_of(vector)
    if not _has_rows(matrix) and not matrix.is_contiguous():
        yield copy_of(matrix)


def _adds_bias(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Source: aten/src/ATen/native/cuda/Blas.cpp, ``isInputCompliesAddmmCudaLt`` (2.15)."""
    return bias.dim() == 1 and bias.is_contiguous() and bias.size(0) == b.size(1) and b.size(0) > 1 and b.size(1) > 1
