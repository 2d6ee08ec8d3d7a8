"""Assemble the rules for one GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_memplan.cuda.attention import flash, flash_backward
from lightning_memplan.cuda.convolutions import COPIED_GRADIENTS, POOLS, convolutions
from lightning_memplan.cuda.indexing import embedding, embedding_backward, index_copies, index_put
from lightning_memplan.cuda.layout import Rule, copied
from lightning_memplan.cuda.matmul import CUBLAS, OPERANDS, WORKSPACE_PER_CALL, cublas_workspace, with_workspace
from lightning_memplan.cuda.normalization import NORMS, ROWS, layer_norm_backward
from lightning_memplan.cuda.reductions import (
    Card,
    accumulator,
    cast_first,
    foreach_norm,
    loss,
    reduction,
    reductions,
    sum_vector,
    sums_of_channels,
)
from lightning_memplan.cuda.rule_set import aten, exists, operator


def workspaces(
    capability: tuple[int, int] = (8, 6), multiprocessors: int = 82, threads: int = 1536
) -> Mapping[Any, tuple[str, int]]:
    """cuBLAS's workspace, where the first product of matrices in each thread makes it and it stays; cuDNN's random
    state, which the first recurrent network with dropout makes: 24 bytes for each thread that the card runs at once
    (measured: 132 · 2048 · 24 = 6,488,064 on an H200, cuDNN 9.19)."""
    state = multiprocessors * threads * 24
    made = {} if WORKSPACE_PER_CALL else dict.fromkeys(CUBLAS, ("cublas", cublas_workspace(capability)))
    return {**made, aten._cudnn_init_dropout_state.default: ("cudnn dropout", state)}


def temporaries(
    capability: tuple[int, int] = (8, 6), multiprocessors: int = 82, threads: int = 1536
) -> Mapping[Any, Rule]:
    """Bytes that CUDA's kernels allocate beside their outputs, and free before they return."""
    rules: dict[Any, Rule] = dict(OPERANDS)
    if WORKSPACE_PER_CALL:
        rules.update({op: with_workspace(op, rules.get(op), cublas_workspace(capability)) for op in CUBLAS})
    card = Card(multiprocessors, threads)
    sums = cast_first(reduction(card, accumulator, sum_vector))
    rules.update(reductions(card))
    rules.update(NORMS)
    rules.update(ROWS)
    rules[aten.native_layer_norm_backward.default] = layer_norm_backward(card)
    rules.update({operator(name): copied(0) for name in COPIED_GRADIENTS if exists(name)})
    rules.update(POOLS)
    rules.update(convolutions(capability, lambda grad: sums_of_channels(grad, card)))
    rules.update(
        dict.fromkeys([aten.mse_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default], loss(card))
    )
    rules[aten._foreach_norm.Scalar] = foreach_norm
    rules[aten.embedding.default] = embedding
    rules[aten.embedding_dense_backward.default] = embedding_backward
    rules[aten.index.Tensor] = index_copies
    rules[aten.index_put.default] = rules[aten.index_put_.default] = index_put
    rules[aten._scaled_dot_product_flash_attention.default] = flash
    rules[aten._scaled_dot_product_flash_attention_backward.default] = flash_backward
    rules.update(dict.fromkeys([aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default], sums))
    rules.update(dict.fromkeys([aten.cumsum.default, aten.cumprod.default], cast_first(lambda args, kwargs, out: ())))
    return rules


#: Statistics that CUDA keeps in float32 where the input is half (aten/src/ATen/native/cudnn/BatchNorm.cpp)
WIDTHS: Mapping[Any, Mapping[int, int]] = {
    aten.cudnn_batch_norm.default: {1: 4, 2: 4},
    aten.native_batch_norm.default: {1: 4, 2: 4},
    # what only the CPU keeps (aten/src/ATen/native/Activation.cpp, log_sigmoid_forward's buffer)
    aten.log_sigmoid_forward.default: {1: 0},
}


#: Outputs that CUDA allocates in another order than they are returned in: the mask first
#: (aten/src/ATen/native/cuda/Dropout.cu)
ORDER: Mapping[Any, Sequence[int]] = {
    aten.native_dropout.default: (1, 0),
}
