"""A data set, a network and methods so small that a whole run takes milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clicktrain.config import RunConfig
from clicktrain.data import ArraySplit, DataSet
from clicktrain.errors import InvalidArgument
from clicktrain.method import Method, Phase
from clicktrain.schedule import LRSchedule

CLASSES = 3
TRAIN_IMAGES = 30
BATCH = 5

DENSE = "tests.helpers.toy:Plain"
TWO_PHASES = "tests.helpers.toy:Rewriter"

OPTIONS = {"target_compression": 2.5, "select_at": 1, "prune_at": 2, "batches": 2, "backend": "reference"}
"""Of a ClickTrain run: epoch 0 dense, epoch 1 regularised, epoch 2 sparse; nothing to be compiled."""


def config(method: str = DENSE, options: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    """Return a run of 3 epochs of 5 steps (24 training images of 30), checkpointed every 2 steps."""
    return RunConfig.from_dict(
        {
            "data": {"name": "toy", "validation": 0.2},
            "model": {"name": "toy"},
            "train": {
                "epochs": 3,
                "batch_size": BATCH,
                "lr": 0.05,
                "channels_last": "off",
                "checkpoint_every": 2,
                "threads": 1,
                "device": "cpu",
                **train,
            },
            "method": {"name": method, "options": options or {}},
        }
    )


def clicktrain_config(**train: Any) -> RunConfig:
    """Return a ClickTrain run of `OPTIONS`."""
    return config("clicktrain", OPTIONS, **train)


def load_data(name: str, *_: object, **__: object) -> DataSet:
    """Stand in for `clicktrain.data.load`: noisy 8x8 images, their class in the brightness."""
    if name != "toy":
        raise InvalidArgument(f"unknown data set {name!r}: expected toy")
    generator = torch.Generator().manual_seed(7)

    def split(count: int) -> ArraySplit:
        labels = torch.arange(count) % CLASSES
        noise = torch.randint(0, 120, (count, 1, 8, 8), generator=generator)
        return ArraySplit((noise + 60 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)

    classes = tuple("abc")
    return DataSet("toy", classes, split(TRAIN_IMAGES), split(12), mean=(0.5,), std=(0.25,))


def create_model(name: str, num_classes: int, **_: object) -> nn.Module:
    """Stand in for `clicktrain.models.create`."""
    if name != "toy":
        raise InvalidArgument(f"model: unknown name {name!r}; known: toy")
    return ToyNet(num_classes)


class ToyNet(nn.Sequential):
    """Three convolutions with everything that has state: batch norm, dropout, biases."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, num_classes),
        )


class Plain(Method):
    """Dense training."""

    name = "plain"

    def __init__(self, epochs: int = 3) -> None:
        self.epochs = epochs

    @property
    def phases(self) -> Sequence[Phase]:
        return [Phase("dense", self.epochs)]


class Rewriter(Plain):
    """A phase of the run's own, then one with Adam, for which the parameter groups are reordered and split.

    It also draws from torch's global generator in every step and takes noise from it at each epoch.
    """

    name = "rewriter"

    def __init__(self, epochs: int = 3) -> None:
        super().__init__(epochs)
        self.calls: list[str] = []
        self.noise = torch.zeros(3)

    @property
    def phases(self) -> Sequence[Phase]:
        schedule = LRSchedule("multistep", milestones=(1,))
        return [
            Phase("first", self.epochs - 2),
            Phase("skipped", 0),
            Phase("second", 2, lr=0.01, schedule=schedule, weight_decay=0.0, batch_size=12, optimizer="adam"),
        ]

    @property
    def stage(self) -> str:
        return "late" if self.calls and self.calls[-1] == "begin_phase 2" else "early"

    def begin_phase(self, index: int, optimizer: Optimizer) -> None:
        super().begin_phase(index, optimizer)
        self.calls.append(f"begin_phase {index}")
        (group,) = optimizer.param_groups
        last = group["params"].pop()
        group["params"].reverse()
        optimizer.add_param_group({"params": [last], "weight_decay": 0.1})

    def on_epoch(self, epoch: int, loader: Any) -> None:
        self.noise = self.noise + torch.rand(3)

    def penalty(self) -> Tensor:
        first, *_ = self.model.parameters()
        return 1e-3 * (first * self.noise[0]).square().sum()

    def after_step(self) -> None:
        torch.rand(1)

    def state_dict(self) -> dict[str, Any]:
        return {"calls": list(self.calls), "noise": self.noise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls, self.noise = list(state["calls"]), state["noise"]


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    """Return a metrics record without what no two runs share."""
    return {key: value for key, value in record.items() if not key.endswith("seconds")}
