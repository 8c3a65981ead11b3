"""Which memory format a network trains faster in."""

from __future__ import annotations

import copy
import statistics
import time

import torch
from torch import Tensor, nn

_ROUNDS = 3


def use_channels_last(model: nn.Module) -> nn.Module:
    """Change the memory format of all convolution weights, in place; activations follow the weights."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # not in the stubs


def faster_in_channels_last(model: nn.Module, x: Tensor) -> bool:
    """Return whether steps (forward and backward) are faster in channels_last than in the usual format.

    Both run on copies of the model, alternately, and their medians are compared after one round of warming
    up; the model, its gradients and torch's random state stay as they are.

    Parameters
    ----------
    model : nn.Module
        The network, on the device it will train on.
    x : Tensor, float32 (N, C, H, W)
        A batch of the size it will train with; its values do not matter.
    """
    with torch.random.fork_rng():
        plain = copy.deepcopy(model)
        last = use_channels_last(copy.deepcopy(model))
        rounds = [(_seconds(plain, x), _seconds(last, x)) for _ in range(1 + _ROUNDS)]
    plain_median, last_median = map(statistics.median, zip(*rounds[1:], strict=True))
    return bool(last_median < plain_median)


def _seconds(model: nn.Module, x: Tensor) -> float:
    """Return the time of one step; reading the loss waits for the device."""
    start = time.perf_counter()
    loss = model(x).float().square().mean()
    loss.backward()
    loss.item()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
