"""Sizes that are no polynomials of the batch size, beside what torch's own code asks for."""

from __future__ import annotations

import csv
import sys

import pytest
import torch

from lightning_memplan.cuda.cudnn_process import FORWARD, MOVED
from lightning_memplan.cuda.kernel_sizes import KERNELS, kernel_bytes, layer_norm_rows, measured, norm_blocks, reduction
from tests.paths import ROOT

RTX3090 = (82, 1536)

#: Calls and the bytes of each, as torch's kernels ask for them on the null GPU (tests/programs/kernel_sizes.py)
TABLE = ROOT / "tests/unit/cuda/kernel_sizes.csv"
CALLS = [(name, *map(int, numbers)) for name, *numbers in csv.reader(TABLE.read_text().splitlines())]


@pytest.mark.parametrize("kernel", sorted({name for name, *_ in CALLS}))
def test_a_kernel_takes_what_torchs_own_code_asks_for(kernel):
    calls = [call for call in CALLS if call[0] == kernel]
    assert [call for *call, size in calls if kernel_bytes(tuple(call)) != size] == []


def test_the_table_is_what_torch_asks_for(nullgpu):
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):
        pytest.skip("the table is of torch 2.14")
    done = nullgpu([sys.executable, "-W", "ignore", "-m", "tests.programs.kernel_sizes"], PYTHONPATH=ROOT)
    assert done.stdout == TABLE.read_text()


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
    assert reduction(0, 4, 4, 4, *RTX3090, 1, 10_000_000, 0, 1, 1) == 0


def test_a_number_alone_is_reduced_without_a_buffer():
    assert [reduction(part, 4, 4, 4, *RTX3090, 0) for part in (0, 1)] == [0, 0]


def test_half_of_an_odd_number_of_multiprocessors_is_rounded_down():
    # 41 blocks of 32 columns are as many as 83 // 2
    assert layer_norm_rows(0, 100_356, 41 * 32 - 1, 4, 4, 83, 1536) > 0
    assert layer_norm_rows(0, 100_356, 41 * 32, 4, 4, 83, 1536) == 0


def test_a_batch_norm_without_rows_or_channels_needs_nothing():
    assert norm_blocks(0, 16384, 0, 16) == norm_blocks(0, 0, 64, 16) == 0


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (1, 0),  # 100 - 3 · 100 would be less than nothing
        (3, 0),
        (4, 100),
        (5, 200),
        (7, 300),  # halfway to 400, at 9
        (9, 400),
        (10, 460),  # as from the first to the last: 300 in 5 samples
        (14, 700),
    ],
)
def test_measured_bytes_lie_on_lines_between_measurements(samples, expected):
    assert measured(samples, 4, 100, 5, 200, 9, 400) == expected


def test_one_measurement_holds_for_every_batch():
    assert [measured(samples, 4, 100) for samples in (1, 3, 4, 5, 99)] == [100] * 5


def test_beyond_two_neighbours_each_sample_adds_as_much():
    assert measured(7, 4, 100, 5, 110) == 110 + 2 * 10
    assert measured(7, 4, 110, 5, 100) == 100  # and takes nothing away


def test_a_convolution_takes_what_the_workspaces_chosen_allow():
    # 8 images of 56 · 56 and 64 channels through 3 · 3 filters, in layouts between which cuDNN copies
    convolution = ("convolution", 0, 86, FORWARD, 2, 0, MOVED, 8, 64, 64, 1, 56, 56, 56, 56, 3, 3, 1, 1, 1, 1, 1, 1)
    assert kernel_bytes(convolution) == kernel_bytes(convolution, "low") == 0
    assert 0 < kernel_bytes(convolution, "expected") < kernel_bytes(convolution, "high")


def test_an_unknown_kernel_is_a_key_error():
    with pytest.raises(KeyError):
        kernel_bytes(("no such kernel", 1))
    assert kernel_bytes(("measured", 4, 4, 100)) == 100
    assert sorted(KERNELS) == list(KERNELS)
