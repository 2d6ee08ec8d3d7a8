"""Record a module's layers for the formula: parameters, output shapes, bytes of each feature map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from lightning_memplan.checks import check_batch_size
from lightning_memplan.data.batches import bytes_of, storage_key, tensors_of
from lightning_memplan.memory.formula import Formula
from lightning_memplan.types import Filters, Layer


# --- parameters of one layer ------------------------------------------------------------------------------------------
def filters_of(module: nn.Module) -> tuple[Filters, ...] | None:
    """Describe a layer's parameters as filters, from its attributes; return None for an unknown kind of layer.

    A transposed, grouped or one-dimensional convolution, a Linear, a norm, an embedding, attention and the recurrent
    layers are all filters: a Linear has a kernel of 1, a norm one weight and one bias a channel, a gate of an LSTM one
    filter a unit.

    >>> filters_of(nn.Conv3d(1, 30, 3))
    (Filters(kernel=27, inputs=1, biases=1, count=30),)
    >>> sum(f.per_filter for f in filters_of(nn.LSTM(8, 16)))  # 4 gates * 16 units * (8 + 16 weights + 2 biases)
    1664
    >>> filters_of(nn.ReLU())
    ()
    """
    match module:
        case nn.modules.conv._ConvNd():
            kernel = math.prod(module.kernel_size)
            has_bias = module.bias is not None
            return (Filters(kernel, module.in_channels // module.groups, int(has_bias), module.out_channels),)
        case nn.Linear():
            return (Filters(1, module.in_features, int(module.bias is not None), module.out_features),)
        case nn.Bilinear():
            pairs = module.in1_features * module.in2_features
            return (Filters(1, pairs, int(module.bias is not None), module.out_features),)
        case nn.modules.batchnorm._NormBase():  # BatchNorm*, SyncBatchNorm, InstanceNorm*
            return (Filters(1, 1, int(module.bias is not None), module.num_features),) if module.affine else ()
        case nn.GroupNorm():
            return (Filters(1, 1, int(module.bias is not None), module.num_channels),) if module.affine else ()
        case nn.LayerNorm():
            places = math.prod(module.normalized_shape)
            return (Filters(1, 1, int(module.bias is not None), places),) if module.elementwise_affine else ()
        case nn.RMSNorm():
            return (Filters(1, 1, 0, math.prod(module.normalized_shape)),) if module.elementwise_affine else ()
        case nn.Embedding() | nn.EmbeddingBag():
            return (Filters(1, module.embedding_dim, 0, module.num_embeddings),)
        case nn.PReLU():
            return (Filters(1, 1, 0, module.num_parameters),)
        case nn.MultiheadAttention():
            return _attention_filters(module)
        case nn.RNNBase():
            return _recurrent_filters(module)
        case nn.RNNCell() | nn.GRUCell() | nn.LSTMCell():
            gates = 4 if isinstance(module, nn.LSTMCell) else 3 if isinstance(module, nn.GRUCell) else 1
            inputs = module.input_size + module.hidden_size
            return (Filters(1, inputs, 2 * int(module.bias), gates * module.hidden_size),)
        case _:
            return None if any(True for _ in module.parameters()) else ()


def _attention_filters(module: nn.MultiheadAttention) -> tuple[Filters, ...]:
    """Count queries, keys, values and the output as four Linears, and the key and value that ``add_bias_kv`` learns."""
    width, bias = module.embed_dim, int(module.in_proj_bias is not None)
    projections = [Filters(1, inputs, bias, width) for inputs in (width, module.kdim, module.vdim)]
    output = Filters(1, width, int(module.out_proj.bias is not None), width)
    learnt = [Filters(1, 2, 0, width)] if module.bias_k is not None else []
    return (*projections, output, *learnt)


def _recurrent_filters(module: nn.RNNBase) -> tuple[Filters, ...]:
    """Count a filter for each unit of each gate: it reads the input and the last state, with a bias for each."""
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    directions = 2 if module.bidirectional else 1
    state = module.proj_size or module.hidden_size
    found = []
    for layer in range(module.num_layers):
        inputs = module.input_size if layer == 0 else state * directions
        for _ in range(directions):
            found.append(Filters(1, inputs + state, 2 * int(module.bias), gates * module.hidden_size))
            if module.proj_size:
                found.append(Filters(1, module.hidden_size, 0, module.proj_size))
    return tuple(found)


def _sample_shape(tensor: Tensor | None, batch_size: int) -> tuple[int, ...]:
    """Return the shape without the batch: the first dimension of that size, or the second where time comes first.

    A first dimension that is a multiple of the batch size has something folded into it, such as windows of an image:
    one sample's share of it stays.
    """
    if tensor is None:
        return ()
    shape = tuple(int(size) for size in tensor.shape)
    if batch_size in shape[:2]:
        batch = shape.index(batch_size)
        return shape[:batch] + shape[batch + 1 :]
    if shape and shape[0] and shape[0] % batch_size == 0:
        return (shape[0] // batch_size, *shape[1:])
    return shape


# --- rows -------------------------------------------------------------------------------------------------------------
def record_layers(module: nn.Module, run: Callable[[], object], batch_size: int) -> tuple[Layer, ...]:
    """Run a network once and record its layers: a row for each call, in the order in which calls finish.

    A layer is a module that calls no other module: ``nn.Conv3d``, but also ``nn.MultiheadAttention`` and any module
    that works on its children's parameters by functions. Parameters that none of these holds follow as rows of their
    own: of type ``Parameter`` and of their own shape where a parent has them (a class token), else of the type of the
    module that has them.

    - A row's ``feature_bytes`` are its output for one sample, by the dtype of each tensor in it; an output that lies in
      the memory of the layer's input (``nn.Identity``, a ReLU in place, ``nn.Flatten``) is no further feature map: 0.
    - A parameter counts once, in the first row that has it, however often it is called or tied; a frozen one has no
      gradient.
    - A layer that runs again in the backward pass, as under activation checkpointing, is not recorded twice.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 30 * 30, 10))
    >>> net = net.to("meta")
    >>> layers = record_layers(net, lambda: net(torch.empty(4, 3, 32, 32, device="meta")), batch_size=4)
    >>> for row in layers:
    ...     print(row.type, row.parameters, row.shape, row.feature_bytes)
    Conv2d 224 (8, 30, 30) 28800
    ReLU 0 (8, 30, 30) 0
    Flatten 0 (7200,) 0
    Linear 72010 (10,) 40

    Args:
        module: The network. Its hooks are as before when this returns or raises.
        run: Runs it on a batch of ``batch_size`` samples, backward or not.
        batch_size: Samples that ``run`` takes. Sizes are divided by it.

    Raises:
        ValueError: ``batch_size`` is less than 1, or a lazy module has no shapes yet.
    """
    check_batch_size(batch_size)
    _check_initialised(module)
    recorder = _Recorder(module, batch_size)
    try:
        recorder.attach()
        run()
    finally:
        recorder.detach()
    recorder.add_uncalled()
    return tuple(recorder.rows)


@dataclass(slots=True)
class _Call:
    module: nn.Module
    has_calls: bool = False  #: another module's call has ended inside it


class _Recorder:
    """Hook every module. A call that ends without another inside it was a layer's."""

    def __init__(self, module: nn.Module, batch_size: int) -> None:
        self.rows: list[Layer] = []
        self._batch_size = batch_size
        # a parametrization (such as a weight norm) belongs to the layer whose weight it computes
        hidden = {
            id(inner)
            for owner in module.modules()
            if parametrize.is_parametrized(owner) and isinstance(owner.parametrizations, nn.Module)
            for inner in owner.parametrizations.modules()
        }
        self._layers = [(child, path) for path, child in module.named_modules() if id(child) not in hidden]
        self._paths = {id(child): path for child, path in self._layers}  # a torchmetrics' metric's hash is its state's
        # before any call: in one, other tensors may stand for them (torch.func.functional_call)
        self._parameters = {id(child): tuple(child.parameters()) for child, _ in self._layers}
        self._calling: list[_Call] = []  # begun and not ended
        self._counted: dict[nn.Parameter, str] = {}  # and the path of the row that has it
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        for child, _ in self._layers:
            if isinstance(child, torch.jit.ScriptModule):  # TorchScript takes no hooks
                continue
            self._handles.append(child.register_forward_pre_hook(self._begin))
            self._handles.append(child.register_forward_hook(self._end, with_kwargs=True))

    def detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _begin(self, module: nn.Module, args: object) -> None:
        self._calling.append(_Call(module))

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        while (call := self._calling.pop()).module is not module:
            pass  # an exception ended this call, and the network caught it
        if self._calling:
            self._calling[-1].has_calls = True
        if call.has_calls or _in_backward():
            return
        held = {storage_key(tensor) for tensor in tensors_of((args, kwargs))}
        held.update(storage_key(tensor) for tensor in (*module.parameters(), *module.buffers()))
        tensors = tuple(tensors_of(output))
        feature_bytes = bytes_of(iter(tensors), held) // self._batch_size
        shape = _sample_shape(tensors[0] if tensors else None, self._batch_size)
        self._add(module, self._parameters[id(module)], shape, feature_bytes)

    def add_uncalled(self) -> None:
        """Add rows for the parameters that no recorded call has."""
        for module, path in self._layers:
            # a layer that was not called has a row for all that is left of it; a parent has rows for its own
            is_layer = all(id(child) not in self._paths for child in module.children())
            own = [p for p in module.parameters(recurse=is_layer) if p not in self._counted]
            if own and is_layer:
                self._add(module, list(module.parameters()), (), 0)
            elif own:
                for name, parameter in module.named_parameters(prefix=path, recurse=False):
                    if parameter not in self._counted:
                        self._counted[parameter] = name
                        sizes = _parameter_bytes([parameter])
                        self.rows.append(Layer(name, "Parameter", parameter.numel(), *sizes, tuple(parameter.shape), 0))

    def _add(
        self, module: nn.Module, parameters: Sequence[nn.Parameter], shape: tuple[int, ...], feature_bytes: int
    ) -> None:
        new = [p for p in parameters if p not in self._counted]
        path, kind, count = self._paths[id(module)], type(module).__name__, sum(p.numel() for p in new)
        filters, differs = textbook_filters(module), ""
        if filters and sum(each.per_filter for each in filters) != count:
            counted_in = dict.fromkeys(self._counted[p] for p in parameters if p in self._counted)
            differs = "; ".join(_differences(module, parameters, path, counted_in))
        self._counted.update(dict.fromkeys(new, path))
        if parametrize.is_parametrized(module):
            kind = kind.removeprefix("Parametrized")
        self.rows.append(Layer(path, kind, count, *_parameter_bytes(new), shape, feature_bytes, filters, differs))


