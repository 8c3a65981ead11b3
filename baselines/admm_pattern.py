"""Pattern and connectivity pruning with ADMM after training, as PatDNN and PCONV do it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from baselines.admm import Admm, AdmmStage, Weights, admm_phase, check_rho, length
from baselines.train_prune_finetune import TrainPruneFinetune
from clicktrain.assignment import Assignment, assign
from clicktrain.importance import magnitude
from clicktrain.method import Method, Phase
from clicktrain.patterns import PatternPool
from clicktrain.selection import PoolChoice


class AdmmPattern(AdmmStage, TrainPruneFinetune):
    """Train, draw the weights to patterns and to removed kernels with ADMM, prune, fine-tune.

    Source: PatDNN (ASPLOS 2020, arXiv 2001.00138) and PCONV (AAAI 2020), steps and settings as in 7bvcxz/PatDNN: a
    set of 8 patterns, those that are most often the best of a trained kernel; one constraint for patterns and one
    for connectivity, duals updated after every epoch; then the hard prune, kernels by their norm, and retraining.
    120 and 60 epochs, Adam, rho 1e-2.
    Deviations: the penalty is the squared norm (that code's is the norm); patterns need not hold the centre; the
    kernels left in each layer come from one budget, shared out by the code that serves ClickTrain; the first
    convolution stays dense; after the prune, layers compute through `PatternConv2d`.

    Parameters
    ----------
    target_compression, epochs, target_flops, pool, backend
        See `TrainPruneFinetune`.
    rho : float
        Strength of the penalties.
    admm_epochs, finetune_epochs : int, optional
        Lengths on top of `epochs`; unset: 120/190 and 60/190 of them.
    admm_lr, finetune_lr : float
        Learning rates of the two later phases.
    admm_optimizer : {"adam", "sgd"}
        Optimizer of the ADMM phase.
    patterns : int
        Size of the pool.

    Raises
    ------
    InvalidArgument
        If an option has no meaning; in `setup`, if the model cannot be pruned so.
    """

    name = "admm-pattern"

    def __init__(
        self,
        target_compression: float | None = None,
        epochs: int = 190,
        *,
        target_flops: float | None = None,
        pool: PoolChoice | PatternPool = "frequency",
        patterns: int = 8,
        rho: float = 1e-2,
        admm_epochs: int | None = None,
        admm_lr: float = 3e-4,
        admm_optimizer: str = "adam",
        finetune_epochs: int | None = None,
        finetune_lr: float = 1e-3,
        backend: str = "auto",
    ) -> None:
        finetune = length(60, 190, epochs, finetune_epochs)
        super().__init__(
            target_compression,
            epochs,
            target_flops=target_flops,
            pool=pool,
            patterns=patterns,
            rank_by="kernel",
            finetune_epochs=finetune,
            finetune_lr=finetune_lr,
            backend=backend,
        )
        self.rho = check_rho(rho)
        self._admm_phase = admm_phase(length(120, 190, epochs, admm_epochs), admm_lr, admm_optimizer)
        self._goal: dict[str, tuple[PatternPool, int]] = {}
        self._admm: Admm | None = None

    @property
    def phases(self) -> Sequence[Phase]:
        """Dense training at the run's own settings, ADMM, fine-tuning."""
        return [Phase("dense", self.epochs), self._admm_phase, self.finetune]

    def begin_phase(self, index: int, optimizer: Optimizer) -> None:
        """Choose patterns and budgets and begin ADMM, or prune."""
        Method.begin_phase(self, index, optimizer)
        if index == 1:
            kept = self.choose()
            self._begin({name: (assignment.pool, assignment.kept_kernels) for name, assignment in kept.items()})
        else:
            self.prune({name: self._assign(name, weight.detach()) for name, weight in self.weights.items()})
            self._admm = None

    def state_dict(self) -> dict[str, Any]:
        """Return the assignments, or what ADMM knows before there are any."""
        goal = {name: {"pool": pool.masks(), "kept": kept} for name, (pool, kept) in self._goal.items()}
        admm = self._admm.state_dict() if self._admm else None
        return {"assignments": super().state_dict(), "goal": goal, "admm": admm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`; converts the model if it was pruned."""
        if state["admm"]:
            packed = state["goal"].items()
            admm = self._begin(
                {name: (PatternPool.from_masks(goal["pool"].numpy()), goal["kept"]) for name, goal in packed}
            )
            admm.load_state_dict(state["admm"])
        super().load_state_dict(state["assignments"])

    def _begin(self, goal: dict[str, tuple[PatternPool, int]]) -> Admm:
        self._goal = goal
        self._admm = Admm(self.rho, self.weights, [self._to_patterns, self._to_kernels])
        return self._admm

    def _assign(self, name: str, weight: Tensor, kept: int | None = None) -> Assignment:
        pool, budget = self._goal[name]
        return assign(magnitude(weight), pool, kept or budget, rank_by="kernel")

    def _to_patterns(self, weights: Weights) -> dict[str, Tensor]:
        """Keep of each kernel the pattern with the largest norm."""
        kernels = {name: weight.shape[0] * weight.shape[1] for name, weight in weights.items()}
        return {name: weight * self._assign(name, weight, kernels[name]).mask() for name, weight in weights.items()}

    def _to_kernels(self, weights: Weights) -> dict[str, Tensor]:
        """Keep whole the kernels that are largest, as many as each layer's budget says."""
        masks = {name: self._assign(name, weight).mask() for name, weight in weights.items()}
        return {name: weight * masks[name].flatten(2).any(2)[:, :, None, None] for name, weight in weights.items()}
