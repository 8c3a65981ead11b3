"""The layers, compressions, pools and goals that every benchmark measures.

Channels and sizes are those of the networks' 3x3 convolutions (and of ResNet-50's 1x1 ones), each shape once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import clicktrain


@dataclass(frozen=True)
class LayerShape:
    """One convolution without sparsity and batch size.

    Attributes
    ----------
    network, layer : str
        Where it is from.
    in_channels, out_channels : int
        C_in and C_out.
    size : int or (int, int)
        Height and width of the input in pixels.
    kernel_size, stride, padding : int
        Same in both directions.
    """

    network: str
    layer: str
    in_channels: int
    out_channels: int
    size: tuple[int, int]
    kernel_size: int = 3
    stride: int = 1
    padding: int = 1

    @property
    def name(self) -> str:
        """Unique name."""
        return f"{self.network}.{self.layer}"

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        height, width = ((s + 2 * self.padding - self.kernel_size) // self.stride + 1 for s in self.size)
        return height, width

    def macs(self, batch: int) -> int:
        """Return the multiply-accumulates of the dense convolution of a batch."""
        height, width = self.output_size
        return batch * self.out_channels * self.in_channels * self.kernel_size**2 * height * width


def _square(network: str, layer: str, c_in: int, c_out: int, size: int, stride: int = 1, kernel: int = 3) -> LayerShape:
    return LayerShape(network, layer, c_in, c_out, (size, size), kernel, stride, kernel // 2)


VGG13 = (
    _square("vgg13", "64x32", 64, 64, 32),
    _square("vgg13", "64-128x16", 64, 128, 16),
    _square("vgg13", "128x16", 128, 128, 16),
    _square("vgg13", "128-256x8", 128, 256, 8),
    _square("vgg13", "256x8", 256, 256, 8),
    _square("vgg13", "256-512x4", 256, 512, 4),
    _square("vgg13", "512x4", 512, 512, 4),
    _square("vgg13", "512x2", 512, 512, 2),
)
"""VGG-13 on 32x32 images, all but the first layer."""

RESNET32 = (
    _square("resnet32", "128x16", 128, 128, 16),
    _square("resnet32", "256x8", 256, 256, 8),
    _square("resnet32", "512x4", 512, 512, 4),
    _square("resnet32", "64-128x32/2", 64, 128, 32, 2),
    _square("resnet32", "128-256x16/2", 128, 256, 16, 2),
    _square("resnet32", "256-512x8/2", 256, 512, 8, 2),
)
"""The released code's ResNet-32 on 32x32 images."""

RESNET18 = (
    _square("resnet18", "64x56", 64, 64, 56),
    _square("resnet18", "128x28", 128, 128, 28),
    _square("resnet18", "256x14", 256, 256, 14),
    _square("resnet18", "512x7", 512, 512, 7),
    _square("resnet18", "64-128x56/2", 64, 128, 56, 2),
    _square("resnet18", "128-256x28/2", 128, 256, 28, 2),
    _square("resnet18", "256-512x14/2", 256, 512, 14, 2),
)
"""ResNet-18 (and the 3x3 layers of ResNet-50) on 224x224 images."""

RESNET50_POINTWISE = (
    _square("resnet50", "256-64x56k1", 256, 64, 56, kernel=1),
    _square("resnet50", "512-128x28k1", 512, 128, 28, kernel=1),
    _square("resnet50", "256-1024x14k1", 256, 1024, 14, kernel=1),
    _square("resnet50", "2048-512x7k1", 2048, 512, 7, kernel=1),
)
"""1x1 layers of ResNet-50, where only connectivity can be pruned."""

ODD = (
    LayerShape("odd", "37-53x13x11", 37, 53, (13, 11)),
    LayerShape("odd", "3-16x33x17/2", 3, 16, (33, 17), stride=2),
    LayerShape("odd", "48x9x9k5", 48, 48, (9, 9), kernel_size=5, padding=2),
    LayerShape("odd", "64x1x1", 64, 64, (1, 1)),
)
"""Shapes of no network: what tiles and blocks do not divide."""

LAYERS = {shape.name: shape for shape in (*VGG13, *RESNET32, *RESNET18, *RESNET50_POINTWISE, *ODD)}
"""Every layer by name."""

COMPRESSIONS = (2.25, 4.5, 8.1)
"""Weights over kept weights: patterns only, with half of the kernels, with 28 % of the kernels."""

POOLS: dict[str, Callable[[], clicktrain.PatternPool]] = {
    "official4": lambda: clicktrain.official_pool(4),
    "official8": lambda: clicktrain.official_pool(8),
    "official12": lambda: clicktrain.official_pool(12),
}
"""Pattern pools of 3x3 layers by name."""


