"""The tensor-core path of the CUDA backend: plans whose filters share channels and patterns in blocks of 16.

`applies` says where it serves; see tensor.cuh for how it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from clicktrain.kernels.cuda import tensor_layout as layout
from clicktrain.kernels.cuda import tensor_text as text
from clicktrain.kernels.cuda import tensor_tuning as tuning
from clicktrain.kernels.cuda.arrays import on_device
from clicktrain.kernels.cuda.codegen import Dtype
from clicktrain.kernels.cuda.epilogue import Epilogue
from clicktrain.kernels.cuda.finish import add_up
from clicktrain.kernels.cuda.launch import Launcher
from clicktrain.kernels.cuda.region import LANES
from clicktrain.kernels.cuda.tensor_estimate import row_bytes, walks_and_splits
from clicktrain.kernels.cuda.tensor_geometry import Geometry
from clicktrain.kernels.cuda.tensor_text import FILTERS, IMAGES, Function, TensorSpec
from clicktrain.kernels.cuda.tiling import Limits
from clicktrain.kernels.plan import Plan

OLDEST = (8, 0)
"""Oldest compute capability that multiplies bfloat16 16 x 16 by 16 x 8."""


def applies(plan: Plan, dtype: Dtype, device: torch.device) -> bool:
    """Return whether tensor cores serve a plan: 16-bit operands, 8 images or more, blocks of 16 equal filters."""
    filters, channels = plan.index.shape
    if dtype == "float32" or plan.input_shape[0] < IMAGES or filters % FILTERS or not _capable(device):
        return False
    by_block = plan.index.view(-1, FILTERS, channels)
    return bool((by_block == by_block[:, :1]).all())


def is_batch_last(images: Tensor) -> bool:
    """Return whether images (N, C, H, W) lie in memory as [C][H][W][N], and not as NCHW."""
    return images.dim() == 4 and not images.is_contiguous() and images.permute(1, 2, 3, 0).is_contiguous()


def as_batch_last(images: Tensor) -> Tensor:
    """Return the same images in memory as [C][H][W][N], where neighbouring images are neighbours: see `backend`."""
    return images.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def units(
    plan: Plan,
    dtype: Dtype,
    limits: Limits,
    candidates: int | None,
    batch_last: bool,
    functions: Collection[str] = tuning.FUNCTIONS,
) -> list[str]:
    """Return the texts among which `tune` chooses, one where it has chosen; or so many of each pass, the likeliest."""
    found = list[TensorSpec]()
    for function in (function for function in tuning.FUNCTIONS if function in functions):
        context = function, plan, dtype, limits, batch_last
        if candidates is None and tuning.settled(*context):
            found.append(tuning.choose(*context))
        else:
            found += tuning.likely(*context)[:candidates]
    return [text.unit(spec) for spec in found]


def tune(
    plan: Plan,
    dtype: Dtype,
    launcher: Launcher,
    operands: tuple[Tensor, Tensor, Tensor],
    epilogue: Epilogue,
    functions: Collection[str],
) -> None:
    """Measure in which way passes are fastest for x, values and dy, in their format and on their device."""
    x, values, dy = operands
    batch_last = is_batch_last(x)
    context = plan, dtype, x.device, launcher, batch_last
    runs: dict[Function, Callable[[TensorSpec], Callable[[], object]]] = {
        "forward": lambda s: partial(Forward(*context, s).run, x, values, plan.output_shape, epilogue),
        "grad_input": lambda s: partial(InputGradient(*context, s).run, dy, values, plan.input_shape, epilogue),
        "grad_values": lambda s: partial(ValuesGradient(*context, s).run, x, dy, plan.values_shape),
    }
    for function, run in runs.items():
        if function in functions:
            tuning.tune(function, plan, dtype, launcher.limits(x.device), batch_last, run)


@cache
def _capable(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= OLDEST


class Forward:
    """The forward pass on one device, ready to run."""

    def __init__(
        self, plan: Plan, dtype: Dtype, device: torch.device, launcher: Launcher, batch_last: bool = False,
        spec: TensorSpec | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.launcher = plan, launcher
        limits = launcher.limits(device)
        self.spec = spec or tuning.choose("forward", plan, dtype, limits, batch_last)
        self.text = text.unit(self.spec)
        made = layout.rows(plan, self.spec.input, self.spec.blocks)
        self._program = [on_device(a, device) for a in (made.offsets, made.places, made.step_strides, made.bounds)]
        self._most_steps = layout.most_steps(plan, self.spec.input.channels, self.spec.blocks)[self.spec.all_rows]
        self._shared = self.spec.shared_bytes + row_bytes(self.spec, plan)
        self._sets = len(made.bounds)
        self._walks, self._splits = walks_and_splits(self._sets, self.spec, plan, limits)
        self._rects = Geometry.forward(plan).rects(self.spec.rect)

    def run(self, x: Tensor, values: Tensor, shape: tuple[int, ...], epilogue: Epilogue) -> Tensor:
        """Return the outputs, of the given shape."""
        y = _empty(shape, x, self.spec.batch_last)
        spec, (images, channels, *in_size), (_, filters, *out_size) = self.spec, self.plan.input_shape, shape
        residual = None if epilogue.residual is None else _aligned(epilogue.residual, spec.batch_last)
        self.launcher.launch(
            self.text, "tensor_forward", self._sets * self._splits, spec.warps * LANES, self._shared,
            (
                _aligned(x), _aligned(values), y, *self._program, epilogue.scale, epilogue.shift, residual,
                int(epilogue.relu), images, channels, *in_size, filters, *out_size, *self._rects,
                _parts(channels, spec.input.channels), self._sets, self._most_steps, self._walks, self._splits,
            ),
        )  # fmt: skip
        return y


class InputGradient:
    """The input gradient on one device, ready to run."""

    def __init__(
        self, plan: Plan, dtype: Dtype, device: torch.device, launcher: Launcher, batch_last: bool = False,
        spec: TensorSpec | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.launcher = plan, launcher
        self.spec = spec or tuning.choose("grad_input", plan, dtype, launcher.limits(device), batch_last)
        self.text = text.unit(self.spec)
        made = layout.input_jobs(plan, self.spec)
        self._program = [on_device(a, device) for a in (made.words, made.bounds, made.kernels, made.strides)]
        self._kernels, self._jobs = int(made.kernels[..., 1].max()), int(np.diff(made.bounds).max())
        self._shared = self.spec.shared_bytes + self.spec.weight_bytes(self._kernels) + self.spec.job_bytes(self._jobs)
        self._rects = Geometry.transposed(plan).rects(self.spec.rect)

    def run(self, dy: Tensor, values: Tensor, shape: tuple[int, ...], epilogue: Epilogue) -> Tensor:
        """Return the gradient, of the given shape; there is no epilogue."""
        dx = _empty(shape, dy, self.spec.batch_last)
        spec, (images, channels, *in_size), (_, filters, *out_size) = self.spec, shape, self.plan.output_shape
        sets = _parts(channels, spec.channels)
        blocks = sets * self._rects[0] * self._rects[1] * _parts(images, IMAGES * spec.input.groups)
        self.launcher.launch(
            self.text, "tensor_input", blocks, spec.warps * LANES, self._shared,
            (
                _aligned(dy), _aligned(values), dx, *self._program, images, channels, *in_size, filters, *out_size,
                *self._rects, sets, self._kernels, self._jobs,
            ),
        )  # fmt: skip
        return dx


class ValuesGradient:
    """The gradient of the values on one device, ready to run."""

    def __init__(
        self, plan: Plan, dtype: Dtype, device: torch.device, launcher: Launcher, batch_last: bool = False,
        spec: TensorSpec | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.launcher = plan, launcher
        limits = launcher.limits(device)
        self.spec = spec or tuning.choose("grad_values", plan, dtype, limits, batch_last)
        self.text = text.unit(self.spec)
        made = layout.rows(plan, self.spec.input)
        jobs, pieces = layout.value_jobs(made.bounds, self.spec)
        self._program = [on_device(a, device) for a in (made.offsets, made.places, made.strides, jobs, pieces)]
        self._pieces = len(pieces)
        self._walks, self._splits = walks_and_splits(self._pieces, self.spec, plan, limits)
        self._rects = Geometry.forward(plan).rects(self.spec.rect)

    def run(self, x: Tensor, dy: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the gradient, of the given shape (kept_kernels, entries)."""
        spec, count, shares = self.spec, shape[0] * shape[1], self._splits * self.spec.parts
        (images, channels, *in_size), (_, filters, *out_size) = self.plan.input_shape, self.plan.output_shape
        sums = torch.empty(shares * count, dtype=torch.float32, device=x.device)
        dvalues = torch.empty(shape, dtype=x.dtype, device=x.device)
        self.launcher.launch(
            self.text, "tensor_values", self._pieces * self._splits, spec.warps * LANES, spec.shared_bytes,
            (
                _aligned(x), _aligned(dy), sums, *self._program, images, channels, *in_size, filters, *out_size,
                *self._rects, self._walks, self._pieces, self._splits, count,
            ),
        )  # fmt: skip
        add_up(self.launcher, self.text, sums, dvalues, count, shares)
        return dvalues


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)


def _empty(shape: tuple[int, ...], like: Tensor, batch_last: bool) -> Tensor:
    """Return new images in a format."""
    if not batch_last:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    n, *rest = shape
    return torch.empty((*rest, n), dtype=like.dtype, device=like.device).permute(3, 0, 1, 2)


def _aligned(tensor: Tensor, batch_last: bool = False) -> Tensor:
    """Return the tensor where eight neighbouring values can be read at once: views may start anywhere."""
    if batch_last and not tensor.permute(1, 2, 3, 0).is_contiguous():
        tensor = as_batch_last(tensor)
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
