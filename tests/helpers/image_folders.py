"""Small folders of generated images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_image_folder(
    root: Path,
    classes: Sequence[str],
    per_class: int,
    size: Callable[[int], tuple[int, int]],
    suffix: str = ".png",
) -> None:
    """Write `per_class` images of noise around a colour of its own into a folder for each class.

    `size` gives width and height of the image with a running number. PNG keeps the pixels as they are drawn.
    """
    rng = np.random.default_rng(0)
    number = 0
    for name in classes:
        (root / name).mkdir(parents=True)
        colour = rng.integers(40, 200, 3)
        for i in range(per_class):
            width, height = size(number)
            pixels = colour + rng.integers(-40, 56, (height, width, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:04}{suffix}")
            number += 1
