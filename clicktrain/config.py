"""The configuration of a run: four sections of typed, validated fields, and one identity over all of them.

A file holds any subset of the fields; the rest take the defaults below, or the values of a preset::

    preset = "official:cifar10_vgg13"   # optional start values, see clicktrain.presets

    [train]
    epochs = 60

    [method.options]
    target_compression = 9.0
"""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from clicktrain import presets, toml
from clicktrain.errors import ConfigError
from clicktrain.schedule import LRSchedule

SCHEMA_VERSION = 1
"""Part of every `config_id`: raised whenever a field changes its meaning."""


class Section(BaseModel):
    """A group of fields: immutable, strictly typed, without unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DataConfig(Section):
    """What is trained on, and which split chooses the best epoch."""

    name: str = "fashion-mnist-small"
    """Data set: a name of `clicktrain.data`, or ``imagefolder:PATH``."""
    root: str | None = None
    """Directory that holds the data set; unset: the data set's own default."""
    train_limit: int | None = Field(default=None, gt=0)
    """Use only this many training images (class-balanced); unset: all."""
    image_size: int | None = Field(default=None, gt=0)
    """Height and width in pixels; unset: the data set's own."""
    validation: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the training images held out for validation."""
    split_seed: int = 0
    """Seed of the held-out split; apart from the run's seed, so that all runs validate on the same images."""
    eval_on: Literal["validation", "test"] = "validation"
    """Split that chooses the best epoch. ``test`` is what the official code does: optimistic."""

    @model_validator(mode="after")
    def _check_selection(self) -> Self:
        if self.eval_on == "validation" and self.validation == 0:
            raise ValueError('data.validation = 0 leaves nothing to choose the best epoch on: set eval_on = "test"')
        return self


class ModelConfig(Section):
    """The network."""

    name: str = "vgg13"
    """A name of `clicktrain.models.names()`."""
    width: float = Field(default=1.0, gt=0)
    """Multiplier of all channel counts."""


class ScheduleConfig(Section):
    """How the learning rate moves; see `clicktrain.LRSchedule`."""

    kind: Literal["constant", "multistep", "cosine", "onecycle"] = "cosine"
    """``multistep`` changes between epochs, ``cosine`` and ``onecycle`` with every step."""
    milestones: tuple[int, ...] = Field(default=(), strict=False)
    """Epochs from which the rate is multiplied by `gamma` once more (``multistep`` only)."""
    gamma: float = Field(default=0.1, gt=0)
    """Factor at each milestone."""
    warmup: float = Field(default=0.0, ge=0)
    """Epochs of linear increase at the start."""

    @model_validator(mode="after")
    def _check_milestones(self) -> Self:
        if self.milestones and self.kind != "multistep":
            raise ValueError(f'milestones need kind = "multistep", not "{self.kind}"')
        if any(later <= earlier for earlier, later in zip((0, *self.milestones), self.milestones, strict=False)):
            raise ValueError(f"milestones must be positive and increasing, not {list(self.milestones)}")
        return self

    def build(self) -> LRSchedule:
        """Return the schedule these fields describe."""
        return LRSchedule(**self.model_dump())


