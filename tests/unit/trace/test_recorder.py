"""The dispatch mode that turns storages into events."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from lightning_memplan.cuda.rule_set import OUTPUTS, Gpu, Output, Rules, Scope, Scratch, scratch
from lightning_memplan.cuda.rules import rules_for
from lightning_memplan.memory.events import EMPTY, FREE, Event, labelled
from lightning_memplan.step.context import module_paths
from lightning_memplan.step.fake_cuda import DEVICE
from lightning_memplan.trace.autograd import GradientAccumulation
from lightning_memplan.trace.recorder import Recorder

aten = torch.ops.aten


@pytest.fixture
def recorder() -> Iterator[Callable[..., Recorder]]:
    gc.collect()
    gc.disable()
    yield lambda **rules: Recorder(FakeTensorMode(allow_non_fake_inputs=True), Rules(**rules))
    gc.enable()


def _sizes(recorder: Recorder) -> list[int]:
    return [event.size for event in recorder.events]


def test_a_block_is_allocated_and_freed(recorder):
    with recorder() as mode:
        x = torch.zeros(100, device=DEVICE)
        del x
    assert [(e.block, e.size) for e in mode.events] == [(0, 400), (0, -1)]


def test_a_view_is_no_block_and_keeps_one(recorder):
    with recorder() as mode:
        x = torch.zeros(10, 10, device=DEVICE)
        view = x.t()[2:]
        del x
        assert _sizes(mode) == [400]
        del view
    assert _sizes(mode) == [400, -1]


def test_a_fake_tensor_is_as_its_own_constructor_makes_it(recorder):
    mode = recorder()
    ours = mode._fakes.wrap(torch.empty(2, 3, device="meta"))
    theirs = FakeTensor(mode._mode, torch.empty(2, 3, device="meta"), DEVICE)
    assert type(ours) is type(theirs) is FakeTensor
    assert ours.__dict__ == theirs.__dict__
    assert torch._C._dispatch_keys(ours).raw_repr() == torch._C._dispatch_keys(theirs).raw_repr()


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.t(),
        lambda x: x.view(2, 5, 10)[:, 1:, ::2],
        lambda x: x.detach().unsqueeze(0).expand(3, 10, 10).permute(2, 0, 1),
        lambda x: torch.cat([part.select(1, 0) for part in x.split(3)]),
        lambda x: torch.stack(x.unbind(1)[2:4]),
        lambda x: x.mm(x.t()) + x * x[0],
        lambda x: torch.nn.functional.gelu(x).sum((0,), keepdim=True, dtype=torch.float64),
    ],
)
def test_what_is_asked_of_kernels_directly_is_what_they_give(recorder, look):
    expected = look(torch.zeros(10, 10))
    with recorder():
        found = look(torch.zeros(10, 10, device=DEVICE))
    assert found.device == DEVICE
    assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert found.storage_offset() == expected.storage_offset()


_LAST = torch.channels_last
_RULES = rules_for(Gpu())


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x + x,
        lambda x: x.to(memory_format=_LAST) * x.to(memory_format=_LAST),
        lambda x: x.to(memory_format=_LAST) * x,
        lambda x: x.transpose(0, 3) + x.transpose(0, 3),
        lambda x: x.transpose(1, 2) * x.transpose(1, 2)[:1],
        lambda x: 2 * x + 1.5 - x.add(x, alpha=2),
        lambda x: x * x[:1, :, :1] + x[0, 0, 0, :1],
        lambda x: x[:, :1] + x,
        lambda x: x[0] * x,
        lambda x: x.half() * x[0, 0, 0, 0],
        lambda x: x.half() + x,
        lambda x: x.long() * 0.5,
        lambda x: x.long() + x.int(),
        lambda x: x * torch.zeros(()),
        lambda x: torch.nn.functional.gelu(x.transpose(1, 3), approximate="tanh"),
        lambda x: aten.gelu_backward.default(x, x.to(memory_format=_LAST)),
        lambda x: torch.addmm(x[0, 0, 0], x[0, 0], x[0, 0].t()[:, :1].expand(5, 5)),
        lambda x: torch.addmm(x[0, 0, 0, :1], x[0, 0], x[0, 0].t()),
        lambda x: x.to(memory_format=_LAST).sum((0, -1), keepdim=True),
        lambda x: x.permute(3, 1, 0, 2).sum(1),
        lambda x: x.half().sum((0,), dtype=torch.float32),
        lambda x: x.long().sum((1, 2)),
        lambda x: aten.select_backward.default(x[0], [7, 3, 4, 5], 0, -1),
        lambda x: aten.slice_backward.default(x, [9, 3, 4, 5], 0, 1, 3, 1),
        lambda x: torch.roll(x, (1, 2), (0, -1)),
        lambda x: torch.roll(x, 3),
        lambda x: torch.roll(x.transpose(0, 1), 1, 0),
    ],
)
def test_what_is_told_of_outputs_is_what_they_are(recorder, look):
    expected = look(torch.zeros(2, 3, 4, 5))
    with recorder(output_metas=_RULES.output_metas):
        found = look(torch.zeros(2, 3, 4, 5, device=DEVICE))
    assert (found.device, found.shape, found.dtype) == (DEVICE, expected.shape, expected.dtype)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize(
    ("look", "message"),
    [
        (lambda x: x + torch.zeros(3, 3), r"two (different )?devices"),
        (lambda x: x + x[:2], "must match|broadcast"),
        (lambda x: torch.addmm(x[0], x, x[:2]), "cannot be multiplied|same reduction dim"),
        (lambda x: x.sum((0, 0)), "appears multiple times|duplicate value"),
        (lambda x: x.sum(2), "out of range"),
        (lambda x: torch.roll(x, 1, 2), "out of range"),
    ],
)
def test_what_is_told_of_outputs_hides_no_error(recorder, look, message):
    with recorder(output_metas=_RULES.output_metas), pytest.raises((RuntimeError, IndexError), match=message):
        look(torch.zeros(3, 3, device=DEVICE))


def test_a_copy_of_what_was_moved_to_the_host_stays_there(recorder):
    with recorder(output_metas=_RULES.output_metas) as mode:
        moved = torch.zeros(100, device=DEVICE).to("cpu")
        assert [moved.clone().device, torch.zeros_like(moved).device, (moved + moved).device] == 3 * [moved.device]
        assert moved.device != DEVICE
    assert _sizes(mode) == [400, -1]


def test_a_tensor_of_the_host_is_not_added_to_one_of_the_device(recorder):
    with recorder(), pytest.raises(RuntimeError, match=r"two (different )?devices"):
        torch.zeros(3, device=DEVICE) + torch.zeros(3)


def test_a_storage_that_is_resized_is_another_block(recorder):
    with recorder() as mode:
        x = torch.zeros(100, device=DEVICE)
        storage = x.untyped_storage()
        view = x[25:]
        assert view.data_ptr() - x.data_ptr() == 100
        storage.resize_(0)
        assert storage.data_ptr() == 0
        storage.resize_(800)
        del x, view
        assert [(e.block, e.size) for e in mode.events] == [(0, 400), (0, FREE), (1, 800)]
        del storage
    assert [(e.block, e.size) for e in mode.events][3:] == [(1, FREE)]
    host = torch.zeros(2).untyped_storage()
    assert host.resize_(16).nbytes() == 16  # outside, all is as it was
    assert host.data_ptr() != host._cdata


def test_data_are_where_those_were_that_they_are_set_to(recorder):
    with recorder() as mode:
        parameter = torch.nn.Parameter(mode._mode.from_tensor(torch.zeros(100)))
        assert (parameter.device, mode.events) == (torch.device("cpu"), [])
        parameter.data = parameter.to(DEVICE)
        assert parameter.device == DEVICE
        assert _sizes(mode) == [400]


def test_what_stays_on_the_host_is_real_and_unseen(recorder):
    with recorder() as mode:
        x = torch.ones(3) + 1
        assert x.tolist() == [2.0, 2.0, 2.0]
    assert mode.events == []


@pytest.mark.parametrize("numbers", [[], [1.0, 2.0], 3.0])
def test_a_tensor_made_of_numbers_lies_where_it_was_asked_to(recorder, numbers):
    with recorder():
        x = torch.tensor(numbers, device=DEVICE)
        assert x.device == DEVICE
        assert x.new_tensor(numbers).device == DEVICE
        assert torch.as_tensor(numbers, device=DEVICE).device == DEVICE
        assert torch.tensor(numbers).to(DEVICE).device == DEVICE
        assert torch.tensor(numbers).device == torch.device("cpu")
        assert torch.tensor([1.0], device=DEVICE, requires_grad=True).requires_grad


def test_a_value_is_read_as_zero_and_counted(recorder):
    with recorder() as mode:
        x = torch.zeros(3, device=DEVICE)
        assert x.sum().item() == 0.0
        assert bool((x > 0).any()) is False
        with pytest.raises(DataDependentOutputException):
            int(torch.zeros(3, device=DEVICE, dtype=torch.long).sum())
    assert mode.values.values_read == 2


def test_no_layer_is_left_out_by_chance(recorder):
    with recorder():
        assert float(torch.rand([])) > 0.999
        assert torch.rand(3).shape == (3,)


def test_temporaries_are_freed_when_the_kernel_returns_and_scopes_before(recorder):
    def rule(call, gpu):
        yield OUTPUTS
        yield Scratch(512)
        yield Scope([Scratch(1024), scratch("above", 0, 1, 2048)])
        yield Scratch(4096)

    with recorder(allocations={aten.neg.default: rule}) as mode:
        x = torch.zeros(1, device=DEVICE)
        y = x.neg()
        mode.stop()
        del x, y
    assert [(e.block, e.size) for e in mode.events] == [
        (0, 4),
        (1, 4),
        (2, 512),
        (3, 1024),
        (4, 2048),
        (4, -1),
        (3, -1),
        (5, 4096),
        (5, -1),
        (2, -1),
    ]


def test_a_kernel_told_by_other_operators(recorder):
    def double(x):
        return aten.neg.default(aten.exp.default(x))

    with recorder(decompositions={aten.neg.default: double}) as mode:
        x = torch.zeros(100, device=DEVICE)
        y = x.neg()
        mode.stop()
    assert y.shape == (100,)
    assert [(e.block, e.size, e.op) for e in mode.events[1:]] == [
        (1, 400, aten.exp.default),
        (2, 400, aten.neg.default),
        (1, -1, None),
    ]


def test_gradients_are_added_up_in_place(recorder):
    """As on a GPU: the first gradient's memory is reused (torch/csrc/autograd/input_buffer.cpp)."""
    with recorder() as mode:
        x = torch.zeros(1000, device=DEVICE, requires_grad=True)
        y = x * 1
        loss = (y.exp() + y.sin()).sum()
        mode.phase = "backward"
        start = len(mode.events)
        loss.backward()
        made = [e for e in mode.events[start:] if e.size > 0 and e.op is aten.add.Tensor]
        mode.stop()
    assert made == []


