"""Settings of the released ClickTrain code: every configuration, active or left in its comments.

A configuration is addressed as ``official:NAME`` for the active one, ``official:NAME@ROW`` for another
row of the same file, where ROW is the compression ratio that the file states (``6.2x``), or ``active`` and
``commented`` where it states none. Leftovers of smoke tests in the released files (selection at epoch 2,
hard prune at epoch 4, 19 epochs) are replaced by the values commented beside them; for ``cifar100_vgg13``
these are the second comment above its active ratios.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from clicktrain.errors import ConfigError
from clicktrain.schedule import Stages

PREFIX = "official:"

_BLOCK = re.compile(r"(layer\d+\.\d+)\.")


@dataclass(frozen=True)
class Reported:
    """One result from the comments: best test top-1 over the run (percent), one run, seed unset."""

    lam: float
    top1: float
    select_at: int
    prune_at: int


@dataclass(frozen=True)
class OfficialConfig:
    """One configuration of the released code.

    Attributes
    ----------
    name, row : str
        Its address, ``official:NAME@ROW``.
    dataset, model : str
        Names of `clicktrain.data` and `clicktrain.models`.
    ratios : tuple of int
        Percent of kernels removed. VGG: one value for each convolution but the first. ResNet: one value for
        all convolutions of a residual block, see `by_layer`.
    lam : float
        Coefficient of the group lasso; where the comments of a row try several, the one with the best top-1.
    stages : Stages
        Epochs of selection (t_c) and hard prune (t_h), and of the whole run.
    milestones : tuple of int
        Epochs after which the learning rate falls to a tenth.
    patterns : int
        Size of the official pattern pool.
    batch_size : int
        Images per step.
    mixup_from_batch : int
        Batch of the first sparse epoch from which mixup is on, until the end of the run.
    reported : tuple of Reported
        Accuracies in the comments; empty where their author left them blank.
    lr, momentum, weight_decay, mixup_alpha
        The same in all configurations. Weight decay is on every parameter.
    """

    name: str
    row: str
    dataset: str
    model: str
    ratios: tuple[int, ...]
    lam: float
    stages: Stages
    milestones: tuple[int, ...]
    patterns: int = 4
    batch_size: int = 128
    mixup_from_batch: int = 0
    reported: tuple[Reported, ...] = ()
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    mixup_alpha: float = 0.3

    @property
    def address(self) -> str:
        """The text that `resolve` turns back into this configuration."""
        return f"{PREFIX}{self.name}@{self.row}"

    def options(self) -> dict[str, Any]:
        """Return the options with which `clicktrain.ClickTrain` does what the released code does.

        Kernels are ranked whole on one batch, the hard prune comes after the first step of its epoch, and
        mixup starts there.
        """
        return {
            "ratios": list(self.ratios),
            "pool": "official",
            "patterns": self.patterns,
            "rank_by": "kernel",
            "select_at": self.stages.select_at,
            "prune_at": self.stages.prune_at,
            "penalty_strength": self.lam,
            "batches": 1,
            "prune_after_step": True,
            "mixup_after_prune": self.mixup_alpha,
            "mixup_from": self.mixup_from_batch,
        }


def by_layer(ratios: Iterable[float], layers: Iterable[str]) -> dict[str, float]:
    """Give each layer its ratio, from one value a layer or one value a residual block.

    Parameters
    ----------
    ratios : iterable of float
        Percent of kernels removed.
    layers : iterable of str
        Names of the prunable layers in the order in which the model runs them. Layers whose names start with
        the same ``layerI.J`` form a residual block.

    Raises
    ------
    ConfigError
        If there are neither as many values as layers nor, in a residual network, as many as blocks.
    """
    ratios, layers = tuple(ratios), tuple(layers)
    if len(ratios) == len(layers):
        return dict(zip(layers, ratios, strict=True))
    blocks = defaultdict(list)
    for layer in layers:
        match = _BLOCK.match(layer)
        blocks[match[1] if match else layer].append(layer)
    if len(ratios) == len(blocks):
        return {layer: ratio for ratio, block in zip(ratios, blocks.values(), strict=True) for layer in block}
    by_block = f" or {len(blocks)} (one a residual block)" if len(blocks) < len(layers) else ""
    raise ConfigError(
        f"ratios: expected {len(layers)} values (one a prunable convolution){by_block}, got {len(ratios)}"
    )


def resolve(text: str) -> OfficialConfig:
    """Return the configuration with the address ``[official:]NAME[@ROW]``.

    Raises
    ------
    ConfigError
        If there is no such configuration; the message lists the known ones.
    """
    name, _, row = text.removeprefix(PREFIX).partition("@")
    if name not in OFFICIAL:
        close = difflib.get_close_matches(name, OFFICIAL, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"config: no official configuration {name!r}{hint}; known: {', '.join(OFFICIAL)}")
    if row in ("", "active"):
        return OFFICIAL[name]
    for config in ROWS:
        if config.name == name and config.row == row:
            return config
    known = ", ".join(config.row for config in ROWS if config.name == name)
    raise ConfigError(f"config: {PREFIX}{name} has no row {row!r}; known: {known}")


def _runs(select_at: int, prune_at: int, top1: dict[float, float]) -> tuple[Reported, ...]:
    return tuple(Reported(lam, accuracy, select_at, prune_at) for lam, accuracy in top1.items())


def _vgg11(dataset: str, row: str, ratios: str, lam: float, top1: dict[float, float]) -> OfficialConfig:
    return OfficialConfig(
        f"{dataset}_vgg11",
        row,
        dataset,
        "vgg11",
        _percents(ratios),
        lam,
        Stages(65, 143, 190),
        milestones=(55, 131),
        reported=_runs(65, 143, top1),
    )


def _vgg13(
    dataset: str, row: str, ratios: str, lam: float, at: tuple[int, int], reported: tuple[Reported, ...] = ()
) -> OfficialConfig:
    return OfficialConfig(
        f"{dataset}_vgg13",
        row,
        dataset,
        "vgg13",
        _percents(ratios),
        lam,
        Stages(*at, 190),
        milestones=(55, 131),
        mixup_from_batch=5,
        reported=reported,
    )


def _vgg16(dataset: str, row: str, ratios: str, lam: float, at: tuple[int, int], patterns: int) -> OfficialConfig:
    return OfficialConfig(
        f"{dataset}_vgg16",
        row,
        dataset,
        "vgg16",
        _percents(ratios),
        lam,
        Stages(*at, 190),
        milestones=(55, 131),
        patterns=patterns,
    )


def _resnet(model: str, row: str, ratios: str) -> OfficialConfig:
    return OfficialConfig(
        f"cifar10_{model}",
        row,
        "cifar10",
        model,
        _percents(ratios),
        2.5e-4,
        Stages(61, 141, 190),
        milestones=(55, 130),
    )


def _first(name: str) -> OfficialConfig:
    return next(config for config in ROWS if config.name == name)


def _percents(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split())


_VGG16_ACTIVE = "35 45 55 55 55 65 65 65 75 80 85 85"
_VGG16_COMMENTED = "35 45 45 45 45 45 45 55 55 65 75 75"

# The first row of each name is the active one. Wider gaps in the ratios of a ResNet separate its stages.
ROWS: tuple[OfficialConfig, ...] = (
    _vgg11("cifar10", "10.3x", "35 45 65 75 80 80 85", 3.5e-4, {3.5e-4: 91.69, 2.5e-4: 91.46}),
    _vgg11("cifar10", "5.85x", "35 45 45 55 55 65 75", 2.5e-4, {2.5e-4: 92.14}),
    _vgg11(
        "cifar10", "8.7x", "45 55 55 65 65 85 85", 3.5e-4,
        {2.5e-4: 91.7, 3.5e-4: 92.09, 4.5e-4: 92.0, 5.5e-4: 91.77},
    ),
    _vgg11(
        "cifar10", "11.5x", "45 65 66 75 78 85 88", 2.5e-4,
        {4.5e-4: 91.31, 3.5e-4: 91.54, 2.5e-4: 91.58, 1.5e-4: 91.50},
    ),
    _vgg13(
        "cifar10", "9.0x", "40 50 55 60 65 70 75 75 85", 6.5e-4, (60, 148),
        _runs(60, 148, {4.5e-4: 93.27, 5.5e-4: 93.31, 6.5e-4: 93.52, 7.5e-4: 93.19}),
    ),
    _vgg13(
        "cifar10", "4x", "16 26 35 35 36 45 46 46 46", 6.5e-4, (64, 149),
        _runs(64, 149, {6.5e-4: 93.7}) + _runs(60, 148, {7.5e-4: 93.68}),
    ),
    _vgg13(
        "cifar10", "6.2x", "25 45 55 55 55 65 65 65 65", 7.5e-4, (60, 148),
        _runs(60, 148, {5.5e-4: 93.36, 6.5e-4: 93.48, 7.5e-4: 93.7}),
    ),
    _vgg16("cifar10", "active", _VGG16_ACTIVE, 1.5e-4, (150, 163), patterns=12),
    _vgg16("cifar10", "commented", _VGG16_COMMENTED, 1.5e-4, (150, 163), patterns=12),
    _resnet("resnet32", "8.6x", "55 55 55  65 65 65 65  65 75 75 75 75  75 75 75"),
    _resnet("resnet32", "13.9x", "65 65 65  75 75 75 75  75 85 85 85 85  85 85 85"),
    _resnet("resnet50", "active", "65 65 75  75 75 80 80  80 85 85 90 90 90  90 90 90"),
    _resnet("resnet50", "8.35x", "55 55 55  65 65 65 75  75 80 80 85 85 85  85 85 85"),
    _vgg11("cifar100", "8.4x", "40 55 60 65 70 75 85", 7.5e-4, {7.5e-4: 69.6}),
    _vgg11("cifar100", "5.85x", "35 45 45 55 55 65 75", 8.5e-4, {8.5e-4: 70.78, 7.5e-4: 70.07}),
    _vgg11(
        "cifar100", "7.9x", "45 55 55 65 65 75 85", 1.2e-3,
        {8.5e-4: 69.47, 9.5e-4: 69.57, 1.2e-3: 69.91, 1.5e-3: 69.19},
    ),
    _vgg11(
        "cifar100", "10.3x", "45 55 65 75 75 80 88", 1.2e-3,
        {1.2e-3: 69.44, 2.2e-3: 68.99, 9.5e-4: 69.42, 8.5e-4: 69.28},
    ),
    _vgg13("cifar100", "4.3x", "15 30 35 35 40 45 45 50 55", 8.5e-4, (60, 146)),
    _vgg13(
        "cifar100", "6.2x", "25 45 55 55 55 65 65 65 65", 2.5e-4, (60, 148),
        _runs(60, 148, {6.5e-4: 72.76, 9.5e-4: 72.65, 1.5e-4: 72.44, 2.5e-4: 73.35})
        + _runs(60, 146, {7.5e-4: 72.86}),
    ),
    _vgg13(
        "cifar100", "8.5x", "35 55 65 65 65 75 75 75 75", 7.5e-4, (60, 146),
        _runs(65, 143, {5.5e-4: 72.0, 6.5e-4: 72.01, 9.5e-4: 72.0})
        + _runs(60, 152, {7.5e-4: 71.9}) + _runs(60, 146, {7.5e-4: 72.7}),
    ),
    _vgg16("cifar100", "active", _VGG16_ACTIVE, 8e-4, (54, 149), patterns=4),
    _vgg16("cifar100", "commented", _VGG16_COMMENTED, 8e-4, (54, 149), patterns=4),
    OfficialConfig(
        "imagenet_resnet50", "active", "imagenet", "imagenet_resnet50",
        _percents("25 25 25  25 25 25 35  35 35 45 45 45 45  55 55 55"),
        2.5e-4, Stages(35, 78, 95), milestones=(31, 61, 75), batch_size=256,
    ),
)  # fmt: skip
"""Every row of every configuration file."""

OFFICIAL = MappingProxyType({config.name: config for config in ROWS if config is _first(config.name)})
"""Name -> active configuration."""