def textbook_filters(module: nn.Module) -> tuple[Filters, ...]:
    """Return a layer's filters as the textbook counts them: each reads all input channels, and has a bias.

    A parametrized layer has none: it holds other tensors, and to read its bias would compute it.

    >>> textbook_filters(nn.Conv2d(16, 32, 3, groups=4, bias=False))
    (Filters(kernel=9, inputs=16, biases=1, count=32),)
    >>> textbook_filters(nn.Flatten())
    ()
    """
    found = () if parametrize.is_parametrized(module) else filters_of(module) or ()
    if found and isinstance(module, nn.modules.conv._ConvNd):
        found = (replace(found[0], inputs=module.in_channels),)
    return (replace(found[0], biases=max(1, found[0].biases)),) if len(found) == 1 else found


def _differences(
    module: nn.Module, parameters: Sequence[nn.Parameter], path: str, counted_in: Iterable[str]
) -> Iterator[str]:
    """Say why a row counts other numbers than its layer's filters; other rows have ``counted_in`` some of them."""
    filters = filters_of(module) or ()
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
        reads = module.in_channels // module.groups
        yield f"groups={module.groups}, so that a filter reads {reads} of {module.in_channels} channels"
    if len(filters) == 1 and not filters[0].biases:
        yield "no bias"
    if sum(p.numel() for p in parameters) != sum(each.per_filter for each in filters):
        yield "it holds other tensors than its kind does"
    for other in counted_in:
        yield "counted at its first call" if other == path else f"tied, and counted in {other or '(itself)'}"


