"""Magnitude pruning after training (Han et al., 2015), element by element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from torch.optim import Optimizer

from baselines.finetuning import finetune_phase
from baselines.masking import Masked
from clicktrain.errors import InvalidArgument
from clicktrain.method import Phase


class MagnitudePruneFinetune(Masked):
    """Train, remove the smallest weights at once or in rounds, fine-tune what is left.

    Source: Han et al., "Learning both weights and connections" (NIPS 2015), with the lengths and the global
    threshold of the code of Liu et al. (ICLR 2019, weight-level): 160 epochs of training, 40 of fine-tuning at a
    constant rate of 1e-3.
    Deviations: the first convolution and residual shortcuts stay dense, as in all methods here; several rounds
    (Han's own way) share the fine-tuning epochs, each removing the same fraction of what is left.

    Parameters
    ----------
    target_compression, epochs
        See `baselines.masking.Masked`.
    distribution : {"global", "uniform", "erk"}
        One threshold for all layers, or a number of weights for each.
    rounds : int
        1 prunes at once; more prune step by step, with fine-tuning after each.
    finetune_epochs : int, optional
        Length of all fine-tuning, on top of `epochs`; unset: a quarter of them, at least one a round.
    finetune_lr : float
        Learning rate of the fine-tuning.

    Raises
    ------
    InvalidArgument
        If an option has no meaning; in `setup`, if the target cannot be met.
    """

    name = "magnitude"

    def __init__(
        self,
        target_compression: float,
        epochs: int = 160,
        *,
        distribution: str = "global",
        rounds: int = 1,
        finetune_epochs: int | None = None,
        finetune_lr: float = 1e-3,
    ) -> None:
        super().__init__(target_compression, epochs, distribution)
        finetune = finetune_phase(epochs, finetune_epochs, finetune_lr)
        if finetune_epochs is None:
            finetune = replace(finetune, epochs=max(finetune.epochs, rounds))
        if not 1 <= rounds <= finetune.epochs:
            raise InvalidArgument(f"rounds={rounds}: expected 1 to finetune_epochs={finetune.epochs}")
        self.rounds, self.finetune = rounds, finetune

    @property
    def phases(self) -> Sequence[Phase]:
        """Dense training at the run's own settings, then a fine-tuning for each round."""
        ends = [self.finetune.epochs * number // self.rounds for number in range(self.rounds + 1)]
        rounds = [replace(self.finetune, epochs=last - first) for first, last in pairwise(ends)]
        if len(rounds) > 1:
            rounds = [replace(phase, name=f"finetune-{number}") for number, phase in enumerate(rounds, 1)]
        return [Phase("dense", self.epochs), *rounds]

    @property
    def stage(self) -> str:
        """Return "dense" or "finetune"."""
        return "finetune" if self._masks else "dense"

    def begin_phase(self, index: int, optimizer: Optimizer) -> None:
        """Prune, as a fine-tuning begins: by the same factor in each round."""
        super().begin_phase(index, optimizer)
        weights = sum(weight.numel() for weight in self.weights.values())
        kept = round(self.budget * (weights / self.budget) ** (1 - index / self.rounds))
        self.set_masks(self.magnitude_masks(kept))
