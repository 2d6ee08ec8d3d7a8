"""Values of fake tensors that are known, and the reads of those that are not."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_memplan.cuda.rule_set import Rules
from lightning_memplan.step.fake_cuda import DEVICE
from lightning_memplan.trace.fake_tensors import fake_copy, fake_mode
from lightning_memplan.trace.known_values import has_values, largest_numbers, remember
from lightning_memplan.trace.recorder import Recorder


def recorder():
    return Recorder(FakeTensorMode(allow_non_fake_inputs=True), Rules())


def counts(values):
    return values.numbers_taken, values.lengths_taken, values.values_read


def test_numbers_of_the_batch_are_followed_through_operators():
    lengths, mode = torch.tensor([3, 7, 5]), recorder()
    mode.values.numbers = largest_numbers(lengths, lengths)
    with mode:
        moved = lengths.to(DEVICE)
        assert int((moved * 2 + 1).max()) == 15  # 2 * 7 + 1
        assert moved.cpu().tolist() == [7, 7, 7]
        assert (moved > 6).all().item() is True
    assert counts(mode.values) == (3, 0, 0)


def test_a_number_that_chance_changes_is_known_no_more():
    lengths, mode = torch.tensor([3, 7, 5]), recorder()
    mode.values.numbers = largest_numbers(lengths, lengths)
    with mode:
        moved = lengths.to(DEVICE)
        moved.random_(0, 9)
        assert not has_values(moved)


def test_a_mask_is_counted_as_if_all_of_it_were_true():
    mode = recorder()
    with mode:
        mask = torch.zeros(4, 3, device=DEVICE) > 0
        assert int(mask.sum()) == 12  # 4 * 3
        assert mask.sum(1).tolist() == [3, 3, 3, 3]
        assert int(torch.count_nonzero(mask)) // 2 == 6
    assert counts(mode.values) == (0, 1 + 4 + 1, 0)  # each number of the list is read by itself


@pytest.mark.parametrize(
    ("true", "check"),
    [
        (True, lambda x: torch.isfinite(x).all()),
        (True, lambda x: (x == x).all() & torch.isfinite(x).all()),
        (False, lambda x: (x > 0).all()),
        (False, lambda x: (x > 0).all() & torch.isfinite(x).all()),
    ],
)
def test_a_condition_is_true_where_all_numbers_pass(true, check):
    mode = recorder()
    with mode:
        assert bool(check(torch.zeros(8, device=DEVICE))) is true
    assert mode.values.values_read == 1


def test_tensors_are_equal_where_they_are_the_same():
    mode = recorder()
    with mode:
        x, y = torch.zeros(8, device=DEVICE), torch.zeros(8, device=DEVICE)
        assert torch.equal(x, x)
        assert mode.values.values_read == 0
        assert not torch.equal(x, y)
        assert not torch.equal(x, y[:4])  # by their shapes alone
    assert mode.values.values_read == 1


@pytest.mark.parametrize(
    ("known", "buffer"),
    [
        (True, torch.arange(16)),
        (False, torch.arange(17)),
        (True, torch.tensor(0.5)),
        (False, torch.tensor([0.5, 0.5])),
        (False, torch.arange(4, device="meta")),
    ],
)
def test_a_few_numbers_of_a_buffer_are_remembered(known, buffer):
    fake = fake_copy(buffer, fake_mode(), DEVICE)
    assert (remember(fake, buffer), has_values(fake)) == (known, known)
    again = fake_copy(fake, fake_mode(), DEVICE)
    assert remember(again, fake) is known


def test_numbers_of_a_batch_are_whole_and_one_a_sample():
    ids, lengths = torch.zeros(3, 9, dtype=torch.long), torch.tensor([3, 7, 5])
    batch = (ids, lengths.float(), lengths > 3, lengths, lengths[:0])
    assert [numbers.tolist() for numbers in largest_numbers(batch, batch).values()] == [[7, 7, 7]]
