"""Whole fits on an H200: bytes that their allocator reserved, and what a trace expects of them with cuDNN's workspaces.

    python -m benchmarks.accuracy.fits                            # how far off, by rule and as cuDNN says
    MEMPLAN_CUDNN=LIBRARY python -m benchmarks.accuracy.fits --again FILE  # expected anew, of the cuDNN measured

The fits are rows of nullgpu.txt, in torch 2.11 with cuDNN 9.19: ``LIBRARY`` is that one's libcudnn.so.9.
"""

from __future__ import annotations

import argparse
import csv
import os
import warnings
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

from lightning_memplan.memory.allocator import replay
from lightning_memplan.memory.allocator_settings import AllocatorSettings

FITS = Path(__file__).parent / "rows" / "h200_fits.csv"


class Fit(NamedTuple):
    """Of a row, bytes: what was reserved, and what is expected by rule and as cuDNN says."""

    row: str
    reserved: int
    expected: int
    asked: int


def read_fits(path: Path = FITS) -> list[Fit]:
    with open(path, newline="") as file:
        return [Fit(r["row"], *(int(r[name]) for name in Fit._fields[1:])) for r in csv.DictReader(file)]


def again(fit: Fit) -> Fit:
    """The same with what is expected now, on a card of that compute capability."""
    import lightning_memplan as mp
    from benchmarks.accuracy import networks
    from benchmarks.accuracy.nullgpu import Row

    row = Row.parse(fit.row)
    module, sample = networks.build(row.network, row.optimizer)
    estimate = mp.estimate(
        module,
        networks.loader(sample, row.batch_size, 1),
        method="trace",
        device=mp.Device("H200", total=150 * 10**9, capability=(9, 0)),
        precision=row.precision,
        gradient_clip_val=row.clip,
        accumulate_grad_batches=row.accumulate,
    )
    assert estimate.program is not None
    library, found = os.environ["MEMPLAN_CUDNN"], []
    for asked in ("off", library):
        os.environ["MEMPLAN_CUDNN"] = asked
        entries = estimate.program.at(row.batch_size, "expected")
        found.append(replay(entries, None, AllocatorSettings(by_address=True)).peak_reserved)
    return fit._replace(expected=found[0], asked=found[1])


def summary(fits: list[Fit]) -> str:
    """Of fits that reserved over 512 MiB, below which a single segment counts. In 16-mixed the scale of the loss is at
    first too large for zeros as samples: steps without an optimizer's, whose state is not there."""
    lines = []
    for name, rows in (
        ("all", [f for f in fits if f.reserved > 2**29]),
        ("not 16-mixed", [f for f in fits if f.reserved > 2**29 and " 16-mixed" not in f.row]),
    ):
        lines.append(f"{name}, {len(rows)} rows")
        for how in ("expected", "asked"):
            off = [100 * abs(f.reserved / getattr(f, how) - 1) for f in rows]
            lines.append(
                f"  {'by rule' if how == 'expected' else 'asked':8} off by {median(off):.2f} % (median), "
                f"{quantiles(off, n=10, method='inclusive')[-1]:.1f} (90th percentile), {max(off):.1f} (worst)"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", type=Path, help="where the table is written, expected anew")
    options = parser.parse_args()
    if not options.again:
        print(summary(read_fits()))
        return
    if os.environ.get("MEMPLAN_CUDNN", "off") in ("", "off"):
        parser.error("--again needs MEMPLAN_CUDNN, the libcudnn.so.9 with which the fits ran")
    warnings.simplefilter("ignore")
    with open(options.again, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Fit._fields)
        for fit in read_fits():
            writer.writerow(again(fit))
            file.flush()


if __name__ == "__main__":
    main()
