"""Sizes that are no polynomials of the batch size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_memplan.cuda.kernel_sizes import KERNELS, kernel_bytes, reduction

RTX3090 = (82, 1536)


def test_a_small_reduction_needs_no_buffer():
    assert reduction(0, 4, 4, 4, *RTX3090, 1, 64, 1000, 1000, 1) == 0
    assert reduction(1, 4, 4, 4, *RTX3090, 1, 64, 1000, 1000, 1) == 0


def test_the_buffers_of_a_sum_over_rows():
    # 200,704 rows of 64 float16 columns: vectors of 4 columns, blocks of 16 · 8 threads (512 / 4); 8 rows a step,
    # 25,088 values a thread; a grid of 1 by min(82 · (1536 // 128), 25088 / 16 = 1568) = 984 blocks, each passing
    # 16 · 4 threads' float32 values for 64 columns: 4 · 64 · 984 · 64, and one counter for all of them
    assert reduction(0, 4, 2, 8, *RTX3090, 1, 200704, 64, 64, 1) == 4 * 64 * 984 * 64
    assert reduction(1, 4, 2, 8, *RTX3090, 1, 200704, 64, 64, 1) == 4


def test_neighbouring_dimensions_are_one():
    apart = reduction(0, 4, 4, 4, *RTX3090, 2, 64, 32, 1000, 32 * 1000, 1000, 1)
    assert apart == reduction(0, 4, 4, 4, *RTX3090, 1, 2048, 1000, 1000, 1) == 16384000


def test_an_input_of_two_gibibytes_is_cut_in_halves():
    # 2**30 float32 values: the last of 2**29 begins 2**31 - 4 bytes after the first, which 32 bits can still hold
    whole = reduction(0, 4, 4, 4, *RTX3090, 1, 2**30, 1)
    assert whole == reduction(0, 4, 4, 4, *RTX3090, 1, 2**29, 1) == 16384


def test_what_is_empty_needs_nothing():
    assert reduction(0, 4, 4, 4, *RTX3090, 1, 0, 1000, 1000, 1) == 0


@given(
    st.integers(1, 4096),
    st.integers(1, 4096),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.sampled_from([(82, 1536), (132, 2048)]),
)
def test_a_reduction_is_never_negative_and_counts_blocks_only_with_a_buffer(rows, columns, width, card):
    buffer = reduction(0, width, 4, 4, *card, 1, rows, columns, columns, 1)
    counters = reduction(1, width, 4, 4, *card, 1, rows, columns, columns, 1)
    assert buffer >= 0
    assert bool(buffer) == bool(counters)


def test_an_unknown_kernel_is_a_key_error():
    with pytest.raises(KeyError):
        kernel_bytes(("no such kernel", 1))
    assert sorted(KERNELS) == list(KERNELS)
