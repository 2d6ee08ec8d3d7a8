"""Move a batch to the device through the user's hooks, as Lightning does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lightning_memplan.data.tiling import TiledBatch
from lightning_memplan.lightning.compat import is_overridden, move_to_device
from lightning_memplan.step.precision import convert


@dataclass(frozen=True)
class BatchTransfer:
    """Move batches to ``device``, converted to ``dtype`` if there is one.

    A hook is the datamodule's where it overrides it, else the replica's, as Lightning chooses.
    """

    replica: Any
    datamodule: Any
    device: torch.device
    dtype: torch.dtype | None

    def __call__(self, batch: Any) -> Any:
        tiled = batch if isinstance(batch, TiledBatch) else None
        if tiled is not None:
            hooked = self._overrides("on_before_batch_transfer") or self._overrides("transfer_batch_to_device")
            batch, tiled = (tiled.whole(), None) if hooked else (tiled.few, tiled)
        if self.dtype is not None:
            batch = convert(batch, self.dtype)
        batch = self._hooked("on_before_batch_transfer", batch, 0)
        if self._overrides("transfer_batch_to_device"):
            batch = self._hooked("transfer_batch_to_device", batch, self.device, 0)
        elif tiled is not None:
            batch = tiled.on(self.device, batch)
        else:
            batch = move_to_device(batch, self.device)
        return self._hooked("on_after_batch_transfer", batch, 0)

    def _overrides(self, hook: str) -> bool:
        return is_overridden(hook, self.datamodule) or is_overridden(hook, self.replica)

    def _hooked(self, hook: str, batch: Any, *args: Any) -> Any:
        for owner in (self.datamodule, self.replica):
            if is_overridden(hook, owner):
                return getattr(owner, hook)(batch, *args)
        return batch
