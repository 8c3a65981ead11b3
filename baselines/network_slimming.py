"""Network slimming (Liu et al., ICCV 2017): L1 on BatchNorm scales, then the channels with small ones go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from baselines.budgets import largest_everywhere
from baselines.channels import NORMS
from baselines.shrinking import Shrinking
from clicktrain.errors import ClickTrainError, InvalidArgument
from clicktrain.method import Phase


class NetworkSlimming(Shrinking):
    """Train with L1 on the BatchNorm scales, remove the channels with the smallest ones, train again.

    Source: Liu et al., "Learning efficient convolutional networks through network slimming" (ICCV 2017) and
    Eric-mingjie/network-slimming: gradient + s * sign(gamma) on every scale, s 1e-4 (VGG) or 1e-5 (ResNet); one
    threshold over the network; 160 epochs of training and of fine-tuning, each with SGD 0.1, x 0.1 at half and at
    three quarters, decay 1e-4, batch 64.
    Deviations: channels that a residual join shares stay (the source puts a channel selection before each block of a
    pre-activation network instead); each layer keeps at least its strongest channel, so that a `prune` beyond that is
    met only in part: `log` has the channels that are left.

    Parameters
    ----------
    prune : float
        Share of the prunable channels to remove, 0 to below 1.
    epochs : int
        Length of the training with L1.
    strength : float
        The source's s.
    finetune_epochs : int, optional
        Length of the fine-tuning; unset: as long again.
    finetune_lr : float, optional
        Its learning rate; unset: the run's.

    Raises
    ------
    InvalidArgument
        If an option has no meaning; in `setup`, if the model has no BatchNorm to go by, or its channels cannot be
        followed.
    """

    name = "network-slimming"

    def __init__(
        self,
        prune: float = 0.7,
        epochs: int = 160,
        *,
        strength: float = 1e-4,
        finetune_epochs: int | None = None,
        finetune_lr: float | None = None,
    ) -> None:
        super().__init__(epochs)
        if not 0 <= prune < 1:
            raise InvalidArgument(f"prune={prune}: expected a share of the channels from 0 to below 1")
        if strength < 0:
            raise InvalidArgument(f"strength={strength}: expected at least 0")
        self._finetune = Phase("finetune", epochs if finetune_epochs is None else finetune_epochs, lr=finetune_lr)
        if self._finetune.epochs < 1:
            raise InvalidArgument(f"finetune_epochs={finetune_epochs}: expected at least 1")
        self.prune, self.strength = prune, strength
        self.is_pruned = False

    @property
    def phases(self) -> Sequence[Phase]:
        """Training with L1 at the run's own settings, then fine-tuning."""
        return [replace(self._finetune, name="sparsity", epochs=self.epochs, lr=None), self._finetune]

    @property
    def stage(self) -> str:
        """Return "sparsity" or "finetune"."""
        return "finetune" if self.is_pruned else "sparsity"

    def setup(self, model: nn.Module, optimizer: Optimizer, example_input: Tensor) -> None:
        """Take the model and find the scales that stand for channels; see `Method.setup`."""
        super().setup(model, optimizer, example_input)
        self._norms = {}
        for number, group in enumerate(self.graph.groups):
            norm = self.graph.norm_of.get(group.producers[0]) if group.producers else None
            if norm and not group.is_join and not group.is_fixed and model.get_submodule(norm).weight is not None:
                self._norms[number] = norm
        if not self._norms:
            raise InvalidArgument(
                f"model {type(model).__name__}: expected a BatchNorm with scales behind a convolution, "
                "found none whose channels could go"
            )

    def begin_phase(self, index: int, optimizer: Optimizer) -> None:
        """Remove channels, as the fine-tuning begins."""
        super().begin_phase(index, optimizer)
        scales = {
            str(number): self.model.get_parameter(f"{norm}.weight").detach().abs()
            for number, norm in self._norms.items()
        }
        total = sum(scale.numel() for scale in scales.values())
        stay = largest_everywhere(scales, max(len(scales), total - math.floor(self.prune * total)))
        self.shrink({int(number): mask.nonzero().flatten().cpu() for number, mask in stay.items()})
        self.is_pruned = True

    def after_backward(self) -> None:
        """Add the subgradient of the L1 norm of every scale, until channels are removed."""
        if self.is_pruned:
            return
        for module in self.model.modules():
            if isinstance(module, NORMS) and module.weight is not None and module.weight.grad is not None:
                module.weight.grad.add_(torch.sign(module.weight.detach()), alpha=self.strength)

    def finish(self) -> nn.Module:
        """Return the smaller model."""
        if not self.is_pruned:
            raise ClickTrainError(f"finish() before channels were removed after epoch {self.epochs}: train on")
        return self.model

    def log(self) -> dict[str, float]:
        """Return the size of the present network, and the share of the prunable channels that is left."""
        before = sum(self.graph.groups[number].channels for number in self._norms)
        return {**super().log(), "channels_left": sum(len(self.left[number]) for number in self._norms) / before}

    def state_dict(self) -> dict[str, Any]:
        """Return the structure, and whether it is final."""
        return {**super().state_dict(), "is_pruned": self.is_pruned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`: make the layers as small as they were."""
        super().load_state_dict(state)
        self.is_pruned = bool(state["is_pruned"])
