"""Lay out tables and text for an 80-column terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence

from lightning_memplan.units import format_bytes

WIDTH = 80  #: columns of a terminal

_BAR = 20  #: characters of a bar that stands for the whole


# --- rows
def format_row(label: str, value: str, text: str) -> str:
    """Return a line of a label, a value to the right of its column, and a text.

    >>> format_row("batch size", "24", "limited by memory")
    '  batch size              24   limited by memory'
    """
    return f"  {label:<15}{value:>11}   {text}"


def breakdown_rows(breakdown: Mapping[str, int], count: int = 5) -> list[str]:
    """Return a line for each of the largest parts of a peak, with its share of the whole and a bar.

    >>> breakdown_rows({"gradients": 2**30, "activations": 3 * 2**30})
    ['    activations     3.00 GiB    75 %  ###############', '    gradients       1.00 GiB    25 %  #####']
    """
    whole = sum(breakdown.values())
    return [
        format_row(f"  {label}", format_bytes(size), f"{percent(size, whole)}  {draw_bar(size, whole)}".rstrip())
        for label, size in largest_parts(breakdown, count)
    ]


def largest_parts(breakdown: Mapping[str, int], count: int) -> list[tuple[str, int]]:
    """Return the largest parts first; if there are more than ``count``, the others are summed up as one.

    >>> largest_parts({"a": 1, "b": 5, "c": 2, "d": 0, "e": 3}, 2)
    [('b', 5), ('e', 3), ('the rest', 3)]
    """
    parts = sorted(((label, size) for label, size in breakdown.items() if size), key=lambda part: -part[1])
    if len(parts) <= count + 1:
        return parts
    return [*parts[:count], ("the rest", sum(size for _, size in parts[count:]))]


def percent(part: int, whole: int) -> str:
    """Return a part in percent of the whole, in five characters.

    >>> percent(1, 3), percent(0, 0)
    (' 33 %', '  - %')
    """
    return f"{100 * part / whole:3.0f} %" if whole else "  - %"


def draw_bar(part: int, whole: int, fill: str = "") -> str:
    """Return a bar whose length is the part's share of the whole, at most 20 characters, and ``fill`` for the rest.

    >>> draw_bar(1, 4), draw_bar(3, 4, fill=".")
    ('#####', '###############.....')
    """
    length = min(_BAR, round(_BAR * part / whole)) if whole else 0
    return "#" * length + fill * (_BAR - length)


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Align rows in columns: the first ``left`` of them to the left, the others to the right.

    >>> print(table([("name", "size"), ("a", "1 B")]))
    name  size
    a      1 B
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{text:{'<' if k < left else '>'}{widths[k]}}" for k, text in enumerate(row)) for row in rows
    )


# --- text
def wrap(text: str, label: str = "") -> list[str]:
    """Break a text into lines of 80 columns, indented by the length of a label that begins the first.

    >>> wrap("cost: half-precision arithmetic", "   ")
    ['   cost: half-precision arithmetic']
    """
    text = re.sub(r"(?<=\d) (?=%|[KMG]iB\b)", "\N{NO-BREAK SPACE}", text)  # a number and its unit stay together
    lines = textwrap.wrap(text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label), break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines] or [label.rstrip()]


def shorten_end(text: str, width: int) -> str:
    """Cut a text to a width, with dots for what is left out.

    >>> shorten_end("MultiheadAttention", 12)
    'Multihead...'
    """
    return text if len(text) <= width else text[: width - 3] + "..."


def shorten_middle(text: str, width: int) -> str:
    """Cut a text to a width, with dots in its first half: a path's end tells more.

    >>> shorten_middle("encoder.blocks.11.attn.out", 15)
    'enco...attn.out'
    """
    if len(text) <= width:
        return text
    head = (width - 3) // 3
    return text[:head] + "..." + text[len(text) - (width - 3 - head) :]
