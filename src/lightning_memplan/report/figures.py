"""Draw predictions and measurements with matplotlib, in black and white: greys, hatches, and labels within the areas.

Every function returns a ``matplotlib.figure.Figure`` that no window holds: ``figure.savefig("name.png")``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.memory.events import Event
from lightning_memplan.types import Device, Measurement, Plan
from lightning_memplan.units import format_bytes, gib

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


#: Grey level and hatch of each category, from the bottom of the stack: first the categories that stay throughout
_LOOK: Mapping[str, tuple[str, str]] = {
    "parameters": ("0.35", ""),
    "buffers": ("0.45", ""),
    "optimizer": ("0.55", ""),
    "workspaces": ("0.95", "xx"),
    "communication": ("0.65", ""),
    "other": ("0.95", "oo"),
    "batch": ("0.95", ".."),
    "gradients": ("0.75", ""),
    "activations": ("0.88", "//"),
    "temporaries": ("1.0", "\\\\\\\\"),
}


_SMALL = 0.01  #: fraction of the peak; categories that never take more are drawn as one
_NAMED = 0.07  #: fraction of the figure's height at which an area has room for its name


def plot_timeline(
    estimate: Estimate,
    batch_size: int,
    *,
    device: Device | None = None,
    budget: int | None = None,
) -> Figure:
    """Draw one training step at a batch size: bytes in use by category, and bytes reserved, event by event.

    The step is the last that was traced: gradients and the optimizer's state are there. ``device`` and ``budget``
    (bytes) are drawn as lines.

    >>> import torch
    >>> import lightning_memplan as mp
    >>> figure = mp.plot_timeline(mp.estimate(torch.nn.Linear(1000, 1000), torch.zeros(4, 1000)), batch_size=64)
    >>> figure.axes[0].get_ylabel()
    'memory (GiB)'

    Raises:
        ValueError: the estimate is by the formula, which has no events.
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure, axes = _figure(8.5, 4.6)
    step = last_step(estimate, batch_size, None if device is None else device.capacity)
    allocated, reserved = step.allocated, max(step.reserved)
    top = int(1.12 * max(reserved, *([] if device is None else [device.total]), budget or 0))
    _shade_phases(axes, step.events, gib(top))
    legend = _stack(axes, step.sizes, top)
    line = axes.step(range(len(allocated)), _gib(step.reserved), "k-", where="post", linewidth=1.4)[0]
    legend.append((line, f"reserved, up to {format_bytes(reserved)}"))
    peak = max(range(len(allocated)), key=allocated.__getitem__)
    axes.plot([peak], [gib(allocated[peak])], "kv", markersize=6)
    _draw_limits(axes, device, budget, outside=True)
    handles, texts = zip(*reversed(legend), strict=True)
    axes.legend(handles, texts, loc="upper left", bbox_to_anchor=(1.0, 0.7), frameon=False, fontsize=8)
    axes.set(xlim=(0, len(allocated) - 1), ylim=(0, gib(top)), ylabel="memory (GiB)")
    in_use = f"in use at most {format_bytes(allocated[peak])} (marked)"
    axes.set_xlabel(f"allocations and frees of one training step; {in_use}")
    axes.set_title(f"One step at batch size {batch_size}", loc="left", fontsize=11)
    return figure


