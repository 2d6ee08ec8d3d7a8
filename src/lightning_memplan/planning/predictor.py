"""Interface between a search and what it asks: the estimate at a batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lightning_memplan.memory.estimate import Estimate
from lightning_memplan.types import Advice


class Predictor(Protocol):
    """Predict one step at any batch size: what a search asks."""

    @property
    def name(self) -> str:
        """Name of what is trained, for messages."""

    def estimate_at(self, batch_size: int) -> Estimate:
        """Return the estimate that holds at a batch size."""

    def retrace(self, batch_size: int) -> None:
        """Trace the step at exactly this batch size: ``estimate_at`` has the result from then on.

        Raises:
            TraceError: the step refuses so many samples.
        """

    def advise(self, estimate: Estimate, batch_size: int, budget: int) -> tuple[Advice, ...]:
        """Return what would save memory, where nothing fits."""


@dataclass(frozen=True)
class OneEstimate:
    """A predictor with one estimate for all batch sizes, which is taken at its word."""

    estimate: Estimate
    name: str = "the model"

    def estimate_at(self, batch_size: int) -> Estimate:
        return self.estimate

    def retrace(self, batch_size: int) -> None:
        pass

    def advise(self, estimate: Estimate, batch_size: int, budget: int) -> tuple[Advice, ...]:
        return ()
