"""The gradient of the values in float32 with windows in registers, ready to run: see window_gradient.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cuda import window_layout, window_text, window_tiling
from clicktrain.kernels.cuda.arrays import on_device
from clicktrain.kernels.cuda.finish import add_up
from clicktrain.kernels.cuda.launch import Launcher
from clicktrain.kernels.cuda.region import LANES
from clicktrain.kernels.cuda.window_text import WindowSpec


class WindowGradient:
    """The gradient of the values on one device, ready to run."""

    def __init__(self, layer: Layer, images: int, device: torch.device, launcher: Launcher, spec: WindowSpec) -> None:
        self.layer, self.images, self.launcher, self.spec = layer, images, launcher, spec
        self.text = window_text.unit(spec)
        made = window_layout.programs(layer, spec)
        self._program = [on_device(a, device) for a in (made.words, made.pieces)]
        self._places = on_device(made.places, device)
        self._pieces, self._kernels = made.count, made.kernels
        self._regions = window_tiling.region_count(spec, layer, images)
        self._splits = window_tiling.splits(made.count, self._regions, spec.resident, launcher.limits(device))

    def run(self, x: Tensor, dy: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the gradient, of the given shape (kept_kernels, entries)."""
        layer, spec, words = self.layer, self.spec, self._kernels * self.spec.cells
        partial = torch.empty(self._splits * words + LANES, dtype=torch.float32, device=x.device)
        self.launcher.launch(
            self.text, "window_gradient", self._pieces * self._splits, spec.warps * LANES, spec.shared_bytes,
            (
                _aligned(x), _aligned(dy), partial, *self._program, self.images, layer.channels, layer.filters,
                self._regions, self._pieces, self._splits, self._kernels,
            ),
        )  # fmt: skip
        dvalues = torch.empty(shape, dtype=x.dtype, device=x.device)
        add_up(self.launcher, self.text, partial, dvalues, words, self._splits, self._places, spec.cells)
        return dvalues


def _aligned(tensor: Tensor) -> Tensor:
    """Return the tensor where four neighbouring values can be read at once: views may start anywhere."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
