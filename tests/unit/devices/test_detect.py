"""Devices: NVML faked here, NVML and CUDA together on the null GPU, the catalogue, the host."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lightning_memplan.devices import allocator_stats, catalogue, detect
from lightning_memplan.devices.catalogue import gpu, gpus
from lightning_memplan.devices.detect import CONTEXT, cpu_device, detect_devices, visible_indexes
from lightning_memplan.types import Device
from lightning_memplan.units import GiB, MiB
from tests.paths import ROOT

# --- NVML, faked: what a machine with these cards would answer before CUDA is initialised


class FakeNvml(ModuleType):
    """As much of pynvml as is asked for. ``cards`` are (name, NVML's total, reserved, used)."""

    NVMLError = type("NVMLError", (Exception,), {})
    nvmlMemory_v2 = 2
    NVML_DEVICE_MIG_ENABLE = 1

    def __init__(self, cards, *, driver=True, version_2=True, mig=False):
        super().__init__("pynvml")
        self.cards, self.driver, self.version_2, self.mig = cards, driver, version_2, mig
        self.open = 0

    def nvmlInit(self):
        if not self.driver:
            raise self.NVMLError("driver not loaded")
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid == "MIG-1":
            return 0
        raise self.NVMLError("not found")

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-{handle}{handle}{handle}"

    def nvmlDeviceGetName(self, handle):
        return self.cards[handle][0].encode()  # bytes, as older versions of pynvml return

    def nvmlDeviceGetMigMode(self, handle):
        if not self.mig:
            raise self.NVMLError("not supported")
        return [1, 1]

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return 8, 6

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=1, usedGpuMemory=None)]

    def nvmlDeviceGetMemoryInfo(self, handle, version=None):
        _, total, reserved, used = self.cards[handle]
        if version is None:
            return SimpleNamespace(total=total, used=used + reserved, free=total - used - reserved)
        if not self.version_2:
            raise self.NVMLError("function not found")
        return SimpleNamespace(total=total, reserved=reserved, used=used, free=total - used - reserved)


