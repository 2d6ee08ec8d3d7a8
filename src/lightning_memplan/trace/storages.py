"""Tell storages apart, and notice when one is resized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def key_of(storage: torch.UntypedStorage) -> int:
    """Return the address of a storage's C++ object, which stays while anything refers to it (torch 2.13 and 2.14)."""
    return storage._cdata  # type: ignore[no-any-return]


class ResizedStorages:
    """While entered, call ``resized`` with every storage that is resized, and give each fake one an address of its own.

    Source: torch/distributed/fsdp/_flat_param.py and torch/distributed/utils.py (``_alloc_storage``, ``_free_storage``;
    2.14), which gather parameters into a storage that has bytes only while they are needed.
    """

    def __init__(self, resized: Callable[[torch.UntypedStorage, int], None]) -> None:
        self._resized = resized

    def __enter__(self) -> None:
        resized, kind = self._resized, torch.UntypedStorage
        resize, address = self._before = kind.resize_, kind.data_ptr

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            resized(storage, size)
            return result

        def data_ptr(storage: torch.UntypedStorage) -> int:
            if storage.device.type != "meta":
                return address(storage)
            return key_of(storage) if storage.nbytes() else 0

        kind.resize_, kind.data_ptr = resize_, data_ptr  # type: ignore[method-assign, assignment]

    def __exit__(self, *error: object) -> None:
        torch.UntypedStorage.resize_, torch.UntypedStorage.data_ptr = self._before  # type: ignore[method-assign]
