"""Recurrent networks on CUDA: cuDNN's kernels for whole sequences, with a reserve and a workspace, and fused cells.

Source: aten/src/ATen/native/cudnn/RNN.cpp, cuda/RNN.cu and RNN.cpp (2.14); sizes as measured on an H200 (cuDNN 9.19).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from lightning_memplan.cuda.rule_set import Gpu, Workspace, aten, decomposes, keeps_workspace


class _LSTMCell(torch.autograd.Function):
    """Keep the gates for the backward pass.

    Source: aten/src/ATen/native/cuda/RNN.cu, ``_thnn_fused_lstm_cell`` (2.14).
    """

    @staticmethod
    def forward(ctx: Any, gates: torch.Tensor, hidden: torch.Tensor, state: torch.Tensor, *biases: Any) -> Any:
        kept, h, c = torch.empty_like(gates), torch.empty_like(state), torch.empty_like(state)
        ctx.save_for_backward(state, c, kept, gates, hidden)  # the gates for a second derivative
        ctx.set_materialize_grads(False)
        ctx.biased = biases[0] is not None
        return h, c

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        state, _, kept, *_ = ctx.saved_tensors
        gates, before = torch.empty_like(kept), torch.empty_like(state)
        bias = gates.sum(0) if ctx.biased else None
        return gates, gates, before, bias, bias


class _GRUCell(torch.autograd.Function):
    """Source: aten/src/ATen/native/cuda/RNN.cu, ``_thnn_fused_gru_cell`` (2.14)."""

    @staticmethod
    def forward(ctx: Any, gates: torch.Tensor, hidden: torch.Tensor, state: torch.Tensor, *biases: Any) -> Any:
        kept, h = state.new_empty(state.size(0), 5 * state.size(1)), torch.empty_like(state)
        ctx.save_for_backward(kept, gates, hidden, state)
        ctx.biased = biases[0] is not None
        return h

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        kept = ctx.saved_tensors[0]
        size = kept.size(1) // 5
        of_input, of_hidden = (kept.new_empty(kept.size(0), 3 * size) for _ in range(2))
        before = kept.new_empty(kept.size(0), size)
        biases = (of_input.sum(0), of_hidden.sum(0)) if ctx.biased else (None, None)
        return of_input, of_hidden, before, *biases


def lstm_cell(
    input: torch.Tensor, state: Sequence[torch.Tensor], w_ih: torch.Tensor, w_hh: torch.Tensor, *biases: Any
) -> Any:
    """Run the one kernel that CUDA has for a cell.

    Source: aten/src/ATen/native/RNN.cpp, ``LSTMCell`` (2.14).
    """
    h, c = state
    b_ih, b_hh = (*biases, None, None)[:2]
    return _LSTMCell.apply(torch.matmul(input, w_ih.t()), torch.matmul(h, w_hh.t()), c, b_ih, b_hh)


def gru_cell(
    input: torch.Tensor, state: torch.Tensor, w_ih: torch.Tensor, w_hh: torch.Tensor, *biases: Any
) -> torch.Tensor:
    b_ih, b_hh = (*biases, None, None)[:2]
    return _GRUCell.apply(torch.matmul(input, w_ih.t()), torch.matmul(state, w_hh.t()), state, b_ih, b_hh)  # type: ignore[no-any-return]


_CUDNN_TYPES = (torch.float16, torch.float32, torch.float64)  # torch/backends/cudnn/__init__.py, is_acceptable


class RNN(NamedTuple):
    """The shape of a recurrent network for cuDNN, in the order of its operators' arguments.

    Modes 0 and 1 are plain networks, 2 is an LSTM and 3 a GRU.

    >>> RNN(2, 256, 0, 2, True, 0.0, True, False).reserve(3200, 4)  # 3200 · 256 · (5 · 2 + 1) · 4 + 256
    36045056
    """

    mode: int
    hidden: int
    projected: int  #: 0 where the network does not project
    layers: int
    batch_first: bool
    dropout: float
    train: bool
    bidirectional: bool

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def gates(self) -> int:
        return {2: 4, 3: 3}.get(self.mode, 1)

    def weights(self, width: int) -> int:
        """Return the values in the one buffer of all weights, which has two biases a gate, also without any in use."""
        out = self.projected or self.hidden
        total = 0
        for layer in range(self.layers):
            source = out * self.directions if layer else width
            projection = out * self.hidden if self.projected else 0
            total += self.directions * (self.gates * self.hidden * (source + out + 2) + projection)
        return total

    def reserve(self, rows: int, element: int) -> int:
        """Return the bytes that a training step keeps; ``rows`` are its time steps times its samples.

        Each layer of an LSTM keeps 5 values (gates and cell), of a GRU 6, of a plain network 1, and each layer but the
        last its results. Measured to the byte on an H200 with cuDNN 9.19, but for dropout's masks of a bit a value,
        which are left out here.
        """
        values = {2: 5, 3: 6}.get(self.mode, 1) * self.layers + self.layers - 1
        return rows * self.directions * self.hidden * values * element + 256

    def workspace(self, rows: int, width: int, element: int) -> int:
        """Return the bytes that cuDNN takes in each pass.

        There are 8 MiB for each layer and direction, the matrices of the weights, and the gates, states and inputs of
        one layer at all time steps. The first two were measured to the byte as above. The last grow with the samples:
        670 values a hidden unit were measured for an LSTM of 100 steps and 460 for a GRU (here 700 and 500), and more
        for a plain network (1406; here 250). From some thousand samples on cuDNN has another algorithm, and takes more.
        """
        parts = self.layers * self.directions
        matrices = self.weights(width) - 2 * parts * self.gates * self.hidden
        widest = max(width, self.directions * self.hidden) if self.layers > 1 else width
        states = 2 if self.mode == 2 else 1
        rising = rows * (self.directions * self.hidden * (self.gates + states) + widest)
        return parts * 2**23 + 288 + element * (matrices + rising)


def recurrent(mode: int) -> Callable[..., Any]:
    """Return the operator of a whole sequence, which is cuDNN's kernel and keeps a reserve.

    Source: aten/src/ATen/native/RNN.cpp (2.14).
    """

    def kernel(
        input: torch.Tensor,
        hx: Any,
        params: Sequence[torch.Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
        sizes: Sequence[int] = (),
    ) -> Any:
        hidden, cell = (hx[0], hx[1]) if mode == 2 else (hx, None)
        size = (cell if cell is not None else hidden).size(2)
        projected = hidden.size(2) if hidden.size(2) != size else 0
        per_layer = (4 if has_biases else 2) + bool(projected)
        if train and dropout > 0:
            aten._cudnn_init_dropout_state.default(dropout, train, 0, dtype=torch.uint8, device=input.device)
        shape = RNN(mode, size, projected, num_layers, batch_first, dropout, train, bidirectional)
        out = aten._cudnn_rnn.default(input, params, per_layer, None, hidden, cell, *shape, sizes or [], None)
        return out[:3] if mode == 2 else out[:2]

    return kernel


def recurrent_packed(mode: int) -> Callable[..., Any]:
    """Return the operator of a packed sequence, whose numbers of samples at each time step are on the host."""
    whole = recurrent(mode)

    def kernel(
        data: torch.Tensor,
        batch_sizes: torch.Tensor,
        hx: Any,
        params: Sequence[torch.Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
    ) -> Any:
        options = (has_biases, num_layers, dropout, train, bidirectional, False)
        return whole(data, hx, params, *options, sizes=batch_sizes.tolist())

    return kernel


@decomposes(aten._pack_padded_sequence)
def pack_padded(input: torch.Tensor, lengths: torch.Tensor, batch_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy each stretch of time steps that the same samples have, and then all of them into one tensor.

    Source: aten/src/ATen/native/PackedSequence.cpp (2.14).
    """
    x = aten.transpose.int(input, 0, 1) if batch_first else input
    parts, sizes, done = [], [], 0
    for shorter, length in enumerate(reversed(lengths.tolist())):  # they fall: checked by the caller
        if length > done:
            count = x.size(1) - shorter
            part = x[done:length, :count]
            part = part if part.is_contiguous() else aten.clone.default(part, memory_format=torch.contiguous_format)
            parts.append(part.view(-1, *x.shape[2:]))
            sizes += [count] * (length - done)
            done = length
    return aten.cat.default(parts), torch.tensor(sizes)