@pytest.fixture
def machine(monkeypatch):
    """``machine([(name, total, reserved, used), ...])``: NVML answers so; torch is a CUDA build, not initialised."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def install(cards, **options):
        fake = FakeNvml(cards, **options)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return install


TWO = [("NVIDIA A", 24576 * MiB, 308 * MiB, 100 * MiB), ("NVIDIA A", 12288 * MiB, 250 * MiB, 0)]


def test_nvml_alone_describes_the_cards(machine):
    fake = machine(TWO)
    first, second = detect_devices()
    # CUDA's total is NVML's less what is reserved: 24576 - 308; 100 MiB of that are used; a context will take its part.
    assert first == Device(
        "NVIDIA A",
        total=24268 * MiB,
        free=24168 * MiB,
        context=CONTEXT,
        index=0,
        uuid="GPU-000",
        capability=(8, 6),
    )
    assert first.capacity == 24168 * MiB - CONTEXT
    assert (second.index, second.total, second.free) == (1, 12038 * MiB, 12038 * MiB)
    assert fake.open == 0  # shut down again


def test_a_driver_without_reserved_bytes_counts_them_as_used(machine):
    machine(TWO, version_2=False)
    assert detect_devices()[0].total == 24576 * MiB
    assert detect_devices()[0].free == (24576 - 308 - 100) * MiB


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, [("GPU-000", 0), ("GPU-111", 1)]),
        ("1,0", [("GPU-111", 0), ("GPU-000", 1)]),
        ("1", [("GPU-111", 0)]),
        ("GPU-11", [("GPU-111", 0)]),
        ("GPU-", []),  # more than one
        ("0,7,1", [("GPU-000", 0)]),
        ("0,0", []),
        ("-1", []),
        ("", []),
        ("NoDevFiles", []),
        ("MIG-1", [("GPU-000", 0)]),
    ],
)
def test_only_visible_devices_are_listed_in_their_order(machine, monkeypatch, variable, expected):
    machine(TWO)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert [(device.uuid, device.index) for device in detect_devices()] == expected


def test_visible_indexes_reads_numbers_as_cuda_does():
    assert visible_indexes("1gpu2, 2ampere,+0", ["GPU-a", "GPU-b", "GPU-c"]) == (1, 2, 0)


MIXED = [("NVIDIA A", 8 * GiB, 0, 0), ("NVIDIA B", 24 * GiB, 0, 0)]


@pytest.mark.parametrize(
    ("variable", "value"), [("CUDA_DEVICE_ORDER", "PCI_BUS_ID"), ("CUDA_VISIBLE_DEVICES", "GPU-0,GPU-1")]
)
def test_cards_of_different_types_in_a_known_order(machine, monkeypatch, variable, value):
    machine(MIXED)
    monkeypatch.setenv(variable, value)
    assert [device.name for device in detect_devices()] == ["NVIDIA A", "NVIDIA B"]


@pytest.mark.parametrize(("cards", "options"), [(MIXED, {}), (TWO, {"mig": True})])
def test_only_cuda_knows_the_order_or_the_instance(machine, monkeypatch, cards, options):
    machine(cards, **options)
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(asked.append("cuda")))
    assert detect_devices() == ()
    assert asked


@pytest.mark.parametrize("module", [None, FakeNvml([], driver=False)])
def test_without_nvml_torch_alone_is_asked(machine, monkeypatch, module):
    machine(TWO)
    monkeypatch.setitem(sys.modules, "pynvml", module)  # None: the import fails
    assert detect_devices() == ()
    fake_torch(monkeypatch, context_on={0}, current=1)
    first, second, third = detect_devices()
    # 0 has a context: the 700 MiB free and the 200 MiB that the allocator holds are what it can reserve.
    assert (first.free, first.context, first.capacity) == (900 * MiB, 0, 900 * MiB)
    # 1 is the current device, which is asked though that makes a context.
    assert (second.free, second.context) == (700 * MiB, 0)
    # 2 is not touched.
    assert (third.free, third.context, third.capacity) == (None, CONTEXT, 1024 * MiB - CONTEXT)
    assert [d.uuid for d in (first, second, third)] == ["GPU-u0", "GPU-u1", "GPU-u2"]


def fake_torch(monkeypatch, context_on, current):
    """torch.cuda with three cards of 1 GiB, 700 MiB of it free; this process holds 200 MiB where it has a context."""
    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: 3,
        "current_device": lambda: current,
        "get_device_properties": lambda i: SimpleNamespace(
            name="card", total_memory=GiB, major=9, minor=0, uuid=f"u{i}"
        ),
        "mem_get_info": lambda i: (700 * MiB, GiB) if i in (*context_on, current) else pytest.fail(f"a context on {i}"),
        "memory_reserved": lambda i: 200 * MiB if i in context_on else 0,
        "get_per_process_memory_fraction": lambda i: 1.0,
    }
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda i: i in context_on, raising=False)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake, raising=False)


def test_a_build_without_cuda_has_no_devices(machine, monkeypatch):
    machine(TWO)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert detect_devices() == ()


def test_peaks_are_zero_before_cuda_is_initialised(machine):
    machine([])
    allocator_stats.reset_peaks(0)
    assert allocator_stats.read_stats(0) == (0,) * 5


# --- NVML and CUDA together, on the null GPU

DETECT = """
import json, dataclasses, torch
from lightning_memplan.devices.allocator_stats import read_peaks, reset_peaks
from lightning_memplan.devices.detect import detect_devices
def show(): print(json.dumps([{**dataclasses.asdict(d), "capacity": d.capacity} for d in detect_devices()]))
"""


@pytest.fixture
def on_null_gpu(nullgpu):
    """Runs code after ``DETECT``; what it prints, a JSON value a line."""
    source = str(ROOT / "src")

    def run(code, **env):
        done = nullgpu([sys.executable, "-c", DETECT + code], PYTHONPATH=source, **env)
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def test_detection_does_not_initialise_cuda(on_null_gpu):
    before, initialised, after, totals = on_null_gpu(
        "show(); print(json.dumps(torch.cuda.is_initialized())); torch.cuda.init(); show()\n"
        "print(json.dumps([torch.cuda.get_device_properties(i).total_memory for i in range(2)]))",
        NULLGPU_COUNT=2,
        NULLGPU_MEMORY="24000000000,16000000000",
        NULLGPU_OTHERS=10**9,
        NULLGPU_RESERVED=300 * MiB,
    )
    assert initialised is False
    assert [device["total"] for device in before] == totals == [24_000_000_000, 16_000_000_000]
    assert [device["free"] for device in before] == [23_000_000_000, 15_000_000_000]
    assert before[0]["name"] == "NVIDIA GeForce RTX 3090"
    assert before[0]["capability"] == [8, 6]
    assert before[1]["uuid"] == "GPU-01424242-4242-4242-4242-424242424201"
    assert [device["context"] for device in before] == [CONTEXT, CONTEXT]
    assert after == before  # initialised, but no card has a context yet


@pytest.mark.parametrize(
    ("visible", "totals"),
    [
        ("1", [16]),
        ("1,0", [16, 24]),
        ("GPU-01", [16]),
        ("GPU-01424242-4242-4242-4242-424242424201,GPU-00", [16, 24]),
        ("", []),
    ],
)
def test_visible_devices_as_torch_numbers_them(on_null_gpu, visible, totals):
    before, of_torch, after = on_null_gpu(
        "show()\n"
        "properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]\n"
        "print(json.dumps([[p.total_memory, f'GPU-{p.uuid}'] for p in properties])); show()",
        NULLGPU_COUNT=2,
        NULLGPU_MEMORY="24000000000,16000000000",
        CUDA_VISIBLE_DEVICES=visible,
    )
    assert [total for total, _ in of_torch] == [total * 10**9 for total in totals]
    for detected in (before, after):
        assert [[device["total"], device["uuid"]] for device in detected] == of_torch
        assert [device["index"] for device in detected] == list(range(len(totals)))


# Allocates in ever smaller blocks until nothing fits, the smallest as large as the smallest segment of the large pool.
FILL = """
torch.cuda.init()
torch.cuda.set_device(0)
def fill():
    kept, size = [], 2**33
    while size >= 20 * 2**20:
        try: kept.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError: size //= 2
    return kept
