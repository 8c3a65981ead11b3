"""PruneTrain (Lym et al., SC 2019): group lasso from the first epoch, and a smaller dense network every few."""

from __future__ import annotations

import copy
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from baselines.shrinking import Shrinking
from clicktrain import distributed
from clicktrain.errors import InvalidArgument
from clicktrain.flops import FLOPS_PER_MAC, layer_costs
from clicktrain.method import Batches

Test = Literal["signed", "magnitude"]

_EPSILON = 1e-8  # under the root, as in the source


class PruneTrain(Shrinking):
    """Train with group lasso on channels, and remove dead channels in regular intervals.

    Source: Lym et al., "PruneTrain" (SC 2019, arXiv 1901.09290) and its code as copied in VictorSuciu/prunetrain.
    The penalty is lambda times the sum of the norms of all input-channel and output-channel groups, convolutions and
    linear layers, but for image and logits; lambda is fixed on the very first batch, so that the penalty is the
    share `ratio` of the loss. Every `every` epochs a channel is dead if all its weights are below `threshold` in every
    layer that shares it (added up in residual joins, or written here and read there); a residual branch in which a
    layer has no channel left is removed. The smaller dense network keeps weights, BatchNorm and momentum.
    Published: SGD 0.1, momentum 0.9, decay 5e-4, batch 128, 182 epochs, x 0.1 at 91 and 136; ratio 0.2, every 10.
    Deviations: no fine-tuning at the end; a network without residual branches cannot lose a whole layer, so its
    strongest channel stays; what a removed branch would still add through its biases is dropped, as in the source.

    Parameters
    ----------
    epochs : int
        Length of the run.
    ratio : float
        Share of the penalty in the first loss, in [0, 1).
    every : int
        Epochs between two reconfigurations.
    threshold : float
        Below it a weight is dead.
    test : {"signed", "magnitude"}
        Whether w < threshold is dead, as the code has it, or |w| < threshold, as the paper does.

    Raises
    ------
    InvalidArgument
        If an option has no meaning; in `setup`, if channels of the model cannot be followed or joined.
    """

    name = "prunetrain"

    def __init__(
        self,
        epochs: int = 182,
        *,
        ratio: float = 0.2,
        every: int = 10,
        threshold: float = 1e-4,
        test: Test = "signed",
    ) -> None:
        super().__init__(epochs)
        if not 0 <= ratio < 1:
            raise InvalidArgument(f"ratio={ratio}: expected a share from 0 to below 1")
        if every < 1:
            raise InvalidArgument(f"every={every}: expected at least 1 epoch")
        if not threshold > 0:
            raise InvalidArgument(f"threshold={threshold}: expected above 0")
        if test not in get_args(Test):
            raise InvalidArgument(f"test={test!r}: expected {' or '.join(get_args(Test))}")
        self.ratio, self.every, self.threshold, self.test = ratio, every, threshold, test
        self.strength: float | None = None
        self._extra_flops = 0

    @property
    def extra_flops(self) -> int:
        """FLOPs of the forward pass in which lambda was fixed."""
        return self._extra_flops

    def setup(self, model: nn.Module, optimizer: Optimizer, example_input: Tensor) -> None:
        """Take the model and find its groups of channels; see `Method.setup`."""
        super().setup(model, optimizer, example_input)
        costs = layer_costs(model, tuple(example_input.shape[1:]))
        self._forward_flops = FLOPS_PER_MAC * sum(cost.macs for cost in costs)

    def on_epoch(self, epoch: int, loader: Batches) -> None:
        """Fix lambda at the very start; reconfigure every few epochs."""
        if self.strength is None:
            self.strength = self._choose_strength(*next(iter(loader)))
        elif epoch % self.every == 0:
            self.reconfigure()

    def penalty(self) -> Tensor:
        """Return lambda times the sum of the norms of all groups."""
        return self.strength * self.lasso() if self.strength else super().penalty()

    def lasso(self) -> Tensor:
        """Return the sum over groups of sqrt(||group||^2 + 1e-8), differentiable in the weights."""
        norms = []
        for name in self.layers:
            square = self.layer(name).weight.square()
            if not self.graph.groups[self.graph.reads[name]].is_image:
                norms.append(self._by_input(name, square).sum(1))
            if not self.graph.groups[self.graph.writes[name]].is_output:
                norms.append(square.flatten(1).sum(1))
        return torch.cat(norms).add(_EPSILON).sqrt().sum()

    def reconfigure(self) -> None:
        """Remove what is dead from the network."""
        alive, strongest = self._alive()
        empty: set[int] = set()
        for number, live in alive.items():
            if not bool(live.any()):
                if self.graph.open_layers({*empty, number}, self.removed) is None:
                    live[strongest[number]] = True  # nothing runs past this layer: it has to stay
                else:
                    empty.add(number)
        left = {number: self.left[number][live.cpu()] for number, live in alive.items()}
        stay = self.graph.open_layers(empty, self.removed)
        assert stay is not None
        removed = set(self.graph.reads) - stay
        self.shrink(left | dict.fromkeys(self._without_layers(removed), torch.arange(0)), removed)

    def state_dict(self) -> dict[str, Any]:
        """Return structure, lambda and counters."""
        return {**super().state_dict(), "strength": self.strength, "extra_flops": self._extra_flops}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`: make the layers as small as they were."""
        super().load_state_dict(state)
        self.strength, self._extra_flops = state["strength"], state["extra_flops"]

    def log(self) -> dict[str, float]:
        """Return the size of the present network, and lambda."""
        return {**super().log(), "penalty_strength": self.strength or 0.0}

    def _choose_strength(self, x: Tensor, y: Tensor) -> float:
        """Return lambda so that the penalty is `ratio` of the loss on a batch; the model is left as it was."""
        self._extra_flops += self._forward_flops * int(distributed.total(len(x)))
        probe = copy.deepcopy(self.model).train()
        with torch.random.fork_rng(), torch.no_grad():
            (loss,) = distributed.averaged([F.cross_entropy(probe(x), y)], len(x))
            return self.ratio * float(loss) / (float(self.lasso()) * (1 - self.ratio))

    def _by_input(self, name: str, values: Tensor) -> Tensor:
        """Return values of a layer's weight as (input channels, all others)."""
        return values.transpose(0, 1).reshape(len(self.left[self.graph.reads[name]]), -1)

    def _alive(self) -> tuple[dict[int, Tensor], dict[int, int]]:
        """Return by group which of its channels live in any layer, and the number of its strongest one."""
        alive, strongest = {}, {}
        for number, group in enumerate(self.graph.groups):
            views = [self.layer(name).weight.detach().flatten(1) for name in group.producers if name in self.layers]
            views += [
                self._by_input(name, self.layer(name).weight.detach())
                for name in group.consumers
                if name in self.layers and not group.is_image
            ]
            if views and not group.is_fixed:
                values = views if self.test == "signed" else [view.abs() for view in views]
                alive[number] = torch.stack([(value >= self.threshold).any(1) for value in values]).any(0)
                strongest[number] = int(torch.stack([view.square().sum(1) for view in views]).sum(0).argmax())
        return alive, strongest

    def _without_layers(self, removed: set[str]) -> list[int]:
        """Return the groups that only removed layers touch."""
        return [
            number
            for number, group in enumerate(self.graph.groups)
            if not group.is_fixed and removed.issuperset([*group.producers, *group.consumers])
        ]
