"""One convolution on strips of images, the form in which compiled networks keep activations of few images."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .optional import need


class StripConvolution:
    """A forward pass from strips to strips: what a strip reads beyond its edge it takes from the other lanes.

    Parameters
    ----------
    plan : clicktrain.kernels.Plan
        The layer, with fewer than eight images.

    Raises
    ------
    NotImplementedError
        Where there are no compiled networks: asv skips the benchmark.
    """

    def __init__(self, plan: Any) -> None:
        layout, layers = need("clicktrain.deploy.layout"), need("clicktrain.kernels.cpu.layer")
        self._function, self._memory = (
            need("clicktrain.kernels.cpu.library:function"),
            need("clicktrain.kernels.cpu.memory"),
        )
        self._plan, images = plan, plan.input_shape[0]
        layer = layers.Layer.forward(plan)
        forms = layout.windowed(layer.in_size, layer.out_size, layer.stride, images)
        choice = need("clicktrain.kernels.cpu.tuning:choice_for")(
            layout.layer_on(layer, forms), forms.target.blocks(images)
        )
        self._pass = layout.prepare_on(layer, forms, images, choice)
        self._source = forms.source.lanes(images, layer.channels, layer.in_size)
        self._target = forms.target.lanes(images, layer.filters, layer.out_size)

    def pack(self, x: Tensor) -> Tensor:
        """Return images (N, C_in, H, W) as strips."""
        xs = self._empty(self._source)
        self._call("pack", ctypes.addressof(self._source), x, xs)
        return xs

    def unpack(self, ys: Tensor) -> Tensor:
        """Return the strips of a result as images (N, C_out, H_out, W_out)."""
        y: Tensor = self._memory.empty(*self._plan.output_shape)
        self._call("unpack", ctypes.addressof(self._target), ys, y)
        return y

    def __call__(self, xs: Tensor, values: Tensor) -> Tensor:
        """Convolve strips."""
        ys = self._empty(self._target)
        self._call("convolve", self._pass.address, xs, values, ys)
        return ys

    def _empty(self, lanes: Any) -> Tensor:
        return self._memory.empty(lanes.blocks, lanes.channels, lanes.lane_h, lanes.lane_w, 8)  # type: ignore[no-any-return]

    def _call(self, name: str, address: int, *tensors: Tensor) -> None:
        self._function(name)(address, *(tensor.data_ptr() for tensor in tensors), torch.get_num_threads())
