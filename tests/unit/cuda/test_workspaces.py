"""cuDNN's workspaces: the arithmetic by hand, what a trace records of them, and what a plan makes of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lightning_memplan as mp
from lightning_memplan.cuda import workspaces
from lightning_memplan.cuda.cudnn_process import FILTER, FORWARD, INPUT, LAST, MOVED, PLAIN, Question
from lightning_memplan.cuda.workspaces import convolution, padded, taken, transposed, winograd

GiB = 2**30


def expected(part, n, c, k, pixels, results, taps, *, tiles=0, groups=1, width=2, layout=MOVED):
    return convolution(part, n, c, k, pixels, results, taps, tiles, groups, width, layout).expected


@pytest.mark.parametrize("part", [FORWARD, INPUT, FILTER])
def test_half_precision_channels_first_is_copied(part):
    # input 2·16·64 = 2048 values, result 2·32·64 = 4096, filter 32·16·9 = 4608; two bytes each
    assert transposed(2, 16, 32, 64, 64, 9, groups=1, width=2) == 2 * (2048 + 4096 + 4608)
    assert expected(part, 2, 16, 32, 64, 64, 9) == 21504


def test_channels_are_filled_up_to_a_vector_of_16_bytes():
    # 3 channels are 8 in float16 and 4 in float32; a filter of one place is the same in either layout
    assert transposed(1, 3, 8, 16, 16, 1, groups=1, width=2) == 2 * (8 * 16 + 8 * 16)
    assert transposed(1, 3, 8, 16, 16, 4, groups=1, width=4) == 4 * (4 * 16 + 8 * 16 + 8 * 4 * 4)
    # channels last: only the operand that has to be filled up is copied, 30 channels to 32
    assert padded(1, 30, 64, 16, 16, width=2) == expected(FORWARD, 1, 30, 64, 16, 16, 9, layout=LAST) == 2 * 32 * 16


def test_a_group_has_its_own_share_of_the_filter():
    # input and result 64·4·4 values each, filter 64·(64/4)·3·3
    found = convolution(FORWARD, 1, 64, 64, 16, 16, 9, 1, groups=4, width=2, layout=MOVED)
    assert found == (0, *[2 * (1024 + 1024 + 9216)] * 2)


def test_winograd_has_36_values_for_each_tile_and_filter():
    # 4 tiles of 1 + 1 channels and 1 filter, of 4 bytes
    assert winograd(1, 1, 1, tiles=4) == 4 * 36 * (4 * 2 + 1)
    assert expected(FILTER, 1, 1, 1, 64, 64, 9, tiles=4, width=4, layout=PLAIN) == 4 * 36 * 9
    assert expected(FORWARD, 1, 1, 1, 64, 64, 9, tiles=4, width=4, layout=PLAIN) == 0


def test_a_pointwise_convolution_is_a_product_of_matrices():
    # 14² places are an even number: nothing is copied, and the filter's gradient is a sum of 32 products in float32
    assert expected(FORWARD, 32, 64, 128, 196, 196, 1) == expected(INPUT, 32, 64, 128, 196, 196, 1) == 0
    assert expected(FILTER, 32, 64, 128, 196, 196, 1) == 4 * 32 * 64 * 128
    # 7² are an odd one: both operands are copied
    assert {expected(part, 32, 64, 128, 49, 49, 1) for part in (FORWARD, INPUT, FILTER)} == {2 * 32 * 49 * (64 + 128)}
    # with a stride they are as well
    assert expected(FORWARD, 32, 64, 128, 196, 49, 1) == 2 * 32 * (196 * 64 + 49 * 128)


@pytest.mark.parametrize(("c", "k"), [(64, 64), (64, 128), (128, 64)])
def test_depthwise_convolutions_have_none(c, k):
    assert convolution(FORWARD, 2, c, k, 64, 64, 9, 4, groups=64, width=2, layout=MOVED) == (0, 0, 0)


def test_a_depthwise_filters_gradient_is_summed_up_in_parts_where_channels_are_last():
    # 32 · 49 / 2 = 784 parts of 64 · 25 float32 values, at most 1,024
    assert expected(FILTER, 32, 64, 64, 49, 49, 25, groups=64, layout=LAST) == 784 * 64 * 25 * 4
    assert expected(FILTER, 128, 64, 64, 49, 49, 25, groups=64, layout=LAST) == 1024 * 64 * 25 * 4


@given(
    part=st.sampled_from([FORWARD, INPUT, FILTER]),
    sizes=st.tuples(*[st.integers(1, 64)] * 7),
    groups=st.sampled_from([1, 2, 64]),
    width=st.sampled_from([2, 4]),
    layout=st.sampled_from([PLAIN, MOVED, LAST]),
)
def test_the_range_is_in_order_and_grows_with_the_batch(part, sizes, groups, width, layout):
    one = convolution(part, *sizes, groups, width, layout)
    more = convolution(part, 2 * sizes[0], *sizes[1:], groups, width, layout)
    assert 0 <= one.low <= one.expected <= one.high
    assert all(a <= b <= 2 * a for a, b in zip(one, more, strict=True))


# ---------------------------------------------------------------------------------------------------------- in a trace


def recorded(module, batch, precision="16-mixed", **options):
    """The numbers of each convolution's workspace in the first step, at the batch size of the first trace: its part,
    layout, whether it is transposed, its type's number, the card's capability, whether it is to be deterministic, and
    the rest."""
    program = mp.estimate(module, batch, precision=precision, method="trace", **options).program
    found = [e.rule[1:] for e in program.events if e.rule[:1] == ("convolution",) and e.step == 1]
    return [(part, layout, *(up, kind, card, same), tuple(rest)) for up, card, part, kind, same, layout, *rest in found]


def test_a_call_has_one_and_each_gradient_one():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2))
    # two samples, 3 to 8 channels, one group, on 10² to 10² places by 3², in steps of 1, padded by 1, not dilated;
    # then 8 to 16, on 10² to 4², in steps of 2
    first = (MOVED, 0, 2, 86, 0, (2, 3, 8, 1, 10, 10, 10, 10, 3, 3, 1, 1, 1, 1, 1, 1))
    second = (MOVED, 0, 2, 86, 0, (2, 8, 16, 1, 10, 10, 4, 4, 3, 3, 2, 2, 0, 0, 1, 1))
    # the image needs no gradient, so the first convolution has one backwards, the second two
    parts = [(FORWARD, *first), (FORWARD, *second), (INPUT, *second), (FILTER, *second), (FILTER, *first)]
    assert recorded(net, torch.zeros(4, 3, 10, 10)) == parts


def test_in_one_and_three_dimensions_and_transposed():
    # 4 channels of 6³ to 8 of 4³ by 3³, of 6 to 4 by 3; transposed, 4 of 6² to 8 of 12² by 2² in steps of 2
    ones, threes = (1, 1, 1), (3, 3, 3)
    cube = (2, 4, 8, 1, 6, 6, 6, 4, 4, 4, *threes, *ones, 0, 0, 0, *ones)
    assert recorded(nn.Conv3d(4, 8, 3), torch.zeros(4, 4, 6, 6, 6))[0][-1] == cube
    assert recorded(nn.Conv1d(4, 8, 3), torch.zeros(4, 4, 6))[0][-1] == (2, 4, 8, 1, 6, 4, 3, 1, 0, 1)
    up = recorded(nn.ConvTranspose2d(4, 8, 2, stride=2), torch.zeros(4, 4, 6, 6))[0]
    assert up[1:] == (MOVED, 1, 2, 86, 0, (2, 4, 8, 1, 6, 6, 12, 12, 2, 2, 2, 2, 0, 0, 1, 1))


def test_channels_last_and_what_no_tensor_core_computes_is_not_moved():
    net, batch = nn.Conv2d(16, 32, 3), torch.zeros(4, 16, 8, 8)
    last = net.to(memory_format=torch.channels_last), batch.to(memory_format=torch.channels_last)
    assert recorded(*last)[0][1] == LAST
    assert recorded(nn.Conv2d(16, 32, 3), batch, "64-true")[0][1] == PLAIN
    assert recorded(nn.Conv2d(16, 32, 3), batch, "32-true")[0][1:4] == (MOVED, 0, 0)  # TF32
    turing = mp.Device("Turing", total=GiB, capability=(7, 5))
    assert recorded(nn.Conv2d(16, 32, 3), batch, "32-true", device=turing)[0][1:5] == (PLAIN, 0, 0, 75)
    assert recorded(nn.Conv2d(16, 32, 3), batch, "16-mixed", device=turing)[0][1:5] == (MOVED, 0, 2, 75)


def test_whether_results_must_be_the_same_is_recorded(monkeypatch):
    net, batch = nn.Conv2d(16, 32, 3), torch.zeros(4, 16, 8, 8)
    assert recorded(net, batch)[0][5] == 0
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert recorded(net, batch)[0][5] == 1


def test_float32_without_tf32_is_not_moved(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert recorded(nn.Conv2d(16, 32, 3), torch.zeros(4, 16, 8, 8), "32-true")[0][1] == PLAIN


# ------------------------------------------------------------------------------------------------- where cuDNN is asked

SQUARE = (56, 56, 56, 56, 3, 3, 1, 1, 1, 1, 1, 1)  # a filter of 3², padded


@pytest.fixture
def asked(monkeypatch):
    """The questions that cuDNN was asked; it says 1,000 bytes of each."""
    questions = []
    monkeypatch.setattr(workspaces, "workspace", lambda question: questions.append(question) or 1000)
    return questions


def test_what_cudnn_says_is_usual(asked):
    numbers = (0, 86, FORWARD, 2, 0, MOVED, 32, 64, 64, 1, *SQUARE)
    by_rule = convolution(FORWARD, 32, 64, 64, 56**2, 56**2, 9, 14**2, 1, 2, MOVED)
    assert [taken(choice, *numbers) for choice in ("low", "expected", "high")] == [0, 1000, by_rule.high]
    edges = ((56, 56), (56, 56), (3, 3), (1, 1), (1, 1), (1, 1))
    assert asked == [Question(86, FORWARD, 2, 0, MOVED, 32, 64, 64, 1, *edges)] * 2


def test_a_transposed_one_is_another_ones_gradient(asked):
    edges = (6, 6, 12, 12, 2, 2, 2, 2, 0, 0, 1, 1)
    for part in (FORWARD, INPUT, FILTER):
        assert taken("expected", 1, 90, part, 9, 1, LAST, 4, 8, 16, 1, *edges) == 1000
    assert [q[1:11] for q in asked] == [
        (part, 9, 1, LAST, 4, 16, 8, 1, (12, 12), (6, 6)) for part in (INPUT, FORWARD, FILTER)
    ]


def test_products_of_matrices_and_kernels_of_torchs_own_are_not_asked_for(asked):
    pointwise = (56, 56, 56, 56, 1, 1, 1, 1, 0, 0, 1, 1)
    assert taken("expected", 0, 86, FILTER, 2, 0, MOVED, 32, 64, 128, 1, *pointwise) == 4 * 32 * 64 * 128
    assert taken("expected", 0, 86, FORWARD, 2, 0, MOVED, 32, 64, 64, 64, *SQUARE) == 0
    assert taken("expected", 0, 75, FORWARD, 0, 0, PLAIN, 32, 64, 64, 1, *SQUARE) == 0
    assert not asked


def test_without_cudnn_it_is_the_rules(monkeypatch):
    monkeypatch.setenv("MEMPLAN_CUDNN", "off")
    by_rule = convolution(INPUT, 32, 64, 64, 56**2, 56**2, 9, 14**2, 1, 2, MOVED)
    numbers = (0, 86, INPUT, 2, 0, MOVED, 32, 64, 64, 1, *SQUARE)
    assert (taken("expected", *numbers), taken("high", *numbers)) == by_rule[1:]


# ----------------------------------------------------------------------------------------------------------- in a plan


def test_an_estimate_has_a_range_and_its_peak_is_the_low_end(monkeypatch):
    monkeypatch.setenv("MEMPLAN_CUDNN", "off")
    batch = torch.zeros(4, 16, 64, 64)
    estimate = mp.estimate(nn.Conv2d(16, 32, 3, padding=1), batch, precision="16-mixed")
    low, expected, high = estimate.reserved_range(256)
    assert low == estimate.peak(256)
    # the copies: 2 · (256 · (16 + 32) · 64² + 32 · 16 · 9) = 100,672,512 bytes, a segment of 49 times 2 MiB;
    # the transforms: 144 · (256 · 16² · 48 + 16 · 32) = 453,058,560 bytes, 217 times
    assert expected - low == 49 * 2**21
    assert expected < high <= low + 217 * 2**21
    assert estimate.reserved_range(256, expected + 2**20).high == expected + 2**20  # what is not there is not taken


def test_without_convolutions_there_is_one_figure():
    estimate = mp.estimate(nn.Linear(8, 8), torch.zeros(4, 8))
    assert len(set(estimate.reserved_range(64))) == 1
    assert len(set(mp.estimate(nn.Linear(8, 8), torch.zeros(4, 8), method="formula").reserved_range(64))) == 1


def test_a_plan_leaves_room_for_what_is_expected():
    card = mp.Device("small", total=GiB, capability=(8, 6))
    net, batch = nn.Conv2d(16, 32, 3, padding=1), torch.zeros(4, 16, 64, 64)
    estimate = mp.estimate(net, batch, precision="16-mixed", device=card)
    plan = mp.plan(net, batch, precision="16-mixed", device=card, margin=0)
    assert estimate.fits(plan.batch_size, GiB, workspaces="expected")
    assert not estimate.fits(plan.batch_size + 1, GiB, workspaces="expected")
    assert estimate.fits(plan.batch_size + 1, GiB)  # which runs, by slower algorithms
    assert plan.reserved_range.low == plan.peak_reserved < plan.reserved_range.expected <= GiB
    line = next(line for line in mp.plan_table(plan).splitlines() if "cuDNN" in line)
    assert len(line) <= 80


def test_where_there_is_no_room_for_them_a_plan_goes_without():
    # eight samples of 64 channels of 64² to 64, four bytes: where they just fit, copies of them (16 MiB) do not
    net, batch = nn.Conv2d(64, 64, 3, padding=1), torch.zeros(4, 64, 64, 64)
    estimate = mp.estimate(net, batch)
    capacity = next(n for n in range(2**21, GiB, 2**21) if estimate.fits(8, n))
    assert not estimate.fits(8, capacity, workspaces="expected")
    plan = mp.plan(net, batch, device=mp.Device("small", total=capacity), margin=0, min_batch_size=8)
    assert plan.batch_size >= 8
    assert estimate.fits(plan.batch_size, capacity)
