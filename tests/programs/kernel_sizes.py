"""Bytes that torch's kernels ask for beside their outputs: prints a row for each call, of which none is the package's.

    tests/nullgpu/nullgpu python -m tests.programs.kernel_sizes > tests/unit/cuda/kernel_sizes.csv

A row is the name of a function of ``cuda/kernel_sizes.py``, its arguments, and the bytes. Shapes are on both sides of
every threshold of these functions, and a seeded sample of others.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch

aten = torch.ops.aten
GPU = torch.device("cuda")
Row = tuple[str | int, ...]

#: Reductions: how, in which type, the bytes of an accumulator, and the values that a thread reads at once
REDUCTIONS: dict[str, tuple[Callable[[torch.Tensor, list[int]], object], torch.dtype, int, int]] = {
    "sum": (lambda x, dims: x.sum(dims), torch.float32, 4, 4),
    "sum of halves": (lambda x, dims: x.sum(dims), torch.float16, 4, 8),
    "sum of doubles": (lambda x, dims: x.sum(dims), torch.float64, 8, 4),
    "largest": (lambda x, dims: x.amax(dims), torch.float32, 4, 4),
    "variance": (lambda x, dims: x.var(dims), torch.float32, 16, 2),
    "any": (lambda x, dims: x.any(tuple(dims)), torch.bool, 1, 4),
}


def requests(call: Callable[[], object]) -> list[int]:
    """Return the bytes of each request while ``call`` runs, as the allocator records them."""
    torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=10**5, clear_history=True)
    call()
    history = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(enabled=None)
    return [event["size"] for event in history if event["action"] == "alloc"]


def multiprocessors() -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(GPU)
    return properties.multi_processor_count, properties.max_threads_per_multi_processor


def reduction(
    name: str, shape: Sequence[int], dims: Sequence[int], order: Sequence[int] | None = None
) -> Iterator[Row]:
    """Reduce ``dims`` of a tensor; its dimensions lie in memory in this order, the last one innermost."""
    order = order or range(len(shape))
    x = torch.empty([shape[d] for d in order], device=GPU, dtype=REDUCTIONS[name][1])
    yield from reduction_of(x.permute([*map(list(order).index, range(len(shape)))]), name, dims)


def reduction_of(x: torch.Tensor, name: str, dims: Sequence[int]) -> Iterator[Row]:
    reduce, _, width, vector = REDUCTIONS[name]
    _, *beside = requests(lambda: reduce(x, list(dims)))  # several times two where the input is cut into parts
    ordered = [*dims, *(d for d in range(x.dim()) if d not in dims)]
    layout = *(x.size(d) for d in ordered), *(x.stride(d) for d in ordered)
    for part in (0, 1):
        size = max(beside[part::2], default=0)
        yield "reduction", part, width, x.element_size(), vector, *multiprocessors(), len(dims), *layout, size


def reductions() -> Iterator[Row]:
    source = random.Random(0)
    for name in REDUCTIONS:
        for rows, columns in product((255, 256, 2048, 5000, 65536), (1, 16, 31, 32, 512, 1000)):
            yield from reduction(name, (rows, columns), (0,))
            yield from reduction(name, (columns, rows), (1,))
        for _ in range(30):
            shape = [source.choice((1, 2, 3, 7, 8, 16, 30, 64, 100, 128, 257, 512)) for _ in range(3)]
            order = source.sample(range(3), 3)
            dims = sorted(source.sample(range(3), source.choice((1, 2))))
            yield from reduction(name, shape, dims, order)

    for shape, dim in (((2**29 - 1,), 0), ((2**29 + 1,), 0), ((2**30,), 0), ((5, 2**28 + 3), 1), ((2**28 + 3, 5), 0)):
        yield from reduction("sum", shape, (dim,))
    for columns in (512, 513, 600, 1025):
        yield from reduction("sum", (2**20, columns), (0,))
    for rows, columns in product((1024, 1025, 2048), (125_952, 126_080)):  # 82 · 12 blocks of 32 · 4 columns, and more
        yield from reduction("sum", (rows, columns), (0,))
    yield from reduction("sum of halves", (4096, 8, 31), (0,), (1, 0, 2))
    yield from reduction("sum of doubles", (48, 1025, 15), (1,), (1, 0, 2))
    yield from reduction("sum of doubles", (2, 255, 100_352), (0, 1, 2), (2, 0, 1))
    yield from reduction("sum of halves", (768, 262_144, 1), (1, 2), (2, 1, 0))
    yield from reduction("sum of halves", (8, 1, 32_768), (0, 1, 2), (2, 1, 0))
    yield from reduction("sum", (1000, 200_704), (1,))
    for length in (2**31 - 1, 2**31, 2**31 + 1):
        yield from reduction_of(torch.empty(1, device=GPU).expand(length), "sum", (0,))
    for rows, columns in ((4096, 1000), (200_000, 64)):
        yield from reduction_of(torch.empty(1, 1, device=GPU).expand(rows, columns), "sum", (0,))
    for length in (2**30, 2**30 + 1):
        yield from reduction_of(torch.empty(2 * length, device=GPU, dtype=torch.bool)[::2], "any", (0,))


def norm_blocks(rows: int, channels: int) -> Iterator[Row]:
    x = torch.empty(rows, 1, 1, channels, device=GPU).permute(0, 3, 1, 2)
    _, _, *beside = requests(lambda: torch.batch_norm_stats(x, 1e-5))
    for part in (0, 1):
        yield "norm_blocks", part, rows, channels, 16, beside[part] if beside else 0


def layer_norm_rows(rows: int, width: int, dtype: torch.dtype) -> Iterator[Row]:
    x, weight = torch.empty(rows, width, device=GPU, dtype=dtype), torch.empty(width, device=GPU, dtype=dtype)
    mean, flags = torch.empty(rows, 1, device=GPU), (True, True, True)
    backward = aten.native_layer_norm_backward
    _, _, _, *beside = requests(lambda: backward(x, x, (width,), mean, mean, weight, weight, flags))
    parts, _, total, *sums = beside or (0, 0, 0)
    buffer, counters = sums[:2] if len(sums) > 2 else (0, 0)
    vector = 8 if x.element_size() == 2 else 4
    for part, size in enumerate((parts, total, buffer, counters)):
        yield "layer_norm_rows", part, rows, width, x.element_size(), vector, *multiprocessors(), size


def embedding(indices: int, rows: int, width: int) -> Iterator[Row]:
    """The gradient of a table: equal indices are found by a sort and a scan, and summed by segments."""
    index, grad = torch.zeros(indices, dtype=torch.int64, device=GPU), torch.empty(indices, width, device=GPU)
    found = requests(lambda: aten.embedding_dense_backward(grad, index, rows, -1, False))
    if len(found) == 1:
        found = [0] * 15
    _, _, _, sort, _, each, number, _, scan, segments, _, scanned, _, parts, values = found
    yield "above", 3072, indices, 8 * indices, each
    yield "above", 3072, indices, 8, number
    yield "sort_pairs", 3072, indices, rows, sort
    yield "scan", 3072, indices, 320, scan
    for part, size in enumerate((segments, parts, values, scanned)):
        yield "embedding_segments", part, indices, rows, 4 * width, multiprocessors()[0], size


def sort_pairs(count: int, rows: int) -> Iterator[Row]:
    table, index = torch.empty(rows, 2, device=GPU), torch.zeros(count, dtype=torch.int64, device=GPU)
    values = torch.empty(count, 2, device=GPU)
    yield "sort_pairs", 0, count, rows - 1, requests(lambda: table.index_put_((index,), values, accumulate=True))[-1]


def every_row() -> Iterator[Row]:
    torch.empty(1, device=GPU)
    yield from reductions()
    sizes = (1, 16, 127, 128, 1024, 1792, 1793, 2048, 2049, 3583, 3584, 16384, 32769, 262144, 262145)
    for size, channels in product(sizes, (1, 3, 31, 32, 64, 600)):
        yield from norm_blocks(size, channels)
    for size, width in product((65536, 65537, 100_356, 300_000), (1, 31, 192, 1279, 1311, 1312)):
        yield from layer_norm_rows(size, width, torch.float32)
    yield from layer_norm_rows(80_000, 96, torch.float16)
    for count, table in product((3072, 3073, 3840, 3841, 6144, 100_001), (2, 255, 256, 327, 328, 5000, 70_000)):
        yield from embedding(count, table, 16)
    for count, table in product((3099, 3100), (1, 102, 103, 104)):
        yield from embedding(count, table, 16)
    for count, table in product((5120, 5121, 16_000, 1_305_600), (1000, 14_336, 14_337)):  # 16 tiles of 320 and of 896
        yield from embedding(count, table, 4)
    for count, table in product((1, 2304, 2305, 3840, 3841, 7681), (2, 255, 256, 257, 65535, 65536)):
        yield from sort_pairs(count, table)


def main() -> None:
    seen = dict.fromkeys(every_row())
    sys.stdout.writelines(",".join(map(str, row)) + "\n" for row in seen)


if __name__ == "__main__":
    main()
