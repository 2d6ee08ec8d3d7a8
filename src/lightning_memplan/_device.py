"""Which GPU, and how many bytes of it are ours: the cards of this machine, a catalogue of cards, the host, peak meters.

Detection goes by NVML, so that asking does not initialise CUDA (a process that has initialised it can no longer be
forked, and a context takes a few hundred MiB of the card). What CUDA itself says is preferred once it is initialised,
and is all there is without NVML (ROCm, some virtual machines).

Bytes of a card, seen three ways: NVML's total counts a part that is reserved for driver and firmware; CUDA's total
(``torch.cuda.get_device_properties(i).total_memory``, our ``Device.total``) does not; the allocator can reserve what
other processes and the CUDA context leave of CUDA's total.
"""

from __future__ import annotations

import difflib
import os
import platform
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_memplan.types import Device
from lightning_memplan.units import GiB, KiB, MiB

#: What a process's CUDA context takes of a card before its allocator gets any. Since CUDA 11.7, which loads kernels
#: when they are first called (``CUDA_MODULE_LOADING=LAZY``): 300 to 450 MiB by card and driver, of which the upper end.
CONTEXT = 450 * MiB


def detect_devices() -> tuple[Device, ...]:
    """The CUDA devices that this process can use, in torch's order; none is an empty tuple.

    CUDA is not initialised by asking, but where only CUDA can tell: there is no NVML; a card is cut into MIG instances;
    or cards of different types are in the machine, and neither ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` nor UUIDs in
    ``CUDA_VISIBLE_DEVICES`` say which comes first.

    >>> devices = detect_devices()
    >>> [device.index for device in devices] == list(range(len(devices)))
    True
    >>> all(device.capacity <= device.total for device in devices)
    True

    Returns:
        One device each, bytes throughout. ``total`` is CUDA's; ``free`` what no other process holds, and so does not
        shrink by what this process holds (``None`` where nothing says: then ``total`` counts); ``context`` what this
        process's CUDA context takes: ``CONTEXT`` before there is one, after that whatever of this process's bytes is
        not the allocator's; ``limit`` what ``torch.cuda.set_per_process_memory_fraction`` allows.

    Source: NVML's device queries (docs.nvidia.com/deploy/nvml-api); ``CUDA_VISIBLE_DEVICES``, ``CUDA_DEVICE_ORDER`` as
    the CUDA C++ Programming Guide defines them in "CUDA Environment Variables".
    """
    if torch.version.cuda is None and torch.version.hip is None:
        return ()
    if torch.version.hip is None:
        with _nvml() as nvml:
            if nvml is not None and (found := _from_nvml(nvml)) is not None:
                return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own words about a missing driver: no devices is the answer
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(_from_torch(index) for index in range(count))


# --- NVML
@contextmanager
def _nvml() -> Iterator[Any]:
    """The pynvml module between its init and shutdown; None where it or the driver is missing."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _from_nvml(nvml: Any) -> tuple[Device, ...] | None:
    """The visible devices; None where NVML does not know them."""
    try:
        handles = None if torch.cuda.is_initialized() else _visible_handles(nvml)
        if handles is None:
            if not torch.cuda.is_available():
                return ()
            torch.cuda.init()
            handles = [_handle_of(nvml, index) for index in range(torch.cuda.device_count())]
        return tuple(_device_of(nvml, handle, index) for index, handle in enumerate(handles))
    except nvml.NVMLError:
        return None


def _handle_of(nvml: Any, index: int) -> Any:
    """NVML's handle of torch's device, by its UUID; CUDA is initialised."""
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)  # older versions of torch have none
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def _visible_handles(nvml: Any) -> list[Any] | None:
    """NVML's handles of the devices that CUDA will number 0, 1, ...; None where only CUDA can tell."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.startswith("MIG-"):
        return [nvml.nvmlDeviceGetHandleByUUID(uuid.strip()) for uuid in visible.split(",")]
    if visible == "":
        return []
    cards = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    if any(_is_partitioned(nvml, card) for card in cards):
        return None
    # By default CUDA numbers the card first that it takes for the fastest, by a rule that is not published; NVML and
    # CUDA_DEVICE_ORDER=PCI_BUS_ID number them as they are plugged in. With cards of one type that is the same.
    numbered = not (visible or "0").startswith("GPU-") and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"
    if numbered and len({nvml.nvmlDeviceGetName(card) for card in cards}) > 1:
        return None
    uuids = [_text(nvml.nvmlDeviceGetUUID(card)) for card in cards]
    return [cards[index] for index in visible_indexes(visible, uuids)]


