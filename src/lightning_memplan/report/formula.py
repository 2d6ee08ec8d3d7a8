"""The formula as text, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_memplan.report.text import WIDTH, shorten_end, shorten_middle, wrap
from lightning_memplan.types import Layer
from lightning_memplan.units import format_bytes


def layers_table(
    layers: Sequence[Layer],
    *,
    input_bytes: int,
    batch_size: int = 1,
    optimizer_bytes: int = 0,
    top: int | None = None,
) -> str:
    """Return the formula layer by layer, with its totals, and written out with its numbers.

    ``shape`` and ``output`` are one sample's. With ``top``, only so many layers are shown, the largest at this batch
    size, in the network's order; the rest is one line. For layers made of filters the parameters are counted as the
    textbook does, one filter first and then weights and biases apart, beside what their tensors hold.

    >>> from lightning_memplan.types import Filters
    >>> conv = Layer("conv", "Conv3d", 840, 3360, 3360, (30, 191, 227, 191), 993742440, (Filters(27, 1, 1, 30),))
    >>> print(layers_table([conv], input_bytes=34119604, batch_size=2))
    layer          type    parameters  shape               output
    conv           Conv3d         840  30x191x227x191  947.71 MiB
    input                                               32.54 MiB
    sum of layers                 840                  947.71 MiB
    <BLANKLINE>
    parameters     (kernel·in + bias)·out
    conv           (27·1+1)·30 = 840; 27·1·30 + 30 = 840; in tensors 840
    <BLANKLINE>
    memory(bs) = params + grads + bs x (I1 + 2 x sum Ii)
               = 3.28 KiB + 3.28 KiB + bs x (32.54 MiB + 2 x 947.71 MiB)
    memory(2)  = 3.77 GiB

    Raises:
        ValueError: ``batch_size`` or ``top`` is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"a batch size is at least 1, and {batch_size} is not")
    if top is not None and top < 1:
        raise ValueError(f"top is a number of layers to show, at least 1, and {top} is not")
    shown = _largest_layers(layers, batch_size, len(layers) if top is None else top)
    hidden = [row for i, row in enumerate(layers) if i not in shown]
    parameters, features = sum(row.parameters for row in layers), sum(row.feature_bytes for row in layers)
    cells = [("layer", "type", "parameters", "shape", "output")]
    for row in (layers[i] for i in shown):
        shape, output = "x".join(map(str, row.shape)), format_bytes(row.feature_bytes)
        cells.append((row.path or "(itself)", row.type, f"{row.parameters:,}", shape, output))
    if hidden:
        rest, output = sum(row.parameters for row in hidden), format_bytes(sum(row.feature_bytes for row in hidden))
        cells.append((f"{len(hidden)} smaller ones", "", f"{rest:,}", "", output))
    cells.append(("input", "", "", "", format_bytes(input_bytes)))
    cells.append(("sum of layers", "", f"{parameters:,}", "", format_bytes(features)))
    weights = sum(row.parameter_bytes for row in layers), sum(row.gradient_bytes for row in layers)
    formula = _formula_lines(weights, input_bytes, features, batch_size, optimizer_bytes)
    counts = _count_lines([layers[i] for i in shown])
    return "\n".join([*_columns(cells), "", *counts, *formula])


def _count_lines(layers: Iterable[Layer]) -> list[str]:
    """Write out the parameters of layers made of filters, layers that are alike together.

    >>> from lightning_memplan.types import Filters
    >>> conv = Layer("conv", "Conv2d", 1152, 4608, 4608, (), 0, (Filters(9, 16, 1, 32),), "groups=4; no bias")
    >>> print(*_count_lines([conv, conv])[1:-1], sep="\\n")
    conv and 1 more  (9·16+1)·32 = 4,640; 9·16·32 + 32 = 4,640; in tensors 1,152:
                     groups=4; no bias
    """
    alike: dict[tuple[object, ...], list[Layer]] = {}
    for row in layers:
        if row.filters:
            alike.setdefault((row.filters, row.parameters, row.differs), []).append(row)
    if not alike:
        return []
    texts = [(_named(rows), _count_text(rows[0])) for rows in alike.values()]
    width = max(len(name) for name, _ in [("sum of layers", ""), *texts]) + 2
    lines = [f"{'parameters':<{width}}(kernel·in + bias)·out"]
    for name, text in texts:
        lines += wrap(text, f"{name:<{width}}")
    return [*lines, ""]