class TrainConfig(Section):
    """Optimisation, numerics and what is written while training."""

    epochs: int = Field(default=10, gt=0)
    """Passes over the training images that a one-phase method makes."""
    batch_size: int = Field(default=128, gt=0)
    """Images per step; the last step of an epoch takes what is left."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimizer of every phase that names none."""
    lr: float = Field(default=0.1, gt=0)
    """Base learning rate, before the schedule."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD, first-moment decay of Adam."""
    nesterov: bool = False
    """Nesterov momentum (SGD)."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """L2 penalty on every parameter, batch norm and biases included."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Course of the learning rate."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target spread evenly over all classes."""
    mixup: float = Field(default=0.0, ge=0)
    """Alpha of mixup's Beta(alpha, alpha), from the first step on; 0: off."""
    clip_norm: float = Field(default=0.0, ge=0)
    """Largest norm of the whole gradient; 0: unlimited."""
    amp: Literal["none", "bf16", "fp16"] = "none"
    """Autocast type; ``fp16`` scales the loss and needs a CUDA device."""
    augment: str = "auto"
    """Augmentation of training images; ``auto``: the data set's own, or a name of `clicktrain.data`."""
    channels_last: Literal["auto", "on", "off"] = "auto"
    """Memory format; ``auto`` times both before the first step and keeps the faster."""
    eval_every: int = Field(default=1, gt=0)
    """Epochs between evaluations; the last epoch is always evaluated."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Steps between checkpoints within an epoch; 0: at the end of each epoch only."""
    keep: int = Field(default=2, gt=0)
    """Checkpoints kept."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0: as many as torch chooses."""
    device: str = "auto"
    """``cpu``, ``cuda``, ``cuda:1``...; ``auto``: CUDA where it is available."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the package tensorboard)."""

    @model_validator(mode="after")
    def _check_nesterov(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov = true needs a momentum above 0")
        return self


class MethodConfig(Section):
    """What prunes the network, if anything."""

    name: str = "clicktrain"
    """``clicktrain``, ``dense``, or any `Method` as ``module:Class``."""
    options: dict[str, Any] = {}
    """Arguments of the method, checked by the method itself."""

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        return tomllib.loads(toml.dumps(options))  # as a file would give it back, so that both compare equal


class RunConfig(Section):
    """Everything that decides the outcome of a run, except its seed."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    method: MethodConfig = MethodConfig()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "configuration") -> RunConfig:
        """Build a configuration from nested values, on top of a preset where the key ``preset`` names one.

        Parameters
        ----------
        values : mapping
            Sections and their fields, as a TOML file holds them.
        source : str
            What error messages call the origin of `values`.

        Raises
        ------
        ConfigError
            A key is unknown or its value cannot work; the message names it with its section.
        """
        values = dict(values)
        preset = values.pop("preset", None)
        if preset is not None:
            values = merge(presets.resolve(preset), values)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(f"{source}: {_explain(error.errors()[0])}") from None

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> RunConfig:
        """Read a configuration file.

        Raises
        ------
        ConfigError
            The file cannot be read, is not TOML, or `from_dict` refuses what it holds.
        """
        return cls.from_dict(read_toml(path), str(path))

    def to_toml(self) -> str:
        """Return all fields as TOML; fields that are unset (``None``) are left out."""
        return toml.dumps(self.model_dump())

    def config_id(self) -> str:
        """Return the SHA-256 over all fields, defaults included, and the schema version (64 hex digits).

        The seed is no part of a configuration: runs that repeat one with other seeds share their id.
        """
        fields = {"schema": SCHEMA_VERSION, **self.model_dump()}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def first_difference(self, other: RunConfig) -> str | None:
        """Return ``"section.key = mine, not theirs"`` for the first field that differs, or None."""
        mine, theirs = _flatten(self.model_dump()), _flatten(other.model_dump())
        for key in [*mine, *(key for key in theirs if key not in mine)]:
            if mine.get(key) != theirs.get(key):
                return f"{key} = {mine.get(key)!r}, not {theirs.get(key)!r}"
        return None


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the values of a TOML file, unchecked.

    Raises
    ------
    ConfigError
        The file cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except ValueError as error:  # malformed TOML and text that is not UTF-8
        raise ConfigError(f"{path}: not a TOML file: {error}") from None


def parse_assignment(text: str) -> dict[str, Any]:
    """Turn ``"train.epochs=3"`` into ``{"train": {"epochs": 3}}``.

    The value is read as TOML; what is no TOML value is a string, so that names need no quotes.

    Raises
    ------
    ConfigError
        There is no ``=``, or no section before the key.
    """
    path, equals, value = text.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or len(keys) < 2 or not all(keys):
        raise ConfigError(f"{text!r} is not of the form section.key=value, as in train.epochs=3")
    try:
        nested: Any = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        nested = value.strip()
    for key in reversed(keys):
        nested = {key: nested}
    return dict(nested)


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `override` in place of its own, section by section.

    Options belong to one method: where `override` names another one, the options of `base` are dropped.
    """
    merged = dict(base)
    if "name" in override and "options" in merged and override["name"] != merged.get("name"):
        del merged["options"]
    for key, value in override.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _explain(error: ErrorDetails) -> str:
    """Return one line for one error of pydantic's."""
    location = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        return _unknown_key(location)
    reason = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":  # one of the checks above, on a section as a whole
        return f"[{'.'.join(location)}] {reason}" if location else reason
    return f"{'.'.join(location)} = {error['input']!r}: {reason[:1].lower()}{reason[1:]}"


def _unknown_key(location: list[str]) -> str:
    """Say where an unknown key stands and which known one it resembles."""
    *path, key = location
    section: type[BaseModel] = RunConfig
    for part in path:
        section = section.model_fields[part].annotation  # type: ignore[assignment]  # always a Section here
    near = get_close_matches(key, section.model_fields, n=1)
    if not path:
        hint = near[0] if near else f"one of {', '.join(RunConfig.model_fields)}, preset"
        return f"unknown section [{key}]: did you mean {hint}?"
    if elsewhere := _sections_with(key):
        hint = f"it belongs in [{elsewhere[0]}]"
    elif near:
        hint = f"did you mean {near[0]}?"
    else:
        hint = f"known are {', '.join(section.model_fields)}"
    return f"unknown key {key!r} in [{'.'.join(path)}]: {hint}"


def _sections_with(key: str) -> list[str]:
    return [name for name, value in RunConfig() if key in type(value).model_fields]
