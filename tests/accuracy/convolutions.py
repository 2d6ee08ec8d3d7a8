"""cuDNN's workspaces, measured: what each convolution of many networks takes beside its operands, on this card.

    python -m tests.accuracy.convolutions FILE --jobs 8        # on a machine with a GPU

A line of ``FILE`` is a convolution and the bytes of all that was allocated and given back while it ran, forwards and in
each of its gradients (``input``, ``weight``), with ``cudnn.benchmark`` off; ``tried`` is the most with it on.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple


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

    from tests.accuracy import networks

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


def measure(shape: Shape, batch: int, kind: tuple[str, bool, bool], tries: bool) -> dict[str, Any]:
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
    passes = {
        "forward": lambda: aten.convolution(x, w, None, *how),
        "input": lambda: aten.convolution_backward(g, x, w, None, *how, (True, False, False)),
        "weight": lambda: aten.convolution_backward(g, x, w, None, *how, (False, True, False)),
    }
    found: dict[str, Any] = {**shape._asdict(), "batch": batch, "dtype": name, "channels_last": last, "tf32": tf32}
    found["results_size"] = tuple(y.shape[2:])
    for benchmark in (False, True)[: 1 + tries]:
        torch.backends.cudnn.benchmark = benchmark
        for what, run in passes.items():
            torch.cuda.empty_cache()
            torch.cuda.memory._record_memory_history("all", context=None, max_entries=10**5)
            try:
                kept = run()
                sizes = [
                    e["size"] for e in torch.cuda.memory._snapshot(0)["device_traces"][0] if e["action"] == "alloc"
                ]
            except RuntimeError as error:
                found[what] = str(error).splitlines()[0][:100]
                continue
            finally:
                torch.cuda.memory._record_memory_history(None)
            outputs = [
                t.untyped_storage().nbytes() for t in (kept if isinstance(kept, tuple) else (kept,)) if t is not None
            ]
            for size in outputs:
                if size in sizes:
                    sizes.remove(size)
            del kept
            found[("tried_" if benchmark else "") + what] = max(sizes, default=0) if benchmark else sizes
    return found


def work(job: tuple[list[Shape], int, bool]) -> list[dict[str, Any]]:
    import torch

    warnings.simplefilter("ignore")
    torch.zeros(1, device="cuda")
    chosen, batch, tries = job
    found = []
    for shape in chosen:
        for kind in KINDS:
            try:
                found.append(measure(shape, batch, kind, tries))
            except RuntimeError as error:
                found.append({**shape._asdict(), "batch": batch, "dtype": kind[0], "failed": str(error)[:100]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where the measurements are written, a line of JSON each")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--networks", nargs="*", default=_NETWORKS)
    parser.add_argument("--batch", type=int, nargs="*", default=[4, 32, 128])
    parser.add_argument("--tried", type=int, default=32, help="the batch size at which cudnn.benchmark is on as well")
    arguments = parser.parse_args()
    found = shapes(arguments.networks)
    print(f"{len(found)} different convolutions", file=sys.stderr)
    chosen = list(found)
    jobs = [
        (chosen[k : k + 6], batch, batch == arguments.tried)
        for batch in arguments.batch
        for k in range(0, len(chosen), 6)
    ]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool, arguments.file.open("w") as out:
        for lines in pool.map(work, jobs):
            out.writelines(json.dumps(line) + "\n" for line in lines)
            out.flush()


if __name__ == "__main__":
    main()