def _named(rows: Sequence[Layer]) -> str:
    more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    return shorten_middle(rows[0].path or "(itself)", 26 - len(more)) + more


def _count_text(row: Layer) -> str:
    """Return a layer's count of parameters by both methods of the textbook, and what its tensors hold.

    >>> from lightning_memplan.types import Filters
    >>> _count_text(Layer("head", "Linear", 66, 264, 264, (2,), 8, (Filters(1, 32, 1, 2),)))
    '(1·32+1)·2 = 66; 1·32·2 + 2 = 66; in tensors 66'
    """
    a = " + ".join(f"({each.kernel}·{each.inputs}+{each.biases})·{each.count}" for each in row.filters)
    weights = [f"{each.kernel}·{each.inputs}·{each.count}" for each in row.filters]
    biases = [
        str(each.count) if each.biases == 1 else f"{each.biases}·{each.count}" for each in row.filters if each.biases
    ]
    b = " + ".join([*weights, *biases])
    per_filter, apart = (sum(sizes) for sizes in zip(*((f.per_filter, f.apart) for f in row.filters), strict=True))
    why = f": {row.differs}" if row.differs else ""
    return f"{a} = {per_filter:,}; {b} = {apart:,}; in tensors {row.parameters:,}{why}"


def _largest_layers(layers: Sequence[Layer], batch_size: int, count: int) -> list[int]:
    """Return the places of the ``count`` layers that take the most memory, in the network's order."""

    def size(place: int) -> int:
        row = layers[place]
        return row.parameter_bytes + row.gradient_bytes + 2 * batch_size * row.feature_bytes

    return sorted(sorted(range(len(layers)), key=size, reverse=True)[:count])


def _formula_lines(
    weights: tuple[int, int], input_bytes: int, features: int, batch_size: int, optimizer_bytes: int
) -> list[str]:
    """Write out the formula, with the bytes of parameters and gradients, of inputs and of features, and its value.

    >>> _formula_lines((1024, 1024), 512, 2**20, batch_size=1, optimizer_bytes=0)[2]
    'memory(1)  = 2.00 MiB'
    """
    parameters, gradients = weights
    total = parameters + gradients + batch_size * (input_bytes + 2 * features)
    label = f"memory({batch_size})"
    left = max(len(label), len("memory(bs)"))
    numbers = f"{format_bytes(parameters)} + {format_bytes(gradients)}"
    sample = f"{format_bytes(input_bytes)} + 2 x {format_bytes(features)}"
    lines = [
        f"{'memory(bs)':<{left}} = params + grads + bs x (I1 + 2 x sum Ii)",
        f"{'':<{left}} = {numbers} + bs x ({sample})",
        f"{label:<{left}} = {format_bytes(total)}",
    ]
    if optimizer_bytes:
        lines.append(f"{'':<{left}}   and {format_bytes(optimizer_bytes)} of optimizer state, apart")
    return lines


def _columns(cells: Sequence[tuple[str, str, str, str, str]]) -> list[str]:
    """Align the layers' table in columns as wide as they need; the path gets the width that is left."""
    kind, parameters, shape, output = (max(len(row[i]) for row in cells) for i in range(1, 5))
    kind, shape = min(kind, 20), min(shape, 20)
    path = min(max(len(row[0]) for row in cells), WIDTH - (kind + parameters + shape + output + 8))
    return [
        f"{shorten_middle(row[0], path):<{path}}  {shorten_end(row[1], kind):<{kind}}  {row[2]:>{parameters}}"
        f"  {shorten_end(row[3], shape):<{shape}}  {row[4]:>{output}}"
        for row in cells
    ]
