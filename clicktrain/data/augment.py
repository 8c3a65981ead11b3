"""Random crops and flips: of whole batches in memory, and as boxes for images that are still files."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge of a rectangle in pixels."""

_ATTEMPTS = 10
RESIZED_CROP_DRAWS = 2 * _ATTEMPTS + 2
"""Uniform numbers that `resized_crop_box` consumes."""


def crop_flip(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Flip half of the images and cut each at random out of its zero-padded self.

    Parameters
    ----------
    images : Tensor, (B, C, H, W)
        Any dtype and device; not changed.
    generator : torch.Generator
        On the CPU, so that every device sees the same draws.
    padding : int
        Zeros added on each side; the offsets are uniform over 0 .. 2*padding in both directions.

    Returns
    -------
    Tensor, (B, C, H, W)
        Contiguous.
    """
    batch, channels, height, width = images.shape
    device = images.device
    offsets = torch.randint(0, 2 * padding + 1, (2, batch, 1), generator=generator).to(device)
    flip = (torch.rand(batch, 1, generator=generator) < 0.5).to(device)

    rows = offsets[0] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    columns = offsets[1] + torch.where(flip, width - 1 - columns, columns)
    source = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]

    # One gather does both: several times faster than a loop, and than indexing with four index tensors.
    padded = F.pad(images, (padding, padding, padding, padding)).flatten(2)
    source = source.view(batch, 1, -1).expand(-1, channels, -1)
    return padded.gather(2, source).view(images.shape)


def resized_crop_box(width: int, height: int, draws: NDArray[np.float64]) -> Box:
    """Choose the rectangle of a random resized crop.

    Area uniform in 8-100 % of the image, aspect ratio log-uniform in 3/4 .. 4/3, as Szegedy et al., "Going
    deeper with convolutions", 2015, section 6; of ten tries the first that fits, else the largest centred
    rectangle of a permitted aspect ratio.

    Parameters
    ----------
    width, height : int
        Size of the image in pixels.
    draws : array, (RESIZED_CROP_DRAWS,)
        Uniform in [0, 1).
    """
    areas = width * height * (0.08 + 0.92 * draws[:_ATTEMPTS])
    ratios = np.exp((2 * draws[_ATTEMPTS : 2 * _ATTEMPTS] - 1) * math.log(4 / 3))
    widths = np.rint(np.sqrt(areas * ratios))
    heights = np.rint(np.sqrt(areas / ratios))
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    if not fits.any():
        box_width = min(width, height * 4 / 3)
        box_height = min(height, width * 4 / 3)
        return centred_box(width, height, box_width, box_height)
    first = int(np.argmax(fits))
    box_width, box_height = float(widths[first]), float(heights[first])
    left = math.floor(draws[-2] * (width - box_width + 1))
    top = math.floor(draws[-1] * (height - box_height + 1))
    return left, top, left + box_width, top + box_height


def centred_box(width: int, height: int, box_width: float, box_height: float) -> Box:
    """Return the rectangle of the given size in the middle of an image of width x height pixels."""
    left = (width - box_width) / 2
    top = (height - box_height) / 2
    return left, top, left + box_width, top + box_height
