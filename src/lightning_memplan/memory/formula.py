"""Predict memory by the formula ``parameters + gradients + batch_size * (I1 + 2 * sum(Ii))``."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_memplan.checks import check_batch_size
from lightning_memplan.types import Layer


@dataclass(frozen=True, slots=True)
class Formula:
    """``memory(bs) = parameters + gradients + bs * (I1 + 2 * sum(Ii))``, in bytes.

    >>> formula = Formula(layers=(), parameter_bytes=1000, gradient_bytes=1000, input_bytes=10, feature_bytes=45)
    >>> formula.memory(8)  # 1000 + 1000 + 8 * (10 + 2 * 45)
    2800
    """

    layers: tuple[Layer, ...]
    parameter_bytes: int
    gradient_bytes: int
    input_bytes: int  #: I1: one sample of the network's input
    feature_bytes: int  #: sum of Ii: every layer's output for one sample
    optimizer_bytes: int = 0  #: the optimizer's state, which the formula omits

    def __post_init__(self) -> None:
        for name in ("parameter_bytes", "gradient_bytes", "input_bytes", "feature_bytes", "optimizer_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} is a number of bytes (an int, at least 0), not {value!r}")

    @property
    def sample_bytes(self) -> int:
        """Bytes that each sample adds: I1 + 2 * sum(Ii).

        >>> Formula((), 1000, 1000, input_bytes=10, feature_bytes=45).sample_bytes
        100
        """
        return self.input_bytes + 2 * self.feature_bytes

    def memory(self, batch_size: int) -> int:
        """Return the bytes at a batch size.

        >>> Formula((), 1000, 1000, 10, 45, optimizer_bytes=2000).memory(1)
        2100

        Raises:
            ValueError: ``batch_size`` is not an int of at least 1.
        """
        check_batch_size(batch_size)
        return self.parameter_bytes + self.gradient_bytes + batch_size * self.sample_bytes
