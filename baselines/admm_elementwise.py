"""Element-wise ADMM pruning after training (Zhang et al., ECCV 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from baselines.admm import Admm, AdmmStage, Weights, admm_phase, check_rho, length
from baselines.budgets import largest_by_layer
from baselines.finetuning import finetune_phase
from baselines.masking import Masked
from clicktrain.method import Phase


class AdmmElementwise(AdmmStage, Masked):
    """Train, draw the weights to the nearest sparse ones with ADMM, prune, fine-tune.

    Source: Zhang et al., "A systematic DNN weight pruning framework using ADMM" (ECCV 2018): Z keeps the largest
    weights of each layer, U += W - Z after every epoch, then masks and retraining.
    Deviations: the source tunes each layer's budget by hand, here "global" ranks all weights as ADMM begins and
    fixes the numbers of weights by layer; lengths are PatDNN's (120 + 60 epochs after 190), scaled to the run; first
    convolution and residual shortcuts stay dense, as in all methods here.

    Parameters
    ----------
    target_compression, epochs
        See `baselines.masking.Masked`.
    distribution : {"global", "uniform", "erk"}
        How each layer's number of weights is chosen.
    rho : float
        Strength of the penalty.
    admm_epochs, finetune_epochs : int, optional
        Lengths, on top of `epochs`.
    admm_lr, finetune_lr : float
        Learning rates.
    admm_optimizer : {"adam", "sgd"}
        Optimizer of the ADMM phase.

    Raises
    ------
    InvalidArgument
        If an option has no meaning; in `setup`, if the target cannot be met.
    """

    name = "admm-elementwise"

    def __init__(
        self,
        target_compression: float,
        epochs: int = 190,
        *,
        distribution: str = "global",
        rho: float = 1e-2,
        admm_epochs: int | None = None,
        admm_lr: float = 3e-4,
        admm_optimizer: str = "adam",
        finetune_epochs: int | None = None,
        finetune_lr: float = 1e-3,
    ) -> None:
        super().__init__(target_compression, epochs, distribution)
        self.rho = check_rho(rho)
        self._admm_phase = admm_phase(length(120, 190, epochs, admm_epochs), admm_lr, admm_optimizer)
        self._finetune = finetune_phase(epochs, length(60, 190, epochs, finetune_epochs), finetune_lr)
        self._counts: dict[str, int] = {}
        self._admm: Admm | None = None

    @property
    def phases(self) -> Sequence[Phase]:
        """Dense training at the run's own settings, ADMM, fine-tuning."""
        return [Phase("dense", self.epochs), self._admm_phase, self._finetune]

    @property
    def stage(self) -> str:
        """Return "dense", "admm" or "finetune"."""
        return "finetune" if self._masks else super().stage

    def begin_phase(self, index: int, optimizer: Optimizer) -> None:
        """Begin ADMM, or prune."""
        super().begin_phase(index, optimizer)
        if index == 1:
            self._begin({name: int(mask.sum()) for name, mask in self.magnitude_masks(self.budget).items()})
        else:
            self.set_masks(largest_by_layer(self.weights, self._counts))
            self._admm = None

    def state_dict(self) -> dict[str, Any]:
        """Return masks, progress and what ADMM knows."""
        admm = self._admm.state_dict() if self._admm else None
        return {**super().state_dict(), "counts": dict(self._counts), "admm": admm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`."""
        super().load_state_dict(state)
        self._counts = dict(state["counts"])
        if state["admm"]:
            self._begin(self._counts).load_state_dict(state["admm"])

    def _begin(self, counts: dict[str, int]) -> Admm:
        self._counts = counts
        self._admm = Admm(self.rho, self.weights, [self._project])
        return self._admm

    def _project(self, weights: Weights) -> dict[str, Tensor]:
        return {name: weights[name] * mask for name, mask in largest_by_layer(weights, self._counts).items()}
