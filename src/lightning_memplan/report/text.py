"""Lay out tables and text for an 80-column terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence

from lightning_memplan.types import Device

WIDTH = 80


# --- text -------------------------------------------------------------------------------------------------------------
def format_row(label: str, value: str, text: str) -> str:
    return f"  {label:<15}{value:>11}   {text}"


def columns(table: Sequence[tuple[str, str, str, str, str]]) -> list[str]:
    """The layers' table in columns as wide as they need; the path gets what is left of the width."""
    kind, parameters, shape, output = (max(len(row[i]) for row in table) for i in range(1, 5))
    kind, shape = min(kind, 20), min(shape, 20)
    path = min(max(len(row[0]) for row in table), WIDTH - (kind + parameters + shape + output + 8))
    return [
        f"{shorten_middle(row[0], path):<{path}}  {shorten_end(row[1], kind):<{kind}}  {row[2]:>{parameters}}"
        f"  {shorten_end(row[3], shape):<{shape}}  {row[4]:>{output}}"
        for row in table
    ]


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows in columns: the first ``left`` of them to the left, the others to the right.

    >>> print(table([("name", "size"), ("a", "1 B")]))
    name  size
    a      1 B
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{text:{'<' if k < left else '>'}{widths[k]}}" for k, text in enumerate(row)) for row in rows
    )


def capability(device: Device) -> str:
    return "" if device.capability is None else "{}.{}".format(*device.capability)


def module_or_phase(device: Device) -> str:
    return "card" if device.kind == "cuda" else "machine"


def shorten_middle(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    head = (width - 3) // 3
    return text[:head] + "..." + text[len(text) - (width - 3 - head) :]


def shorten_end(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def wrap(text: str, label: str = "") -> list[str]:
    text = re.sub(r"(?<=\d) (?=%|[KMG]iB\b)", "\N{NO-BREAK SPACE}", text)  # a number and its unit stay together
    lines = textwrap.wrap(text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label), break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines] or [label.rstrip()]


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:3.0f} %" if whole else "  - %"


def draw_bar(part: int, whole: int, fill: str = "") -> str:
    length = min(20, round(20 * part / whole)) if whole else 0
    return "#" * length + fill * (20 - length)


def largest(breakdown: Mapping[str, int], count: int) -> list[tuple[str, int]]:
    """The largest parts first; where there are more than ``count``, the rest is one part."""
    parts = sorted(((label, size) for label, size in breakdown.items() if size), key=lambda part: -part[1])
    if len(parts) <= count + 1:
        return parts
    return [*parts[:count], ("the rest", sum(size for _, size in parts[count:]))]
