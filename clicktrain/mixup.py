"""Mixup: training on weighted pairs of images (Zhang et al., ICLR 2018, arXiv 1710.09412)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clicktrain.errors import InvalidArgument


def mixup(x: Tensor, y: Tensor, num_classes: int, alpha: float, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mix each image of a batch with another one.

    The cross-entropy with the mixed targets equals weight * CE(y) + (1 - weight) * CE(y[partner]).

    Parameters
    ----------
    x : Tensor, (N, ...) float
        Images.
    y : Tensor, (N,) int64
        Classes.
    num_classes : int
        Width of the targets.
    alpha : float
        The weight is drawn from Beta(alpha, alpha), one for the batch.
    key : tuple of int
        Names the batch: equal keys give equal draws, whatever happened before.

    Returns
    -------
    x : Tensor, (N, ...)
        Mixed images.
    y : Tensor, (N, num_classes)
        Class probabilities.
    """
    if alpha <= 0:
        raise InvalidArgument(f"alpha={alpha}: expected a positive Beta parameter")
    random = np.random.default_rng(key)
    weight = float(random.beta(alpha, alpha))
    partner = torch.from_numpy(random.permutation(len(x))).to(x.device)
    targets = F.one_hot(y, num_classes).to(x.dtype)
    return torch.lerp(x[partner], x, weight), torch.lerp(targets[partner], targets, weight)
