"""Examples, run small on a GPU, one after another in one process: ``NAME ARGUMENTS`` each (see test_examples.py)."""

from __future__ import annotations

import runpy
import sys
import warnings
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for example in sys.argv[1:]:
        name, *arguments = example.split()
        print("EXAMPLE", name, flush=True)
        sys.argv = [name, *arguments]
        try:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        except ModuleNotFoundError as error:
            print("ABSENT", error.name, flush=True)
