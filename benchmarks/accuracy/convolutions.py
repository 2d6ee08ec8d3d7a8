"""cuDNN's workspaces, measured: what each convolution of many networks takes beside its operands, on this card.

    python -m benchmarks.accuracy.convolutions                            # the package's rules beside an H200's figures
    python -m benchmarks.accuracy.convolutions --measure FILE --jobs 8    # on a machine with a GPU

A line of ``FILE`` (CSV, gzipped) is a convolution and the bytes of all that was allocated and given back while it ran,
forwards and in each of its gradients (``input``, ``weight``), with ``cudnn.benchmark`` off.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from lightning_memplan.cuda.cudnn_process import FILTER, FORWARD, INPUT, LAST, MOVED, PLAIN, Question
from lightning_memplan.cuda.workspaces import allowance, is_pointwise, taken


class Shape(NamedTuple):
    """A convolution of one sample: sizes of its input and filter."""

    channels: int
    results: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()


#: type, channels last, TF32
KINDS = (
    ("float16", False, True),
    ("float16", True, True),
    ("bfloat16", False, True),
    ("bfloat16", True, True),
    ("float32", False, True),
    ("float32", True, True),
    ("float32", False, False),
)

_NETWORKS = (
    "torchvision.resnet50 torchvision.vgg16 torchvision.densenet121 torchvision.mobilenet_v2 torchvision.googlenet "
    "torchvision.efficientnet_b0 torchvision.convnext_tiny torchvision.regnet_y_400mf torchvision.resnext50_32x4d "
    "torchvision.shufflenet_v2_x1_0 torchvision.deeplabv3_resnet50 torchvision.r3d_18 torchvision.vit_b_16 "
    "torchvision.alexnet own.unet own.diffusion own.conv3d hf.wav2vec2 monai.UNet monai.DynUNet monai.SegResNet"
).split()


def shapes(names: list[str]) -> dict[Shape, str]:
    """The different convolutions of networks, each with the first network that has it."""
    import torch
    from torch import nn

    from benchmarks.accuracy import networks

    found: dict[Shape, str] = {}
    for name in names:
        try:
            module, sample = networks.build(name, "SGD")
        except ImportError:
            continue

        def see(conv: Any, inputs: tuple[torch.Tensor, ...], _: object, name: str = name) -> None:
            padding = conv.padding if isinstance(conv.padding, tuple) else tuple((k - 1) // 2 for k in conv.kernel_size)
            shape = Shape(
                conv.in_channels,
                conv.out_channels,
                tuple(inputs[0].shape[2:]),
                conv.kernel_size,
                conv.stride,
                padding,
                conv.dilation,
                conv.groups,
                conv.transposed,
                conv.output_padding if conv.transposed else (),
            )
            found.setdefault(shape, name)

        for child in module.modules():
            if isinstance(child, nn.modules.conv._ConvNd):
                child.register_forward_hook(see)
        batch = next(iter(networks.loader(sample, 2, 1)))
        with torch.no_grad():
            module.training_step(batch, 0)
    return found


MEASURED = Path(__file__).parent / "rows" / "h200_convolutions.csv.gz"
PARTS = {"forward": FORWARD, "input": INPUT, "weight": FILTER}


def measure(shape: Shape, batch: int, kind: tuple[str, bool, bool]) -> dict[str, Any]:
    """One convolution of one kind on this card, as a line of the table."""
    import torch

    name, last, tf32 = kind
    torch.backends.cudnn.allow_tf32 = tf32
    dtype, device = getattr(torch, name), torch.device("cuda", 0)
    layout = torch.contiguous_format
    if last and len(shape.size) > 1:
        layout = torch.channels_last if len(shape.size) == 2 else torch.channels_last_3d
    x = torch.randn(batch, shape.channels, *shape.size, device=device, dtype=dtype).to(memory_format=layout)
    filters = (shape.channels, shape.results) if shape.transposed else (shape.results, shape.channels)
    w = torch.randn(filters[0], filters[1] // shape.groups, *shape.kernel, device=device, dtype=dtype)
    w = w.to(memory_format=layout)
    output_padding = shape.output_padding or (0,) * len(shape.size)
    how = (shape.stride, shape.padding, shape.dilation, shape.transposed, output_padding, shape.groups)
    aten = torch.ops.aten
    y = aten.convolution(x, w, None, *how)
    g = torch.randn_like(y)
    runs = {
        "forward": lambda: (aten.convolution(x, w, None, *how),),
        "input": lambda: aten.convolution_backward(g, x, w, None, *how, (True, False, False)),
        "weight": lambda: aten.convolution_backward(g, x, w, None, *how, (False, True, False)),
    }
    found: dict[str, Any] = {field: _text(value) for field, value in shape._asdict().items() if field in FIELDS}
    found |= {"batch": batch, "dtype": name, "layout": "last" if last else "first", "tf32": int(tf32)}
    found["results_size"] = _text(tuple(y.shape[2:]))
    for part, run in runs.items():
        torch.cuda.empty_cache()
        torch.cuda.memory._record_memory_history("all", context=None, max_entries=10**5)
        try:
            made = run()
            history = torch.cuda.memory._snapshot(0)["device_traces"][0]
        finally:
            torch.cuda.memory._record_memory_history(None)
        asked = sum(entry["size"] for entry in history if entry["action"] == "alloc")
        found[part] = asked - sum(t.untyped_storage().nbytes() for t in made if t is not None)
    return found


def _text(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, tuple) else int(value)


FIELDS = (
    "channels results size results_size kernel stride dilation groups transposed batch dtype layout tf32 "
    "forward input weight"
).split()


def work(job: tuple[list[Shape], int]) -> list[dict[str, Any]]:
    import torch

    warnings.simplefilter("ignore")
    torch.zeros(1, device="cuda")
    chosen, batch = job
    return [measure(shape, batch, kind) for shape in chosen for kind in KINDS]


def measure_all(file: Path, names: list[str], batches: list[int], jobs: int) -> None:
    chosen = list(shapes(names))
    print(f"{len(chosen)} different convolutions", file=sys.stderr)
    tasks = [(chosen[k : k + 6], batch) for batch in batches for k in range(0, len(chosen), 6)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool, gzip.open(file, "wt") as out:
        writer = csv.DictWriter(out, FIELDS)
        writer.writeheader()
        for lines in pool.map(work, tasks):
            writer.writerows(lines)


# ------------------------------------------------------------------------------------------------------------ a report


class Seen(NamedTuple):
    """What is said of one part of a measured convolution: by the rules alone, and with what cuDNN says where it is
    asked. ``operands`` are the bytes of input and result."""

    kind: str
    part: str
    by_rule: int
    expected: int
    high: int
    measured: int
    operands: int
    pointwise: bool


_TYPES = {"float32": (0, 4), "float16": (2, 2), "bfloat16": (9, 2)}  # cuDNN's number, and bytes of a value


def compared(file: Path = MEASURED, only: str = "") -> Iterator[Seen]:
    """What is expected beside each measurement, or those of one kind."""
    with gzip.open(file, "rt") as lines:
        for row in csv.DictReader(lines):
            size, results, kernel, stride, dilation = (
                tuple(map(int, row[name].split("x")))
                for name in ("size", "results_size", "kernel", "stride", "dilation")
            )
            n, c, k, groups = (int(row[name]) for name in ("batch", "channels", "results", "groups"))
            number, width = _TYPES[row["dtype"]]
            plain = row["dtype"] == "float32" and row["tf32"] == "0"
            last = row["layout"] == "last" and len(size) > 1
            layout = PLAIN if plain else LAST if last else MOVED
            transposed = row["transposed"] == "1"
            padding = _padding(*((results, size) if transposed else (size, results)), kernel, stride, dilation)
            edges = (*size, *results, *kernel, *stride, *padding, *dilation)
            rest = (number, 0, layout, n, c, k, groups, *edges)
            kind = f"{row['dtype']}, channels {row['layout']}" + (", no TF32" if plain else "")
            if only not in ("", kind):
                continue
            for part, of_part in PARTS.items():
                numbers = (CAPABILITY, of_part, *rest)
                question = Question.of(numbers)
                expected, high = (taken(choice, int(transposed), *numbers) for choice in ("expected", "high"))
                operands, by_rule = width * n * (c * prod(size) + k * prod(results)), allowance(question).expected
                yield Seen(kind, part, by_rule, expected, high, int(row[part]), operands, is_pointwise(question))


CAPABILITY = 90  #: an H200's


def _padding(size: Sequence[int], results: Sequence[int], *edges: Sequence[int]) -> list[int]:
    """The least with which a convolution has that result: it is not in the table."""
    return [
        max(0, -(-((result - 1) * stride + dilation * (kernel - 1) + 1 - edge) // 2))
        for edge, result, kernel, stride, dilation in zip(size, results, *edges, strict=True)
    ]


def report(file: Path = MEASURED) -> str:
    """For each kind: how many workspaces are expected within 5 % of their operands, and how many bytes are not; by the
    rules alone, then with cuDNN's answers."""
    lines = [f"{'type and layout':24}{'part':>8}{'by rule: %, GiB':>17}{'asked: %, GiB':>15}{'high':>7}{'GiB':>7}"]
    every = sorted(compared(file))

    def error(s: Seen, rule: bool) -> int:
        return abs((s.by_rule if rule else s.expected) - s.measured)

    for (kind, part), seen in groupby(every, lambda s: s[:2]):
        rows = list(seen)
        cells = ""
        for rule in (True, False):
            near = sum(error(s, rule) <= 0.05 * s.operands for s in rows) / len(rows)
            cells += f"{100 * near:>9.1f}{sum(error(s, rule) for s in rows) / 2**30:>6.1f}"
        under = 100 * sum(s.measured <= s.high + 2**24 for s in rows) / len(rows)
        whole = sum(s.measured for s in rows) / 2**30
        lines.append(f"{kind.replace('channels ', ''):24}{part:>8}  {cells}{under:>7.1f}{whole:>7.1f}")
    cores = [s for s in every if "TF32" not in s.kind]
    by_rule, asked = (sum(error(s, rule) for s in cores) / 2**30 for rule in (True, False))
    whole = sum(s.measured for s in cores) / 2**30
    pointwise = sum(error(s, rule=False) for s in cores if s.pointwise) / 2**30
    lines.append(f"on tensor cores: by rule off by {by_rule:.1f} GiB, asked by {asked:.1f}, of {whole:.1f}")
    lines.append(f"{pointwise:.1f} of the asked are pointwise convolutions, for which the rules stand")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, help="measure on this machine's GPU, and write a table")
    parser.add_argument("--file", type=Path, default=MEASURED, help="a table, in place of the H200's")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--networks", nargs="*", default=_NETWORKS)
    parser.add_argument("--batch", type=int, nargs="*", default=[32, 128, 8])
    arguments = parser.parse_args()
    if arguments.measure:
        measure_all(arguments.measure, arguments.networks, arguments.batch, arguments.jobs)
    else:
        print(report(arguments.file))


if __name__ == "__main__":
    main()
