"""The README's figure: predicted peak against batch size, ResNet-50 on an RTX 3090.

    python docs/figures.py

Needs: pip install "lightning-memplan[examples]"
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

from image_classifier import Classifier, Digits  # noqa: E402

import lightning_memplan as mp  # noqa: E402

GiB = 2**30


def main() -> None:
    card, model, data = mp.gpu("RTX 3090"), Classifier(), Digits(224)
    plan = mp.plan(model, data, device=card, precision="16-mixed")
    estimate = mp.estimate(model, data, device=card, precision="16-mixed")
    sizes = sorted({1, *range(16, plan.batch_size + 150, 16), plan.batch_size})
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    axes.plot(
        sizes, [estimate.peak(n) / GiB for n in sizes], "k-", label="reserved, were there no limit (trace and replay)"
    )
    axes.plot(sizes, [estimate.peak_allocated(n) / GiB for n in sizes], "k--", label="allocated (trace and replay)")
    axes.plot(sizes, [estimate.formula.memory(n) / GiB for n in sizes], ":", color="0.45", label="formula")
    axes.axhline(card.total / GiB, color="0.3", lw=1)
    axes.text(4, card.total / GiB + 0.3, f"the card's {card.total / GiB:.1f} GiB", color="0.3", fontsize=9)
    axes.axhline(plan.budget / GiB, color="0.6", lw=1, ls="-.")
    axes.text(4, plan.budget / GiB - 1.1, f"budget {plan.budget / GiB:.1f} GiB", color="0.4", fontsize=9)
    axes.plot([plan.batch_size], [plan.predicted_peak / GiB], "ko", ms=8)
    axes.annotate(
        f"batch size {plan.batch_size}",
        (plan.batch_size, plan.predicted_peak / GiB),
        (plan.batch_size - 150, 27.5),
        arrowprops={"arrowstyle": "->", "color": "0.3"},
    )
    axes.set(xlabel="batch size", ylabel="peak memory (GiB)", xlim=(0, sizes[-1]), ylim=(0, 34))
    axes.set_title("ResNet-50, 224 x 224, 16-mixed, SGD: predicted for an RTX 3090, without one", fontsize=11)
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "images" / "batch_size.png", dpi=110)


if __name__ == "__main__":
    main()
