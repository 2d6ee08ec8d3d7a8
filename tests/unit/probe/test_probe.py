"""The probe: real steps of a few samples on the (null) GPU, as events."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from lightning_memplan.memory.alignment import aligned, doubled
from lightning_memplan.memory.events import Event, Trace
from lightning_memplan.memory.program import scale
from lightning_memplan.probe.allocator_history import Mark, runs_of
from lightning_memplan.probe.grad_scaler import UnskippedGradScaler
from lightning_memplan.probe.out_of_memory import ran_out_of_memory
from lightning_memplan.probe.probe import can_probe
from tests.paths import PROGRAMS


def trace(size, *events):
    return Trace(size, tuple(Event(block, bytes_) for block, bytes_ in events))


def sizes(traces):
    return [[event.size for event in t.events] for t in traces]


def test_traces_of_the_same_events_stay_as_they_are():
    traces = [trace(2, (0, 20), (1, 7), (1, -1), (0, -1)), trace(3, (0, 30), (1, 9), (1, -1), (0, -1))]
    assert aligned(traces) == traces


def test_workspaces_that_differ_are_taken_as_measured():
    # At 2 samples no workspace, at 3 one of 100 bytes, at 5 one of 40: on lines between; beyond 5 it goes on
    # as from the first to the last, (40 - 0) / (5 - 2) bytes a sample: 40 + 95 · 40 / 3 = 1306 at 100.
    traces = [
        trace(2, (0, 20), (2, 8), (0, -1)),
        trace(3, (0, 30), (1, 100), (1, -1), (2, 8), (0, -1)),
        trace(5, (0, 50), (1, 40), (1, -1), (2, 8), (0, -1)),
    ]
    assert sizes(aligned(traces)) == [[20, 0, -1, 8, -1], [30, 100, -1, 8, -1], [50, 40, -1, 8, -1]]
    program = scale(aligned(traces))
    assert [program.at(n)[1][1] for n in (2, 3, 4, 5, 100)] == [0, 100, 70, 40, 1306]


def test_a_large_batch_decides_what_a_workspace_is_there():
    # 500 bytes at 2 and 3 samples, by an algorithm for few; at 100 samples 200 bytes: they do not grow from there on
    traces = [trace(n, (0, size), (0, -1), (1, n)) for n, size in ((2, 500), (3, 500), (100, 200))]
    assert [scale(aligned(traces)).at(n)[0][1] for n in (3, 100, 1000)] == [500, 200, 200]


def test_several_workspaces_at_one_place_are_one_of_the_largest():
    traces = [
        trace(2, (0, 20), (1, 7), (1, -1), (2, 9), (2, -1), (3, 4), (0, -1)),
        trace(3, (0, 30), (1, 8), (1, -1), (3, 4), (0, -1)),
    ]
    assert sizes(aligned(traces)) == [[20, 9, -1, 4, -1], [30, 8, -1, 4, -1]]
    assert scale(aligned(traces)).at(50)[1][1] == 8  # what falls does not go on falling


def test_workspaces_that_one_size_has_and_another_has_not_stay_as_they_are():
    # a reduction's buffer of 100 bytes and its semaphores of 8, freed in the order in which they were made
    traces = [trace(2, (0, 20), (3, 4)), trace(3, (0, 30), (1, 100), (2, 8), (1, -1), (2, -1), (3, 4))]
    # none at 2 samples, then lines of slope 100 and 8; as one block of 108 they would want another place
    assert sizes(aligned(traces)) == [[20, 0, 0, -1, -1, 4], [30, 100, 8, -1, -1, 4]]
    assert [size for _, size, _ in scale(aligned(traces)).at(5)[1:3]] == [300, 24]


def test_workspaces_within_a_workspace_count_together():
    # nested at 3 samples, one after another at 5: one block of 100 + 8, and of the larger
    traces = [
        trace(2, (0, 20), (3, 4)),
        trace(3, (0, 30), (1, 100), (2, 8), (1, -1), (2, -1), (3, 4)),
        trace(5, (0, 50), (1, 90), (1, -1), (2, 70), (2, -1), (3, 4)),
    ]
    assert sizes(aligned(traces)) == [[20, 0, -1, 4], [30, 108, -1, 4], [50, 90, -1, 4]]


def test_traces_that_differ_in_more_are_not_aligned():
    assert aligned([trace(2, (0, 20)), trace(3, (0, 30), (1, 5), (0, -1), (1, -1))]) is None


@pytest.mark.parametrize(
    ("seen", "at_10"),
    [
        ((20, 30, 50), 100),  # 10 n
        ((64, 144, 400), 1600),  # 16 n²: all pairs of samples
        ((8, 24, 80), 360),  # 4 n (n - 1): all pairs of two samples
        ((0, 0, 60), 160),  # 10 (n - 2) (n - 3) is no tensor's: 60 / 3 = 20 a sample, 60 + 5 · 20
        ((90, 60, 0), 0),  # 150 - 30 n would be less than nothing
        ((512, 1024, 1536), 3242),  # rounded up: 1536 + 5 · (1536 - 512) / 3, rounded down
    ],
)
def test_sizes_that_are_no_tensors_go_on_as_from_the_first_to_the_last(seen, at_10):
    traces = [trace(n, (0, size), (0, -1)) for n, size in zip((2, 3, 5), seen, strict=True)]
    assert sizes(aligned(traces)) == [[size, -1] for size in seen]
    assert scale(aligned(traces)).at(10)[0][1] == at_10


def test_pairs_stay_pairs_where_workspaces_differ():
    # 16 n² beside a workspace that there is at 3 and 5 samples only
    traces = [
        trace(2, (0, 64), (0, -1), (2, 8)),
        trace(3, (0, 144), (0, -1), (2, 12), (1, 7), (1, -1)),
        trace(5, (0, 400), (0, -1), (2, 20), (1, 7), (1, -1)),
    ]
    assert [events[0] for events in sizes(aligned(traces))] == [64, 144, 400]


def test_blocks_are_numbered_anew():
    traces = [trace(2, (7, 20), (5, 1)), trace(3, (4, 30), (9, 1), (9, -1), (3, 1))]
    assert [[event.block for event in t.events] for t in aligned(traces)] == [[0, 1, 1, 2], [0, 1, 1, 2]]


def test_a_prime_number_of_samples_tells_what_grows():
    # at 7 samples: 700 bytes of them, 1000 of weights, a workspace of 64 that few samples have not: it is taken to grow
    large, few = trace(7, (0, 700), (1, 1000), (2, 64), (2, -1)), trace(2, (0, 200), (1, 1000))
    assert [size for _, size, _ in scale([large, doubled(large, [few])]).at(70)] == [7000, 1000, 640, -1]


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
