"""How much each weight matters: scores of the same shape as the weight, never negative."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clicktrain import distributed
from clicktrain.errors import InvalidArgument

Score = Literal["taylor", "magnitude"]
Criterion = Callable[[Tensor, Tensor], Tensor]


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return (w * g)**2: the squared first-order change of the loss when the weight is removed."""
    return (weight * gradient).square()


def magnitude(weight: Tensor) -> Tensor:
    """Return w**2, so that the score of a kernel is its squared norm."""
    return weight.square()


def measure(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batches: Iterable[tuple[Tensor, Tensor]] = (),
    score: Score = "taylor",
    criterion: Criterion = F.cross_entropy,
) -> dict[str, Tensor]:
    """Score the weights of some layers.

    The model runs in training mode as in an ordinary step, but weights, gradients, BatchNorm statistics and
    random states are left as they were. Taylor scores are the mean over batches of (w * g_batch)**2, with g
    the gradient of the criterion alone, no penalty. Where several processes train together, each measures on
    its share of a batch, and the gradients are averaged before they are squared.

    Parameters
    ----------
    model : nn.Module
        The model that `weights` belong to.
    weights : mapping of str to Tensor
        Layer name -> weight, (C_out, C_in, k, k).
    batches : iterable of (x, y)
        At least one for "taylor"; not used by "magnitude".
    score : {"taylor", "magnitude"}
        Which score.
    criterion : callable
        (logits, y) -> scalar.

    Returns
    -------
    dict of str to Tensor
        Layer name -> scores of the weight's shape.
    """
    if score == "magnitude":
        return {name: magnitude(weight.detach()) for name, weight in weights.items()}
    if score != "taylor":
        raise InvalidArgument(f"score={score!r}: expected 'taylor' or 'magnitude'")
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    count = 0
    with _left_as_found(model):
        for x, y in batches:
            loss = criterion(model(x), y)
            own = torch.autograd.grad(loss, list(weights.values()))
            gradients = distributed.averaged(own, len(x))
            for total, weight, gradient in zip(totals.values(), weights.values(), gradients, strict=True):
                total += taylor(weight.detach(), gradient)
            count += 1
    if count == 0:
        raise InvalidArgument("batches: measuring Taylor importance needs at least one batch")
    return {name: total / count for name, total in totals.items()}


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Run in training mode and put mode, buffers and random state back afterwards."""
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            model.train()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers.items():
                buffer.copy_(before)