def plot_batch_sizes(estimate: Estimate, plan: Plan) -> Figure:
    """Draw predicted peaks against the batch size, with the batch size of the plan.

    The reserved peak is shown twice: as a line for a GPU without limit, and at the planned batch size for the plan's
    device.

    >>> import torch
    >>> import lightning_memplan as mp
    >>> net, batch, card = torch.nn.Linear(100, 100), torch.zeros(4, 100), mp.Device("card", total=2**26)
    >>> figure = mp.plot_batch_sizes(mp.estimate(net, batch), mp.plan(net, batch, device=card))
    >>> figure.axes[0].get_xlabel()
    'batch size'
    """
    figure, axes = _figure(8, 4.2)
    chosen, last = plan.batch_size, max(plan.batch_size + 2, round(1.3 * plan.batch_size))
    sizes = sorted({1, chosen, last, *range(1, last, -(-last // 40))})
    curves = (
        ([estimate.peak(n) for n in sizes], "k-", "reserved, were there no limit"),
        ([estimate.peak_allocated(n) for n in sizes], "k--", "allocated"),
        ([estimate.formula.memory(n) for n in sizes], "k:", "formula"),
    )
    for values, style, label in curves if estimate.program is not None else curves[2:]:
        axes.plot(sizes, _gib(values), style, linewidth=1.2, label=label)
    top = max(max(values) for values, _, _ in curves)
    if plan.limited_by == "memory":
        top = round(1.25 * plan.device.total)
    if plan.budget <= top:
        _draw_limits(axes, plan.device, plan.budget)
    axes.plot([chosen], [gib(plan.peak_reserved)], "ko", markersize=8)
    axes.annotate(
        f"batch size {chosen}\n{format_bytes(plan.peak_reserved)} reserved",
        (chosen, gib(plan.peak_reserved)),
        (10, -80),
        textcoords="offset points",
        arrowprops={"arrowstyle": "->", "color": "0.3", "shrinkB": 5},
    )
    axes.set(xlabel="batch size", ylabel="peak memory (GiB)", xlim=(0, last), ylim=(0, gib(top)))
    axes.set_title(f"Predicted for {plan.device.name}", loc="left", fontsize=11)
    axes.legend(loc="lower right", frameon=False)
    return figure


def plot_measurements(measurements: Sequence[Measurement]) -> Figure:
    """Draw predicted and actual peaks of every measured step: ``plot_measurements(planner.measurements)``.

    >>> import lightning_memplan as mp
    >>> steps = [mp.Measurement(k, 2**31, 2**32, 2**31 + 2**k, 2**32) for k in range(5)]
    >>> mp.plot_measurements(steps).axes[0].get_xlabel()
    'step'

    Raises:
        ValueError: there are no measurements.
    """
    if not measurements:
        raise ValueError(
            "no step was measured: fit on a CUDA device with a MemoryPlanner, and pass planner.measurements"
        )
    figure, axes = _figure(8, 4.2)
    steps = [m.step for m in measurements]
    pairs = (
        ("reserved", [m.predicted_reserved for m in measurements], [m.reserved for m in measurements], "s"),
        ("allocated", [m.predicted_allocated for m in measurements], [m.allocated for m in measurements], "o"),
    )
    many = len(steps) > 40
    for (name, predicted, actual, mark), va, offset in zip(pairs, ("bottom", "top"), (1, -1), strict=True):
        error = round(100 * (max(predicted) - max(actual)) / max(actual), 2) if max(actual) else 0.0
        axes.plot(steps, _gib(actual), color="0.6", marker="" if many else mark, markersize=8, linewidth=3)
        axes.plot(steps, _gib(predicted), "k--", marker="" if many else "x", markersize=6, linewidth=1)
        text = f"{name} {format_bytes(max(actual))}\npredicted {error + 0.0:+.2f} %"
        last = steps[-1], gib(actual[-1])
        axes.annotate(text, last, (10, offset), textcoords="offset points", va=va, fontsize=9)
    axes.plot([], [], color="0.6", linewidth=3, label="measured")
    axes.plot([], [], "k--", linewidth=1, label="predicted")
    axes.set(xlabel="step", ylabel="peak memory (GiB)")
    axes.set_ylim(0, 1.15 * gib(max(max(p + a) for _, p, a, _ in pairs)))
    axes.locator_params(axis="x", integer=True)
    axes.set_title("Peak memory of every step, measured and predicted", loc="left", fontsize=11)
    axes.legend(loc="lower left", frameon=False, ncols=2)
    return figure


def plot_layers(estimate: Estimate, batch_size: int, *, top: int = 15) -> Figure:
    """Draw the modules that hold the most memory at the peak.

    By a trace, a module holds the blocks in use that its forward made (gradients and the optimizer's state belong to
    none); by the formula, a layer holds its parameters, its gradients and twice its feature map.

    >>> import torch
    >>> import lightning_memplan as mp
    >>> net = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))
    >>> figure = mp.plot_layers(mp.estimate(net, torch.zeros(4, 100)), batch_size=64)
    >>> sorted(label.get_text() for label in figure.axes[0].get_yticklabels())
    ['0', '1', '2']

    Raises:
        ValueError: ``top`` is less than 1.
    """
    if top < 1:
        raise ValueError(f"top is a number of layers to show, at least 1, and {top} is not")
    rows = sorted(_by_module(estimate, batch_size).items(), key=lambda row: -sum(row[1]))
    shown, hidden = rows[:top], rows[top:]
    figure, axes = _figure(8, 1.2 + 0.28 * len(shown))
    names = [path if len(path) <= 40 else f"...{path[-37:]}" for path, _ in shown]
    weights, features = ([row[1][k] for row in shown] for k in (0, 1))
    axes.barh(names, _gib(features), color="0.88", edgecolor="0.3", hatch="//", linewidth=0.5, label="feature maps")
    axes.barh(
        names, _gib(weights), left=_gib(features), color="0.4", edgecolor="0.3", linewidth=0.5, label="parameters"
    )
    for name, (_, sizes) in zip(names, shown, strict=True):
        axes.annotate(
            format_bytes(sum(sizes)),
            (gib(sum(sizes)), name),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.set_xlim(0, 1.16 * gib(sum(shown[0][1])) if shown else None)
    rest = f"; {len(hidden)} more: {format_bytes(sum(sum(row[1]) for row in hidden))}" if hidden else ""
    axes.set_xlabel(f"memory (GiB){rest}")
    axes.set_title(f"What holds the most at the peak, batch size {batch_size}", loc="left", fontsize=11)
    axes.legend(loc="lower right", frameon=False)
    return figure


# --- what is drawn
@dataclass(frozen=True)
class StepCurves:
    """Bytes after each event of one step: in use by category, from the bottom of the stack, and reserved."""

    sizes: Mapping[str, Sequence[int]]
    reserved: Sequence[int]
    events: Sequence[Event]

    @property
    def allocated(self) -> list[int]:
        """Bytes in use in all categories together."""
        return _sums(self.sizes.values())


def last_step(estimate: Estimate, batch_size: int, capacity: int | None) -> StepCurves:
    """Return the curves of the last step that was traced; categories that are always small are ``"the rest"``.

    Raises:
        ValueError: the estimate has no events, or the step does not fit in the capacity.
    """
    replayer = estimate.replayer_at(batch_size)
    journal = replayer.journal(batch_size, capacity)
    events, begin = replayer.program.events, replayer.program.steps()[-2]
    live = dict.fromkeys(_LOOK, 0)
    categories: dict[int, str] = {}
    sizes: dict[str, list[int]] = {name: [] for name in _LOOK}
    reserved: list[int] = []
    at = held = 0
    for move in journal:
        if move.action.startswith("segment"):
            held += move.size if move.action in ("segment_alloc", "segment_map") else -move.size
            continue
        event = events[at]
        if move.action == "alloc":
            categories[event.block] = event.category
            live[event.category] += move.size
        elif move.action == "free":
            live[categories.pop(event.block)] -= move.size
        if at >= begin:
            for name, size in live.items():
                sizes[name].append(size)
            reserved.append(held)
        at += 1
    if not reserved:
        raise ValueError(f"batch size {batch_size} does not fit in {capacity} bytes: there is no whole step to draw")
    return StepCurves(_joined(sizes), reserved, events[begin:at])


def _joined(sizes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Sum up the categories that never take more than a hundredth of the peak, at the bottom of the stack.

    >>> _joined({"buffers": [1, 1], "optimizer": [0, 1], "activations": [100, 300]})
    {'the rest': [1, 2], 'activations': [100, 300]}
    """
    peak = max(_sums(sizes.values()))
    small = [name for name in sizes if max(sizes[name]) < _SMALL * peak]
    rest = _sums(sizes[name] for name in small)
    large = {name: sizes[name] for name in sizes if name not in small}
    return {"the rest": rest, **large} if any(rest) else large


def _sums(rows: Iterable[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _by_module(estimate: Estimate, batch_size: int) -> dict[str, tuple[int, int]]:
    """Return the bytes of parameters and of feature maps of each module."""
    if estimate.program is None:
        return {
            row.path or "(itself)": (row.parameter_bytes + row.gradient_bytes, 2 * batch_size * row.feature_bytes)
            for row in estimate.layers
        }
    sums: dict[str, tuple[int, int]] = {}
    for event, size in estimate.replayer_at(batch_size).live_at_peak(batch_size):
        if event.path:
            weights, features = sums.get(event.path, (0, 0))
            kept = event.category in ("parameters", "buffers")
            sums[event.path] = (weights + size, features) if kept else (weights, features + size)
    return sums


# --- how it is drawn
def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'lightning-memplan[plot]'") from error
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _stack(axes: Axes, sizes: Mapping[str, Sequence[int]], top: int) -> list[tuple[Artist, str]]:
    """Draw the categories on top of one another; return the areas that are too thin for a name, with their labels."""
    unnamed: list[tuple[Artist, str]] = []
    below = [0] * len(next(iter(sizes.values())))
    for name, thickness in sizes.items():
        above = _sums((below, thickness))
        grey, hatch = _LOOK.get(name, ("0.95", "++"))
        area = axes.fill_between(
            range(len(below)),
            _gib(below),
            _gib(above),
            step="post",
            facecolor=grey,
            edgecolor="0.3",
            hatch=hatch,
            linewidth=0.4,
        )
        place = _middle_of_thickest(thickness)
        if thickness[place] > _NAMED * top:
            _label(axes, place, gib(below[place] + thickness[place] // 2), name)
        else:
            unnamed.append((area, f"{name}, up to {format_bytes(max(thickness))}"))
        below = above
    return unnamed


def _shade_phases(axes: Axes, events: Sequence[Event], top: float) -> None:
    place = 0
    for shade, (phase, run) in enumerate(groupby(events, key=lambda event: event.phase)):
        length = len(list(run))
        if shade % 2:
            axes.axvspan(place, place + length, color="0.96", linewidth=0, zorder=0)
        if length > 0.05 * len(events):
            axes.text(place + length / 2, 0.985 * top, phase, ha="center", va="top", fontsize=9, style="italic")
        place += length


def _draw_limits(axes: Axes, device: Device | None, budget: int | None, *, outside: bool = False) -> None:
    """Draw the device's bytes and the budget as lines, named within the axes, or right of them if ``outside``."""

    def draw(size: int, text: str, style: str, above: bool) -> None:
        axes.axhline(gib(size), color="0.2", linewidth=0.9, linestyle=style)
        axes.annotate(
            f"{text}: {format_bytes(size)}",
            (outside, gib(size)),
            (4, 1 if above else -2),
            va="bottom" if above else "top",
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            fontsize=9,
        )

    if device is not None:
        draw(device.total, device.name, "-", above=True)
    if budget is not None:
        draw(budget, "budget", "-.", above=False)


def _middle_of_thickest(sizes: Sequence[int]) -> int:
    """Return the middle of the longest run at which an area is nearly as thick as it gets: its name has room there.

    >>> _middle_of_thickest([0, 10, 0, 9, 10, 9, 0])
    4
    """
    most = max(sizes)
    runs: list[tuple[int, int]] = []
    for thick, run in groupby(enumerate(sizes), key=lambda item: item[1] >= 0.8 * most):
        places = [place for place, _ in run]
        if thick:
            runs.append((len(places), places[len(places) // 2]))
    return max(runs)[1]


def _label(axes: Axes, x: float, y: float, text: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=box)


def _gib(sizes: Sequence[int]) -> list[float]:
    return [gib(size) for size in sizes]