def _is_partitioned(nvml: Any, card: Any) -> bool:
    """Whether the card is cut into MIG instances, of which CUDA then sees one."""
    try:
        return bool(nvml.nvmlDeviceGetMigMode(card)[0] == nvml.NVML_DEVICE_MIG_ENABLE)
    except nvml.NVMLError:
        return False


def visible_indexes(variable: str | None, uuids: Sequence[str]) -> tuple[int, ...]:
    """Which cards ``CUDA_VISIBLE_DEVICES`` leaves, in its order: numbers, or UUIDs or the beginnings of such.

    The first entry that names no card, or more than one, ends the list; a card named twice empties it.

    >>> uuids = ["GPU-1f3a", "GPU-97c0", "GPU-9b11"]
    >>> visible_indexes(None, uuids), visible_indexes("", uuids), visible_indexes("2,0", uuids)
    ((0, 1, 2), (), (2, 0))
    >>> visible_indexes("GPU-9b,GPU-1f3a", uuids), visible_indexes("1,-1,0", uuids), visible_indexes("0,0", uuids)
    ((2, 0), (1,), ())
    """
    if variable is None:
        return tuple(range(len(uuids)))
    chosen: list[int] = []
    by_uuid = variable.startswith("GPU-")
    for entry in variable.split(","):
        if by_uuid:
            matches = [i for i, uuid in enumerate(uuids) if entry.startswith("GPU-") and uuid.startswith(entry)]
        else:
            number = re.match(r"\s*\+?(\d+)", entry)  # as strtoul reads: what follows the digits does not count
            matches = [int(number[1])] if number and int(number[1]) < len(uuids) else []
        if len(matches) != 1:
            break
        if matches[0] in chosen:
            return ()
        chosen.append(matches[0])
    return tuple(chosen)


def _device_of(nvml: Any, handle: Any, index: int) -> Device:
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        total = int(memory.total - memory.reserved)
    except nvml.NVMLError:  # drivers before 510 do not tell what is reserved
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        total = int(memory.total)
    limit = None
    context = CONTEXT
    if torch.cuda.is_initialized():
        total = int(torch.cuda.get_device_properties(index).total_memory)
        limit = _limit(index, total)
    free = min(int(memory.free), total)
    ours = _bytes_of_this_process(nvml, handle)
    if torch.cuda.is_initialized() and (ours is not None or _has_context(index)):
        free, context = _shared_with_context(index, total, ours)
    return Device(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        total=total,
        free=free,
        context=context,
        index=index,
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        limit=limit,
    )


def _bytes_of_this_process(nvml: Any, handle: Any) -> int | None:
    """Bytes that NVML books on this process; None where it lists it not, or without bytes.

    In a container NVML may list the host's process numbers, and on Windows it gives no bytes.
    """
    try:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:
        return None
    return next((int(p.usedGpuMemory) for p in processes if p.pid == os.getpid() and p.usedGpuMemory), None)


def driver_version() -> str:
    """The version of NVIDIA's driver; empty where NVML does not tell.

    >>> isinstance(driver_version(), str)
    True
    """
    with _nvml() as nvml:
        return "" if nvml is None else _text(nvml.nvmlSystemGetDriverVersion())


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


