"""Figures: what they show, from values that are known; how they look is looked at (``docs/figures.py``)."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import lightning_memplan as mp

GiB = 2**30
CARD = mp.Device("a card", total=2**27, context=2**22)


def net():
    return nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Sequential(nn.Linear(512, 10)))


@pytest.fixture(scope="module")
def estimate():
    return mp.estimate(net(), torch.zeros(4, 512), optimizer=lambda p: torch.optim.Adam(p))


@pytest.fixture(scope="module")
def plan():
    return mp.plan(net(), torch.zeros(4, 512), device=CARD, optimizer=lambda p: torch.optim.Adam(p))


def texts(figure):
    axes = figure.axes[0]
    legend = axes.get_legend()
    return [t.get_text() for t in (*axes.texts, *(legend.get_texts() if legend else ()))]


def test_the_timeline_shows_phases_categories_and_limits(estimate, tmp_path):
    figure = mp.plot_timeline(estimate, 8192, device=CARD, budget=2**26)
    shown = texts(figure)
    assert {"forward", "backward", "activations", "a card: 128.00 MiB", "budget: 64.00 MiB"} <= set(shown)
    _, steady = estimate.steps(8192, CARD.capacity)[-1]
    assert f"reserved, up to {steady / 2**20:.2f} MiB" in shown
    figure.savefig(tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 10_000


def test_what_is_stacked_is_what_is_allocated(estimate):
    from lightning_memplan.report.figures import last_step

    step = last_step(estimate, 256, None)
    parts, reserved, events = step.sizes, step.reserved, step.events
    assert len(reserved) == len(events) == len(parts["activations"])
    allocated, most = estimate.steps(256)[-1]
    assert max(map(sum, zip(*parts.values(), strict=True))) == allocated
    assert max(reserved) == most
    assert min(parts["optimizer"]) == 2 * 4 * (512 * 512 + 512 + 512 * 10) + 2 * 512  # 10 biases have 512 bytes each


def test_a_step_that_does_not_fit(estimate):
    with pytest.raises(ValueError, match="batch size 1000000 does not fit in 130023424 bytes"):
        mp.plot_timeline(estimate, 1000000, device=CARD)


def test_the_batch_size_figure_has_the_estimates_values(estimate, plan, tmp_path):
    figure = mp.plot_batch_sizes(estimate, plan)
    assert f"batch size {plan.batch_size}\n{plan.peak_reserved / 2**20:.2f} MiB reserved" in texts(figure)
    reserved, allocated, formula = figure.axes[0].get_lines()[:3]
    at = list(reserved.get_xdata()).index(plan.batch_size)
    assert reserved.get_ydata()[at] == estimate.peak(plan.batch_size) / GiB
    assert allocated.get_ydata()[at] == plan.peak_allocated / GiB
    assert formula.get_ydata()[at] == plan.formula_peak / GiB
    figure.savefig(tmp_path / "batch_sizes.png")


def test_batch_sizes_by_the_formula_and_by_a_limit():
    by_formula = mp.estimate(net(), torch.zeros(4, 512), method="formula")
    plan = mp.plan(net(), torch.zeros(4, 512), device=CARD, method="formula", max_batch_size=2)
    shown = texts(mp.plot_batch_sizes(by_formula, plan))
    assert "formula" in shown
    assert "allocated" not in shown
    assert not any("budget" in text for text in shown)  # far above all that is drawn


def test_the_measurements_figure_states_the_errors():
    rows = [mp.Measurement(k, 110 * 2**20, 220 * 2**20, 100 * 2**20, 200 * 2**20) for k in range(50)]
    shown = texts(mp.plot_measurements(rows))
    assert "reserved 200.00 MiB\npredicted +10.00 %" in shown
    assert "allocated 100.00 MiB\npredicted +10.00 %" in shown
    with pytest.raises(ValueError, match="no step was measured: fit on a CUDA device with a MemoryPlanner"):
        mp.plot_measurements([])


def test_the_layers_figure_has_the_bytes_of_each_layer(estimate):
    figure = mp.plot_layers(estimate, 64, top=1)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[0] == "0"  # 512 · 512 + 512 parameters of 4 bytes, and what its forward made
    assert "; 1 more: " in figure.axes[0].get_xlabel()
    by_formula = mp.estimate(net(), torch.zeros(4, 512), method="formula")
    # parameters and gradients: 2 · 4 · (512 · 512 + 512); feature maps: 2 · 64 · 4 · 512
    assert f"{(2 * 4 * (512 * 512 + 512) + 2 * 64 * 4 * 512) / 2**20:.2f} MiB" in texts(mp.plot_layers(by_formula, 64))
    with pytest.raises(ValueError, match="top is a number of layers to show, at least 1, and 0 is not"):
        mp.plot_layers(estimate, 64, top=0)


def test_figures_without_matplotlib_say_what_to_install(estimate, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"figures need matplotlib: pip install 'lightning-memplan\[plot\]'"):
        mp.plot_layers(estimate, 64)
