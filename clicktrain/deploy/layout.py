"""How activations lie in memory while a network runs.

The eight lanes of a vector are eight images, or, where there are too few images to fill them, a grid of eight
strips of one image. Strips hold no copies of their neighbours' pixels: a step that reads around a strip takes them
from the other lanes. So an activation stays as it is from layer to layer with few images, too.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from clicktrain.errors import InvalidArgument
from clicktrain.kernels.cpu.codegen import LANES
from clicktrain.kernels.cpu.layer import Layer, Pair
from clicktrain.kernels.cpu.library import Lanes, Strips
from clicktrain.kernels.cpu.passes import Prepared, prepare
from clicktrain.kernels.cpu.runtime import GRIDS, fills_lanes, image_strips, plane_work, whole_images
from clicktrain.kernels.cpu.tiles import Choice

IMAGES: Pair = (1, 1)
"""The grid whose lanes are whole images."""
MUCH_LESS = 0.9
"""Of the work, where strips should change from one layer to the next."""


@dataclass(frozen=True)
class Form:
    """Lanes of an activation: the grid of strips of each image, and the pixels of a strip."""

    grid: Pair
    size: Pair

    def blocks(self, images: int) -> int:
        """Return the number of vectors for each channel and pixel of a strip."""
        return -(-images // LANES) if self.grid == IMAGES else images

    def floats(self, images: int, channels: int) -> int:
        """Return the size of an activation."""
        return self.blocks(images) * channels * self.size[0] * self.size[1] * LANES

    def fits(self, image: Pair) -> bool:
        """Whether the strips hold the image and nothing else."""
        return (self.grid[0] * self.size[0], self.grid[1] * self.size[1]) == image

    def strips(self, images: int, channels: int, image: Pair) -> Strips:
        """Return the structure for steps on blocked activations."""
        return Strips(
            blocks=self.blocks(images), channels=channels, height=self.size[0], width=self.size[1],
            grid_h=self.grid[0], grid_w=self.grid[1], image_h=image[0], image_w=image[1], images=images,
        )  # fmt: skip

    def lanes(self, images: int, channels: int, image: Pair) -> Lanes:
        """Return the structure for packing and unpacking."""
        if self.grid == IMAGES:
            return whole_images(images, channels, image)
        return image_strips(images, channels, image, self.size, self.grid, (0, 0), self.size)


@dataclass(frozen=True)
class Windowed:
    """Forms of the operand and the result of a convolution or pooling."""

    source: Form
    target: Form


@cache
def form_of(size: Pair, images: int) -> Form:
    """Return whole images, or the usual strips unless others are much less work: to change them costs a copy."""
    if fills_lanes(images):
        return Form(IMAGES, size)
    usual, *others = (Form(grid, (-(-size[0] // grid[0]), -(-size[1] // grid[1]))) for grid in GRIDS if grid != IMAGES)
    best = min(others, key=lambda form: plane_work(form.size))
    return best if plane_work(best.size) <= MUCH_LESS * plane_work(usual.size) else usual


@cache
def windowed(in_size: Pair, out_size: Pair, stride: Pair, images: int) -> Windowed:
    """Return the forms for an operation whose strips read neighbours at most a fixed distance away."""
    form = form_of(out_size, images)
    if form.grid == IMAGES:
        return Windowed(Form(IMAGES, in_size), form)
    # A strip of the result starts where its strip of the operand does, and all of the operand lies in some strip.
    height, width = (
        max(own, -(-size // (parts * step)))
        for own, size, parts, step in zip(form.size, in_size, form.grid, stride, strict=True)
    )
    return Windowed(Form(form.grid, (height * stride[0], width * stride[1])), Form(form.grid, (height, width)))


def layer_on(layer: Layer, forms: Windowed) -> Layer:
    """Return the layer that computes on these forms; on strips its input is what a strip reads, without padding."""
    if forms.target.grid == IMAGES:
        return layer
    read = forms.source.size if _stays_inside(layer, forms) else _read(layer, forms)
    return replace(layer, out_size=forms.target.size, in_size=read, padding=(0, 0))


def prepare_on(layer: Layer, forms: Windowed, images: int, choice: Choice, packed: bool = False) -> Prepared:
    """Lay out a convolution pass on these forms; `layer` is the whole one. Packed: its weights are gathered before."""
    if choice.sweep == "winograd" and forms.target.grid != IMAGES:
        raise InvalidArgument(f"choice {choice}: expected one that reads strips of images")
    made = prepare(layer_on(layer, forms), forms.target.blocks(images), choice, short_chains=True, packed=packed)
    if forms.target.grid != IMAGES and not _stays_inside(layer, forms):
        structure = made.structure
        structure.grid_h, structure.grid_w = forms.source.grid
        structure.strip_h, structure.strip_w = forms.source.size
        structure.before_h, structure.before_w = layer.padding
        made.add("neighbours", neighbours(forms.source.grid))
    return made


def _read(layer: Layer, forms: Windowed) -> Pair:
    """Return the rows and columns that a convolution reads for a strip of its result."""
    sizes = zip(forms.target.size, layer.stride, strict=True)
    height, width = ((size - 1) * step + layer.kernel_size for size, step in sizes)
    return height, width


def _stays_inside(layer: Layer, forms: Windowed) -> bool:
    """Tell whether a convolution reads nothing around a strip of its operand."""
    read, own = _read(layer, forms), forms.source.size
    return layer.padding == (0, 0) and read[0] <= own[0] and read[1] <= own[1]


@cache
def neighbours(grid: Pair) -> NDArray[np.int32]:
    """Return for each distance in strips and each lane the lane so far away, LANES where there is none."""
    (rows, columns), lane = grid, np.arange(LANES)
    down, right = np.ogrid[-rows : rows + 1, -columns : columns + 1]
    row, column = lane // columns + down[..., None], lane % columns + right[..., None]
    exists = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    return np.where(exists, row * columns + column, LANES).astype(np.int32)


def address(structure: ctypes.Structure) -> int:
    """Return where a structure lies."""
    return ctypes.addressof(structure)
