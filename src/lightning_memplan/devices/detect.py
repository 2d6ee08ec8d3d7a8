"""Find the GPUs of this machine and the host's memory, in bytes that a process can have."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import runpy
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning_memplan.types import Device
from lightning_memplan.units import KiB, MiB

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
    cuda, hip = _torch_build()
    if cuda is None and hip is None:
        return ()
    if hip is None:
        with _nvml() as nvml:
            if nvml is not None and (found := _from_nvml(nvml)) is not None:
                return found
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own words about a missing driver: no devices is the answer
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(_from_torch(index) for index in range(count))


# torch takes seconds to import, and NVML tells the devices without it: it is imported where only CUDA can tell.
def _torch_build() -> tuple[str | None, str | None]:
    """Return the versions of CUDA and of HIP that torch is built for, each None where it is built without.

    >>> import torch
    >>> _torch_build() == (torch.version.cuda, torch.version.hip)
    True
    """
    if (torch := sys.modules.get("torch")) is not None:
        return torch.version.cuda, torch.version.hip
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    version = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return version["cuda"], version["hip"]


def _cuda_is_initialized() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


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
        handles = None if _cuda_is_initialized() else _visible_handles(nvml)
        if handles is None:
            import torch

            if not torch.cuda.is_available():
                return ()
            torch.cuda.init()
            handles = [_handle_of(nvml, index) for index in range(torch.cuda.device_count())]
        return tuple(_device_of(nvml, handle, index) for index, handle in enumerate(handles))
    except nvml.NVMLError:
        return None


def _handle_of(nvml: Any, index: int) -> Any:
    """NVML's handle of torch's device, by its UUID; CUDA is initialised."""
    import torch

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
    if _cuda_is_initialized():
        import torch

        total = int(torch.cuda.get_device_properties(index).total_memory)
        limit = _limit(index, total)
    free = min(int(memory.free), total)
    ours = _bytes_of_this_process(nvml, handle)
    if _cuda_is_initialized() and (ours is not None or _has_context(index)):
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
    import torch

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
    import torch

    available = torch.cuda.mem_get_info(index)[0]
    reserved = torch.cuda.memory_reserved(index)
    capacity = min(available + reserved, total)
    context = min(max(0, ours - reserved), total - capacity) if ours is not None else 0
    return capacity + context, context


def _has_context(index: int) -> bool:
    """Whether this process has a CUDA context on the device: asking in any public way would make one.

    torch has no public name for this; ``torch._C._cuda_hasPrimaryContext`` was checked in 2.15.
    """
    import torch

    if torch.cuda.memory_reserved(index) > 0:
        return True
    ask = getattr(torch._C, "_cuda_hasPrimaryContext", None)
    return bool(ask(index)) if ask is not None else False


def _limit(index: int, total: int) -> int | None:
    """Bytes that ``torch.cuda.set_per_process_memory_fraction`` leaves the allocator (rounded down); None for all."""
    import torch

    ask = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # older versions of torch cannot say
    fraction = 1.0 if ask is None else float(ask(index))
    return int(fraction * total) if fraction < 1.0 else None


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