def test_gradients_are_added_up_out_of_place_where_that_is_asked_for():
    mode = Recorder(FakeTensorMode(allow_non_fake_inputs=True), Rules(), GradientAccumulation(in_place=False))
    with mode:
        x = torch.zeros(1000, device=DEVICE, requires_grad=True)
        y = x * 1
        loss = (y.exp() + y.sin()).sum()
        mode.phase = "backward"
        loss.backward()
        mode.stop()
    # the gradients of exp and of sin, 1000 floats each, have a sum of as many
    assert [e.size for e in mode.events if e.op is aten.add.Tensor and e.phase == "backward"] == [4000]


def test_a_gradient_is_written_into_new_zeros_in_place(recorder):
    with recorder() as mode:
        x = torch.zeros(100, 8, device=DEVICE, requires_grad=True)
        index = torch.zeros(5, dtype=torch.long, device=DEVICE)
        loss = x[index].sum()
        mode.phase = "backward"
        loss.backward()
        mode.stop()
    assert [e.op for e in mode.events if e.size == 100 * 8 * 4 and e.phase == "backward"] == [aten.new_zeros.default]


def test_paths_are_of_the_module_that_runs(recorder):
    net = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Sequential(torch.nn.Tanh()))
    mode = recorder()
    with mode, module_paths(net, mode):
        net(torch.zeros(4, device=DEVICE))
        mode.stop()
    assert [e.path for e in labelled(mode.events) if e.size > 0] == ["", "0", "1.0"]
    assert not net[0]._forward_hooks


