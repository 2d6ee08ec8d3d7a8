"""The documentation says that DeepSpeed must be installed to be planned for."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_memplan as mp

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_without_deepspeed_its_strategy_cannot_be_planned_for() -> None:
    with pytest.raises(ValueError, match=r"the strategy 'deepspeed_stage_2' cannot be made here: .*install"):
        mp.estimate(nn.Linear(8, 8), torch.zeros(4, 8), devices=2, strategy="deepspeed_stage_2")


@pytest.mark.parametrize("name", ["README.md", "docs/command_line.md", "docs/recipes.md"])
def test_every_page_says_the_same(name: str) -> None:
    text = " ".join((ROOT / name).read_text().split())
    assert "ZeRO stages 1, 2 and 3" in text
    assert "lightning-memplan[deepspeed]" in text
    assert "not modelled (DeepSpeed)" not in text
