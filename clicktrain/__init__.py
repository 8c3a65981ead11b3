"""ClickTrain: train a CNN once and end with a small, fast, pattern-pruned model.

The method is `ClickTrain`, usable in any training loop through the `Method` protocol; `PatternConv2d` is the
layer that it leaves behind. `clicktrain.data`, `clicktrain.deploy`, `clicktrain.models` and `clicktrain.kernels`
are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from clicktrain.algorithm import ClickTrain
from clicktrain.assignment import Assignment, assign
from clicktrain.conversion import convert, to_dense
from clicktrain.errors import ClickTrainError
from clicktrain.kernels.ops import pattern_conv2d
from clicktrain.layers import PatternConv2d
from clicktrain.method import Method, Phase
from clicktrain.patterns import PRUNED, Pattern, PatternPool, all_patterns, official_pool
from clicktrain.preparation import prepare, tune
from clicktrain.recording import record
from clicktrain.schedule import LRSchedule, Stages
from clicktrain.selection import Sparsity

__version__ = "0.1.0"
__all__ = [
    "PRUNED",
    "Assignment",
    "ClickTrain",
    "ClickTrainError",
    "LRSchedule",
    "Method",
    "Pattern",
    "PatternConv2d",
    "PatternPool",
    "Phase",
    "Sparsity",
    "Stages",
    "all_patterns",
    "assign",
    "convert",
    "official_pool",
    "pattern_conv2d",
    "prepare",
    "record",
    "to_dense",
    "tune",
]

_SUBPACKAGES = ("data", "deploy", "kernels", "models")


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