# --- torch.cuda
def _from_torch(index: int) -> Device:
    """A device as torch.cuda alone describes it.

    Only a context can tell what is free. None is made for that but on the current device, which will get one anyway.
    """
    properties = torch.cuda.get_device_properties(index)
    total = int(properties.total_memory)
    free, context = None, CONTEXT
    if _has_context(index) or index == torch.cuda.current_device():
        free, context = _shared_with_context(index, total, None)
    uuid = getattr(properties, "uuid", None)
    return Device(
        name=properties.name,
        total=total,
        free=free,
        context=context,
        index=index,
        uuid=None if uuid is None else f"GPU-{uuid}",
        capability=(properties.major, properties.minor),
        limit=_limit(index, total),
    )


def _shared_with_context(index: int, total: int, ours: int | None) -> tuple[int, int]:
    """``free`` and ``context`` of a device on which this process has a context: their difference is what the card has
    free now, and what the allocator holds already.
    """
    available = torch.cuda.mem_get_info(index)[0]
    reserved = torch.cuda.memory_reserved(index)
    capacity = min(available + reserved, total)
    context = min(max(0, ours - reserved), total - capacity) if ours is not None else 0
    return capacity + context, context


def _has_context(index: int) -> bool:
    """Whether this process has a CUDA context on the device: asking in any public way would make one.

    torch has no public name for this; ``torch._C._cuda_hasPrimaryContext`` was checked in 2.15.
    """
    if torch.cuda.memory_reserved(index) > 0:
        return True
    ask = getattr(torch._C, "_cuda_hasPrimaryContext", None)
    return bool(ask(index)) if ask is not None else False


def _limit(index: int, total: int) -> int | None:
    """Bytes that ``torch.cuda.set_per_process_memory_fraction`` leaves the allocator (rounded down); None for all."""
    ask = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # older versions of torch cannot say
    fraction = 1.0 if ask is None else float(ask(index))
    return int(fraction * total) if fraction < 1.0 else None


# --- peaks
class AllocatorStats(NamedTuple):
    """What the allocator of a CUDA device reports: bytes, and counts since the process began."""

    allocated: int = 0
    peak_allocated: int = 0
    peak_reserved: int = 0
    retries: int = 0  #: times that it gave back its cache to serve a request
    device_allocations: int = 0  #: times that it asked the card for memory (cudaMalloc)


#: What ``torch.cuda.memory_stats_as_nested_dict`` and ``reset_peak_memory_stats`` call in the end (torch 2.4 to 2.14):
#: in the midst of a training step each Python function on the way costs as much as a third of the reading itself.
#: They raise RuntimeError before CUDA is initialised. Where torch has none of that name, the public functions.
_STATS: Callable[[int], dict[str, Any]] = getattr(torch._C, "_cuda_memoryStats", torch.cuda.memory_stats_as_nested_dict)


_RESET: Callable[[int], None] = getattr(torch._C, "_cuda_resetPeakMemoryStats", lambda _: None)


def reset_peaks(index: int) -> None:
    """Let the peaks of a CUDA device begin anew, at what is allocated and reserved now.

    >>> reset_peaks(0)
    >>> read_stats(0).peak_allocated >= 0  # from here on
    True

    The allocator keeps its books on the host: nothing waits for the device, and it takes less than a microsecond.
    Before CUDA is initialised there are no peaks, and nothing is done.
    """
    try:
        _RESET(index)
    except RuntimeError:
        if torch.cuda.is_initialized():
            raise


