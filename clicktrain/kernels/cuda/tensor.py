"""The tensor-core path of the CUDA backend: plans whose filters share channels and patterns in blocks of 16.

`applies` says where it serves; see tensor.cuh for how it computes.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clicktrain.kernels.cuda import tensor_layout as layout
from clicktrain.kernels.cuda import tensor_text as text
from clicktrain.kernels.cuda import tensor_tiling as tiling
from clicktrain.kernels.cuda.codegen import Dtype
from clicktrain.kernels.cuda.launch import Launcher
from clicktrain.kernels.cuda.region import LANES
from clicktrain.kernels.cuda.tensor_estimate import value_splits
from clicktrain.kernels.cuda.tensor_geometry import Geometry
from clicktrain.kernels.cuda.tensor_text import FILTERS, IMAGES, TensorSpec
from clicktrain.kernels.cuda.tiling import Limits
from clicktrain.kernels.plan import Plan

if TYPE_CHECKING:
    from clicktrain.kernels.cuda.backend import Epilogue

FINISH_THREADS = 256
OLDEST = (8, 0)
"""Oldest compute capability that multiplies bfloat16 16 x 16 by 16 x 8."""


def applies(plan: Plan, dtype: Dtype, device: torch.device) -> bool:
    """Return whether tensor cores serve a plan: 16-bit operands, 8 images or more, blocks of 16 equal filters."""
    filters, channels = plan.index.shape
    if dtype == "float32" or plan.input_shape[0] < IMAGES or filters % FILTERS or not _capable(device):
        return False
    by_block = plan.index.view(-1, FILTERS, channels)
    return bool((by_block == by_block[:, :1]).all())


def units(plan: Plan, dtype: Dtype, limits: Limits) -> list[str]:
    """Return the texts of the three passes."""
    makers = tiling.forward_spec, tiling.input_spec, tiling.values_spec
    return [text.unit(make(plan, dtype, limits)) for make in makers]


@cache
def _capable(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= OLDEST


class Forward:
    """The forward pass on one device, ready to run."""

    def __init__(self, plan: Plan, dtype: Dtype, device: torch.device, launcher: Launcher) -> None:
        self.plan, self.launcher = plan, launcher
        self.spec: TensorSpec = tiling.forward_spec(plan, dtype, launcher.limits(device))
        self.text = text.unit(self.spec)
        made = layout.rows(plan, self.spec.input)
        self._program = [_on(a, device) for a in (made.offsets, made.places, made.bounds, made.strides)]
        self._rects = Geometry.forward(plan).rects(self.spec.rect)

    def run(self, x: Tensor, values: Tensor, shape: tuple[int, ...], epilogue: Epilogue) -> Tensor:
        """Return the outputs, of the given shape."""
        y = torch.empty(shape, dtype=x.dtype, device=x.device)
        spec, (images, channels, *in_size), (_, filters, *out_size) = self.spec, self.plan.input_shape, shape
        sets = _parts(filters, FILTERS * spec.blocks)
        blocks = sets * self._rects[0] * self._rects[1] * _parts(images, IMAGES * spec.input.groups)
        residual = None if epilogue.residual is None else _aligned(epilogue.residual)
        self.launcher.launch(
            self.text, "tensor_forward", blocks, spec.warps * LANES, spec.shared_bytes,
            (
                _aligned(x), _aligned(values), y, *self._program, epilogue.scale, epilogue.shift, residual,
                int(epilogue.relu), images, channels, *in_size, filters, *out_size, *self._rects,
                _parts(channels, spec.input.channels), sets,
            ),
        )  # fmt: skip
        return y


class InputGradient:
    """The input gradient on one device, ready to run."""

    def __init__(self, plan: Plan, dtype: Dtype, device: torch.device, launcher: Launcher) -> None:
        self.plan, self.launcher = plan, launcher
        self.spec: TensorSpec = tiling.input_spec(plan, dtype, launcher.limits(device))
        self.text = text.unit(self.spec)
        made = layout.input_jobs(plan, self.spec)
        self._program = [_on(a, device) for a in (made.taps, made.words, made.bounds, made.kernels, made.strides)]
        self._kernels = int(made.kernels[..., 1].max())
        self._rects = Geometry.transposed(plan).rects(self.spec.rect)

    def run(self, dy: Tensor, values: Tensor, shape: tuple[int, ...], epilogue: Epilogue) -> Tensor:
        """Return the gradient, of the given shape; there is no epilogue."""
        dx = torch.empty(shape, dtype=dy.dtype, device=dy.device)
        spec, (images, channels, *in_size), (_, filters, *out_size) = self.spec, shape, self.plan.output_shape
        sets = _parts(channels, spec.channels)
        blocks = sets * self._rects[0] * self._rects[1] * _parts(images, IMAGES * spec.input.groups)
        self.launcher.launch(
            self.text, "tensor_input", blocks, spec.warps * LANES, spec.shared_bytes + spec.weight_bytes(self._kernels),
            (
                _aligned(dy), _aligned(values), dx, *self._program, images, channels, *in_size, filters, *out_size,
                *self._rects, sets, self._kernels,
            ),
        )  # fmt: skip
        return dx


class ValuesGradient:
    """The gradient of the values on one device, ready to run."""

    def __init__(self, plan: Plan, dtype: Dtype, device: torch.device, launcher: Launcher) -> None:
        self.plan, self.launcher = plan, launcher
        limits = launcher.limits(device)
        self.spec: TensorSpec = tiling.values_spec(plan, dtype, limits)
        self.text = text.unit(self.spec)
        made = layout.rows(plan, self.spec.input)
        jobs, pieces = layout.value_jobs(made.bounds, self.spec)
        self._program = [_on(a, device) for a in (made.offsets, made.places, made.strides, jobs, pieces)]
        self._pieces = len(pieces)
        self._walks, self._splits = value_splits(self._pieces, self.spec, plan, limits)
        self._rects = Geometry.forward(plan).rects(self.spec.rect)

    def run(self, x: Tensor, dy: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the gradient, of the given shape (kept_kernels, entries)."""
        spec, count, shares = self.spec, shape[0] * shape[1], self._splits * self.spec.parts
        (images, channels, *in_size), (_, filters, *out_size) = self.plan.input_shape, self.plan.output_shape
        partial = torch.empty(shares * count, dtype=torch.float32, device=x.device)
        dvalues = torch.empty(shape, dtype=x.dtype, device=x.device)
        self.launcher.launch(
            self.text, "tensor_values", self._pieces * self._splits, spec.warps * LANES, spec.shared_bytes,
            (
                _aligned(x), _aligned(dy), partial, *self._program, images, channels, *in_size, filters, *out_size,
                *self._rects, self._walks, self._pieces, self._splits, count,
            ),
        )  # fmt: skip
        blocks = _parts(count, FINISH_THREADS)
        self.launcher.launch(self.text, "tensor_finish", blocks, FINISH_THREADS, 0, (partial, dvalues, count, shares))
        return dvalues


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)


def _on(array: NDArray[np.int32], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array).ravel()).to(device)


def _aligned(tensor: Tensor) -> Tensor:
    """Return the tensor where eight neighbouring values can be read at once: views may start anywhere."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
