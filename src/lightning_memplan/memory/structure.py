"""Hash what makes two runs comparable: layers, events without their sizes, and settings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_memplan.memory.estimate import Estimate


def structure_of(estimate: Estimate, *settings: object) -> str:
    """Return a hash of the layers, of the events without their sizes, and of ``settings``: equal for comparable runs.

    >>> import torch, lightning_memplan as mp
    >>> small, large = (mp.estimate(torch.nn.Linear(8, n), torch.zeros(4, 8)) for n in (2, 3))
    >>> structure_of(small) == structure_of(small) != structure_of(large) != structure_of(large, "16-mixed")
    True
    """
    layers = ((layer.path, layer.type, layer.parameters, layer.shape) for layer in estimate.layers)
    events = () if estimate.program is None else estimate.program.events
    steps = ((event.phase, event.category, event.op) for event in events)
    return structure_hash([estimate.method, estimate.formula.input_bytes, *settings, *layers, *steps])


def structure_hash(parts: Iterable[object]) -> str:
    """Return twelve hexadecimal digits of the parts' text, whatever their addresses in memory.

    >>> structure_hash(["Linear", (3, 4)]) == structure_hash(["Linear", (3, 4)]) != structure_hash(["Linear", (4, 3)])
    True
    """
    text = "\n".join(re.sub(r" at 0x[0-9a-f]+", "", repr(part)) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
