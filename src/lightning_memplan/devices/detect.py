"""Find the GPUs of this machine and the host's memory, and how many bytes a process can have of each."""

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

#: Bytes that a process's CUDA context takes on a GPU before its allocator gets any. It takes 300 to 450 MiB, by GPU and
#: driver, since CUDA 11.7 loads kernels on their first call (``CUDA_MODULE_LOADING=LAZY``). This is the upper end.
CONTEXT = 450 * MiB


def detect_devices() -> tuple[Device, ...]:
    """Return the CUDA devices that this process can use, in torch's order.

    This initialises CUDA only if nothing else can tell: without NVML; with a GPU that is split into MIG instances; or
    with GPUs of different types, unless ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` or UUIDs in ``CUDA_VISIBLE_DEVICES`` define
    their order.

    >>> devices = detect_devices()
    >>> [device.index for device in devices] == list(range(len(devices)))
    True
    >>> all(device.capacity <= device.total for device in devices)
    True

    Returns:
        One ``Device`` each, in bytes. ``total`` is CUDA's figure. ``free`` is what no other process holds, so it does
        not shrink with this process; it is ``None`` if unknown. ``context`` is ``CONTEXT`` before this process has a
        CUDA context, and after that all bytes of this process that are not the allocator's. ``limit`` is what
        ``torch.cuda.set_per_process_memory_fraction`` allows.

    Source: NVML's device queries (docs.nvidia.com/deploy/nvml-api); ``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER``
    in the CUDA C++ Programming Guide, "CUDA Environment Variables".
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
        warnings.simplefilter("ignore")  # torch warns about a missing driver, which means no devices
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
    """Yield the pynvml module between its init and shutdown; None if it or the driver is missing."""
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
    """Return the visible devices, None if NVML does not know them."""
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
    """Return NVML's handle of torch's device, by its UUID. CUDA must be initialised."""
    import torch

    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)  # older versions of torch have none
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def _visible_handles(nvml: Any) -> list[Any] | None:
    """Return NVML's handles of the devices that CUDA will number 0, 1, ..., None if only CUDA can tell."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.startswith("MIG-"):
        return [nvml.nvmlDeviceGetHandleByUUID(uuid.strip()) for uuid in visible.split(",")]
    if visible == "":
        return []
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    if any(_is_partitioned(nvml, handle) for handle in handles):
        return None
    # By default CUDA puts the fastest GPU first, by an unpublished rule. NVML and CUDA_DEVICE_ORDER=PCI_BUS_ID number
    # GPUs by their slots. With GPUs of one type, both orders are the same.
    numbered = not (visible or "0").startswith("GPU-") and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"
    if numbered and len({nvml.nvmlDeviceGetName(handle) for handle in handles}) > 1:
        return None
    uuids = [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    return [handles[index] for index in visible_indexes(visible, uuids)]


def _is_partitioned(nvml: Any, handle: Any) -> bool:
    """Return True if the GPU is split into MIG instances, of which CUDA sees only one."""
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE)
    except nvml.NVMLError:
        return False


def visible_indexes(variable: str | None, uuids: Sequence[str]) -> tuple[int, ...]:
    """Return the GPUs that ``CUDA_VISIBLE_DEVICES`` selects, in its order: by number, or by UUID or its beginning.

    The first entry that names no GPU, or several, ends the list. A GPU that is named twice empties the list.

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
            number = re.match(r"\s*\+?(\d+)", entry)  # as strtoul does, ignore everything after the digits
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
    except nvml.NVMLError:  # drivers before 510 do not report reserved bytes
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
    """Return the bytes that NVML attributes to this process, None if it does not list the process or its bytes.

    In a container NVML may list the host's process ids. On Windows it reports no bytes.
    """
    try:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:
        return None
    return next((int(p.usedGpuMemory) for p in processes if p.pid == os.getpid() and p.usedGpuMemory), None)


def driver_version() -> str:
    """Return the version of NVIDIA's driver, "" if NVML does not tell.

    >>> isinstance(driver_version(), str)
    True
    """
    with _nvml() as nvml:
        return "" if nvml is None else _text(nvml.nvmlSystemGetDriverVersion())


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


# --- torch.cuda
def _from_torch(index: int) -> Device:
    """Describe a device by torch.cuda alone.

    Only a CUDA context can tell what is free. The current device gets a context for that, as it will need one anyway;
    other devices do not.
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
    """Return ``free`` and ``context`` of a device on which this process has a context.

    Their difference is the memory free at this moment plus that which the allocator holds.
    """
    import torch

    available = torch.cuda.mem_get_info(index)[0]
    reserved = torch.cuda.memory_reserved(index)
    capacity = min(available + reserved, total)
    context = min(max(0, ours - reserved), total - capacity) if ours is not None else 0
    return capacity + context, context


def _has_context(index: int) -> bool:
    """Return True if this process has a CUDA context on the device; do not make one.

    torch has no public function for this. ``torch._C._cuda_hasPrimaryContext`` was checked in 2.15.
    """
    import torch

    if torch.cuda.memory_reserved(index) > 0:
        return True
    ask = getattr(torch._C, "_cuda_hasPrimaryContext", None)
    return bool(ask(index)) if ask is not None else False


def _limit(index: int, total: int) -> int | None:
    """Return the bytes that ``torch.cuda.set_per_process_memory_fraction`` allows, rounded down; None for all."""
    import torch

    ask = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # older versions of torch lack it
    fraction = 1.0 if ask is None else float(ask(index))
    return int(fraction * total) if fraction < 1.0 else None


class NvmlMeter:
    """Ask NVML for the bytes in use on a GPU, after CUDA is initialised; ``read`` returns (None, None) without NVML.

    >>> meter = NvmlMeter(0)
    >>> process, used = meter.read()
    >>> meter.close()
    """

    def __init__(self, index: int) -> None:
        self._closing = ExitStack()
        self._nvml = self._closing.enter_context(_nvml())
        try:
            self._handle = None if self._nvml is None else _handle_of(self._nvml, index)
        except (self._nvml.NVMLError, RuntimeError, AssertionError):  # torch's own errors for a missing device
            self._handle = None

    def read(self) -> tuple[int | None, int | None]:
        """Return the bytes of this process, None if NVML does not list it, and the bytes in use on the GPU."""
        if self._handle is None:
            return None, None
        try:
            used = int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        except self._nvml.NVMLError:
            return None, None
        return _bytes_of_this_process(self._nvml, self._handle), used

    def close(self) -> None:
        """Shut NVML down."""
        self._closing.close()


# --- the host
def cpu_device() -> Device:
    """Return the host as a device: its memory, and how much of it is available.

    >>> host = cpu_device()
    >>> host.kind, host.context, 0 < host.capacity <= host.total
    ('cpu', 0, True)

    In a container, the limits of its control groups (version 1 or 2) count if they are lower than the machine's.
    """
    total, available = _host_memory()
    for limit, used in _control_groups():
        total, available = min(total, limit), min(available, max(0, limit - used))
    return Device(platform.processor() or "CPU", total=total, free=min(available, total), kind="cpu")


def _host_memory(meminfo: Path = Path("/proc/meminfo")) -> tuple[int, int]:
    """Return total and available bytes, by psutil or Linux's /proc/meminfo; without either, the total for both."""
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
    """Return limit and used bytes of every control group with a limit that this process is in.

    Cached file pages that the kernel would drop (``inactive_file``) do not count as used.
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
