"""A convolution pass, ready to run: see convolution.cuh."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cuda import codegen, layout, tiling, tuning
from clicktrain.kernels.cuda.arrays import on_device
from clicktrain.kernels.cuda.codegen import ConvolutionSpec, Dtype
from clicktrain.kernels.cuda.epilogue import NO_EPILOGUE, Epilogue
from clicktrain.kernels.cuda.launch import Launcher
from clicktrain.kernels.cuda.region import LANES


class Convolution:
    """A convolution pass on one device: the forward pass, or the input gradient by the transposed layer."""

    def __init__(
        self, layer: Layer, images: int, dtype: Dtype, device: torch.device, launcher: Launcher,
        spec: ConvolutionSpec | None = None,
    ) -> None:  # fmt: skip
        self.layer, self.images, self.launcher = layer, images, launcher
        self.spec = spec or tuning.convolution_spec(layer, images, dtype, launcher.limits(device))
        self.text, self._fused_text = text(self.spec), text(self.spec, fused=True)
        made = layout.program(layer, self.spec)
        self._words, self._bounds = on_device(made.words, device), on_device(made.bounds, device)
        self._channels = on_device(made.channels, device)
        self._gather, self._filter_of_slot = on_device(made.gather, device), on_device(made.filter_of_slot, device)
        self._weight_words, self._program_words = -(-made.most_weights // 4) * 4, made.most_words
        self._shared = tiling.shared_bytes(self.spec, self._weight_words, self._program_words)
        self._chunks = -(-layer.channels // self.spec.channels)
        self._filter_blocks = len(made.filter_of_slot) // self.spec.filters
        self._regions = tiling.region_count(self.spec, layer, images)
        self._grid = tiling.grid(layer, self.spec.tile, self.spec.region)

    def run(self, x: Tensor, values: Tensor, shape: tuple[int, ...], epilogue: Epilogue) -> Tensor:
        """Return the outputs, of the given shape."""
        y = torch.empty(shape, dtype=x.dtype, device=x.device)
        if not y.numel():
            return y
        layer, spec = self.layer, self.spec
        code = self.text if epilogue is NO_EPILOGUE else self._fused_text
        self.launcher.launch(
            code, "convolve", self._regions * self._filter_blocks, spec.warps * LANES, self._shared,
            (
                x, values, y, self._words, self._gather, self._bounds, self._channels, self._filter_of_slot,
                epilogue.scale, epilogue.shift, epilogue.residual, int(epilogue.relu), self.images, layer.channels,
                *layer.in_size, layer.filters, *layer.out_size, *self._grid, self._chunks,
                self._filter_blocks, self._weight_words, self._program_words,
            ),
        )  # fmt: skip
        return y


def text(spec: ConvolutionSpec, fused: bool = False) -> str:
    """Return the text of a pass; `fused`: with an epilogue."""
    return codegen.unit(replace(spec, fused=fused))
