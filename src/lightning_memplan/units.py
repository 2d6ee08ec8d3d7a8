"""Convert bytes to text and back. GiB and MiB are powers of two; GB and MB are decimal."""

from __future__ import annotations

import re
from fractions import Fraction

KiB, MiB, GiB = 2**10, 2**20, 2**30
KB, MB, GB = 10**3, 10**6, 10**9

_SCALE = {"": 1, "b": 1, "kib": KiB, "mib": MiB, "gib": GiB, "kb": KB, "mb": MB, "gb": GB, "tib": 2**40, "tb": 10**12}

_TEXT = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(value: int | str) -> int:
    """Return the bytes of ``"24GiB"``, ``"80 GB"``, ``"512"`` or a plain ``int``.

    >>> parse_bytes("24GiB"), parse_bytes("80 GB"), parse_bytes("1.5 MiB"), parse_bytes(512)
    (25769803776, 80000000000, 1572864, 512)

    Raises:
        ValueError: The text is not a size, or is negative.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError(f"a number of bytes cannot be negative, and {value} is")
        return value
    match = _TEXT.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2].lower() not in _SCALE:
        raise ValueError(f"{value!r} is not a size: write bytes as an int, or text such as '24GiB', '80GB' or '512MiB'")
    return round(Fraction(match[1].replace("_", "")) * _SCALE[match[2].lower()])


def gib(size: int) -> float:
    """Return bytes in GiB (2**30 bytes).

    >>> gib(3 * 2**29)
    1.5
    """
    return size / GiB


def format_bytes(size: int) -> str:
    """Write bytes in the binary unit that gives a readable number.

    >>> format_bytes(25446711296), format_bytes(13206604), format_bytes(840), format_bytes(0)
    ('23.70 GiB', '12.59 MiB', '840 B', '0 B')
    """
    for unit, scale in (("GiB", GiB), ("MiB", MiB), ("KiB", KiB)):
        if round(abs(size) / (scale // 1024), 2) >= 1024:  # the smaller unit would write 1024.00 or more
            return f"{size / scale:.2f} {unit}"
    return f"{size} B"
