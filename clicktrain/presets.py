"""Start values of a run configuration, by name."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from clicktrain import official
from clicktrain.errors import ConfigError
from clicktrain.official import OfficialConfig

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "data": {"name": "fashion-mnist-small"},
        "model": {"name": "vgg13", "width": 0.25},
        "train": {"epochs": 10, "batch_size": 64, "augment": "none"},
        "method": {"name": "clicktrain", "options": {"target_compression": 6.0}},
    },
}
"""Named presets besides the official ones; ``quick`` needs no download and takes minutes on two cores."""


def resolve(name: str) -> dict[str, Any]:
    """Return the values of a preset, as `RunConfig.from_dict` takes them.

    Parameters
    ----------
    name : str
        A key of `PRESETS`, or ``official:NAME[@ROW]`` for settings of the released code to the letter: its
        schedule, its mixup, and its use of the test set as the only validation set.

    Raises
    ------
    ConfigError
        There is no such preset.
    """
    if name.startswith(official.PREFIX):
        return _official(official.resolve(name))
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(PRESETS)} or {official.PREFIX}NAME"
        raise ConfigError(f"preset = {name!r}: {hint}")
    return PRESETS[name]


def _official(config: OfficialConfig) -> dict[str, Any]:
    return {
        "data": {"name": config.dataset, "validation": 0.0, "eval_on": "test"},
        "model": {"name": config.model},
        "train": {
            "epochs": config.stages.epochs,
            "batch_size": config.batch_size,
            "lr": config.lr,
            "momentum": config.momentum,
            "weight_decay": config.weight_decay,
            "schedule": {"kind": "multistep", "milestones": list(config.milestones), "gamma": 0.1},
        },
        "method": {"name": "clicktrain", "options": config.options()},
    }
