"""Pruning after training: train dense, prune by magnitude once, fine-tune what is left (Han et al., 2015)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from baselines.finetuning import finetune_phase
from clicktrain.assignment import Assignment, Ranking
from clicktrain.conversion import convert
from clicktrain.errors import ClickTrainError
from clicktrain.flops import Densities, layer_costs
from clicktrain.importance import measure
from clicktrain.kernels.backends import check_name
from clicktrain.method import Method, Phase
from clicktrain.patterns import PatternPool
from clicktrain.selection import PoolChoice, Sparsity, check_budget, prunable_layers, select


class TrainPruneFinetune(Method):
    """Train, prune to patterns by the magnitude of the trained weights, fine-tune at a constant rate.

    Pool, budget and assignment come from the same code as ClickTrain's, with w**2 as score, so that at the
    same target both end with the same number of weights, and both compute through `PatternConv2d` after the
    hard prune. The lengths are those of the code of Liu et al. (ICLR 2019): 160 epochs of training, 40 of
    fine-tuning at the last learning rate of the training.

    Parameters
    ----------
    target_compression, target_flops, ratios, pool, patterns, entries, rank_by
        The budget (exactly one of the first three) and the patterns, see `clicktrain.selection.Sparsity`.
    epochs : int
        Length of the dense training.
    finetune_epochs : int, optional
        Length of the fine-tuning, on top of `epochs`; unset: a quarter of them.
    finetune_lr : float
        Learning rate of the fine-tuning.
    backend : str
        See `clicktrain.PatternConv2d`.

    Raises
    ------
    InvalidArgument
        If an option has no meaning; in `setup`, if the model cannot be pruned so.
    """

    name = "train-prune-finetune"
    recordable = True

    def __init__(
        self,
        target_compression: float | None = None,
        epochs: int = 160,
        *,
        target_flops: float | None = None,
        ratios: Sequence[float] | Mapping[str, float] | None = None,
        pool: PoolChoice | PatternPool = "coverage",
        patterns: int = 4,
        entries: int = 4,
        rank_by: Ranking = "pattern",
        finetune_epochs: int | None = None,
        finetune_lr: float = 1e-3,
        backend: str = "auto",
    ) -> None:
        self.epochs = epochs
        self.finetune = finetune_phase(epochs, finetune_epochs, finetune_lr)
        self.sparsity = Sparsity(target_compression, target_flops, ratios, pool, patterns, entries, rank_by)
        self.backend = check_name(backend)
        self.assignments: dict[str, Assignment] = {}

    @property
    def phases(self) -> Sequence[Phase]:
        """Dense training at the run's own settings, then fine-tuning."""
        return [Phase("dense", self.epochs), self.finetune]

    @property
    def dense_epochs(self) -> int:
        """The whole first phase: see `Method.dense_epochs`."""
        return self.epochs

    @property
    def stage(self) -> str:
        """Return "dense" or "finetune"."""
        return "finetune" if self.assignments else "dense"

    def setup(self, model: nn.Module, optimizer: Optimizer, example_input: Tensor) -> None:
        """Take the model and its optimizer; see `Method.setup`."""
        super().setup(model, optimizer, example_input)
        shape = tuple(example_input.shape[1:])
        self._costs = layer_costs(model, shape)
        self._convs = prunable_layers(model, shape)
        check_budget({name: conv.weight.shape for name, conv in self._convs.items()}, self._costs, self.sparsity)

    def begin_phase(self, index: int, optimizer: Optimizer) -> None:
        """Prune, as the fine-tuning begins."""
        super().begin_phase(index, optimizer)
        self.prune(self.choose())

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights that will be pruned, by layer name; empty after the prune."""
        return {name: conv.weight for name, conv in self._convs.items()}

    def choose(self) -> dict[str, Assignment]:
        """Choose what to keep, by the magnitude of the present weights."""
        scores = measure(self.model, self.weights, score="magnitude")
        return {name: layer.kept for name, layer in select(scores, self._costs, self.sparsity).items()}

    def finish(self) -> nn.Module:
        """Return the pruned model."""
        if not self.assignments:
            epochs = sum(phase.epochs for phase in self.phases[:-1])
            raise ClickTrainError(f"finish() before the prune after epoch {epochs}: train on")
        return self.model

    def masks(self) -> dict[str, Tensor]:
        """Return what is kept, by layer name; empty before the prune."""
        return {name: assignment.mask() for name, assignment in self.assignments.items()}

    def densities(self) -> Densities:
        """Return the densities of the pruned layers: all three passes are sparse while fine-tuning."""
        return {name: (assignment.density,) * 3 for name, assignment in self.assignments.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the assignments, by layer name."""
        return {
            name: {"index": assignment.index.cpu(), "pool": assignment.pool.masks()}
            for name, assignment in self.assignments.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`; converts the model if it was pruned."""
        if state:
            device = next(self.model.parameters()).device
            pools = {name: PatternPool.from_masks(packed["pool"].numpy()) for name, packed in state.items()}
            self.prune({name: Assignment(state[name]["index"].to(device), pools[name]) for name in state})

    def prune(self, assignments: dict[str, Assignment]) -> None:
        """Convert the layers; from here on only kept weights exist."""
        self.prepare_kernels(assignments, self.backend).wait()
        convert(self.model, assignments, self.optimizer, self.backend)
        self._convs, self.assignments = {}, assignments
