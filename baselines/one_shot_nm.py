"""One-shot N:M pruning after training, as NVIDIA's ASP does it."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from baselines.masking import Masked
from baselines.nm import check_nm, nm_budget, nm_mask
from clicktrain.flops import LayerCost
from clicktrain.method import Phase


class OneShotNM(Masked):
    """Train dense, keep the N largest of each M weights, train again in the same way.

    Source: ASP in NVIDIA/apex (contrib/sparsity): 2:4 along the input channels, chosen once by magnitude, then
    the whole schedule once more with the same optimizer settings.
    Deviations: no search for a permutation of channels; first convolution and residual shortcuts stay dense, as in
    all methods here; a layer that does not fit is an error, where ASP leaves it dense.

    Parameters
    ----------
    n, m : int
        N of M weights stay.
    epochs : int
        Length of the dense training.
    retrain_epochs : int, optional
        Length of the retraining; unset: as long again.

    Raises
    ------
    InvalidArgument
        If an option has no meaning; in `setup`, if a layer's input channels are no multiple of M.
    """

    name = "one-shot-nm"

    def __init__(self, n: int = 2, m: int = 4, epochs: int = 100, *, retrain_epochs: int | None = None) -> None:
        super().__init__(m / n if n else 0.0, epochs)
        check_nm(n, m)
        self.n, self.m = n, m
        self.retrain_epochs = epochs if retrain_epochs is None else retrain_epochs

    @property
    def phases(self) -> Sequence[Phase]:
        """The run's own settings, twice."""
        return [Phase("dense", self.epochs), Phase("retrain", self.retrain_epochs)]

    @property
    def stage(self) -> str:
        """Return "dense" or "retrain"."""
        return "retrain" if self._masks else "dense"

    def choose_budget(self, costs: Sequence[LayerCost]) -> int:
        """Return N of each M weights."""
        return nm_budget(self.weights, self.n, self.m)

    def begin_phase(self, index: int, optimizer: Optimizer) -> None:
        """Prune, as the retraining begins."""
        super().begin_phase(index, optimizer)
        self.set_masks({name: nm_mask(weight, self.n, self.m) for name, weight in self.weights.items()})
