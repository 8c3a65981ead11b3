"""What a run is made of, built from its configuration: data, splits, network and method."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain import data, models
from clicktrain.config import RunConfig, TrainConfig
from clicktrain.data import DataSet, Loader, Split
from clicktrain.errors import ClickTrainError, ConfigError, InvalidArgument
from clicktrain.method import Method, Phase
from clicktrain.training.seeding import seed_torch

METHODS = {"clicktrain": "clicktrain.algorithm:ClickTrain", "dense": "baselines.dense:Dense"}
"""Short names of methods; ``module:Class`` reaches all others."""

_EVAL_BATCH = 250


@dataclass(frozen=True)
class Session:
    """The parts of a run before its first step.

    Parameters
    ----------
    config : RunConfig
    seed : int
    device : torch.device
    data : DataSet
    train, test : Split
        Training images without the held-out ones, and test images.
    validation : Split or None
        Held-out training images; None where ``data.validation`` is 0.
    model : nn.Module
        The dense network, initialised from the seed alone, on `device`.
    method : Method
        Not set up yet.
    """

    config: RunConfig
    seed: int
    device: torch.device
    data: DataSet
    train: Split
    validation: Split | None
    test: Split
    model: nn.Module
    method: Method

    def example_input(self, batch_size: int = 1) -> Tensor:
        """Return black images (N, C, H, W) on the device of the run."""
        return torch.zeros(batch_size, *self.data.image_shape, device=self.device)

    def train_loader(self, phase: Phase) -> Loader:
        """Return the batches of a phase, shuffled and augmented as functions of the seed and the epoch."""
        augment = self.config.train.augment
        return self._loader(
            self.train,
            phase.batch_size or self.config.train.batch_size,
            train=True,
            augment=self.data.augmentation if augment == "auto" else augment,
        )

    def eval_batches(self, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over a split once, in order and without augmentation."""
        return iter(self.eval_loader(split))

    def eval_loader(self, split: Split) -> Loader:
        """Return the batches of `eval_batches`."""
        return self._loader(split, _EVAL_BATCH, train=False)

    @property
    def eval_splits(self) -> list[Split]:
        """Return the splits that are evaluated."""
        return [split for split in (self.validation, self.test) if split is not None]

    def _loader(self, split: Split, batch_size: int, *, train: bool, augment: str = "none") -> Loader:
        return Loader(
            split,
            batch_size,
            train=train,
            seed=self.seed,
            mean=self.data.mean,
            std=self.data.std,
            augment=augment,
            device=self.device,
            shared=train,
        )


def build(config: RunConfig, seed: int) -> Session:
    """Load the data and build the network and the method of a run.

    Parameters
    ----------
    config : RunConfig
    seed : int
        Decides initialisation, order, augmentation, mixup and dropout, each through a stream of its own: runs
        of different methods with equal seeds begin with equal weights and see equal batches.

    Raises
    ------
    ClickTrainError
        A name is unknown, a value cannot work, or data are missing; the message names it.
    """
    if seed < 0:
        raise InvalidArgument(f"seed={seed}: expected at least 0")
    device = choose_device(config.train)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    method = build_method(config)
    dataset = data.load(
        config.data.name,
        config.data.root,
        train_limit=config.data.train_limit,
        image_size=config.data.image_size,
    )
    train, validation = dataset.train, None
    if config.data.validation:
        train, validation = dataset.split_validation(config.data.validation, config.data.split_seed)
    channels, size, _ = dataset.image_shape
    seed_torch("initialisation", seed)
    model = models.create(
        config.model.name,
        dataset.num_classes,
        width=config.model.width,
        in_channels=channels,
        input_size=size,
    )
    return Session(
        config=config,
        seed=seed,
        device=device,
        data=dataset,
        train=train.to(device),
        validation=None if validation is None else validation.to(device),
        test=dataset.test.to(device),
        model=model.to(device),
        method=method,
    )


def build_method(config: RunConfig) -> Method:
    """Return the method that ``method.name`` calls for.

    Raises
    ------
    ConfigError
        There is no such module or class, it is no `Method`, or it refuses its options.
    """
    name = config.method.name
    module_name, colon, class_name = METHODS.get(name, name).partition(":")
    if not colon:
        raise ConfigError(f"method.name = {name!r}: expected {', '.join(METHODS)} or module:Class")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"method.name = {name!r}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(f"method.name = {name!r}: {class_name} is no clicktrain.Method")
    _check_options(found, config.method.options)
    try:
        return found.from_config(config)
    except ClickTrainError:
        raise
    except (TypeError, ValueError) as error:  # an option of a type the method did not think of
        raise ConfigError(f"method.options of {name}: {error}") from error


def _check_options(method: type[Method], options: dict[str, Any]) -> None:
    """Refuse options that the constructor does not know."""
    parameters = inspect.signature(method).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [name for name in parameters if name != "epochs"]
    for key in options:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known) or 'none'}"
            raise ConfigError(f"unknown key {key!r} in [method.options] of {method.name}: {hint}")


def choose_device(train: TrainConfig) -> torch.device:
    """Return the device that ``train.device`` means here.

    Raises
    ------
    ConfigError
        The device does not exist here, or cannot do what ``train.amp`` asks.
    """
    name = train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch built without CUDA asserts
        raise ConfigError(f"train.device = {train.device!r} is not available here") from None
    if train.amp == "fp16" and device.type != "cuda":
        raise ConfigError(f'train.amp = "fp16" needs a CUDA device, not {name}: use "bf16"')
    return device
