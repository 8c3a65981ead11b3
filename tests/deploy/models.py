"""Pruned networks whose results depend on their input: what is compared is signal, not bias."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import clicktrain
from clicktrain import blocked, models
from clicktrain.assignment import assign


def pruned(name: str, *, width: float = 0.25, input_size: int = 32, keep: float = 0.4) -> nn.Module:
    """Return a network of the zoo with pattern convolutions, in evaluation mode."""
    torch.manual_seed(1)
    wide = {} if name.startswith("imagenet") else {"width": width}
    model = models.create(name, 10, input_size=input_size, **wide)
    prune(model, keep)
    return alive(model, torch.randn(6, 3, input_size, input_size))


def prune(model: nn.Module, keep: float = 0.4) -> None:
    """Prune all 3x3 convolutions but the first."""
    convolutions = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    pool = clicktrain.official_pool(4)
    kept = {name: max(conv.out_channels, int(keep * conv.weight[:, :, 0, 0].numel())) for name, conv in convolutions}
    clicktrain.convert(
        model, {name: assign(torch.rand_like(conv.weight), pool, kept[name]) for name, conv in convolutions[1:]}
    )


def alive(model: nn.Module, x: Tensor) -> nn.Module:
    """Draw normalisations at random and let their statistics be those of a batch, so that no activation fades."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    model.train()
    with torch.no_grad(), blocked.disabled():
        model(x)
    return model.eval()


def dense(model: nn.Module) -> nn.Module:
    """Return the same network as torch computes it, with zeros."""
    return clicktrain.to_dense(copy.deepcopy(model))


def error(got: Tensor, want: Tensor) -> float:
    """Return the norm-wise relative error."""
    assert got.shape == want.shape
    assert bool(torch.isfinite(got).all())
    return float((got - want).norm() / want.norm())
