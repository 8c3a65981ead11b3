"""Image files to pixels."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clicktrain.data.augment import Box, centred_box, resized_crop_box
from clicktrain.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
"""Endings of the files that are taken for images, lower case."""

_CENTRE = 224 / 256  # the part of the shorter side that `central_part` shows


def decode(path: Path) -> Image:
    """Read a whole image as RGB.

    Raises
    ------
    DataError
        If the file is missing, truncated or no image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    # what PIL's decoders raise on damaged files, besides OSError
    except (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from error


def pixels(image: Image) -> NDArray[np.uint8]:
    """Return the pixels (3, H, W) of an RGB image."""
    return np.asarray(image).transpose(2, 0, 1)


def central_part(path: Path, side: int) -> NDArray[np.uint8]:
    """Read the middle of an image, a square of 224/256 of its shorter side, resized to `side` pixels.

    That is the usual "resize to 256, cut out 224" in one resampling. Returns (3, side, side).
    """
    image = decode(path)
    edge = _CENTRE * min(image.size)
    return pixels(_resized(image, side, centred_box(*image.size, edge, edge)))


def random_part(path: Path, side: int, draws: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Read a random part of an image, resized to `side` pixels and flipped half of the time.

    Parameters
    ----------
    path : Path
        The file.
    side : int
        Height and width of the result.
    draws : array, (RESIZED_CROP_DRAWS + 1,)
        Uniform in [0, 1): those of `resized_crop_box`, then one for the flip.

    Returns
    -------
    array, (3, side, side)
    """
    image = decode(path)
    part = pixels(_resized(image, side, resized_crop_box(*image.size, draws[:-1])))
    return part[:, :, ::-1] if draws[-1] < 0.5 else part


def _resized(image: Image, side: int, box: Box) -> Image:
    from PIL.Image import Resampling

    return image.resize((side, side), Resampling.BILINEAR, box=box)
