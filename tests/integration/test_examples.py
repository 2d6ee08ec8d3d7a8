"""The examples that train, on the null GPU: what they print of predicted and measured peaks."""

from __future__ import annotations

import re
import sys

import pytest

from tests.paths import PROGRAMS, ROOT

SMALL = {
    "segmentation_3d": "--crop 32 --volume 192 --crops 16",
    "lora_decoder": "--width 256 --layers 2 --tokens 64 --texts 400",
    "gan": "--size 32 --width 16 --images 2000",
}


@pytest.fixture(scope="module")
def printed(nullgpu):
    cases = PROGRAMS / "examples_cases.py"
    done = nullgpu(
        [sys.executable, cases, *(f"{name} {arguments}" for name, arguments in SMALL.items())], HF_HUB_OFFLINE=1
    )
    parts = iter(re.split(r"^EXAMPLE (\w+)$", done.stdout, flags=re.MULTILINE)[1:])
    return dict(zip(parts, parts, strict=True))


def assert_predicted(text):
    pairs = re.findall(r"predicted ([\d.]+) GiB.*measured ([\d.]+) GiB", text)
    assert pairs, text
    for predicted, measured in pairs:
        # three digits are shown, of at least a tenth of a GiB: one of them is no hundredth more
        assert float(predicted) == pytest.approx(float(measured), rel=0.01, abs=0.001)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_an_example_is_predicted_to_one_percent(printed, name):
    text = printed[name]
    if absent := re.search(r"^ABSENT (\w+)$", text, re.MULTILINE):
        pytest.skip(f"examples/{name}.py needs {absent[1]}, which is not installed")
    assert_predicted(text)
    if name == "segmentation_3d":  # 192³ voxels and their logits, against 4 crops of 32³
        assert "of 1 whole volumes" in text
        assert "in validation" in text.splitlines()[-1]


@pytest.mark.slow
def test_two_ranks_that_shard_are_predicted_to_one_percent(nullgpu):
    example = ROOT / "examples" / "fsdp_decoder.py"
    small = "--backend gloo --width 256 --layers 2 --tokens 64 --texts 100"
    done = nullgpu([sys.executable, example, *small.split()], NULLGPU_COUNT=2)
    assert "limited by the dataset" in done.stdout + done.stderr  # 50 texts a rank
    assert len(re.findall(r"^step \d", done.stdout, re.MULTILINE)) == 4  # one rank prints
    assert_predicted(done.stdout)
