"""Removing channels for real: smaller dense layers, with their BatchNorm and what the optimizer remembers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from baselines.channels import ChannelGraph
from clicktrain.conversion import replace_parameter
from clicktrain.errors import ClickTrainError, InvalidArgument
from clicktrain.flops import Densities
from clicktrain.method import Method, Phase

Layer = nn.Conv2d | nn.Linear


class RemovedConv2d(nn.Module):
    """What stands for a convolution of a removed residual branch: zeros of the right shape, for nothing.

    Attributes
    ----------
    out_channels : int
        Channels of the output; 0 inside of the branch.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.out_channels = conv.out_channels
        if isinstance(conv.padding, str):
            raise InvalidArgument(f"a convolution with padding={conv.padding!r}: expected it in numbers")
        self._geometry = tuple(zip(conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, any, H, W) to zeros (N, out_channels, H', W')."""
        size = [
            (pixels + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for pixels, (kernel, stride, padding, dilation) in zip(x.shape[2:], self._geometry, strict=True)
        ]
        return x.new_zeros(x.shape[0], self.out_channels, *size)


class Shrinking(Method):
    """Base of methods that make the network smaller; a subclass decides when and by which channels.

    Parameters
    ----------
    epochs : int
        Length of the (first phase of the) run.

    Attributes
    ----------
    graph : ChannelGraph
        Of the dense model.
    left : list of Tensor
        By group: ascending numbers, in the dense model, of the channels that are left.
    removed : set of str
        Layers that are gone.
    """

    recordable = True

    def __init__(self, epochs: int) -> None:
        if epochs < 1:
            raise InvalidArgument(f"epochs={epochs}: expected at least 1")
        self.epochs = epochs
        self.left: list[Tensor] = []
        self.removed: set[str] = set()
        self._shapes: dict[str, torch.Size] = {}

    @property
    def phases(self) -> Sequence[Phase]:
        """One phase, at the run's own settings."""
        return [Phase(self.name, self.epochs)]

    def setup(self, model: nn.Module, optimizer: Optimizer, example_input: Tensor) -> None:
        """Take the model and find its groups of channels; see `Method.setup`."""
        super().setup(model, optimizer, example_input)
        self.graph = ChannelGraph(model)
        self.left = [torch.arange(group.channels) for group in self.graph.groups]
        self._shapes = {name: self.layer(name).weight.shape for name in self.graph.reads}
        self._example = example_input[:1]

    @property
    def layers(self) -> list[str]:
        """Names of the convolutions and linear layers that are left."""
        return [name for name in self.graph.reads if name not in self.removed]

    def layer(self, name: str) -> Layer:
        """Return a layer that is left."""
        layer = self.model.get_submodule(name)
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        return layer

    def masks(self) -> dict[str, Tensor]:
        """Return what is left of each convolution of the dense model that became smaller."""
        masks = {}
        for name, shape in self._shapes.items():
            if len(shape) == 4 and self._share(name) < 1:
                mask = torch.zeros(shape[:2], dtype=torch.bool)
                if name not in self.removed:
                    mask[self.left[self.graph.writes[name]][:, None], self._read(name)] = True
                masks[name] = mask[:, :, None, None].expand(shape).contiguous()
        return masks

    def densities(self) -> Densities:
        """Return by layer the size of the smaller one against the dense one: all three passes shrink alike."""
        shares = {name: self._share(name) for name in self._shapes}
        return {name: (share, share, share) for name, share in shares.items() if share < 1}

    def log(self) -> dict[str, float]:
        """Return parameters and layers of the present network."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {"parameters": parameters, "removed_layers": len(self.removed)}

    def shrink(self, left: Mapping[int, Tensor], removed: Iterable[str] = ()) -> None:
        """Keep only some channels, and remove whole layers; the network is then run once to prove that it works.

        Parameters
        ----------
        left : mapping
            Group -> ascending numbers, in the dense model, of the channels that stay, from among those that are
            left; other groups stay as they are.
        removed : iterable of str
            Convolutions to remove, with the BatchNorm behind each; see `ChannelGraph.open_layers`.
        """
        for name in set(removed) - self.removed:
            self._remove(name)
        before = self.left
        self.left = [left.get(number, old) for number, old in enumerate(before)]
        positions = [torch.searchsorted(old, new) for old, new in zip(before, self.left, strict=True)]
        for number, group in enumerate(self.graph.groups):
            if len(self.left[number]) == len(before[number]):
                continue
            for name in group.producers:
                self._slice_outputs(name, positions[number])
            for name in group.consumers:
                self._slice_inputs(name, positions[number], len(before[number]))
            for name in group.norms:
                self._slice_norm(name, positions[number])
        self._check()

    def state_dict(self) -> dict[str, Any]:
        """Return the structure."""
        return {"left": list(self.left), "removed": sorted(self.removed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`: make the layers as small as they were."""
        self.shrink(dict(enumerate(state["left"])), state["removed"])

    def _share(self, name: str) -> float:
        if name in self.removed:
            return 0.0
        outputs, inputs = self._shapes[name][:2]
        return len(self.left[self.graph.writes[name]]) * len(self._read(name)) / (outputs * inputs)

    def _read(self, name: str) -> Tensor:
        """Return the numbers of the input channels (or neurons) of the dense layer that are left."""
        number, inputs = self.graph.reads[name], self._shapes[name][1]
        group = self.graph.groups[number]
        return torch.arange(inputs) if group.is_image else _spread(self.left[number], inputs // group.channels)

    def _remove(self, name: str) -> None:
        conv = self.layer(name)
        if not isinstance(conv, nn.Conv2d):
            raise InvalidArgument(f"layer {name}: only convolutions can be removed whole")
        self._put(name, RemovedConv2d(conv))
        if norm := self.graph.norm_of.get(name):
            self._put(norm, nn.Identity())
        self.removed.add(name)

    def _put(self, name: str, stand_in: nn.Module) -> None:
        """Replace a module by one without parameters, and let the optimizer forget the old ones."""
        gone = list(self.model.get_submodule(name).parameters())
        self.model.set_submodule(name, stand_in)
        for group in self.optimizer.param_groups:
            group["params"] = [kept for kept in group["params"] if all(kept is not parameter for parameter in gone)]
        for parameter in gone:
            self.optimizer.state.pop(parameter, None)

    def _slice_outputs(self, name: str, rows: Tensor) -> None:
        layer = self.model.get_submodule(name)
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            self._replace(layer, "weight", lambda tensor: tensor[rows.to(tensor.device)])
            self._replace(layer, "bias", lambda tensor: tensor[rows.to(tensor.device)])
        setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(rows))

    def _slice_inputs(self, name: str, columns: Tensor, before: int) -> None:
        layer = self.model.get_submodule(name)
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            spread = _spread(columns, layer.weight.shape[1] // before)
            self._replace(layer, "weight", lambda tensor: tensor[:, spread.to(tensor.device)])
            setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", len(spread))

    def _slice_norm(self, name: str, rows: Tensor) -> None:
        norm = self.model.get_submodule(name)
        if isinstance(norm, nn.Identity):  # went with the layer before it
            return
        if not len(rows):
            self._put(name, nn.Identity())
            return
        assert isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d))
        for key in ("weight", "bias"):
            self._replace(norm, key, lambda tensor: tensor[rows.to(tensor.device)])
        for key in ("running_mean", "running_var"):
            if (buffer := getattr(norm, key)) is not None:
                setattr(norm, key, buffer[rows.to(buffer.device)])
        norm.num_features = len(rows)

    def _replace(self, module: nn.Module, key: str, take: Callable[[Tensor], Tensor]) -> None:
        """Put a smaller parameter in the place of one, in the module and in the optimizer."""
        old = getattr(module, key)
        if old is None:
            return
        new = nn.Parameter(_like(take(old.detach()), old), old.requires_grad)
        setattr(module, key, new)
        replace_parameter(self.optimizer, old, new, lambda state: _like(take(state), old))

    def _check(self) -> None:
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.no_grad():
                self.model(self._example)
        except RuntimeError as error:
            raise ClickTrainError(f"{self.name}: the shrunk network does not run: {error}") from error
        finally:
            for module, mode in modes.items():
                module.training = mode


def _spread(channels: Tensor, factor: int) -> Tensor:
    """Return the numbers of the neurons that flattened channels became, `factor` of each."""
    return (channels[:, None] * factor + torch.arange(factor)).flatten()


def _like(tensor: Tensor, model: Tensor) -> Tensor:
    """Return a copy in the memory format of another tensor."""
    channels_last = model.ndim == 4 and not model.is_contiguous()
    return tensor.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