def reflattened_rnn(
    input: torch.Tensor,
    weight: Sequence[torch.Tensor],
    weight_stride0: int,
    weight_buf: torch.Tensor | None,
    hx: torch.Tensor,
    cx: torch.Tensor | None,
    *rest: Any,
) -> Any:
    """Cast all weights into one new buffer, to float16 whatever autocast's type is.

    Source: aten/src/ATen/cudnn/AutocastRNN.cpp (2.14).
    """
    half = torch.float16
    if weight[0].dtype == torch.float32:
        flat = torch.zeros(RNN(*rest[:8]).weights(input.size(-1)), dtype=half, device=input.device)
        weight_buf = flat
        weight = [part.detach().copy_(w) for part, w in zip(_laid_out(flat, weight), weight, strict=True)]
    cx = None if cx is None else cx.to(half)
    hx = hx.to(half)  # arguments of a call are made from the last to the first
    return aten._cudnn_rnn.default(input.to(half), weight, weight_stride0, weight_buf, hx, cx, *rest)


@decomposes(aten._cudnn_rnn)
def cudnn_rnn(
    input: torch.Tensor,
    weight: Sequence[torch.Tensor],
    weight_stride0: int,
    weight_buf: torch.Tensor | None,
    hx: torch.Tensor,
    cx: torch.Tensor | None,
    *rest: Any,
) -> Any:
    """Allocate the workspace and the reserve of `RNN` beside the outputs.

    Source: aten/src/ATen/native/cudnn/RNN.cpp, ``_cudnn_rnn`` (2.14).
    """
    rnn = RNN(*rest[:8])
    x = _steps_first(input, rnn)
    outer = x.shape[:-1]  # steps and samples, or both in one where the sequence is packed
    out = x.new_empty((*outer, (rnn.projected or rnn.hidden) * rnn.directions))
    last = x.new_empty(hx.shape)
    last_cell = x.new_empty(cx.shape if cx is not None else (0,))
    if weight_buf is not None:
        flat = aten.alias.default(weight_buf)
    else:
        flat = x.new_empty((0 if _is_flat(weight) else rnn.weights(x.size(-1)),))
    rows, element = math.prod(outer), x.element_size()
    work = x.new_empty((rnn.workspace(rows, x.size(-1), element),), dtype=torch.uint8)
    reserve = x.new_empty((rnn.reserve(rows, element) if rnn.train else 0,), dtype=torch.uint8)
    del work
    out = aten.transpose.int(out, 0, 1) if rnn.batch_first else out
    return out, last, last_cell, reserve, flat


