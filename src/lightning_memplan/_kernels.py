"""Bytes that CUDA kernels ask for beside their outputs, as functions of sizes.

Most sizes of a step are polynomials of the batch size. These are not (they depend on how a launch is cut into blocks,
or are rounded up), so an event carries the function's name and arguments, the arguments are what is scaled to another
batch size, and the function is asked again there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping


def _last_power_of_two(n: int) -> int:
    return 1 << max(0, n.bit_length() - 1)


def _up(a: int, b: int) -> int:
    return -(-a // b)


def reduction(
    outputs: int, inputs: int, width: int, fastest: int, vector: int, multiprocessors: int, threads: int
) -> int:
    """Bytes of the buffer through which the blocks of one reduction pass their partial results.

    ``outputs`` results of ``inputs`` values each, ``width`` bytes an accumulator; ``fastest``: whether the fastest
    moving dimension is reduced; ``vector``: values that one thread reads at a time. ``multiprocessors`` and ``threads``
    (on each of them) are the card's. 0 where one block does an output alone.

    Source: ``setReduceConfig`` and ``ReduceConfig::global_memory_size`` in aten/src/ATen/native/cuda/Reduce.cuh (2.15).

    The gradient of a bias, 2,048 rows of 1,000 columns, on an RTX 3090 (82 multiprocessors of 1,536 threads): 32 blocks
    share an output, each passes 32 · 4 threads' float32 values for 1,000 columns: 4 · 1000 · 32 · 128.

    >>> reduction(outputs=1000, inputs=2048, width=4, fastest=0, vector=4, multiprocessors=82, threads=1536)
    16384000
    """
    if outputs <= 0 or inputs <= 0:
        return 0
    output_vector = 1 if fastest else vector
    if fastest:
        dim0, dim1 = inputs // vector, outputs
    else:
        dim0, dim1 = outputs // output_vector, inputs
    most = 512 // output_vector  # MAX_NUM_THREADS
    wide = _last_power_of_two(dim0) if dim0 < most else most
    high = _last_power_of_two(dim1) if dim1 < most else most
    block_width = min(wide, 32)
    block_height = min(high, most // block_width)
    block_width = min(wide, most // block_height)
    block_threads = block_width * block_height
    step_input = step_output = 1
    reduces_x = bool(fastest)
    if fastest:
        step_input *= block_width
    else:
        step_output *= block_width
    reduces_y = _up(inputs, step_input) >= min(block_height * 16, 256)
    if reduces_y:
        step_input *= block_height
    else:
        step_output *= block_height
    grid = _up(outputs // output_vector, step_output)
    target = multiprocessors * (threads // block_threads)
    per_thread = _up(inputs, step_input)
    if not (reduces_y and per_thread >= 256 and grid <= target):
        return 0
    shared = max(min(_up(target, grid), _up(per_thread, 16)), _up(per_thread, 256))
    if shared <= 1:
        return 0
    size = width * outputs * shared
    return size if reduces_x else size * block_width * output_vector


def rounded_rows(count: int, rows: int, multiple: int, width: int) -> int:
    """``count`` times ``rows`` rounded up to ``multiple``, of ``width`` bytes.

    >>> rounded_rows(count=3, rows=100, multiple=128, width=4)
    1536
    """
    return count * _up(rows, multiple) * multiple * width


KERNELS: Mapping[str, Callable[..., int]] = {
    "reduction": reduction,
    "rounded_rows": rounded_rows,
}


def kernel_bytes(rule: tuple[str, ...] | tuple[object, ...]) -> int:
    """The bytes of ``(name, argument, ...)``.

    >>> kernel_bytes(("rounded_rows", 3, 100, 128, 4))
    1536
    """
    name, *arguments = rule
    return KERNELS[str(name)](*arguments)