def _parameter_bytes(parameters: Sequence[nn.Parameter]) -> tuple[int, int]:
    """Return the bytes of parameters, and of the gradients of those that are not frozen."""
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in parameters]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def _in_backward() -> bool:
    # Source: torch/utils/module_tracker.py, ModuleTracker.is_bw
    return torch._C._current_graph_task_id() != -1


def _check_initialised(module: nn.Module) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name!r} has no shape yet: run one batch through the lazy modules first")


def make_formula(module: nn.Module, layers: Sequence[Layer], input_bytes: int, optimizer_bytes: int = 0) -> Formula:
    """Return the formula of a network whose layers were recorded with :func:`record_layers`.

    >>> from lightning_memplan.data.batches import sample_bytes
    >>> net = nn.Linear(4, 2)
    >>> batch = torch.ones(3, 4)
    >>> formula = make_formula(net, record_layers(net, lambda: net(batch), 3), input_bytes=sample_bytes(batch, 3))
    >>> formula.memory(3)  # (4 + 1) * 2 parameters, twice, and 3 * (4 + 2 * 2) elements, of 4 bytes
    176

    Args:
        module: The network, for its parameters and their gradients.
        layers: Its recorded layers.
        input_bytes: Bytes of one sample of its input.
        optimizer_bytes: Bytes of the optimizer's state, which the formula reports apart.

    Raises:
        ValueError: a size in bytes is negative, or the layers are another network's.
    """
    _check_initialised(module)
    parameter_bytes, gradient_bytes = _parameter_bytes(list(module.parameters()))
    recorded = sum(layer.parameter_bytes for layer in layers)
    if recorded != parameter_bytes:
        raise ValueError(
            f"the layers hold {recorded} bytes of parameters and the module {parameter_bytes}: "
            "they were recorded from another network, or from this one in another precision"
        )
    feature_bytes = sum(layer.feature_bytes for layer in layers)
    return Formula(tuple(layers), parameter_bytes, gradient_bytes, input_bytes, feature_bytes, optimizer_bytes)