def read_stats(index: int) -> AllocatorStats:
    """The allocator's figures, peaks since ``reset_peaks``; all 0 before CUDA is initialised.

    >>> stats = read_stats(0)
    >>> 0 <= stats.peak_allocated <= stats.peak_reserved
    True

    Nothing waits for the device. One query for all takes about 10 microseconds; ``torch.cuda.max_memory_allocated``
    and ``max_memory_reserved`` take about 65 each, since either sorts all statistics into one flat dictionary.
    """
    try:
        stats = _STATS(index)
    except RuntimeError:
        if torch.cuda.is_initialized():
            raise
        stats = {}
    if not stats:
        return AllocatorStats()
    allocated = stats["allocated_bytes"]["all"]
    return AllocatorStats(
        allocated["current"],
        allocated["peak"],
        stats["reserved_bytes"]["all"]["peak"],
        stats["num_alloc_retries"],
        stats.get("num_device_alloc", 0),
    )


def read_peaks(index: int) -> tuple[int, int]:
    """Peak bytes allocated and reserved on a CUDA device since ``reset_peaks``; (0, 0) before CUDA is initialised.

    >>> allocated, reserved = read_peaks(0)
    >>> 0 <= allocated <= reserved
    True
    """
    stats = read_stats(index)
    return stats.peak_allocated, stats.peak_reserved


class CardMeter:
    """Asks NVML for the bytes of a card; ``read`` gives (None, None) where there is no NVML. CUDA is initialised.

    >>> meter = CardMeter(0)
    >>> process, card = meter.read()
    >>> meter.close()
    """

    def __init__(self, index: int) -> None:
        self._closing = ExitStack()
        self._nvml = self._closing.enter_context(_nvml())
        try:
            self._handle = None if self._nvml is None else _handle_of(self._nvml, index)
        except (self._nvml.NVMLError, RuntimeError, AssertionError):  # torch's own errors where there is no such device
            self._handle = None

    def read(self) -> tuple[int | None, int | None]:
        """Bytes booked on this process (None where NVML does not list it), and bytes in use on the card."""
        if self._handle is None:
            return None, None
        try:
            used = int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        except self._nvml.NVMLError:
            return None, None
        return _bytes_of_this_process(self._nvml, self._handle), used

    def close(self) -> None:
        self._closing.close()