"""


def test_capacity_is_what_the_allocator_can_reserve(on_null_gpu):
    before, held, after, full, reserved = on_null_gpu(
        "show()\n" + FILL + "held = torch.zeros(3 * 2**28, device='cuda')\n"
        "print(json.dumps(torch.cuda.memory_reserved(0))); show()\n"
        "kept = fill(); show(); print(json.dumps(torch.cuda.memory_reserved(0)))",
        NULLGPU_OTHERS=10**9,
        NULLGPU_RESERVED=308 * MiB,
        NULLGPU_CONTEXT=300 * MiB,
    )
    assert held == 3 * GiB
    # Before: 25446711296 less the 10**9 of others, and a context of 450 MiB is expected. It turns out to take 300.
    assert before[0]["capacity"] == 25446711296 - 10**9 - 450 * MiB
    for now in (after[0], full[0]):
        assert now["free"] == before[0]["free"] == 25446711296 - 10**9
        assert now["context"] == 300 * MiB
        assert now["capacity"] == 25446711296 - 10**9 - 300 * MiB
    assert 0 <= after[0]["capacity"] - reserved < 20 * MiB


def test_a_fraction_set_for_the_process_is_the_limit(on_null_gpu):
    if not hasattr(torch.cuda, "get_per_process_memory_fraction"):
        pytest.skip("this torch cannot say what fraction was set")
    none, half, reserved = on_null_gpu(
        FILL + "show(); torch.cuda.set_per_process_memory_fraction(0.3, 0); show()\n"
        "kept = fill(); print(json.dumps(torch.cuda.memory_reserved(0)))",
        NULLGPU_MEMORY=10**10,
    )
    assert none[0]["limit"] is None
    assert half[0]["limit"] == half[0]["capacity"] == 3 * 10**9
    assert 0 <= half[0]["capacity"] - reserved < 20 * MiB


def test_one_of_two_cards_has_a_context(on_null_gpu):
    (devices,) = on_null_gpu(
        "held = torch.zeros(2**20, device='cuda:1'); show()", NULLGPU_COUNT=2, NULLGPU_CONTEXT=300 * MiB
    )
    assert [device["context"] for device in devices] == [CONTEXT, 300 * MiB]
    assert [device["free"] for device in devices] == [25446711296, 25446711296]


def test_torch_can_say_whether_there_is_a_context(on_null_gpu):
    """The one private name of torch in this module: if it goes, its use must be thought over."""
    (before, after) = on_null_gpu(
        "from lightning_memplan.devices.detect import _has_context\n"
        "assert hasattr(torch._C, '_cuda_hasPrimaryContext')\n"
        "torch.cuda.init(); print(json.dumps([_has_context(0), _has_context(1)]))\n"
        "torch.cuda.set_device(1); print(json.dumps([_has_context(0), _has_context(1)]))",
        NULLGPU_COUNT=2,
    )
    assert (before, after) == ([False, False], [False, True])


def test_without_nvml_the_capacity_is_the_same(on_null_gpu):
    (devices,) = on_null_gpu(
        "import sys; sys.modules['pynvml'] = None\nheld = torch.zeros(2**28, device='cuda'); show()",
        NULLGPU_OTHERS=10**9,
        NULLGPU_COUNT=2,
    )
    assert devices[0]["context"] == 0  # not known: it is no part of what counts as free
    assert devices[0]["capacity"] == 25446711296 - 10**9 - 450 * MiB
    assert devices[1]["free"] is None


def test_peaks_follow_the_allocator(on_null_gpu):
    zero, high, low, lowest = on_null_gpu(
        "print(json.dumps(read_peaks(0)))\n"
        "big = torch.empty(2**30, dtype=torch.uint8, device='cuda'); del big; print(json.dumps(read_peaks(0)))\n"
        "reset_peaks(0); small = torch.empty(2**20, dtype=torch.uint8, device='cuda')\n"
        "print(json.dumps(read_peaks(0)))\n"
        "assert read_peaks(0) == (torch.cuda.max_memory_allocated(0), torch.cuda.max_memory_reserved(0))\n"
        "torch.cuda.empty_cache(); reset_peaks(0); print(json.dumps(read_peaks(0)))\n"
        "from lightning_memplan.devices import allocator_stats\n"
        "assert allocator_stats._STATS is torch._C._cuda_memoryStats\n"
        "assert allocator_stats._RESET is torch._C._cuda_resetPeakMemoryStats\n"
        "assert allocator_stats._STATS(0) == torch.cuda.memory_stats_as_nested_dict(0)\n"
        "try: allocator_stats.read_stats(7)\n"
        "except RuntimeError: pass\n"
        "else: raise AssertionError('there is no such device')"
    )
    assert zero == [0, 0]
    assert high == [GiB, GiB]
    # 1 MiB is of the small pool, in a segment of 2 MiB; the large segment stays reserved until the cache is emptied.
    assert low == [MiB, GiB + 2 * MiB]
    assert lowest == [MiB, 2 * MiB]


# --- the catalogue


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("RTX 3090", "RTX 3090"),
        ("rtx3090", "RTX 3090"),
        ("3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("RTX 3090 24GB", "RTX 3090"),
        ("RTX 3090ti", "RTX 3090 Ti"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
        ("rtx4070tisuper", "RTX 4070 Ti SUPER"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU 16 GiB", "RTX 3080 Laptop 16GB"),
        ("4060 Ti 16 GB", "RTX 4060 Ti 16GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("Tesla P100-PCIE-16GB", "P100 16GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM5 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe 80GB"),
        ("NVIDIA H100 NVL", "H100 NVL 94GB"),
        ("NVIDIA H200", "H200"),
        ("h200 141GB", "H200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("A6000", "RTX A6000"),
        ("Quadro RTX 8000", "Quadro RTX 8000"),
        ("NVIDIA TITAN RTX", "TITAN RTX"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("NVIDIA B200", "B200"),
        ("GB200", "GB200"),
    ],
)
def test_names_are_found_as_they_are_written(name, found):
    assert gpu(name).name == found


@pytest.mark.parametrize("card", gpus(), ids=lambda card: card.name)
def test_every_card_is_found_by_its_own_name(card):
    assert gpu(card.name) == gpu(f"nvidia {card.name.lower()}") == card
    assert card.context == CONTEXT
    assert card.capability is not None


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("A100", "say 'A100 40GB' or 'A100 80GB'"),
        ("RTX 3080", "say 'RTX 3080 10GB' or 'RTX 3080 12GB'"),
        ("V100-SXM2", "say 'V100 16GB' or 'V100 32GB'"),
        ("H100 80GB", "say 'H100 PCIe 80GB' or 'H100 SXM5 80GB'"),
        ("RTX 6000", "say 'Quadro RTX 6000', 'RTX 6000 Ada' or 'RTX PRO 6000 Blackwell'"),
    ],
)
def test_a_name_of_several_cards(name, choices):
    with pytest.raises(ValueError, match="is more than one GPU") as caught:
        gpu(name)
    assert str(caught.value) == f"{name!r} is more than one GPU: {choices}"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("RTX 3091", "'RTX 3090'"),
        ("A1000", "'A100 40GB'"),
        ("RTX 3090 48GB", "'RTX 3090'"),
        ("GTX 2080 Tie", "'RTX 2080"),
    ],
)
def test_an_unknown_name_says_which_are_near(name, near):
    with pytest.raises(ValueError, match="is not in the catalogue of GPUs: near are") as caught:
        gpu(name)
    assert near in str(caught.value)
    assert "Device(name, total=bytes)" in str(caught.value)


@pytest.mark.parametrize("name", ["", "RTX", "80GB", "zzzzzzzz"])
def test_a_name_that_says_nothing(name):
    with pytest.raises(ValueError, match="gpus\\(\\) lists it"):
        gpu(name)


def test_the_context_can_be_said():
    assert gpu("RTX 3090", context=0).capacity == 25446711296
    assert gpu("RTX 3090", context=10**9).capacity == 25446711296 - 10**9


def test_the_catalogue_holds_forty_cards_and_what_was_measured():
    assert len(gpus()) >= 40
    assert len({card.name for card in gpus()}) == len(gpus())
    measured = {"RTX 3090": 25446711296, "RTX 3060": 12622168064, "RTX 4060": 8318222336}
    assert {name: gpu(name).total for name in measured} == measured


def test_the_rule_for_unreported_cards_is_on_the_safe_side():
    """Where CUDA's figure is known it lies between the rule's and nvidia-smi's, and the rule costs under 5 percent."""
    known = [card for card in catalogue._CATALOGUE if card.reported]
    assert len(known) >= 10
    for card in known:
        by_rule = card._replace(reported=0).total
        assert by_rule <= card.reported <= card.nominal * MiB, card.name
        assert by_rule >= 0.95 * card.reported, card.name


