"""Other projects' training with the planner beside it, on the null GPU: what was planned, and what was stopped.

    python -m benchmarks.clients.run                        # every job that can be imported
    python -m benchmarks.clients.run --only "darts|scvi"    # the jobs whose name matches
    python -m benchmarks.clients.run --out rows.jsonl       # keep the rows; those of the file are not run again

A job is trained three times: without the planner, with its default arguments, and with ``apply=False``. Its row says
which batch size was planned, by which method, whether training had it, and how many steps were measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NULLGPU = ROOT / "tests" / "nullgpu" / "nullgpu"
GPU = {  # 4 GiB, and every value that is read from it is 0, but for flags
    "NULLGPU_MEMORY": str(4 * 2**30),
    "NULLGPU_CONTEXT": str(100 * 2**20),
    "NULLGPU_KEPT": "1",
    "OMP_NUM_THREADS": "1",
}
LIMIT = 300  # seconds for one training


def modules() -> list[str]:
    """Return the modules that hold jobs: a file a client, and the styles."""
    files = sorted(HERE.glob("*/*.py")) + sorted(HERE.glob("*.py"))
    inner = [path.relative_to(ROOT).with_suffix("") for path in files if "\n@job(" in path.read_text()]
    return [".".join(path.parts) for path in inner]


def jobs_in(module: str) -> list[str]:
    """Return the names of a module's jobs, without importing it."""
    text = (ROOT / Path(*module.split("."))).with_suffix(".py").read_text()
    return re.findall(r"^@job\(.*?^def (\w+)", text, re.MULTILINE | re.DOTALL)


def train_here(module: str, names: list[str]) -> None:
    """Train some jobs of one module in this process, and print a line of JSON for each mode of each."""
    from benchmarks.clients.job import JOBS, MODES, as_row, run

    importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder:  # Trainers write where they are started
        os.chdir(folder)
        for name in names:
            outcomes = {}
            for mode in MODES:
                print(json.dumps({"started": name, "mode": mode}), flush=True)
                outcomes[mode] = run(JOBS[name], mode)
            print(json.dumps(as_row(JOBS[name], outcomes)), flush=True)
        os.chdir(ROOT)


def printed(command: list[str], env: dict[str, str]) -> Iterator[str]:
    """Run a command and yield the lines it prints; at last say how it ended, if it did not end well."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        late: list[bool] = []

        def end() -> None:
            late.append(True)
            process.kill()

        assert process.stdout is not None
        while True:
            timer = threading.Timer(LIMIT, end)
            timer.start()
            line = process.stdout.readline()
            timer.cancel()
            if not line:
                break
            yield line
        process.stdout.close()
        if process.wait() or late:
            errors.seek(0)
            said = errors.read().strip().splitlines()[-3:]
            yield f"still running after {LIMIT} s" if late else f"exit status {process.returncode}: {' | '.join(said)}"


def train(module: str, names: list[str]) -> Iterator[dict[str, Any]]:
    """Train some jobs of one module on the null GPU, in one process; yield their rows."""
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, **GPU, "PYTHONPATH": path, "MEMPLAN_HISTORY": "off", "MPLBACKEND": "Agg"}
    mode, ended, left = "start", "ended early", list(names)
    for line in printed([str(NULLGPU), sys.executable, "-m", "benchmarks.clients.run", "--here", module, *names], env):
        if line.startswith('{"started"'):
            mode = json.loads(line)["mode"]
        elif line.startswith('{"job"'):
            row = json.loads(line)
            left.remove(row["job"])
            yield row
        else:
            ended = line
    if left:
        yield {"job": left[0], "faults": [f"{mode}: {ended}"]}
    if left[1:]:
        yield from train(module, left[1:])


def as_text(row: dict[str, Any]) -> str:
    """Return a row of the table, and the faults below it."""
    default = row.get("default", {})
    planned = f"{default['planned']} by {default['method']}" if default.get("planned") else "-"
    had, own = default.get("sizes", [])[:1], row.get("without", {}).get("sizes", [])[:1]
    steps = f"{default.get('measured', 0)}/{len(default.get('sizes', []))}"
    seconds = " + ".join(f"{row[mode]['seconds']:.0f}" for mode in ("without", "default") if mode in row)
    text = f"{row['job']:28} {planned:>16} {own!s:>8} {had!s:>10} {steps:>8} {seconds:>8}"
    said = [text for text in default.get("warnings", []) if "measures nothing" not in text]
    notes = [f"FAULT {fault}" for fault in row["faults"]] + ([] if row["faults"] else said)
    return "\n".join([text, *(f"    {note}" for note in notes)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression: the jobs to run")
    parser.add_argument("--out", type=Path, help="file of rows as JSON lines")
    parser.add_argument("--here", nargs="+", metavar="MODULE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        return train_here(options.here[0], options.here[1:])
    kept = options.out.read_text().splitlines() if options.out and options.out.exists() else []
    seen = {json.loads(line)["job"] for line in kept}
    print(f"{'job':28} {'planned':>16} {'own':>8} {'had':>10} {'measured':>8} {'seconds':>8}")
    for module in modules():
        names = [name for name in jobs_in(module) if name not in seen and re.search(options.only, f"{module}.{name}")]
        for row in train(module, names) if names else ():
            print(as_text(row), flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    return None


if __name__ == "__main__":
    main()
