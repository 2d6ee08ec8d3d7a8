"""List the suites: ``python -m benchmarks``. Each is a program: ``python -m benchmarks.accuracy.nullgpu --help``."""

from __future__ import annotations

import ast
from pathlib import Path

HERE = Path(__file__).resolve().parent


def suites() -> dict[str, str]:
    """Return the first sentence of each suite by the name of its module, without importing it."""
    found = {}
    for path in sorted(HERE.glob("*/*.py")):
        text = path.read_text()
        if '\nif __name__ == "__main__":' in text:
            said = ast.get_docstring(ast.parse(text)) or ""
            name = f"{path.parent.name}.{path.stem}".removesuffix(".__main__")
            found[name] = said.partition("\n")[0]
    return found


def main() -> None:
    for name, said in suites().items():
        print(f"python -m benchmarks.{name}\n    {said}")


if __name__ == "__main__":
    main()
