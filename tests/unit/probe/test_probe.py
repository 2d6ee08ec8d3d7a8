"""The probe: real steps of a few samples on the (null) GPU, as events."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from lightning_memplan.probe.allocator_history import Mark, runs_of
from lightning_memplan.probe.grad_scaler import UnskippedGradScaler
from lightning_memplan.probe.out_of_memory import ran_out_of_memory
from lightning_memplan.probe.probe import can_probe
from tests.paths import PROGRAMS


def test_an_optimizer_steps_whatever_its_gradients_are():
    scaler, parameter = UnskippedGradScaler("cpu", init_scale=1.0), torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([parameter])
    scaler.scale((parameter * torch.inf).sum()).backward()
    scaler.step(optimizer)
    assert len(optimizer.state[parameter]) == 3  # the count and both moments


# ------------------------------------------------------------------------------------------- the allocator's history

LABELS = [
    (0, "setup", 0, "parameters", ""),
    (1, "forward", 1, "activations", "net"),
    (1, "backward", 1, "temporaries", ""),
    (1, "backward", 1, "temporaries", "net"),
    (-1, "optimizer", 1, "optimizer", ""),
    (2, "forward", 1, "activations", "net"),
]


MARKS = [Mark(1000 + number, *label) for number, label in enumerate(LABELS)]  # each at an address of its own


def entry(action, address, size=0, stream=0):
    return {"action": action, "addr": address, "size": size, "stream": stream}


def mark(number):
    """What the history has of a mark: a block that is taken and given back."""
    return [entry("alloc", 1000 + number, 331), *(entry(a, 1000 + number, 331) for a in FREED)]


FREED = ("free_requested", "free_completed")


def recorded(*history):
    """The events of ``history``, whose numbers are marks."""
    entries = [e for one in history for e in ([one] if isinstance(one, dict) else mark(one))]
    return runs_of(entries, MARKS).events


def short(events):
    return [(e.block, e.size, e.phase, e.path) for e in events]


def test_an_entry_has_the_label_of_the_last_mark():
    found = recorded(
        0,
        entry("alloc", 10, 100),
        1,
        entry("alloc", 20, 200),
        entry("alloc", 1003, 331),  # a tensor of a mark's size, at the place of a later mark
        entry("free_requested", 1003),
        2,
        entry("free_requested", 20),
        3,
        entry("alloc", 20, 300),
    )
    assert short(found(1)) == [
        (0, 100, "setup", ""),
        (1, 200, "forward", "net"),
        (2, 331, "forward", "net"),
        (2, -1, "forward", ""),
        (1, -1, "backward", ""),
        (3, 300, "backward", "net"),
    ]


def test_a_block_that_another_stream_still_uses_is_free_when_that_is_asked_for():
    # record_stream: free_completed comes when the stream is done, here after the next block was taken
    found = recorded(
        *(0, 1),
        entry("alloc", 10, 100),
        entry("free_requested", 10, 100),
        entry("alloc", 20, 200),
        entry("free_completed", 10, 100),
        entry("free_requested", 20, 200),
        entry("free_completed", 20, 200),
    )
    assert [e[:2] for e in short(found(1))] == [(0, 100), (0, -1), (1, 200), (1, -1)]


def test_streams_are_numbered_in_the_order_in_which_they_are_met():
    streams = (0, 0x7F00, 0x6000)
    found = recorded(0, 1, *(entry("alloc", 10 * k, 1, stream) for k, stream in enumerate(streams)))
    assert [event.stream for event in found(1)] == [0, 1, 2]


def test_each_run_begins_with_the_setup_that_all_have_in_common():
    found = recorded(
        0,
        entry("alloc", 10, 100),  # a parameter
        1,
        entry("alloc", 20, 200),  # the first batch size's
        entry("alloc", 30, 300),  # its gradient, which is freed between the two
        entry("free_requested", 20, 200),
        *(2, 3, 4),
        entry("free_requested", 30, 300),
        entry("alloc", 40, 9),  # a step that only warms up
        5,
        entry("alloc", 20, 250),  # the second batch size's, at an address that was used before
        entry("free_requested", 40, 9),  # not its own
        entry("free_requested", 20, 250),
        entry("free_requested", 77, 512),  # the user's, from before
    )
    assert [e[:2] for e in short(found(1))] == [(0, 100), (1, 200), (2, 300), (1, -1)]
    assert [e[:2] for e in short(found(2))] == [(0, 100), (4, 250), (4, -1)]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_errors_that_say_that_memory_ran_out(error):
    assert ran_out_of_memory(error)
    for link in ("__cause__", "__context__"):
        wrapped = ValueError("the step failed")
        setattr(wrapped, link, error)
        assert ran_out_of_memory(wrapped)


@pytest.mark.parametrize(
    "text",
    [
        "GET was unable to find an engine to execute this computation",
        "FIND was unable to find an engine to execute this computation after trying 9 plans.",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "NCCL Error 1: unhandled cuda error",
    ],
)
def test_errors_that_mean_it_only_where_the_allocator_has_refused_memory(text):
    assert not ran_out_of_memory(RuntimeError(text))
    assert ran_out_of_memory(RuntimeError(text), refused=True)


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), ValueError("the buffer is out of memory slots"), MemoryError(), None]
)
def test_errors_that_say_something_else(error):
    assert not ran_out_of_memory(error, refused=True)


def test_errors_in_a_circle():
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert not ran_out_of_memory(one)


def test_without_cuda_there_is_nothing_to_probe():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert not can_probe()


def test_the_private_names_it_needs_are_there(nullgpu):
    code = (
        "import torch; m = torch.cuda.memory; enabled = torch._C._cuda_isHistoryEnabled\n"
        "torch.cuda.init(); print(enabled())\n"
        "m._record_memory_history('all', context=None, max_entries=9); print(enabled())\n"
        "address = torch.cuda.caching_allocator_alloc(331, 0, 0); torch.cuda.caching_allocator_delete(address)\n"
        "history = m._snapshot(0)['device_traces'][0]; print([e['action'] for e in history])\n"
        "print({(e['addr'] == address, e['size'], e['stream']) for e in history[1:]})"
    )
    shown = nullgpu([sys.executable, "-c", code]).stdout.splitlines()
    assert shown[:2] == ["False", "True"]
    assert shown[2] == "['segment_alloc', 'alloc', 'free_requested', 'free_completed']"
    # whether a free's size is the one that was asked for is torch's own affair: 331, or 512 as it is rounded
    assert shown[3] in ("{(True, 331, 0)}", "{(True, 331, 0), (True, 512, 0)}", "{(True, 512, 0), (True, 331, 0)}")


@pytest.fixture(scope="module")
def shown(nullgpu):
    done = nullgpu([sys.executable, str(PROGRAMS / "probe_cases.py")])
    return json.loads(done.stdout.split("SHOWN ")[1])


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "compiled"])
def test_what_a_probe_predicts_is_what_training_takes(shown, precision):
    assert len(shown[precision]) == 4
    for predicted_allocated, allocated, predicted_reserved, reserved in shown[precision]:
        assert abs(predicted_allocated / allocated - 1) < 0.001
        assert abs(predicted_reserved / reserved - 1) < 0.01


def test_a_batch_that_is_made_on_the_card_takes_what_another_takes(shown):
    assert shown["repeated"] == shown["tried"]


def test_a_real_step_takes_what_training_takes(shown):
    allocated, reserved, missing = shown["tried"]
    assert missing == 0
    measured = shown["32-true"][:2]
    assert allocated == max(step[1] for step in measured)
    # what was held before may leave room in a small segment (2 MiB), which is then used
    assert 0 <= max(step[3] for step in measured) - reserved <= 2 * 2**20


def test_a_real_step_that_runs_out_of_memory_says_how_much_was_missing(shown):
    allocated, reserved, missing = shown["tried too much"]
    # a feature map of 512 · 1024 · 62² floats of 4 bytes is 7.51 GiB: the card of 23.7 has no room for a fourth
    lacking = 512 * 1024 * 62**2 * 4 + reserved - shown["free"][0]
    assert abs(missing - lacking) < 0.02 * 2**30  # as the error rounds it
    assert allocated <= reserved
    assert shown["free"][0] == shown["free"][1]


def test_nothing_of_the_users_is_changed(shown):
    assert shown["sizes"] == [2, 3, 5]
    assert shown["unchanged"]
    assert shown["on_host"]
    assert shown["random"] == [True, True, True]


def test_the_card_is_left_as_it_was_found(shown):
    assert shown["use"][0][0] == shown["use"][1][0] == 4 * 2**20
    assert shown["use"][1][1] <= shown["use"][0][1]  # what was cached before has been given back
    assert shown["use_at_the_end"] == 4 * 2**20
    assert shown["history"] == 0


def test_a_large_batch_is_probed_too(shown):
    assert shown["large"] == [2, 3, 5, 64]  # the largest that is allowed


def test_each_batch_size_begins_with_the_same_random_states(shown):
    # layers that are left out by chance are the same, and cuDNN makes its random states for dropout each time
    assert len(shown["drawn"]) == 3
    assert len(set(shown["drawn"])) == 1
    assert shown["states"] == [1, 1, 1]


def test_an_error_of_the_large_batch_alone_is_noted(shown):
    sizes, note = shown["not many"]
    assert sizes == [2, 3, 5]
    assert note.startswith(
        "no large batch was probed: the step failed in a probe of up to 64 samples (ValueError: too many samples for "
        "this kernel); at "
    )


def test_a_hook_that_fails_on_the_copy_is_noted(shown):
    (note,) = shown["begins"]
    assert note.startswith("on_train_start was left out: it failed in a copy (")
    assert note.endswith("self.batches = len(self.trainer.train_dataloader)")


def test_the_users_own_error_is_raised_unchanged(shown):
    kind, text = shown["error"]
    assert kind == "RuntimeError"
    assert "mat1 and mat2 shapes cannot be multiplied (384x64 and 7x7)" in text


def test_sizes_that_do_not_fit_are_replaced_by_smaller_ones(shown):
    assert shown["smaller"] in ([1, 2, 3], [1, 2], [1])
    assert shown["none"] == "not even a single sample's training step fits on NVIDIA GeForce RTX 3090"