@dataclass(frozen=True)
class Workload:
    """A pruned layer with a batch.

    Attributes
    ----------
    shape : LayerShape
        The layer.
    batch : int
        Images.
    compression : float
        Weights over kept weights.
    pool : str
        One of `POOLS`; 1x1 and 5x5 layers have pools of their own.
    """

    shape: LayerShape
    batch: int
    compression: float
    pool: str = "official4"

    @property
    def name(self) -> str:
        """Unique name."""
        return f"{self.shape.name}@{self.batch} {self.compression:g}x {self.pool}"

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """Shape (N, C_in, H, W) of the input."""
        return (self.batch, self.shape.in_channels, *self.shape.size)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """Shape (N, C_out, H_out, W_out) of the output."""
        return (self.batch, self.shape.out_channels, *self.shape.output_size)

    def pattern_pool(self) -> clicktrain.PatternPool:
        """Return the pool for the layer's kernel size."""
        k = self.shape.kernel_size
        if k == 3:
            return POOLS[self.pool]()
        if k == 1:
            return clicktrain.PatternPool.from_masks([[[1]]])
        middle_row = torch.zeros(k, k, dtype=torch.int)
        middle_row[k // 2] = 1
        return clicktrain.PatternPool.from_masks([middle_row.tolist(), middle_row.T.tolist()])

    def assignment(self, seed: int = 0, share_filters: int = 1) -> clicktrain.Assignment:
        """Return random kept kernels with random patterns, as many as the compression leaves (at least one).

        Blocks of `share_filters` neighbouring filters keep the same; it divides the filters.
        """
        pool, shape = self.pattern_pool(), self.shape
        blocks = shape.out_channels // share_filters
        kernels = blocks * shape.in_channels
        kept = max(1, min(kernels, round(kernels * shape.kernel_size**2 / pool.entries / self.compression)))
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(0, len(pool), (kernels,), generator=generator, dtype=torch.uint8)
        index[torch.randperm(kernels, generator=generator)[kept:]] = clicktrain.PRUNED
        shared = index.view(blocks, shape.in_channels).repeat_interleave(share_filters, 0)
        return clicktrain.Assignment(shared, pool)

    def operands(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return random x, dy and dense weight, float32 NCHW; the weight is not masked yet."""
        generator = torch.Generator().manual_seed(seed)
        k, shape = self.shape.kernel_size, self.shape
        weight_shape = (shape.out_channels, shape.in_channels, k, k)
        x, dy, weight = (
            torch.randn(s, generator=generator) for s in (self.input_shape, self.output_shape, weight_shape)
        )
        return x, dy, weight


MEASURED = {
    workload.name: workload
    for workload in (
        Workload(LAYERS["vgg13.128x16"], 32, 8.1),
        Workload(LAYERS["vgg13.512x4"], 32, 2.25),
        Workload(LAYERS["resnet18.128-256x28/2"], 8, 8.1),
        Workload(LAYERS["resnet18.512x7"], 8, 8.1, "official8"),
        Workload(LAYERS["resnet18.256x14"], 1, 4.5),
        Workload(LAYERS["resnet50.256-1024x14k1"], 8, 4.5),
    )
}
"""The few workloads that are followed from commit to commit, by name: large and small images, batch 1, stride 2, 1x1,
little and much pruning, two pools."""


@dataclass(frozen=True)
class Goal:
    """A geometric mean over layers that a backend must reach.

    Attributes
    ----------
    name : str
        What it is about.
    function : str
        "forward", "grad_input" or "grad_values".
    layout : str
        "blocked": activations stay blocked, few images as strips; "nchw": packing and unpacking count.
    layers : tuple of LayerShape
        The layers.
    batches : tuple of int
        Batch sizes; the mean is over all pairs of layer and batch.
    compression : float
        Of every layer.
    at_least : float
        Times faster than the best dense layout.
    pool : str
        One of `POOLS`.
    """

    name: str
    function: str
    layout: str
    layers: tuple[LayerShape, ...]
    batches: tuple[int, ...]
    compression: float
    at_least: float
    pool: str = "official4"

    def workloads(self) -> list[Workload]:
        """Return what the mean is over."""
        return [Workload(s, batch, self.compression, self.pool) for batch in self.batches for s in self.layers]


_STRIDE_1_224 = tuple(shape for shape in RESNET18 if shape.stride == 1)
_STRIDE_2 = tuple(shape for shape in (*RESNET32, *RESNET18) if shape.stride == 2)
_CIFAR = Goal("CIFAR", "forward", "blocked", VGG13, (32, 64), 8.1, 7.0)

GOALS = (
    replace(_CIFAR, name="CIFAR 2.25x", compression=2.25, at_least=2.2),
    replace(_CIFAR, name="CIFAR 4.5x", compression=4.5, at_least=4.2),
    replace(_CIFAR, name="CIFAR 8.1x"),
    replace(_CIFAR, name="CIFAR 8.1x, NCHW to NCHW", layout="nchw", at_least=5.5),
    replace(_CIFAR, name="CIFAR 8.1x, 8 patterns", batches=(32,), pool="official8", at_least=5.5),
    replace(_CIFAR, name="CIFAR 8.1x, 12 patterns", batches=(32,), pool="official12", at_least=5.5),
    replace(_CIFAR, name="CIFAR 8.1x, input gradient", function="grad_input", at_least=6.0),
    replace(_CIFAR, name="CIFAR 8.1x, gradient of the values", function="grad_values", at_least=8.0),
    replace(_CIFAR, name="ImageNet 8.1x, batch 8", layers=_STRIDE_1_224, batches=(8,), at_least=5.5),
    replace(_CIFAR, name="ImageNet 8.1x, batch 1", layers=_STRIDE_1_224, batches=(1,), at_least=6.5),
    replace(_CIFAR, name="stride 2, 8.1x", layers=_STRIDE_2, batches=(8,), at_least=4.5),
)
"""The goals of the CPU backend for single layers, in the same-run ratio to the best dense layout of torch."""

STEP_GOAL = 4.0
"""Times that a sparse training step of VGG-13 (batch 64, 9x) must be faster than the best dense one."""

VGG13_RATIOS = (40, 50, 55, 60, 65, 70, 75, 75, 85)
"""Percent of kernels removed in layers 2 to 10 of the released VGG-13 configuration: 9.0x."""
