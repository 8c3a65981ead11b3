"""N:M sparsity: of every M weights along the input channels, the N largest stay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clicktrain.errors import InvalidArgument


def nm_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Return a bool mask that keeps the N largest of each M weights in a row.

    Parameters
    ----------
    weight : Tensor, (C_out, C_in, k, k)
        C_in a multiple of M. Groups lie along the input channels, as sparse tensor cores need them.
    n, m : int
        0 < n <= m.
    """
    groups = weight.detach().abs().movedim(1, -1)
    groups = groups.reshape(*groups.shape[:-1], -1, m)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    return mask.flatten(-2).movedim(-1, 1).contiguous()


def nm_budget(weights: Mapping[str, Tensor], n: int, m: int) -> int:
    """Return how many weights all layers keep.

    Raises
    ------
    InvalidArgument
        If the number of input channels of a layer is no multiple of M.
    """
    for name, weight in weights.items():
        if weight.shape[1] % m:
            raise InvalidArgument(
                f"{n}:{m} sparsity: layer {name} has {weight.shape[1]} input channels, expected a multiple of {m}"
            )
    return sum(weight.numel() for weight in weights.values()) // m * n


def check_nm(n: int, m: int) -> None:
    """Raise InvalidArgument unless 0 < n < m."""
    if not 0 < n < m:
        raise InvalidArgument(f"n={n}, m={m}: expected 0 < n < m, such as 2 and 4")