@pytest.mark.parametrize(
    "put",
    [
        lambda x: x.cuda(),
        lambda x: x.to("cuda"),
        lambda x: x.to("cuda:0", torch.float64),
        lambda x: x.to(torch.device("cuda", 0)),
        lambda x: x.to(0),
        lambda x: x.to(device="cuda"),
        lambda x: torch.zeros(3, device="cuda"),
        lambda x: torch.full_like(x, 2.0, device="cuda:0"),
        lambda x: torch.tensor([1.0, 2.0, 3.0], device="cuda"),
        lambda x: x.new_tensor([1.0, 2.0, 3.0], device="cuda"),
    ],
)
def test_what_the_users_code_puts_on_cuda_is_on_the_traced_device(recorder, put):
    with recorder() as mode:
        y = put(torch.ones(3))
        assert y.device == DEVICE
    assert sum(e.size for e in mode.events if e.size > 0) == y.numel() * y.element_size()


def test_a_result_as_long_as_values_say_is_taken_at_its_longest(recorder):
    with recorder(upper_bounds=_RULES.upper_bounds) as mode:
        x = torch.zeros(4, 3, device=DEVICE)
        mask = x > 0
        assert mask.nonzero().shape == (12, 2)  # 2 · 12 numbers of 8 bytes
        assert x[mask].shape == x.masked_select(mask).shape == (12,)
        assert x[mask[:, 0]].shape == (4, 3)
        assert [len(part) for part in torch.where(mask)] == [12, 12]
        assert x.unique().shape == (12,)
        assert x[[1, 2]].shape == (2, 3)  # its length is known
    assert mode.values.lengths_taken == 6
    assert any(e.size == 2 * 12 * 8 for e in mode.events)