# --- the catalogue
class _Card(NamedTuple):
    name: str
    size: int  #: GB, as it is sold
    nominal: int  #: MiB, the total that nvidia-smi shows
    capability: tuple[int, int]
    reported: int = 0  #: bytes that CUDA reports; 0 where that is not known for sure
    also: str = ""  #: words that may stand in the name as well

    @property
    def total(self) -> int:
        return self.reported or self.nominal * MiB - min(GiB, 256 * MiB + self.nominal * MiB * 3 // 200)


# ``reported`` is ``total_memory`` as torch.cuda.get_device_properties prints it on such a card: of RTX 3090, RTX 3060,
# RTX 4060 and H200 it comes with the measurements that this project is tested against; the others are the figures
# commonly seen in published output, not measured for this project. They move by up to half a percent with the driver.
# Where there is none, one rule stands in: nvidia-smi's total, less 256 MiB and 1.5 %, though never less more than 1
# GiB.
# Every reported figure is above what the rule would say of that card (a test holds that): it errs on the safe side.
_CATALOGUE = (
    # Pascal, Volta, Turing
    _Card("GTX 1080 Ti", 11, 11264, (6, 1), 11_721_506_816),
    _Card("P100 16GB", 16, 16384, (6, 0), 17_071_734_784, also="PCIe SXM SXM2"),
    _Card("V100 16GB", 16, 16384, (7, 0), 16_945_512_448, also="PCIe SXM SXM2"),
    _Card("V100 32GB", 32, 32768, (7, 0), 34_089_730_048, also="PCIe SXM SXM2"),
    _Card("T4", 16, 15360, (7, 5), 15_835_660_288),
    _Card("TITAN RTX", 24, 24576, (7, 5), 25_396_838_400),
    _Card("Quadro RTX 6000", 24, 24576, (7, 5)),
    _Card("Quadro RTX 8000", 48, 49152, (7, 5)),
    _Card("RTX 2060", 6, 6144, (7, 5)),
    _Card("RTX 2060 SUPER", 8, 8192, (7, 5)),
    _Card("RTX 2070", 8, 8192, (7, 5)),
    _Card("RTX 2070 SUPER", 8, 8192, (7, 5)),
    _Card("RTX 2080", 8, 8192, (7, 5)),
    _Card("RTX 2080 SUPER", 8, 8192, (7, 5)),
    _Card("RTX 2080 Ti", 11, 11264, (7, 5), 11_554_717_696),
    # Ampere
    _Card("RTX 3050", 8, 8192, (8, 6)),
    _Card("RTX 3060", 12, 12288, (8, 6), 12_622_168_064),
    _Card("RTX 3060 Ti", 8, 8192, (8, 6)),
    _Card("RTX 3070", 8, 8192, (8, 6)),
    _Card("RTX 3070 Ti", 8, 8192, (8, 6)),
    _Card("RTX 3080 10GB", 10, 10240, (8, 6)),
    _Card("RTX 3080 12GB", 12, 12288, (8, 6)),
    _Card("RTX 3080 Ti", 12, 12288, (8, 6)),
    _Card("RTX 3090", 24, 24576, (8, 6), 25_446_711_296),
    _Card("RTX 3090 Ti", 24, 24564, (8, 6)),
    _Card("RTX 3060 Laptop", 6, 6144, (8, 6)),
    _Card("RTX 3070 Laptop", 8, 8192, (8, 6)),
    _Card("RTX 3080 Laptop 8GB", 8, 8192, (8, 6)),
    _Card("RTX 3080 Laptop 16GB", 16, 16384, (8, 6)),
    _Card("RTX 3080 Ti Laptop", 16, 16384, (8, 6)),
    _Card("RTX A2000 6GB", 6, 6138, (8, 6)),
    _Card("RTX A2000 12GB", 12, 12282, (8, 6)),
    _Card("RTX A4000", 16, 16376, (8, 6)),
    _Card("RTX A4500", 20, 20470, (8, 6)),
    _Card("RTX A5000", 24, 24564, (8, 6)),
    _Card("RTX A5500", 24, 24564, (8, 6)),
    _Card("RTX A6000", 48, 49140, (8, 6)),
    _Card("A2", 16, 15356, (8, 6)),
    _Card("A10", 24, 23028, (8, 6)),
    _Card("A10G", 24, 23028, (8, 6)),
    _Card("A16", 16, 15356, (8, 6)),
    _Card("A30", 24, 24576, (8, 0)),
    _Card("A40", 48, 46068, (8, 6)),
    _Card("A100 40GB", 40, 40960, (8, 0), also="PCIe SXM SXM4"),
    _Card("A100 80GB", 80, 81920, (8, 0), 84_974_239_744, also="PCIe SXM SXM4"),
    # Ada
    _Card("RTX 4060", 8, 8188, (8, 9), 8_318_222_336),
    _Card("RTX 4060 Ti 8GB", 8, 8188, (8, 9)),
    _Card("RTX 4060 Ti 16GB", 16, 16380, (8, 9)),
    _Card("RTX 4070", 12, 12282, (8, 9)),
    _Card("RTX 4070 SUPER", 12, 12282, (8, 9)),
    _Card("RTX 4070 Ti", 12, 12282, (8, 9)),
    _Card("RTX 4070 Ti SUPER", 16, 16376, (8, 9)),
    _Card("RTX 4080", 16, 16376, (8, 9)),
    _Card("RTX 4080 SUPER", 16, 16376, (8, 9)),
    _Card("RTX 4090", 24, 24564, (8, 9), 25_393_692_672),
    _Card("RTX 4090 D", 24, 24564, (8, 9)),
    _Card("RTX 4050 Laptop", 6, 6141, (8, 9)),
    _Card("RTX 4060 Laptop", 8, 8188, (8, 9)),
    _Card("RTX 4070 Laptop", 8, 8188, (8, 9)),
    _Card("RTX 4080 Laptop", 12, 12282, (8, 9)),
    _Card("RTX 4090 Laptop", 16, 16376, (8, 9)),
    _Card("RTX 2000 Ada", 16, 16380, (8, 9)),
    _Card("RTX 4000 Ada", 20, 20475, (8, 9)),
    _Card("RTX 4500 Ada", 24, 24570, (8, 9)),
    _Card("RTX 5000 Ada", 32, 32760, (8, 9)),
    _Card("RTX 6000 Ada", 48, 49140, (8, 9)),
    _Card("L4", 24, 23034, (8, 9)),
    _Card("L40", 48, 46068, (8, 9)),
    _Card("L40S", 48, 46068, (8, 9)),
    # Hopper
    _Card("H100 PCIe 80GB", 80, 81559, (9, 0)),
    _Card("H100 SXM5 80GB", 80, 81559, (9, 0), 85_029_158_912, also="SXM HBM3"),
    _Card("H100 NVL 94GB", 94, 95830, (9, 0)),
    _Card("GH200 96GB", 96, 97871, (9, 0)),
    _Card("H200", 141, 143771, (9, 0), 150_109_880_320, also="SXM SXM5"),
    _Card("H200 NVL", 141, 143771, (9, 0)),
    # Blackwell
    _Card("RTX 5060", 8, 8151, (12, 0)),
    _Card("RTX 5060 Ti 8GB", 8, 8151, (12, 0)),
    _Card("RTX 5060 Ti 16GB", 16, 16311, (12, 0)),
    _Card("RTX 5070", 12, 12227, (12, 0)),
    _Card("RTX 5070 Ti", 16, 16303, (12, 0)),
    _Card("RTX 5080", 16, 16303, (12, 0)),
    _Card("RTX 5090", 32, 32607, (12, 0)),
    _Card("RTX 5080 Laptop", 16, 16303, (12, 0)),
    _Card("RTX 5090 Laptop", 24, 24463, (12, 0)),
    _Card("RTX PRO 6000 Blackwell", 96, 97887, (12, 0), also="Workstation Server Max-Q"),
    _Card("B200", 180, 183359, (10, 0), also="SXM SXM6"),
    _Card("GB200", 186, 189471, (10, 0)),
)


_DROPPED = frozenset(("nvidia", "geforce", "tesla", "rtx", "gtx", "gpu", "graphics", "card", "generation", "edition"))


def gpu(name: str, context: int | None = None) -> Device:
    """A card that need not be here, by its name: case, spaces and the maker's words do not matter.

    >>> card = gpu("RTX 3090")
    >>> card.total, card.capability, card.capacity
    (25446711296, (8, 6), 24974852096)
    >>> gpu("nvidia geforce rtx3090 24gb") == card
    True
    >>> gpu("A100")
    Traceback (most recent call last):
    ...
    ValueError: 'A100' is more than one card: say 'A100 40GB' or 'A100 80GB'

    Args:
        name: as sold, or as ``nvidia-smi`` shows it; memory, if said, in GB as sold.
        context: bytes that the CUDA context takes; ``CONTEXT`` (450 MiB) if not given.

    Raises:
        ValueError: no card of that name is known, or several are. Any other card: ``Device(name, total=...)``.

    Where the bytes come from stands above the table in this module.
    """
    words, size = _words(name)
    known = [(card, *_words(card.name), _words(f"{card.name} {card.also}")[0]) for card in _CATALOGUE]
    fitting = [(card, own) for card, own, _, every in known if words and words <= every and size in (0, card.size)]
    exact = [card for card, own in fitting if own == words]
    choices = exact or [card for card, _ in fitting]
    if not choices:
        plain = {" ".join(sorted(own)) + f" {card.size}": card.name for card, own, _, _ in known}
        near = difflib.get_close_matches(" ".join(sorted(words)) + (f" {size}" if size else ""), plain, n=4, cutoff=0.5)
        hint = f": near are {_listed([plain[key] for key in near], 'and')}" if near else ""
        raise ValueError(
            f"{name!r} is not in the catalogue of GPUs{hint}; gpus() lists it, and any other card is "
            "Device(name, total=bytes)"
        )
    if len(choices) > 1:
        raise ValueError(f"{name!r} is more than one card: say {_listed([card.name for card in choices], 'or')}")
    return _catalogued(choices[0], CONTEXT if context is None else context)


def gpus() -> tuple[Device, ...]:
    """The catalogue that ``gpu`` looks a name up in.

    >>> [card.name for card in gpus() if card.total > 140 * 10**9]
    ['H200', 'H200 NVL', 'B200', 'GB200']
    """
    return tuple(_catalogued(card, CONTEXT) for card in _CATALOGUE)


def _catalogued(card: _Card, context: int) -> Device:
    return Device(card.name, total=card.total, context=context, capability=card.capability)


def _words(name: str) -> tuple[frozenset[str], int]:
    """A card's name as the words that tell it from others, and its GB (0 if not said).

    >>> sorted(_words("NVIDIA GeForce RTX4060Ti-16 GB")[0]), _words("NVIDIA GeForce RTX4060Ti-16 GB")[1]
    (['4060', 'ti'], 16)
    """
    text = re.sub(r"[^a-z0-9]+", " ", name.lower())
    size = re.search(r"\b(\d+) ?gi?b\b", text)
    text = re.sub(r"\b\d+ ?gi?b\b", " ", text)
    text = re.sub(r"(geforce|rtx|gtx|titan|quadro)(?=\S)", r"\1 ", text)
    text = re.sub(r"(?<=\d)(ti|super|laptop)", r" \1 ", text)
    text = re.sub(r"\bti(?=super)", "ti ", text)
    return frozenset(text.split()) - _DROPPED, int(size[1]) if size else 0


def _listed(names: Sequence[str], conjunction: str) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} {conjunction} {quoted[-1]}"