# --- the host


def test_the_hosts_memory_is_that_of_its_tightest_control_group(monkeypatch):
    monkeypatch.setattr(detect, "_control_groups", list)
    monkeypatch.setattr(detect, "_host_memory", lambda: (64 * GiB, 40 * GiB))
    assert cpu_device().capacity == 40 * GiB
    # A container that may have 16 GiB and uses 6; the group above it would leave 12.
    monkeypatch.setattr(detect, "_control_groups", lambda: [(16 * GiB, 6 * GiB), (20 * GiB, 8 * GiB)])
    host = cpu_device()
    assert (host.kind, host.total, host.free, host.capacity) == ("cpu", 16 * GiB, 10 * GiB, 10 * GiB)


def test_the_host_without_psutil(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "psutil", None)
    table = tmp_path / "meminfo"
    table.write_text("MemTotal:       65536 kB\nMemFree:  1 kB\nMemAvailable:   32768 kB\nHugePages_Total:  0\n")
    assert detect._host_memory(table) == (64 * MiB, 32 * MiB)
    total, available = detect._host_memory(tmp_path / "none")
    assert total == available > 0


def test_control_groups_of_version_2(tmp_path):
    inner = tmp_path / "groups/a/b"
    inner.mkdir(parents=True)
    write(inner, {"memory.max": "max\n", "memory.current": "7\n", "memory.stat": "anon 5\n"})
    write(
        inner.parent, {"memory.max": "1000\n", "memory.current": "600\n", "memory.stat": "anon 5\ninactive_file 200\n"}
    )
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    assert detect._control_groups(tmp_path / "cgroup", tmp_path / "groups") == [(1000, 400)]
    assert detect._control_groups(tmp_path / "none", tmp_path / "groups") == []


def test_control_groups_of_version_1(tmp_path):
    group = tmp_path / "groups/memory/docker"
    group.mkdir(parents=True)
    stat = "inactive_file 1\ntotal_inactive_file 2\n"
    write(group, {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "600", "memory.stat": stat})
    (tmp_path / "cgroup").write_text("9:cpu,cpuacct:/docker\n5:memory:/docker\n0::/\n")
    assert detect._control_groups(tmp_path / "cgroup", tmp_path / "groups") == [(1000, 599)]


def write(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text)
