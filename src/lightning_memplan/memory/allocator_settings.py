"""Read ``PYTORCH_CUDA_ALLOC_CONF``: the allocator's settings that change how many bytes are taken."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MIB = 2**20


_LARGE_SEGMENT = 20 * MIB


INTERVALS = 16  # sizes between powers of two that have divisions of their own: from 1 MiB, ... from 32 GiB


_SETTINGS = (
    "backend",
    "expandable_segments",
    "garbage_collection_threshold",
    "large_segment_size_mb",
    "max_non_split_rounding_mb",
    "max_split_size_mb",
    "per_process_memory_fraction",
    "roundup_power2_divisions",
)


_WITHOUT_EFFECT = re.compile(  # on how many bytes are allocated and reserved
    "pinned_.*|release_lock_on_(cuda|hip)malloc|throw_on_cudamalloc_oom|graph_capture_record_stream_reuse"
    "|expandable_segments_reserve(_by_class)?"
)


@dataclass(frozen=True, slots=True)
class AllocatorSettings:
    """Settings of ``PYTORCH_CUDA_ALLOC_CONF`` that change how many bytes are taken. Sizes are in bytes.

    >>> AllocatorSettings.from_text("max_split_size_mb:128, garbage_collection_threshold:0.8").max_split_size
    134217728
    >>> AllocatorSettings.from_environment({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}).expandable_segments
    True

    ``roundup_power2_divisions`` is empty, or holds sixteen numbers: the parts into which the sizes between two powers
    of two are divided, from 1 MiB (and below) to 32 GiB (and above); 0 and 1 leave the rounding at 512 bytes.
    ``per_process_memory_fraction`` is a share of a GPU's total: their product is the ``fraction`` of ``replay``.

    Source: c10/core/AllocatorConfig.h and c10/cuda/CUDAAllocatorConfig.h, torch 2.15.
    """

    expandable_segments: bool = False
    max_split_size: int | None = None  #: larger blocks are neither split, nor used for smaller requests
    roundup_power2_divisions: tuple[int, ...] = ()
    garbage_collection_threshold: float = 0.0  #: share of the fraction above which idle segments are released
    max_non_split_rounding: int = _LARGE_SEGMENT  #: bytes that a block over ``max_split_size`` may be too large
    large_segment_size: int = _LARGE_SEGMENT
    per_process_memory_fraction: float = 1.0
    by_address: bool = False  #: of free blocks of one size, use the one at the lowest address: torch before 2.14

    @classmethod
    def from_text(cls, text: str) -> AllocatorSettings:
        """Parse the variable's value: pairs ``key:value``, separated by commas.

        >>> AllocatorSettings.from_text("roundup_power2_divisions:[256:1,512:2,>:8]").roundup_power2_divisions
        (1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 8, 8, 8, 8, 8, 8)

        Raises:
            ValueError: torch refuses the text, or it names ``backend:cudaMallocAsync``, whose cache CUDA keeps.
        """
        values = _pairs(text)
        if values.get("backend", "native") != "native":
            raise ValueError(f"only the allocator backend:native can be replayed, not backend:{values['backend']}")
        expandable = values.get("expandable_segments", "False")
        if expandable not in ("True", "False"):
            raise ValueError(f"expandable_segments is True or False, not {expandable!r}")
        large = _whole(values, "large_segment_size_mb", 11, _LARGE_SEGMENT)
        return cls(
            expandable_segments=expandable == "True",
            max_split_size=_whole(values, "max_split_size_mb", large // MIB, 0) or None,
            roundup_power2_divisions=_divisions(values.get("roundup_power2_divisions", "[]")),
            garbage_collection_threshold=_share(values, "garbage_collection_threshold", 0.0, lambda x: 0.0 < x < 1.0),
            max_non_split_rounding=_whole(values, "max_non_split_rounding_mb", large // MIB, _LARGE_SEGMENT),
            large_segment_size=large,
            per_process_memory_fraction=_share(values, "per_process_memory_fraction", 1.0, lambda x: 0.0 <= x <= 1.0),
        )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> AllocatorSettings:
        """Return the settings that torch takes from these environment variables.

        ``PYTORCH_CUDA_ALLOC_CONF`` comes before ``PYTORCH_HIP_ALLOC_CONF`` and the newer ``PYTORCH_ALLOC_CONF``; the
        first that is set is the only one that counts.

        >>> AllocatorSettings.from_environment({}) == AllocatorSettings()
        True
        """
        for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
            if name in environ:
                return cls.from_text(environ[name])
        return cls()


def _pairs(text: str) -> dict[str, str]:
    text = "".join(text.split()).removesuffix(",")
    values = {}
    for pair in re.split(r",(?![^\[]*\])", text) if text else ():  # at no comma within brackets
        key, _, value = pair.partition(":")
        if key not in _SETTINGS and not _WITHOUT_EFFECT.fullmatch(key):
            raise ValueError(f"the allocator has no setting {key!r}; it has {', '.join(_SETTINGS)}")
        if not value:
            raise ValueError(f"the allocator's setting {key} has no value: write {key}:VALUE")
        values[key] = value
    return values


def _whole(values: Mapping[str, str], key: str, least: int, default: int) -> int:
    """Return a whole number of MiB as bytes."""
    text = values.get(key)
    if text is None:
        return default
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{key} is a whole number of MiB, at least {least}, and not {text!r}")
    return int(text) * MIB


def _share(values: Mapping[str, str], key: str, default: float, valid: Callable[[float], bool]) -> float:
    text = values.get(key)
    if text is None:
        return default
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not valid(share):
        raise ValueError(f"{key} is a number between 0.0 and 1.0, and not {text!r}")
    return share


def _divisions(text: str) -> tuple[int, ...]:
    """Parse ``"4"``, or ``"[64:8,256:4,>:1]"``: from 64 MiB on, from 256 MiB on, and beyond.

    The first ones hold for all smaller sizes, too. Sizes between two that are named have none.
    """

    def power(text: str, least: int) -> int:
        number = int(text) if text.isdecimal() else -1
        if number < least or number & number - 1:
            raise ValueError(f"roundup_power2_divisions is made of powers of 2, and not of {text!r}")
        return number

    if not text.startswith("["):
        return (power(text, 1),) * INTERVALS
    divisions = [0] * INTERVALS
    at = 0
    for position, pair in enumerate(filter(None, text[1:-1].split(","))):
        bound, _, value = pair.partition(":")
        parts = power(value, 0)
        if bound == ">":
            divisions[at + 1 :] = [parts] * (INTERVALS - at - 1)
        else:
            at = min(power(bound, 1).bit_length() - 1, INTERVALS - 1)
            divisions[0 if position == 0 else at : at + 1] = [parts] * (1 if position else at + 1)
    return tuple(divisions) if any(divisions) else ()