def test_frees_in_a_row_are_in_the_order_of_their_blocks():
    events = [Event(0, 8), Event(1, 8), Event(1, -1), Event(0, -1), Event(2, 8)]
    assert [(e.block, e.size) for e in labelled(events)] == [(0, 8), (1, 8), (0, -1), (1, -1), (2, 8)]


def test_what_is_freed_before_the_cache_is_emptied_stays_before():
    events = [Event(0, 8), Event(1, 8), Event(1, FREE), Event(0, FREE), Event(-1, EMPTY)]
    assert [(e.block, e.size) for e in labelled(events)] == [(0, 8), (1, 8), (0, FREE), (1, FREE), (-1, EMPTY)]


def test_outputs_are_allocated_where_a_rule_has_them(recorder):
    def rule(call, gpu):
        yield Scope([Scratch(512), Output(0)])
        yield Output(1)
        yield Scratch(1024)

    with recorder(allocations={aten.topk.default: rule}) as mode:
        values, places = torch.zeros(8, device=DEVICE).topk(4)
        mode.stop()
        del values, places
    # the input; a temporary beside the values (4 floats), then the places (4 longs), then another temporary
    sizes = [(e.block, e.size) for e in mode.events]
    assert sizes[1:7] == [(1, 512), (2, 16), (1, -1), (3, 32), (4, 1024), (4, -1)]


def test_a_view_that_was_written_to_takes_zeros_for_its_gradient(recorder):
    with recorder() as mode:
        x = torch.zeros(4, 256, device=DEVICE, requires_grad=True)
        mode.phase = "forward"
        loss = (x * 2).view(16, 64).relu_().sum()
        mode.phase = "backward"
        loss.backward()
        mode.stop()
        del x, loss
    made = [e.op for e in mode.events if e.size == 4096 and e.phase == "backward"]
    assert aten.zeros_like.default in made  # as_strided's backward
