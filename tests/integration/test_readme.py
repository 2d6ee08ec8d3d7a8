"""The README's code is run, and what it shows is what comes out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.paths import ROOT

README = (ROOT / "README.md").read_text()


def block(after: str) -> str:
    """The code block that follows a text."""
    found = re.search(r"```\w*\n(.*?)```", README[README.index(after) + len(after) :], flags=re.DOTALL)
    assert found is not None
    return found[1]


def test_the_ten_lines_are_the_example():
    assert block("## Ten lines") == (ROOT / "examples/ten_lines.py").read_text()


def test_the_ten_lines_print_what_the_readme_shows(nullgpu, tmp_path):
    pytest.importorskip("torchvision")
    pytest.importorskip("sklearn")
    code = (ROOT / "examples/ten_lines.py").read_text()
    code = code.replace("callbacks=", f"default_root_dir={str(tmp_path)!r}, callbacks=")
    done = nullgpu([sys.executable, "-W", "ignore", "-c", code], PYTHONPATH=str(ROOT / "examples"))
    printed = (done.stdout + done.stderr).splitlines()
    shown = block('measured")\n```').splitlines()
    assert shown[0].startswith("memory plan for")
    start = printed.index(shown[0])
    steps = [line for line in printed if line.startswith("step ")]
    found = [*printed[start : start + len(shown) - len(steps)], *steps]
    for line, other in zip(found, shown, strict=True):
        assert words(line) == words(other)
        if "MiB" not in line:  # versions of torch differ by cuBLAS's workspaces: some 8,519,680 bytes of 24 GB
            assert numbers(line) == pytest.approx(numbers(other), rel=0.02, abs=1)
    for line in steps:  # "step 0: 24,832,376,832 bytes reserved predicted, 24,832,376,832 measured"
        _, predicted, measured = numbers(line)
        assert predicted == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("main", '.venv/bin/python examples/brain_mri.py --gpu "RTX 3090"'),
        ("tests", ".venv/bin/python -m pytest -n auto --dist loadfile"),
    ],
)
def test_each_command_for_newcomers_sets_up_and_runs(name, command):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    words = block(f"<!-- newcomer: {name} -->\n").split()
    command_line = [*words, "-n", "--always-make"]
    env = {"PATH": os.environ["PATH"]}  # without the flags of a make that runs these tests
    done = subprocess.run(command_line, capture_output=True, text=True, cwd=ROOT, env=env, check=True)
    made, installed, ran = done.stdout.splitlines()  # all that a fresh clone needs
    assert made == "python3 -m venv .venv"
    assert installed.startswith(".venv/bin/pip install -q -e '.[")
    assert ran.strip() == command


def test_the_walk_through_a_network_shows_what_its_program_prints(nullgpu):
    page = (ROOT / "docs/walkthrough.md").read_text()
    program = (ROOT / "docs/walkthrough.py").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    plain = program.replace(" -> None", "").replace(" -> torch.Tensor", "").replace(": Any", "").replace(": int", "")
    assert code in plain
    printed = nullgpu([sys.executable, ROOT / "docs/walkthrough.py"], PYTHONPATH=ROOT / "src").stdout
    parts = ["\n".join(part.split("\n")[1:]).strip() for part in printed.split("\n--- ")[1:]]
    shown = [part.strip() for part in re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)]
    assert len(shown) == len(parts) == 6
    for part, other in zip(parts, shown, strict=True):
        assert max(map(len, part.splitlines())) <= 80
        for line, said in zip(part.splitlines(), other.splitlines(), strict=True):
            assert words(line) == words(said)
            assert numbers(line) == pytest.approx(numbers(said), rel=0.02, abs=1)  # cuBLAS's workspaces


def words(line: str) -> list[str]:
    return re.findall(r"[A-Za-z]\w*", line)


def numbers(line: str) -> list[float]:
    return [float(text.replace(",", "")) for text in re.findall(r"(?<!\w)\d[\d,]*(?:\.\d+)?", line)]


@pytest.mark.parametrize("example", ["brain_mri", pytest.param("image_classifier", marks=pytest.mark.further)])
def test_an_example_plans_for_a_card_that_is_not_here(example, tmp_path):
    for package in ("torchvision", "sklearn", "nibabel", "scipy"):
        pytest.importorskip(package)
    command = [sys.executable, str(ROOT / f"examples/{example}.py"), "--gpu", "RTX 3090"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("memory plan for RTX 3090\n")
    assert "params + grads + bs x (I1 + 2 x sum Ii)" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
