"""GPUs by name: total memory, CUDA context and compute capability."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

from lightning_memplan.devices.detect import CONTEXT
from lightning_memplan.types import Device
from lightning_memplan.units import GiB, MiB


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
