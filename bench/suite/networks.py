"""VGG-13 at the official 9.0x, dense and pruned, and one training step of it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import clicktrain

from .optional import need
from .workloads import VGG13_RATIOS

CLASSES, LEARNING_RATE = 10, 0.01


@dataclass(frozen=True)
class Setting:
    """What is trained.

    Attributes
    ----------
    width : float
        Multiplier of VGG-13's channels.
    batch : int
        Images in a step.
    """

    width: float = 1.0
    batch: int = 64

    def model(self) -> tuple[nn.Module, dict[str, clicktrain.Assignment]]:
        """Return the dense network, always of the same weights, and how it is pruned."""
        torch.manual_seed(0)
        model = need("clicktrain.models").create("vgg13", CLASSES, width=self.width)
        for module in model.modules():
            # With the released code's tiny initial weights here, logits are zero to six digits at first, and losses
            # would agree whatever the convolutions compute.
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        convs = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)][1:]
        pairs = zip(convs, VGG13_RATIOS, strict=True)
        return model, {name: without_kernels(conv, percent) for (name, conv), percent in pairs}

    def sparse(self, backend: str) -> nn.Module:
        """Return the pruned network, on a backend."""
        model, assignments = self.model()
        clicktrain.convert(model, assignments, backend=backend)
        if hasattr(clicktrain, "prepare"):  # before there was one, kernels were compiled on first use
            clicktrain.prepare(model, [(self.batch, 3, 32, 32)], backend=backend)
        return model

    def images(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return a batch: noise, brighter or darker by class."""
        random = torch.Generator().manual_seed(seed)
        y = torch.randint(0, CLASSES, (self.batch,), generator=random)
        x = torch.randn(self.batch, 3, 32, 32, generator=random)
        return x + (y.view(-1, 1, 1, 1) - CLASSES / 2) / CLASSES, y


def without_kernels(conv: nn.Conv2d, percent: int) -> clicktrain.Assignment:
    """Return random patterns of the official pool, and a percentage of the kernels removed at random."""
    kernels = conv.out_channels * conv.in_channels
    index = torch.randint(0, 4, (kernels,), dtype=torch.uint8)
    index[torch.randperm(kernels)[: math.ceil(kernels * percent / 100)]] = clicktrain.PRUNED
    return clicktrain.Assignment(index.view(conv.out_channels, conv.in_channels), clicktrain.official_pool(4))


class Step:
    """A training step as users take it: forward, loss, backward, SGD with momentum and weight decay."""

    def __init__(self, model: nn.Module, compiled: bool = False) -> None:
        self.model = model
        self._optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
        self._forward = torch.compile(model) if compiled else model

    def __call__(self, x: Tensor, y: Tensor) -> float:
        """Do one step; returns its loss."""
        loss = F.cross_entropy(self._forward(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()

    def take_state(self, other: Step) -> None:
        """Go on from where another step of the same network is."""
        self.model.load_state_dict(other.model.state_dict())
        self._optimizer.load_state_dict(copy.deepcopy(other._optimizer.state_dict()))

    def weights(self) -> Tensor:
        """Return all parameters as one vector."""
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])