@decomposes(aten._cudnn_rnn_backward)
def cudnn_rnn_backward(
    input: torch.Tensor,
    weight: Sequence[torch.Tensor],
    weight_stride0: int,
    weight_buf: torch.Tensor | None,
    hx: torch.Tensor,
    cx: torch.Tensor | None,
    output: torch.Tensor,
    grad_output: torch.Tensor | None,
    grad_hy: torch.Tensor | None,
    grad_cy: torch.Tensor | None,
    *rest: Any,
) -> Any:
    """Make the gradients of input and states, then of the weights, in one buffer.

    Source: aten/src/ATen/native/cudnn/RNN.cpp, ``_cudnn_rnn_backward`` (2.14).
    """
    rnn = RNN(*rest[:8])
    grad_output = aten.zeros_like.default(output) if grad_output is None else grad_output
    grad_hy = aten.zeros_like.default(hx) if grad_hy is None else grad_hy
    grad_cy = aten.zeros_like.default(cx) if grad_cy is None and cx is not None else grad_cy
    width = input.size(-1)
    space = rnn.workspace(input.numel() // width, width, input.element_size())

    def of_inputs() -> tuple[torch.Tensor, ...]:
        x, dy = _steps_first(input, rnn), _steps_first(grad_output, rnn)
        made = x.new_empty(x.shape), x.new_empty(hx.shape), x.new_empty(cx.shape if cx is not None else (0,))
        work = x.new_empty((space,), dtype=torch.uint8)
        del work, dy
        return made

    def of_weights() -> torch.Tensor:
        x = _steps_first(input, rnn)
        flat = x.new_empty((rnn.weights(x.size(-1)),))
        work = x.new_empty((space,), dtype=torch.uint8)
        del work
        return flat

    dx, dhx, dcx = of_inputs()
    gradients = _laid_out(of_weights(), weight)
    return aten.transpose.int(dx, 0, 1) if rnn.batch_first else dx, dhx, dcx, gradients


def _laid_out(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Cut one buffer into consecutive views of these shapes."""
    parts, place = [], 0
    for w in like:
        parts.append(flat[place : place + w.numel()].view(w.shape))
        place += w.numel()
    return parts


def _is_flat(weight: Sequence[torch.Tensor]) -> bool:
    """Check that all weights are in one buffer: others are copied into one, which is kept for the backward pass.

    Source: aten/src/ATen/native/cudnn/RNN.cpp, ``try_get_weight_buf`` (2.14).
    """
    return len({w.untyped_storage()._cdata for w in weight}) == 1


def flatten_weights(module: torch.nn.RNNBase) -> None:
    """Lay the weights out in one buffer, as a recurrent network does when it is moved to a GPU.

    Source: torch/nn/modules/rnn.py, ``flatten_parameters``, for the types that cuDNN takes (2.14).
    """
    weights = [getattr(module, name) for name in module._flat_weights_names]
    if weights[0].dtype not in _CUDNN_TYPES:
        return
    mode = {"LSTM": 2, "GRU": 3}.get(module.mode, 0)
    rnn = RNN(
        mode, module.hidden_size, module.proj_size, module.num_layers, True, 0.0, True, bool(module.bidirectional)
    )
    flat = torch.zeros(rnn.weights(module.input_size), dtype=weights[0].dtype, device=weights[0].device)
    for weight, part in zip(weights, _laid_out(flat, weights), strict=True):
        weight.data = part


def _steps_first(tensor: torch.Tensor, rnn: RNN) -> torch.Tensor:
    tensor = aten.transpose.int(tensor, 0, 1) if rnn.batch_first else tensor
    return tensor if tensor.is_contiguous() else aten.clone.default(tensor, memory_format=torch.contiguous_format)


@keeps_workspace(aten._cudnn_init_dropout_state)
def dropout_state(gpu: Gpu) -> Workspace:
    """Return cuDNN's random state, which the first recurrent network with dropout makes and keeps.

    It has 24 bytes for each thread that the GPU runs at once (measured on an H200 with cuDNN 9.19).

    >>> dropout_state(Gpu((9, 0), multiprocessors=132, threads=2048)).size  # 132 · 2048 · 24
    6488064
    """
    return Workspace("cudnn dropout", gpu.multiprocessors * gpu.threads * 24, of_each_thread=False)


@decomposes(aten._cudnn_init_dropout_state)
def no_dropout_state(*args: Any, device: torch.device, **kwargs: Any) -> torch.Tensor:
    """The state is a workspace (see `dropout_state`)."""
    return torch.empty(0, dtype=torch.uint8, device=device)