# --- the host
def cpu_device() -> Device:
    """The host as a device: its memory, and what of it is available now.

    >>> host = cpu_device()
    >>> host.kind, host.context, 0 < host.capacity <= host.total
    ('cpu', 0, True)

    What a container (control group, version 1 or 2) allows counts in place of the machine's, where that is less.
    """
    total, available = _host_memory()
    for limit, used in _control_groups():
        total, available = min(total, limit), min(available, max(0, limit - used))
    return Device(platform.processor() or "CPU", total=total, free=min(available, total), kind="cpu")


def _host_memory(meminfo: Path = Path("/proc/meminfo")) -> tuple[int, int]:
    """Total and available bytes: psutil, else Linux's own table, else the total for both."""
    try:
        import psutil
    except ImportError:
        pass
    else:
        memory = psutil.virtual_memory()
        return int(memory.total), int(memory.available)
    try:
        rows = dict(re.findall(r"^(\w+):\s+(\d+) kB", meminfo.read_text(), flags=re.MULTILINE))
        return int(rows["MemTotal"]) * KiB, int(rows["MemAvailable"]) * KiB
    except (OSError, KeyError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total


def _control_groups(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[tuple[int, int]]:
    """Limit and used bytes of every control group that this process is in and that has a limit.

    Cached pages of files that the kernel would give up (``inactive_file``) do not count as used.
    """
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return []
    found: list[tuple[int, int]] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            try:
                limit, used = ((folder / name).read_text().strip() for name in names)
                cached = re.search(
                    r"^(?:total_)?inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE
                )
            except OSError:
                continue
            if limit.isdigit() and int(limit) > 0:
                found.append((int(limit), max(0, int(used) - (int(cached[1]) if cached else 0))))
    return found
