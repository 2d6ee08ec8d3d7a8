"""Say of a step that ran out of memory what took it, and what would have saved it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_memplan.report.text import wrap
from lightning_memplan.units import format_bytes

#: Changes of less are not worth a line (bytes)
_LITTLE = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Shortage:
    """Hold what is known of a step that ran out of memory; sizes in bytes, 0 where one is not known.

    >>> Shortage("the backward phase of step 3", grown=2**20).module
    ''
    """

    where: str  #: the phase and the step
    module: str = ""  #: innermost module that ran, by its dotted name and its class
    batch: str = ""  #: shapes of the batch
    batch_size: int = 0
    predicted: int = 0  #: bytes that the batch needs, by the estimate
    planned: int = 0  #: batch size of the plan
    planned_bytes: int = 0  #: bytes that it needs, by the plan
    times: float = 0.0  #: how many times the bytes of the samples that were planned with this batch's have
    owners: Sequence[tuple[str, int]] = ()  #: who holds how much at the peak of this batch, by the trace
    others: int = 0  #: held by other processes
    lost: int = 0  #: no longer there for this process, since the plan was made
    grown: int = 0  #: left allocated at the end of a step, more than after the first steps
    fits: int = 0  #: largest batch size that fits in what is there
    saved: int = 0  #: bytes that it needs less


def shortage_text(found: Shortage) -> str:
    """Return a shortage as lines of 80 columns at most.

    >>> print(shortage_text(Shortage("the backward phase of step 3", "net.2 (Linear)", "(96, 1024) float32", 96,
    ...     predicted=3 * 2**30, planned=64, planned_bytes=2**31, owners=[("activations of net.2", 2**30)],
    ...     fits=80, saved=2**29)))
    MemoryPlanner: out of memory in the backward phase of step 3, in net.2 (Linear)
      batch: (96, 1024) float32
      batch size 96 needs 3.00 GiB; 64 were planned, which need 2.00 GiB
      at the peak of this batch, by the trace:
           1.00 GiB  activations of net.2
      batch size 80 fits in what is there, and needs 512.00 MiB less
    """
    lines = wrap(f"MemoryPlanner: out of memory in {found.where}{f', in {found.module}' if found.module else ''}")
    if found.batch:
        lines += wrap(f"batch: {found.batch}", "  ")
    if found.predicted:
        text = f"batch size {found.batch_size} needs {format_bytes(found.predicted)}"
        if found.planned == found.batch_size:
            text += ", as planned"
        elif found.planned:
            text += f"; {found.planned} were planned, which need {format_bytes(found.planned_bytes)}"
        lines += wrap(text, "  ")
    if found.times:
        fewer = max(1, int(found.batch_size / found.times))
        text = f"its samples have {found.times:.3g} times the bytes of those that were planned with: "
        lines += wrap(f"{text}samples='largest' plans for the largest, or pass max_batch_size={fewer}", "  ")
    if found.others:
        lines += wrap(f"other processes hold {format_bytes(found.others)} of the GPU", "  ")
    if found.lost > _LITTLE:
        text = f"{format_bytes(found.lost)} that were free when it was planned are held by others, or outside torch"
        lines += wrap(text, "  ")
    if found.grown > _LITTLE:
        text = f"{format_bytes(found.grown)} more are left at the end of a step than after the first ones: "
        lines += wrap(f"{text}something keeps tensors from step to step", "  ")
    if found.owners:
        lines.append("  at the peak of this batch, by the trace:")
        lines += [f"  {format_bytes(size):>11}  {owner}"[:80] for owner, size in found.owners]
    if found.fits:
        lines += wrap(
            f"batch size {found.fits} fits in what is there, and needs {format_bytes(found.saved)} less", "  "
        )
    return "\n".join(lines)
