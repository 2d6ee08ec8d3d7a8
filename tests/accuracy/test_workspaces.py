"""cuDNN's workspaces: the arithmetic by hand, and the order low <= expected <= high."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .workspaces import convolution, transposed, winograd


def test_half_precision_channels_first_is_transposed():
    # input 2·16·8·8 = 2048 values, result 2·32·8·8 = 4096, filter 32·16·1·1 = 512; two bytes each
    assert transposed(2, 16, 8, 8, 32, 1, 1, 8, 8, width=2) == 2 * (2048 + 4096 + 512)
    assert convolution(2, 16, 8, 8, 32, 1, 1, 8, 8, width=2).expected == 13312


def test_channels_are_filled_up_to_a_vector_of_16_bytes():
    # 3 channels are 8 in float16 and 4 in float32
    assert transposed(1, 3, 4, 4, 8, 1, 1, 4, 4, width=2) == 2 * (8 * 16 + 8 * 16 + 64)
    assert transposed(1, 3, 4, 4, 8, 1, 1, 4, 4, width=4) == 4 * (4 * 16 + 8 * 16 + 32)


def test_a_group_has_its_own_share_of_the_filter():
    # input and result 64·4·4 values each, filter 64·(64/4)·3·3
    assert convolution(1, 64, 4, 4, 64, 3, 3, 4, 4, groups=4, width=2).high == 2 * (1024 + 1024 + 9216)


def test_winograd_tiles_are_rounded_up():
    # 5×5 results are 2×2 tiles of 4×4: 36 · (4 · (1 + 1) + 1) values of 4 bytes
    assert winograd(1, 1, 1, 5, 5) == 4 * 36 * 9


@pytest.mark.parametrize("case", [{"channels_last": True}, {"groups": 4}, {"groups": 64}, {"tensor_cores": False}])
def test_nothing_is_expected_without_transposes(case):
    assert convolution(2, 64, 8, 8, 64, 3, 3, 8, 8, stride=2, width=2, **case).expected == 0


def test_depthwise_convolutions_have_none():
    assert convolution(2, 64, 8, 8, 64, 3, 3, 8, 8, groups=64) == (0, 0, 0)


@given(
    sizes=st.tuples(*[st.integers(1, 64)] * 9),
    groups=st.sampled_from([1, 2, 64]),
    width=st.sampled_from([2, 4]),
    channels_last=st.booleans(),
)
def test_the_range_is_in_order_and_grows_with_the_batch(sizes, groups, width, channels_last):
    settings = {"groups": groups, "width": width, "channels_last": channels_last}
    one = convolution(*sizes, **settings)
    more = convolution(2 * sizes[0], *sizes[1:], **settings)
    assert 0 <= one.low <= one.expected <= one.high
    assert all(a <= b <= 2 * a for a, b in zip(one, more, strict=True))
