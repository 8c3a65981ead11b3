"""SR-STE (Zhou et al., ICLR 2021): N:M sparsity learned from scratch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from baselines.nm import check_nm, nm_budget, nm_mask
from baselines.straight_through import SoftMasked
from clicktrain.errors import InvalidArgument
from clicktrain.flops import LayerCost


class SRSTE(SoftMasked):
    """Compute with the N largest of each M weights, chosen anew in every step, and refine the others.

    Source: Zhou et al., "Learning N:M fine-grained structured sparse neural networks from scratch" (ICLR 2021) and
    NM-sparsity/NM-sparsity: a straight-through gradient, plus lambda * (1 - mask) * w on what is masked out.
    Deviations: groups lie along the input channels as in NVIDIA's ASP, the grouping that tensor cores can run (the
    source's own models group along the kernel); first convolution and residual shortcuts stay dense, as in
    all methods here.

    Parameters
    ----------
    n, m : int
        N of M weights stay.
    epochs : int
        Length of the run.
    decay : float
        The source's lambda.

    Raises
    ------
    InvalidArgument
        If an option has no meaning; in `setup`, if a layer's input channels are no multiple of M.
    """

    name = "sr-ste"

    def __init__(self, n: int = 2, m: int = 4, epochs: int = 120, *, decay: float = 2e-4) -> None:
        super().__init__(m / n if n else 0.0, epochs)
        check_nm(n, m)
        if decay < 0:
            raise InvalidArgument(f"decay={decay}: expected at least 0")
        self.n, self.m, self.decay = n, m, decay

    def choose_budget(self, costs: Sequence[LayerCost]) -> int:
        """Return N of each M weights."""
        return nm_budget(self.weights, self.n, self.m)

    def setup(self, model: nn.Module, optimizer: Optimizer, example_input: Tensor) -> None:
        """Take the model and mask it; see `Method.setup`."""
        super().setup(model, optimizer, example_input)
        self.adopt({name: nm_mask(weight, self.n, self.m) for name, weight in self.weights.items()})

    def before_forward(self) -> None:
        """Choose the masks anew; their densities stay what they are."""
        for name, mask in self._masks.items():
            mask.copy_(nm_mask(self.weights[name], self.n, self.m))

    def after_backward(self) -> None:
        """Add the sparse-refined term to the gradient of what is masked out."""
        with torch.no_grad():
            for name, mask in self._masks.items():
                weight = self.weights[name]
                if weight.grad is not None:
                    weight.grad.add_(weight.masked_fill(mask, 0.0), alpha=self.decay)

    def finish(self) -> nn.Module:
        """Return the model with ordinary convolutions, masked by the final weights."""
        self.before_forward()
        return super().finish()
