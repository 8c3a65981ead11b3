"""Convolutions that compute with masked weights while the dense ones beneath go on learning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from baselines.masking import Masked

Conv = TypeVar("Conv", bound=nn.Conv2d)


class MaskedConv2d(nn.Conv2d):
    """A convolution with `weight * mask`; its gradient reaches every weight as if there were no mask.

    Attributes
    ----------
    mask : Tensor, (C_out, C_in, k, k) bool
        What the convolution computes with. Not part of the state: the method that sets it keeps it.
    """

    mask: Tensor

    @classmethod
    def of(cls, conv: nn.Conv2d) -> MaskedConv2d:
        """Make one that has the very parameters of a dense convolution, nothing masked."""
        layer = _over_the_parameters_of(conv, cls)
        layer.register_buffer("mask", torch.ones_like(conv.weight, dtype=torch.bool), persistent=False)
        return layer

    def dense(self) -> nn.Conv2d:
        """Return an ordinary convolution with zeros where this one is masked, over the same parameter."""
        with torch.no_grad():
            self.weight.masked_fill_(~self.mask, 0.0)
        return _over_the_parameters_of(self, nn.Conv2d)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H', W')."""
        weight: Tensor = _StraightThrough.apply(self.weight, self.mask)  # type: ignore[no-untyped-call]
        return self._conv_forward(x, weight, self.bias)  # type: ignore[no-any-return]


def _over_the_parameters_of(conv: nn.Conv2d, kind: type[Conv]) -> Conv:
    """Return a convolution of a kind that has the geometry and the very parameters of another."""
    layer = kind(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        bias=conv.bias is not None,
        device="meta",
    )
    layer.weight, layer.bias = conv.weight, conv.bias
    return layer


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


class SoftMasked(Masked):
    """Base of methods whose masked-out weights keep learning, so that they can return.

    Forward and grad-input pass run on kept weights, the grad-weight pass is dense.
    """

    def setup(self, model: nn.Module, optimizer: Optimizer, example_input: Tensor) -> None:
        """Take the model and put masked convolutions in; see `Method.setup`."""
        super().setup(model, optimizer, example_input)
        self._layers = {name: MaskedConv2d.of(conv) for name, conv in self._convs.items()}
        for name, layer in self._layers.items():
            model.set_submodule(name, layer)
        self._convs = dict(self._layers)

    def after_backward(self) -> None:
        """Leave the gradients dense."""

    def adopt(self, masks: Mapping[str, Tensor]) -> None:
        """Compute with these masks from now on."""
        super().adopt(masks)
        self._masks = {name: self._layers[name].mask.copy_(mask) for name, mask in self._masks.items()}
        self._densities = {name: (share, share, 1.0) for name, (share, _, _) in self._densities.items()}

    def finish(self) -> nn.Module:
        """Return the model with ordinary convolutions, the masked-out weights zero."""
        model = super().finish()
        for name, layer in self._layers.items():
            model.set_submodule(name, layer.dense())
        return model
