"""Bytes that CUDA kernels allocate beside their outputs, as functions of sizes.

Most sizes of a step are polynomials of the batch size. These are not: they depend on how a launch is cut into blocks,
or are rounded up. So an event carries the name and the arguments of a function. The arguments are scaled to another
batch size, and the function is called again there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from math import prod

from lightning_memplan.cuda.workspaces import Choice, taken


def _last_power_of_two(n: int) -> int:
    return 1 << max(0, n.bit_length() - 1)


def _up(a: int, b: int) -> int:
    return -(-a // b)


def reduction(
    part: int, width: int, element: int, vector: int, multiprocessors: int, threads: int, reduced: int, *layout: int
) -> int:
    """Return the bytes through which the blocks of one reduction pass partial results (``part`` 0), or of counters (1).

    An accumulator has ``width`` bytes, a value ``element`` bytes, and a thread reads ``vector`` values at a time.
    The GPU has ``multiprocessors``, with ``threads`` each. ``layout`` has the sizes of the dimensions, then the strides
    of the input (in elements): the first ``reduced`` dimensions are reduced, each part in the order of strides. The
    result is 0 if each output needs one block alone.

    Source: ``setReduceConfig``, ``ReduceConfig::global_memory_size`` and ``semaphore_size`` in
    aten/src/ATen/native/cuda/Reduce.cuh (2.15); an input of 2 GiB or more is cut in halves first.

    The gradient of a bias, 2,048 rows of 1,000 columns, on an RTX 3090 (82 multiprocessors of 1,536 threads): 32 blocks
    share an output, each passes 32 · 4 threads' float32 values for 1,000 columns: 4 · 1000 · 32 · 128.

    >>> reduction(0, 4, 4, 4, 82, 1536, 1, 2048, 1000, 1000, 1)
    16384000
    >>> reduction(1, 4, 4, 4, 82, 1536, 1, 2048, 1000, 1000, 1)  # a counter for each of 8 blocks of columns
    32
    """
    shape, strides = list(layout[: len(layout) // 2]), list(layout[len(layout) // 2 :])
    if min(shape, default=1) <= 0:
        return 0
    while prod(shape) >= 2**31 or 1 + sum((n - 1) * s * element for n, s in zip(shape, strides, strict=True)) >= 2**31:
        largest = max(range(len(shape)), key=lambda d: (shape[d] - 1) * strides[d])
        shape[largest] = _up(shape[largest], 2)
    shape, strides, reduced = _joined(shape, strides, reduced)
    inputs, outputs = prod(shape[:reduced]), prod(shape[reduced:])
    fastest = reduced == len(shape) or (reduced > 0 and strides[0] < strides[reduced])
    dim0, dim1 = (inputs, outputs) if fastest else (outputs, inputs)
    output_vector = 1
    if not shape or strides[0 if fastest else reduced] == 1:
        if fastest and dim0 >= 128 and reduced == 1:
            dim0 //= vector
        elif not fastest:
            others = [s for d, s in enumerate(strides) if d != reduced]
            output_vector = next(v for v in (4, 2, 1) if all(n % v == 0 for n in (shape[reduced], *others)))
            dim0 //= output_vector
    most = 512 // output_vector  # MAX_NUM_THREADS
    wide = _last_power_of_two(dim0) if dim0 < most else most
    high = _last_power_of_two(dim1) if dim1 < most else most
    block_width = min(wide, 32)
    block_height = min(high, most // block_width)
    block_width = min(wide, most // block_height)
    # Blocks only share an output where torch also reduces along their height.
    step_input, step_output = (block_width * block_height, 1) if fastest else (block_height, block_width)
    grid = _up(outputs // output_vector, step_output)
    target = multiprocessors * (threads // (block_width * block_height))
    per_thread = _up(inputs, step_input)
    if per_thread < 256 or grid > target:
        return 0
    shared = max(min(_up(target, grid), _up(per_thread, 16)), _up(per_thread, 256))
    if shared <= 1:
        return 0
    if part:
        return 4 * grid
    size = width * outputs * shared
    return size if fastest else size * block_width * output_vector


def _joined(shape: list[int], strides: list[int], reduced: int) -> tuple[list[int], list[int], int]:
    """Join neighbouring dimensions of the same kind where one stride goes through both (TensorIterator)."""
    parts = []
    for begin, end in ((0, reduced), (reduced, len(shape))):
        part: list[tuple[int, int]] = []
        for size, stride in sorted(zip(shape[begin:end], strides[begin:end], strict=True), key=lambda pair: pair[1]):
            if size == 1:
                continue
            if part and part[-1][0] * part[-1][1] == stride:
                part[-1] = (part[-1][0] * size, part[-1][1])
            else:
                part.append((size, stride))
        parts.append(part)
    pairs = parts[0] + parts[1]
    return [size for size, _ in pairs], [stride for _, stride in pairs], len(parts[0])


def norm_blocks(part: int, rows: int, channels: int, width: int) -> int:
    """Return the bytes through which blocks pass sums of a batch norm (``part`` 0), or of their counters (1).

    Its channels come last, and each has ``width`` bytes in a block. The result is 0 if a channel needs one block alone.

    Source: ``flexible_launch_configs`` and the templates of ``batch_norm_stats_channels_last`` and
    ``batch_norm_backward_reduce_channels_last`` in aten/src/ATen/native/cuda/Normalization.cuh (2.14).

    Four images of 64 x 64 (16,384 rows) and 64 channels: blocks of 32 x 16 threads, 16 rows a thread, so 2 blocks of
    channels and 64 of rows, each with a mean, a sum of squares and a count (in a place for 4) of 64 channels.

    >>> norm_blocks(0, 16384, 64, 16), norm_blocks(1, 16384, 64, 16)
    (65536, 8)
    """
    wide = min(_last_power_of_two(channels), 32)
    blocks = min(_up(rows, 512 // wide * 16), 128)
    if blocks < 8:
        return 0
    return 4 * _up(channels, wide) if part else width * channels * blocks


def rounded_rows(count: int, rows: int, multiple: int, width: int) -> int:
    """Return the bytes of ``count`` times ``rows``, rounded up to ``multiple``, at ``width`` bytes a value.

    >>> rounded_rows(count=3, rows=100, multiple=128, width=4)
    1536
    """
    return count * _up(rows, multiple) * multiple * width


def above(limit: int, value: int, size: int) -> int:
    """Return ``size`` if ``value`` is above ``limit``, else 0: another kernel is chosen for it.

    >>> above(3072, 4000, 512), above(3072, 3000, 512)
    (512, 0)
    """
    return size if value > limit else 0


def measured(samples: int, *seen: int) -> int:
    """Interpolate the bytes at a number of samples between measurements ``seen``: samples, bytes, samples, ...

    The choice of a library is no polynomial. Beyond the largest batch the bytes rise as from the smallest to the
    largest, and never fall.

    >>> measured(4, 2, 100, 6, 300), measured(10, 2, 100, 6, 300), measured(10, 2, 300, 6, 100)
    (200, 500, 100)
    """
    points = list(zip(seen[::2], seen[1::2], strict=True))
    first, last = points[0], points[-1]
    if samples >= last[0]:
        rise, run = max(0, last[1] - first[1]), max(1, last[0] - first[0])
        return last[1] + rise * (samples - last[0]) // run
    for (a, low), (b, high) in pairwise(points):
        if samples <= b:
            return max(0, low + (high - low) * (samples - a) // (b - a))
    return first[1]


def embedding_segments(part: int, indices: int, rows: int, row_bytes: int, multiprocessors: int) -> int:
    """Return the bytes of scratch memory for the gradient of a table of embeddings.

    It is summed over equal indices, then over their segments. Part 0 is a number for each segment, 1 for each part of
    a segment, 2 a row for each part, and 3 the scan over segments. Where a few segments have many parts each, part 2
    is a number for each part. The table has ``rows``, and a row in float32 ``row_bytes``. The result is 0 up to 3,072
    indices, which are the work of another kernel.

    Source: aten/src/ATen/native/cuda/Embedding.cu and EmbeddingBackwardKernel.cu (2.15), NROWS_PER_THREAD = 10; few
    segments as the null GPU shows them with torch 2.14.

    >>> embedding_segments(0, 6144, 1000, 1024, 82), embedding_segments(2, 6144, 1000, 1024, 82)
    (8000, 1652736)
    >>> embedding_segments(2, 6144, 2, 1024, 82)  # 614 parts of 2 segments, and one more each
    4928
    """
    if indices <= 3072:
        return 0
    segments = min(indices, rows)
    partial = indices // 10 + segments
    if segments < 4 * multiprocessors and partial > 4 * segments:
        row_bytes = 8
    return (8 * segments, 8 * partial, row_bytes * partial, scan(0, segments, 896))[part]


def layer_norm_rows(
    part: int, rows: int, width: int, element: int, vector: int, multiprocessors: int, threads: int
) -> int:
    """Return the bytes of sums for the gradient of a normalization's weight.

    More than 65,536 narrow rows are summed over blocks of 32 first, or over larger blocks, so that the sums are at most
    2**20 numbers. Part 0 is these sums, 1 their sum, 2 and 3 the memory of that `reduction`.

    Source: ``LaunchGammaBetaBackwardCUDAKernel`` in aten/src/ATen/native/cuda/layer_norm_kernel.cu (2.15).

    >>> layer_norm_rows(0, 100_356, 192, 4, 4, 82, 1536), layer_norm_rows(0, 60_000, 192, 4, 4, 82, 1536)
    (2409216, 0)
    """
    if rows <= 65536 or width // 32 >= multiprocessors // 2:
        return 0
    blocks = min(_up(rows, 32), 2**20 // (32 * _up(width, 32)))
    if part < 2:
        return (blocks if part == 0 else 1) * width * element
    return reduction(part - 2, 4, element, vector, multiprocessors, threads, 1, blocks, width, width, 1)


def scan(limit: int, count: int, tile: int) -> int:
    """Return the bytes that cub's scans take for ``count`` values, if these are more than ``limit``.

    They are 16 for each tile and for 32 more, in blocks of 256 bytes.

    Source: cub's dispatch_scan.cuh and util_device.cuh (measured on torch 2.14).

    >>> scan(0, 100_000, 320), scan(3072, 3000, 320)
    (6143, 0)
    """
    return _up(16 * (_up(count, tile) + 32), 256) * 256 + 511 if count > limit else 0


def sort_pairs(limit: int, count: int, largest: int) -> int:
    """Return the bytes that cub's radix sort takes for ``count`` pairs, if these are more than ``limit``.

    A pair is of 8-byte numbers up to ``largest``. They are sorted 8 bits at a time: with two sets of 256 counters for
    each of these passes, one for each tile of 3,840 pairs, and a second set of the pairs if there is more than one
    pass. One block of threads sorts up to 2,304 pairs.

    Source: cub's dispatch_radix_sort.cuh (measured on torch 2.14).

    >>> sort_pairs(0, 6144, 5000), sort_pairs(0, 2401, 169), sort_pairs(0, 2000, 169)
    (104959, 3583, 1)
    """
    if count <= limit:
        return 0
    if count <= 2304:
        return 1
    passes = _up(largest.bit_length(), 8)
    second = 2 * _up(8 * count, 256) * 256 if passes > 1 else 0
    return second + 1024 * (2 * passes + _up(count, 3840)) + 511


KERNELS: Mapping[str, Callable[..., int]] = {
    "above": above,
    "embedding_segments": embedding_segments,
    "layer_norm_rows": layer_norm_rows,
    "measured": measured,
    "norm_blocks": norm_blocks,
    "reduction": reduction,
    "rounded_rows": rounded_rows,
    "scan": scan,
    "sort_pairs": sort_pairs,
}


def kernel_bytes(rule: tuple[str, ...] | tuple[object, ...], workspaces: Choice = "low") -> int:
    """Return the bytes of ``(name, argument, ...)``; of a range, those that ``workspaces`` chooses.

    >>> kernel_bytes(("rounded_rows", 3, 100, 128, 4))
    1536
    """
    name, *arguments = rule
    if name == "convolution":
        return taken(workspaces, *arguments)
    return KERNELS[str(name)](*arguments)
