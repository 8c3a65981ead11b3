"""VGG-13 on Fashion-MNIST: the sparse stage with sparse kernels against masked dense convolutions, paired by seed."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import clicktrain
from clicktrain import data, models

BATCH = 128
RATE, MOMENTUM, DECAY = 0.1, 0.9, 5e-4
DROPS = (55 / 190, 131 / 190)
"""Fractions of the run at which the released code divides the learning rate by ten."""


class MaskedDense(clicktrain.ClickTrain):
    """ClickTrain whose last stage computes dense and zeroes what is pruned after each step, as the released code."""

    name = "masked dense"

    def _prune(self) -> None:
        self._kept = [(self._convs[name].weight, layer.kept.mask()) for name, layer in self.selection.items()]
        self._groups, self._pruned = [], True
        self._mask()

    def after_step(self) -> None:
        """Zero what is pruned."""
        super().after_step()
        if self._pruned:
            self._mask()

    @torch.no_grad()
    def _mask(self) -> None:
        for weight, mask in self._kept:
            weight.mul_(mask)


METHODS = {"sparse": clicktrain.ClickTrain, "masked dense": MaskedDense, "masked dense, TF32": MaskedDense}
PAIRED = ("sparse", "masked dense")
"""Methods that are compared seed by seed, in float32; that with TF32, torch's default, is a yardstick."""


@dataclass(frozen=True)
class Trained:
    """A run.

    Attributes
    ----------
    accuracy : float
        Fraction of the test images in [0, 1] after the last epoch.
    step_ms : dict
        Stage -> median milliseconds of a step.
    seconds : dict
        Stage -> seconds in all.
    """

    method: str
    seed: int
    epochs: int
    accuracy: float
    step_ms: dict[str, float]
    seconds: dict[str, float]


def train(
    method_name: str,
    seed: int,
    epochs: int,
    root: Path | None,
    device: str = "cuda",
    train_limit: int | None = None,
    width: float = 1.0,
) -> Trained:
    """Train once; Fashion-MNIST from `root` where given, else the embedded part of it."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=method_name.endswith("TF32")):
        return _train(method_name, seed, epochs, root, device, train_limit, width)


def _train(
    method_name: str, seed: int, epochs: int, root: Path | None, device: str, train_limit: int | None, width: float
) -> Trained:
    torch.manual_seed(seed)
    dataset = data.load("fashion-mnist" if root else "fashion-mnist-small", root, train_limit=train_limit)
    loaders = {
        train: data.Loader(
            dataset.train if train else dataset.test, BATCH, train=train, mean=dataset.mean, std=dataset.std,
            seed=seed, augment=dataset.augmentation if train else "none", device=device, drop_last=train,
        )
        for train in (True, False)
    }  # fmt: skip
    model = models.create("vgg13", dataset.num_classes, width=width, in_channels=dataset.image_shape[0]).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    computes = "cuda" if device == "cuda" else "auto"
    method = METHODS[method_name](8.0, epochs, pool=clicktrain.official_pool(4), backend=computes)
    method.seed, method.lr_at = seed, lambda position: RATE * 0.1 ** sum(position >= drop * epochs for drop in DROPS)
    method.setup(model, optimizer, next(iter(loaders[True]))[0])
    durations: dict[str, list[float]] = defaultdict(list)
    recorded = Recorded(model, (BATCH, *dataset.image_shape)) if device == "cuda" else None
    for epoch in range(epochs):
        loaders[True].set_epoch(epoch)
        method.on_epoch(epoch, loaders[True])
        forward = recorded.of_stage(method.stage) if recorded else model
        for group in optimizer.param_groups:
            group["lr"] = method.lr_at(epoch)
        for x, y in loaders[True]:
            _synchronize(device)
            start = time.perf_counter()
            _step(method, forward, optimizer, x, y)
            _synchronize(device)
            durations[method.stage].append((time.perf_counter() - start) * 1e3)
    accuracy = evaluate(method.finish(), loaders[False])
    medians = {stage: float(torch.tensor(times).median()) for stage, times in durations.items()}
    return Trained(method_name, seed, epochs, accuracy, medians, {s: sum(t) / 1e3 for s, t in durations.items()})


class Recorded:
    """A model's passes as CUDA graphs, recorded once for each stage, for every method alike."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        self._model, self._shape = model, shape
        self._stage: str | None = None
        self._graphs: nn.Module = model

    def of_stage(self, stage: str) -> nn.Module:
        """Return what replays the graphs; they are recorded, and kernels chosen before, if a new stage begins."""
        if stage != self._stage:
            clicktrain.tune(self._model, self._shape)
            self._graphs = clicktrain.record(self._model, torch.zeros(self._shape, device="cuda"))
            self._stage = stage
        return self._graphs


@torch.no_grad()
def evaluate(model: nn.Module, loader: data.Loader) -> float:
    """Return the fraction of images that are recognised."""
    model.eval()
    right = [(model(x).argmax(1) == y).sum() for x, y in loader]
    model.train()
    return float(torch.stack(right).sum()) / len(loader.split)


def _step(
    method: clicktrain.ClickTrain, forward: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> None:
    x, y = method.prepare_batch(x, y)
    method.before_forward()
    loss = F.cross_entropy(forward(x), y) + method.penalty()
    loss.backward()  # type: ignore[no-untyped-call]
    method.after_backward()
    optimizer.step()
    optimizer.zero_grad()
    method.after_step()


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
