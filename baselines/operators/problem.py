"""A pruned convolution with its operands: what operators are asked to compute."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clicktrain.assignment import Assignment
from clicktrain.errors import InvalidArgument
from clicktrain.kernels.plan import Plan, plan
from clicktrain.patterns import PRUNED, PatternPool

Function = Literal["forward", "grad_input", "grad_values"]
FUNCTIONS: tuple[Function, ...] = ("forward", "grad_input", "grad_values")

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Problem:
    """One function of one convolution; any mask will do.

    Attributes
    ----------
    function : {"forward", "grad_input", "grad_values"}
        What is asked for: y, the gradient of x, or that of the kept weights.
    x : Tensor, (N, C_in, H, W) float32
        Input.
    dy : Tensor, (N, C_out, H_out, W_out) float32
        Gradient of the output; the forward pass does not read it.
    weight : Tensor, (C_out, C_in, k, k) float32
        The weight, zero where the mask is false.
    mask : Tensor, (C_out, C_in, k, k) bool
        What is kept.
    stride, padding : int
        Same in both directions.

    Raises
    ------
    InvalidArgument
        If a weight that the mask removes is not zero.
    """

    function: Function
    x: Tensor
    dy: Tensor
    weight: Tensor
    mask: Tensor
    stride: int = 1
    padding: int = 0

    def __post_init__(self) -> None:
        if self.mask.shape != self.weight.shape or bool(self.weight[~self.mask].any()):
            raise InvalidArgument("weight: expected zeros wherever the mask is false")

    @property
    def device(self) -> str:
        """Type of the device that the operands are on."""
        return self.x.device.type

    @property
    def kernel_size(self) -> int:
        """Side k of the kernels."""
        return self.weight.shape[-1]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of any of the functions, kept weights only, padding included."""
        return int(self.mask.sum()) * len(self.dy) * self.dy[0, 0].numel()

    @property
    def geometry(self) -> tuple[list[int], list[int]]:
        """Stride and padding as torch's operators take them."""
        return [self.stride] * 2, [self.padding] * 2

    @property
    def matrix(self) -> Tensor:
        """The weight as a matrix (C_out, C_in * k * k)."""
        return self.weight.flatten(1)

    def columns(self) -> Tensor:
        """Return the im2col matrix (C_in * k * k, N * H_out * W_out), in one copy."""
        k, stride = self.kernel_size, self.stride
        padded = F.pad(self.x, [self.padding] * 4).transpose(0, 1)
        windows = padded.unfold(2, k, stride).unfold(3, k, stride)
        return windows.permute(0, 4, 5, 1, 2, 3).reshape(self.matrix.shape[1], -1)

    def rows(self) -> Tensor:
        """Return the output gradient as a matrix (C_out, N * H_out * W_out)."""
        return self.dy.transpose(0, 1).flatten(1)

    def as_images(self, rows: Tensor) -> Tensor:
        """Return a matrix like that of `rows` as a view (N, C_out, H_out, W_out)."""
        n, c, h, w = self.dy.shape
        return rows.view(c, n, h, w).transpose(0, 1)

    def folded(self, columns: Tensor) -> Tensor:
        """Return the sum (N, C_in, H, W) of what a matrix like that of `columns` holds for each pixel (col2im)."""
        n, _, h, w = self.dy.shape
        by_image = columns.view(-1, n, h * w).transpose(0, 1)
        size = (self.x.shape[2], self.x.shape[3])
        return F.fold(by_image, size, self.kernel_size, padding=self.padding, stride=self.stride)

    def dense(self, x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        """Compute the function as torch does, in the type and memory format of the operands given.

        The gradient of the weight is that of all weights.
        """
        if self.function == "forward":
            return F.conv2d(x, weight, None, *self.geometry)
        wanted = [self.function == "grad_input", self.function == "grad_values", False]
        gradients = aten.convolution_backward(
            dy, x, weight, None, *self.geometry, [1, 1], False, [0, 0], 1, wanted
        )  # fmt: skip
        return gradients[wanted.index(True)]  # type: ignore[no-any-return]

    def kept(self, gradient: Tensor) -> Tensor:
        """Return the entries of a dense gradient that the mask keeps, in canonical order, (kept,)."""
        return gradient.contiguous()[self.mask]

    def reference(self) -> Tensor:
        """Return the truth, computed in float64."""
        result = self.dense(self.x.double(), self.dy.double(), self.weight.double())
        return self.kept(result) if self.function == "grad_values" else result

    @cached_property
    def assignment(self) -> Assignment:
        """The mask as pool and pattern of each kernel.

        Raises
        ------
        InvalidArgument
            If no pool of patterns has this mask.
        """
        kernels = self.mask.cpu().flatten(2).flatten(0, 1)
        entries = kernels.sum(1)
        if len(set(entries[entries > 0].tolist())) != 1:
            found = sorted(set(entries.tolist()))
            raise InvalidArgument(f"mask: kernels keep {found} weights, expected the same number in each or none")
        patterns, index = torch.unique(kernels[entries > 0], dim=0, return_inverse=True)
        if len(patterns) > PRUNED:
            raise InvalidArgument(f"mask: {len(patterns)} different patterns, expected at most {PRUNED}")
        chosen = torch.full((len(kernels),), PRUNED, dtype=torch.uint8)
        chosen[entries > 0] = index.to(torch.uint8)
        k = self.kernel_size
        pool = PatternPool.from_masks(patterns.view(-1, k, k).numpy())
        return Assignment(chosen.view(self.mask.shape[:2]), pool)

    @cached_property
    def plan(self) -> Plan:
        """The execution plan of ClickTrain's kernels; raises as `assignment`."""
        return plan(self.assignment, None, tuple(self.x.shape), self.stride, self.padding)

    @cached_property
    def values(self) -> Tensor:
        """The kept weights in canonical order; raises as `assignment`."""
        return self.assignment.gather(self.weight).contiguous()
