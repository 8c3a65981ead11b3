"""ClickTrain: train once, and end with a pattern-pruned model (Zhang et al., ICS 2021, arXiv 2011.10170)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Self, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clicktrain import distributed
from clicktrain.assignment import Assignment, Ranking
from clicktrain.conversion import convert
from clicktrain.errors import ClickTrainError, InvalidArgument
from clicktrain.flops import FLOPS_PER_MAC, Densities, layer_costs
from clicktrain.importance import Score, measure
from clicktrain.kernels import Preparation
from clicktrain.kernels.backends import check_name
from clicktrain.method import Batches, Method, Phase
from clicktrain.mixup import mixup
from clicktrain.official import by_layer, resolve
from clicktrain.patterns import PatternPool
from clicktrain.preparation import tune
from clicktrain.regularizer import PrunedGroups, group_lasso
from clicktrain.schedule import Stages
from clicktrain.selection import LayerSelection, PoolChoice, Sparsity, check_budget, prunable_layers, select


@dataclass(frozen=True)
class Preset:
    """When ClickTrain selects and prunes, as fractions of the run, and how much it regularises between.

    Attributes
    ----------
    select, prune : float
        Fractions of the epochs.
    shrinkage : float
        Penalty strength times the sum of learning rates over the regularised steps. The official VGG-13 run
        has 6.5e-4 x 284 = 0.185.
    """

    select: float
    prune: float
    shrinkage: float


PRESETS = {
    "paper": Preset(55 / 190, 95 / 190, 0.185),
    "fast": Preset(0.1, 0.2, 0.185),
}
"""``paper``: half of the run is sparse, as the published training FLOPs imply. ``fast``: most of it is."""


class ClickTrain(Method):
    """Dense until patterns are chosen, regularised towards them until the hard prune, sparse from there.

    Parameters
    ----------
    target_compression, target_flops, ratios, pool, patterns, entries, rank_by, share_filters
        The budget (exactly one of the first three) and the patterns, see `clicktrain.selection.Sparsity`.
    epochs : int
        Length of the run.
    preset : {"paper", "fast"}
        Stage boundaries and shrinkage, where the next four do not say otherwise.
    select_at, prune_at : int, optional
        Epochs of selection and hard prune.
    shrinkage : float, optional
        Strength of the group lasso as lambda times the sum of learning rates over the regularised steps, so
        that short runs regularise as much as long ones.
    penalty_strength : float, optional
        Lambda itself, instead of `shrinkage`.
    score : {"taylor", "magnitude"}
        What importance means.
    batches : int
        Batches over which importance is averaged; 1 equals the released code.
    prune_after_step : bool
        Prune after the first step of `prune_at` instead of before it, as the released code does.
    mixup_after_prune : float
        Beta parameter of mixup in the sparse stage (released code: 0.3); 0 for none.
    mixup_from : int
        Batch of epoch `prune_at` from which mixup runs.
    backend : str
        See `clicktrain.PatternConv2d`.
    tune : bool
        After the hard prune, measure how each layer is computed fastest at the largest batch of the training, see
        `clicktrain.tune`: off, because it gains little, and because runs that were measured are equal in all but the
        last bits only.

    Raises
    ------
    InvalidArgument
        If an option has no meaning, or stages are out of order; in `setup` or at the selection, if the model
        cannot be pruned so.
    """

    name = "clicktrain"
    recordable = True

    def __init__(
        self,
        target_compression: float | None = None,
        epochs: int = 190,
        *,
        target_flops: float | None = None,
        ratios: Sequence[float] | Mapping[str, float] | None = None,
        pool: PoolChoice | PatternPool = "coverage",
        patterns: int = 4,
        entries: int = 4,
        rank_by: Ranking = "pattern",
        share_filters: int = 1,
        preset: str = "paper",
        select_at: int | None = None,
        prune_at: int | None = None,
        shrinkage: float | None = None,
        penalty_strength: float | None = None,
        score: Score = "taylor",
        batches: int = 4,
        prune_after_step: bool = False,
        mixup_after_prune: float = 0.0,
        mixup_from: int = 0,
        backend: str = "auto",
        tune: bool = False,
    ) -> None:
        if preset not in PRESETS:
            raise InvalidArgument(f"preset={preset!r}: expected one of {', '.join(PRESETS)}")
        if score not in get_args(Score):
            raise InvalidArgument(f"score={score!r}: expected {' or '.join(get_args(Score))}")
        if batches < 1:
            raise InvalidArgument(f"batches={batches}: expected at least 1")
        if shrinkage is not None and penalty_strength is not None:
            raise InvalidArgument(f"shrinkage={shrinkage}, penalty_strength={penalty_strength}: give one of them")
        for name, value in (("shrinkage", shrinkage), ("penalty_strength", penalty_strength)):
            if value is not None and value < 0:
                raise InvalidArgument(f"{name}={value}: expected at least 0")
        chosen = PRESETS[preset]
        default = Stages.scaled(chosen.select, chosen.prune, epochs)
        self.stages = Stages(
            default.select_at if select_at is None else select_at,
            default.prune_at if prune_at is None else prune_at,
            epochs,
        )
        self.sparsity = Sparsity(
            target_compression, target_flops, ratios, pool, patterns, entries, rank_by, share_filters
        )
        self.shrinkage = chosen.shrinkage if shrinkage is None else shrinkage
        self.penalty_strength = penalty_strength
        self.score: Score = score
        self.batches = batches
        self.prune_after_step = prune_after_step
        self.mixup_after_prune = mixup_after_prune
        self.mixup_from = mixup_from
        self.backend = check_name(backend)
        self.tune = tune
        self.selection: dict[str, LayerSelection] = {}
        self._groups: list[PrunedGroups] = []
        self._densities: Densities = {}
        self._lambda = 0.0
        self._pruned = False
        self._epoch = -1
        self._batch = 0
        self._extra_flops = 0
        self._preparation: Preparation | None = None

    @classmethod
    def official(cls, address: str, **options: Any) -> Self:
        """Build as the released code trains a configuration, to the letter.

        The learning rate, batch size and data are the trainer's: see `clicktrain.official.OfficialConfig`.

        Parameters
        ----------
        address : str
            "official:NAME", see `clicktrain.official.resolve`.
        **options
            Changes to these settings.
        """
        config = resolve(address)
        return cls(**{"epochs": config.stages.epochs} | config.options() | options)

    @property
    def phases(self) -> Sequence[Phase]:
        """One phase, at the run's own settings."""
        return [Phase("clicktrain", self.stages.epochs)]

    @property
    def dense_epochs(self) -> int:
        """The epochs before the selection: see `Method.dense_epochs`."""
        return self.stages.select_at

    @property
    def stage(self) -> str:
        """Return "dense", "regularized" or "sparse"."""
        if self._pruned:
            return "sparse"
        return "regularized" if self.selection else "dense"

    @property
    def extra_flops(self) -> int:
        """FLOPs spent on measuring importance: a dense forward and backward pass for each image."""
        return self._extra_flops

    def setup(self, model: nn.Module, optimizer: Optimizer, example_input: Tensor) -> None:
        """Take the model and its optimizer; see `Method.setup`."""
        super().setup(model, optimizer, example_input)
        shape = tuple(example_input.shape[1:])
        self._costs = layer_costs(model, shape)
        self._convs = prunable_layers(model, shape)
        check_budget({name: conv.weight.shape for name, conv in self._convs.items()}, self._costs, self._expanded())
        self._num_classes = self._costs[-1].out_shape[0]

    def on_epoch(self, epoch: int, loader: Batches) -> None:
        """Select at the start of epoch `select_at`, prune at that of `prune_at`."""
        self._epoch, self._batch = epoch, 0
        if epoch >= self.stages.select_at and not self.selection:
            self._select(loader)
        if epoch >= self.stages.prune_at and not self._pruned and not self.prune_after_step:
            self._prune()
            self._tune()

    def prepare_batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mix up the batch in the last stage, where asked for."""
        late = self._epoch > self.stages.prune_at or self._batch >= self.mixup_from
        if self.mixup_after_prune and self._epoch >= self.stages.prune_at and late and y.ndim == 1:
            key = (self.seed, self._epoch, self._batch)
            return mixup(x, y, self._num_classes, self.mixup_after_prune, key)
        return x, y

    def penalty(self) -> Tensor:
        """Return lambda * (R_p + R_k) in the regularised stage, else zero."""
        first_step = self._epoch == self.stages.select_at and self._batch == 0  # plain, as in the released code
        if self._groups and self._lambda and self._epoch < self.stages.prune_at and not first_step:
            return self._lambda * group_lasso([conv.weight for conv in self._convs.values()], self._groups)
        return super().penalty()

    def after_step(self) -> None:
        """Count batches; prune after the first step of `prune_at` where asked for."""
        self._batch += 1
        if self.prune_after_step and self._epoch >= self.stages.prune_at and not self._pruned:
            self._prune()
            self._tune()

    def finish(self) -> nn.Module:
        """Return the pruned model."""
        if not self._pruned:
            raise ClickTrainError(f"finish() before the hard prune in epoch {self.stages.prune_at}: train on")
        return self.model

    def masks(self) -> dict[str, Tensor]:
        """Return what is kept, by layer name; empty before the selection."""
        return {name: layer.kept.mask() for name, layer in self.selection.items()}

    def densities(self) -> Densities:
        """Return the densities of the pruned layers: all three passes are sparse after the hard prune."""
        return self._densities

    def log(self) -> dict[str, float]:
        """Return the norm still in what is to be removed, relative to the whole, while regularising."""
        if not self._groups:
            return {}
        weights = [conv.weight for conv in self._convs.values()]
        left = sum(float(group.left(weight)) for group, weight in zip(self._groups, weights, strict=True))
        whole = sum(float(weight.detach().square().sum()) for weight in weights)
        return {"norm_left": (left / whole) ** 0.5 if whole else 0.0, "penalty_strength": self._lambda}

    def state_dict(self) -> dict[str, Any]:
        """Return selection, progress and counters."""
        return {
            "selection": {name: _pack(layer) for name, layer in self.selection.items()},
            "pruned": self._pruned,
            "lambda": self._lambda,
            "epoch": self._epoch,
            "batch": self._batch,
            "extra_flops": self._extra_flops,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`; converts the model if it was pruned."""
        device = next(self.model.parameters()).device
        self._epoch, self._batch = state["epoch"], state["batch"]
        self._lambda, self._extra_flops = state["lambda"], state["extra_flops"]
        if state["selection"]:
            self._take({name: _unpack(packed, device) for name, packed in state["selection"].items()})
        if state["pruned"]:
            self._prune()

    def _select(self, loader: Batches) -> None:
        """Measure importance on batches of the loader, then choose pool, budget and assignment."""
        weights = {name: conv.weight for name, conv in self._convs.items()}
        scores = measure(self.model, weights, self._counted(islice(iter(loader), self.batches)), self.score)
        selection = select(scores, self._costs, self._expanded())
        distributed.check_equal("the assignment", _content(selection))
        self._take(selection)
        self._lambda = self._strength(len(loader))

    def _expanded(self) -> Sparsity:
        """Return the sparsity with ratios by layer, where they were given for residual blocks."""
        ratios = self.sparsity.ratios
        if ratios is None or isinstance(ratios, Mapping):
            return self.sparsity
        return replace(self.sparsity, ratios=by_layer(ratios, self._convs))

    def _counted(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        per_image = 3 * FLOPS_PER_MAC * sum(cost.macs for cost in self._costs)
        for x, y in batches:
            self._extra_flops += per_image * int(distributed.total(len(x)))
            if not self.batch_sizes:  # no trainer said, and later batches will hardly be larger
                self.batch_sizes = (len(x),)
            yield x, y

    def _strength(self, steps_per_epoch: int) -> float:
        """Return lambda = shrinkage / sum of learning rates over the regularised steps."""
        if self.penalty_strength is not None:
            return self.penalty_strength
        first, last = (epoch * steps_per_epoch for epoch in (self._epoch, self.stages.prune_at))
        present = self.optimizer.param_groups[0]["lr"]
        rates = [self.lr_at(step / steps_per_epoch) if self.lr_at else present for step in range(first, last)]
        return self.shrinkage / sum(rates) if sum(rates) > 0 else 0.0

    def _take(self, selection: dict[str, LayerSelection]) -> None:
        self.selection = selection
        self._groups = [PrunedGroups.of(layer.patterns, layer.kept) for layer in selection.values()]
        self._preparation = self.prepare_kernels({n: layer.kept for n, layer in selection.items()}, self.backend)

    def _prune(self) -> None:
        """Convert the layers; from here on only kept weights exist."""
        if self._preparation is not None:
            self._preparation.wait()
        convert(self.model, {n: layer.kept for n, layer in self.selection.items()}, self.optimizer, self.backend)
        self._densities = {name: (layer.kept.density,) * 3 for name, layer in self.selection.items()}
        self._convs, self._groups, self._pruned = {}, [], True

    def _tune(self) -> None:
        """Measure, where asked for; a resumed run has its choices from the checkpoint."""
        if self.tune and self.batch_sizes:
            tune(self.model, (max(self.batch_sizes), *self._image_shape), backend=self.backend)


def _content(selection: Mapping[str, LayerSelection]) -> Iterator[bytes]:
    """Return what identifies a selection, for a hash."""
    for name, layer in selection.items():
        yield f"{name} {layer.patterns.digest()} {layer.kept.digest()}".encode()


def _pack(layer: LayerSelection) -> dict[str, Tensor]:
    """Return tensors that can be saved: indices of all kernels and of the kept ones, and the patterns."""
    return {
        "patterns": layer.patterns.index.cpu(),
        "kept": layer.kept.index.cpu(),
        "pool": layer.kept.pool.masks(),
    }


def _unpack(packed: Mapping[str, Tensor], device: torch.device) -> LayerSelection:
    pool = PatternPool.from_masks(packed["pool"].numpy())
    patterns, kept = (Assignment(packed[key].to(device), pool) for key in ("patterns", "kept"))
    return LayerSelection(patterns, kept)
