"""What a network builder gets to know."""

from __future__ import annotations

import math
from dataclasses import dataclass

from clicktrain.errors import InvalidArgument


@dataclass(frozen=True)
class ModelSpec:
    """Checked arguments of `clicktrain.models.create`, which says what they mean."""

    name: str
    num_classes: int
    width: float
    in_channels: int
    input_size: int

    def __post_init__(self) -> None:
        for field in ("num_classes", "in_channels", "input_size"):
            value = getattr(self, field)
            if value < 1:
                raise InvalidArgument(f"{field}: expected a positive integer, got {value}")
        if not (math.isfinite(self.width) and self.width > 0):
            raise InvalidArgument(f"width: expected a positive channel multiplier, got {self.width}")
