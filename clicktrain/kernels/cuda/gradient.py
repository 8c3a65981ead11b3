"""The gradient of the values, ready to run: see gradient.cuh, and `window` for the other kind."""

from __future__ import annotations

import torch
from torch import Tensor

from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cuda import codegen, gradient_tiling, layout, tiling, tuning, window_text
from clicktrain.kernels.cuda.arrays import on_device
from clicktrain.kernels.cuda.codegen import Dtype, GradientSpec
from clicktrain.kernels.cuda.finish import add_up
from clicktrain.kernels.cuda.launch import Launcher
from clicktrain.kernels.cuda.region import LANES, groups
from clicktrain.kernels.cuda.tuning import AnyGradientSpec
from clicktrain.kernels.cuda.window import WindowGradient
from clicktrain.kernels.cuda.window_text import WindowSpec


class Gradient:
    """The gradient of the values on one device."""

    def __init__(self, layer: Layer, images: int, device: torch.device, launcher: Launcher, spec: GradientSpec) -> None:
        self.layer, self.images, self.launcher, self.spec = layer, images, launcher, spec
        limits = launcher.limits(device)
        self.text = codegen.unit(self.spec)
        made = layout.tasks(layer, self.spec)
        self._tasks, self._pieces = on_device(made.words, device), on_device(made.pieces, device)
        self._piece_count = len(made.pieces)
        patches = -(-images // self.spec.images)
        self._regions = groups(self.spec.x.lanes, tiling.tile_count(layer.out_size, self.spec.tile), patches)
        self._grid = tiling.grid(layer, self.spec.tile, self.spec.x)
        self._shared = gradient_tiling.shared_bytes(self.spec)
        self._splits = gradient_tiling.splits(self._piece_count, self._regions, self.spec.resident, limits)

    def run(self, x: Tensor, dy: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the gradient, of the given shape (kept_kernels, entries)."""
        layer, spec, count = self.layer, self.spec, shape[0] * shape[1]
        partial = torch.empty(self._splits * count, dtype=torch.float32, device=x.device)
        dvalues = torch.empty(shape, dtype=x.dtype, device=x.device)
        self.launcher.launch(
            self.text, "gradient", self._piece_count * self._splits, spec.warps * LANES, self._shared,
            (
                x, dy, partial, self._tasks, self._pieces, self.images, layer.channels, *layer.in_size, layer.filters,
                *layer.out_size, *self._grid, self._regions, self._piece_count,
                self._splits, shape[0],
            ),
        )  # fmt: skip
        add_up(self.launcher, self.text, partial, dvalues, count, self._splits)
        return dvalues


def lay_out(
    layer: Layer, images: int, dtype: Dtype, device: torch.device, launcher: Launcher,
    spec: AnyGradientSpec | None = None,
) -> Gradient | WindowGradient:  # fmt: skip
    """Return the gradient of the values, ready to run; of the kind that the specification is for."""
    spec = spec or tuning.gradient_spec(layer, images, dtype, launcher.limits(device))
    if isinstance(spec, WindowSpec):
        return WindowGradient(layer, images, device, launcher, spec)
    return Gradient(layer, images, device, launcher, spec)


def text(spec: AnyGradientSpec) -> str:
    """Return the text of a gradient of the values of either kind."""
    return window_text.unit(spec) if isinstance(spec, WindowSpec) else codegen.unit(spec)
