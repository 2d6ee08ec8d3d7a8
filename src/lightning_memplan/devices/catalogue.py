"""Look up GPUs by name: total memory, CUDA context and compute capability."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

from lightning_memplan.devices.detect import CONTEXT
from lightning_memplan.types import Device
from lightning_memplan.units import GiB, MiB


class _Gpu(NamedTuple):
    name: str
    size: int  #: GB, as it is sold
    nominal: int  #: MiB, the total that nvidia-smi shows
    capability: tuple[int, int]
    reported: int = 0  #: bytes that CUDA reports; 0 if they are not known for sure
    also: str = ""  #: optional words of the name

    @property
    def total(self) -> int:
        return self.reported or self.nominal * MiB - min(GiB, 256 * MiB + self.nominal * MiB * 3 // 200)


# ``reported`` is ``total_memory`` as torch.cuda.get_device_properties prints it on such a GPU. Those of RTX 3090, RTX
# 3060, RTX 4060 and H200 come with the measurements that this project is tested against. The others are common in
# published output, but were not measured for this project. They move by up to half a percent with the driver.
# Without a reported figure, a rule estimates it: nvidia-smi's total, less 256 MiB and 1.5 %, but at most 1 GiB less.
# The rule errs on the safe side: every reported figure is above it (a test holds that).
_CATALOGUE = (
    # Pascal, Volta, Turing
    _Gpu("GTX 1080 Ti", 11, 11264, (6, 1), 11_721_506_816),
    _Gpu("P100 16GB", 16, 16384, (6, 0), 17_071_734_784, also="PCIe SXM SXM2"),
    _Gpu("V100 16GB", 16, 16384, (7, 0), 16_945_512_448, also="PCIe SXM SXM2"),
    _Gpu("V100 32GB", 32, 32768, (7, 0), 34_089_730_048, also="PCIe SXM SXM2"),
    _Gpu("T4", 16, 15360, (7, 5), 15_835_660_288),
    _Gpu("TITAN RTX", 24, 24576, (7, 5), 25_396_838_400),
    _Gpu("Quadro RTX 6000", 24, 24576, (7, 5)),
    _Gpu("Quadro RTX 8000", 48, 49152, (7, 5)),
    _Gpu("RTX 2060", 6, 6144, (7, 5)),
    _Gpu("RTX 2060 SUPER", 8, 8192, (7, 5)),
    _Gpu("RTX 2070", 8, 8192, (7, 5)),
    _Gpu("RTX 2070 SUPER", 8, 8192, (7, 5)),
    _Gpu("RTX 2080", 8, 8192, (7, 5)),
    _Gpu("RTX 2080 SUPER", 8, 8192, (7, 5)),
    _Gpu("RTX 2080 Ti", 11, 11264, (7, 5), 11_554_717_696),
    # Ampere
    _Gpu("RTX 3050", 8, 8192, (8, 6)),
    _Gpu("RTX 3060", 12, 12288, (8, 6), 12_622_168_064),
    _Gpu("RTX 3060 Ti", 8, 8192, (8, 6)),
    _Gpu("RTX 3070", 8, 8192, (8, 6)),
    _Gpu("RTX 3070 Ti", 8, 8192, (8, 6)),
    _Gpu("RTX 3080 10GB", 10, 10240, (8, 6)),
    _Gpu("RTX 3080 12GB", 12, 12288, (8, 6)),
    _Gpu("RTX 3080 Ti", 12, 12288, (8, 6)),
    _Gpu("RTX 3090", 24, 24576, (8, 6), 25_446_711_296),
    _Gpu("RTX 3090 Ti", 24, 24564, (8, 6)),
    _Gpu("RTX 3060 Laptop", 6, 6144, (8, 6)),
    _Gpu("RTX 3070 Laptop", 8, 8192, (8, 6)),
    _Gpu("RTX 3080 Laptop 8GB", 8, 8192, (8, 6)),
    _Gpu("RTX 3080 Laptop 16GB", 16, 16384, (8, 6)),
    _Gpu("RTX 3080 Ti Laptop", 16, 16384, (8, 6)),
    _Gpu("RTX A2000 6GB", 6, 6138, (8, 6)),
    _Gpu("RTX A2000 12GB", 12, 12282, (8, 6)),
    _Gpu("RTX A4000", 16, 16376, (8, 6)),
    _Gpu("RTX A4500", 20, 20470, (8, 6)),
    _Gpu("RTX A5000", 24, 24564, (8, 6)),
    _Gpu("RTX A5500", 24, 24564, (8, 6)),
    _Gpu("RTX A6000", 48, 49140, (8, 6)),
    _Gpu("A2", 16, 15356, (8, 6)),
    _Gpu("A10", 24, 23028, (8, 6)),
    _Gpu("A10G", 24, 23028, (8, 6)),
    _Gpu("A16", 16, 15356, (8, 6)),
    _Gpu("A30", 24, 24576, (8, 0)),
    _Gpu("A40", 48, 46068, (8, 6)),
    _Gpu("A100 40GB", 40, 40960, (8, 0), also="PCIe SXM SXM4"),
    _Gpu("A100 80GB", 80, 81920, (8, 0), 84_974_239_744, also="PCIe SXM SXM4"),
    # Ada
    _Gpu("RTX 4060", 8, 8188, (8, 9), 8_318_222_336),
    _Gpu("RTX 4060 Ti 8GB", 8, 8188, (8, 9)),
    _Gpu("RTX 4060 Ti 16GB", 16, 16380, (8, 9)),
    _Gpu("RTX 4070", 12, 12282, (8, 9)),
    _Gpu("RTX 4070 SUPER", 12, 12282, (8, 9)),
    _Gpu("RTX 4070 Ti", 12, 12282, (8, 9)),
    _Gpu("RTX 4070 Ti SUPER", 16, 16376, (8, 9)),
    _Gpu("RTX 4080", 16, 16376, (8, 9)),
    _Gpu("RTX 4080 SUPER", 16, 16376, (8, 9)),
    _Gpu("RTX 4090", 24, 24564, (8, 9), 25_393_692_672),
    _Gpu("RTX 4090 D", 24, 24564, (8, 9)),
    _Gpu("RTX 4050 Laptop", 6, 6141, (8, 9)),
    _Gpu("RTX 4060 Laptop", 8, 8188, (8, 9)),
    _Gpu("RTX 4070 Laptop", 8, 8188, (8, 9)),
    _Gpu("RTX 4080 Laptop", 12, 12282, (8, 9)),
    _Gpu("RTX 4090 Laptop", 16, 16376, (8, 9)),
    _Gpu("RTX 2000 Ada", 16, 16380, (8, 9)),
    _Gpu("RTX 4000 Ada", 20, 20475, (8, 9)),
    _Gpu("RTX 4500 Ada", 24, 24570, (8, 9)),
    _Gpu("RTX 5000 Ada", 32, 32760, (8, 9)),
    _Gpu("RTX 6000 Ada", 48, 49140, (8, 9)),
    _Gpu("L4", 24, 23034, (8, 9)),
    _Gpu("L40", 48, 46068, (8, 9)),
    _Gpu("L40S", 48, 46068, (8, 9)),
    # Hopper
    _Gpu("H100 PCIe 80GB", 80, 81559, (9, 0)),
    _Gpu("H100 SXM5 80GB", 80, 81559, (9, 0), 85_029_158_912, also="SXM HBM3"),
    _Gpu("H100 NVL 94GB", 94, 95830, (9, 0)),
    _Gpu("GH200 96GB", 96, 97871, (9, 0)),
    _Gpu("H200", 141, 143771, (9, 0), 150_109_880_320, also="SXM SXM5"),
    _Gpu("H200 NVL", 141, 143771, (9, 0)),
    # Blackwell
    _Gpu("RTX 5060", 8, 8151, (12, 0)),
    _Gpu("RTX 5060 Ti 8GB", 8, 8151, (12, 0)),
    _Gpu("RTX 5060 Ti 16GB", 16, 16311, (12, 0)),
    _Gpu("RTX 5070", 12, 12227, (12, 0)),
    _Gpu("RTX 5070 Ti", 16, 16303, (12, 0)),
    _Gpu("RTX 5080", 16, 16303, (12, 0)),
    _Gpu("RTX 5090", 32, 32607, (12, 0)),
    _Gpu("RTX 5080 Laptop", 16, 16303, (12, 0)),
    _Gpu("RTX 5090 Laptop", 24, 24463, (12, 0)),
    _Gpu("RTX PRO 6000 Blackwell", 96, 97887, (12, 0), also="Workstation Server Max-Q"),
    _Gpu("B200", 180, 183359, (10, 0), also="SXM SXM6"),
    _Gpu("GB200", 186, 189471, (10, 0)),
)


_DROPPED = frozenset(("nvidia", "geforce", "tesla", "rtx", "gtx", "gpu", "graphics", "card", "generation", "edition"))


def gpu(name: str, context: int | None = None) -> Device:
    """Return a GPU by its name; it need not be in this machine. Case, spaces and words such as "NVIDIA" do not matter.

    >>> device = gpu("RTX 3090")
    >>> device.total, device.capability, device.capacity
    (25446711296, (8, 6), 24974852096)
    >>> gpu("nvidia geforce rtx3090 24gb") == device
    True
    >>> gpu("A100")
    Traceback (most recent call last):
    ...
    ValueError: 'A100' is more than one GPU: say 'A100 40GB' or 'A100 80GB'

    Args:
        name: Name as sold, or as ``nvidia-smi`` shows it, with or without the memory in GB as sold.
        context: Bytes that the CUDA context takes; ``CONTEXT`` (450 MiB) by default.

    Raises:
        ValueError: The catalogue has no GPU of that name, or several. Describe others by ``Device(name, total=...)``.

    A comment above the table in this module tells where its figures come from.
    """
    words, size = _words(name)
    known = [(entry, *_words(entry.name), _words(f"{entry.name} {entry.also}")[0]) for entry in _CATALOGUE]
    fitting = [(entry, own) for entry, own, _, every in known if words and words <= every and size in (0, entry.size)]
    exact = [entry for entry, own in fitting if own == words]
    choices = exact or [entry for entry, _ in fitting]
    if not choices:
        plain = {" ".join(sorted(own)) + f" {entry.size}": entry.name for entry, own, _, _ in known}
        near = difflib.get_close_matches(" ".join(sorted(words)) + (f" {size}" if size else ""), plain, n=4, cutoff=0.5)
        hint = f": near are {_listed([plain[key] for key in near], 'and')}" if near else ""
        raise ValueError(
            f"{name!r} is not in the catalogue of GPUs{hint}; gpus() lists it, and any other GPU is "
            "Device(name, total=bytes)"
        )
    if len(choices) > 1:
        raise ValueError(f"{name!r} is more than one GPU: say {_listed([entry.name for entry in choices], 'or')}")
    return _catalogued(choices[0], CONTEXT if context is None else context)


def gpus() -> tuple[Device, ...]:
    """Return the catalogue in which ``gpu`` looks up a name.

    >>> [device.name for device in gpus() if device.total > 140 * 10**9]
    ['H200', 'H200 NVL', 'B200', 'GB200']
    """
    return tuple(_catalogued(entry, CONTEXT) for entry in _CATALOGUE)


def _catalogued(entry: _Gpu, context: int) -> Device:
    return Device(entry.name, total=entry.total, context=context, capability=entry.capability)


def _words(name: str) -> tuple[frozenset[str], int]:
    """Return the distinguishing words of a GPU's name, and its GB (0 if the name has none).

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
