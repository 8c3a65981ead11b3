"""Fashion-MNIST's constants, and the file with a part of it that comes with the library.

The file holds the first 1,000 training and the first 500 test images of each class, as raw bytes (training
images, training labels, test images, test labels) in one bzip2 stream. It carries no header and no date: the
shapes are constants here, and SHA-256 pins the decoded bytes.
"""

from __future__ import annotations

import bz2
import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from clicktrain.data.splits import ArraySplit
from clicktrain.errors import DataError

CLASSES: tuple[str, ...] = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
# Of all pixels of the 60,000 original training images, before padding; tests compute them for the 10,000.
MEAN: tuple[float, ...] = (0.2860,)
STD: tuple[float, ...] = (0.3530,)

IMAGE_SIDE = 28
PADDED_SIDE = 32  # as CIFAR: the official VGGs halve it five times
TRAIN_COUNT, TEST_COUNT = 10_000, 5_000
EMBEDDED_FILE = Path(__file__).parent / "embedded" / "fashion_mnist_small.bz2"
EMBEDDED_SHA256 = "5428fb71f5e9eabbd20a8e27457643eaf2d613bc2ac702480459141c8503fe37"


class Arrays(NamedTuple):
    """Images and labels of both splits, as they are in the original files."""

    train_images: NDArray[np.uint8]
    """(10000, 28, 28)."""
    train_labels: NDArray[np.uint8]
    """(10000,)."""
    test_images: NDArray[np.uint8]
    """(5000, 28, 28)."""
    test_labels: NDArray[np.uint8]
    """(5000,)."""

    def content(self) -> bytes:
        """Return everything in the order of the file: one after the other, images column by column."""
        return b"".join(_columns_first(array).tobytes() for array in self)


_SHAPES = (
    (TRAIN_COUNT, IMAGE_SIDE, IMAGE_SIDE),
    (TRAIN_COUNT,),
    (TEST_COUNT, IMAGE_SIDE, IMAGE_SIDE),
    (TEST_COUNT,),
)


def encode(content: bytes) -> bytes:
    """Compress what the embedded file holds.

    bzip2, because its encoder is frozen, so that equal content gives an equal file anywhere. Columns first
    make it 5.7 MB instead of 6.0, which is what xz needs too.
    """
    return bz2.compress(content)


def decode(path: Path = EMBEDDED_FILE) -> Arrays:
    """Read the embedded file.

    Raises
    ------
    DataError
        If the file is missing or damaged, or holds anything but the embedded images.
    """
    try:
        content = bz2.decompress(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); reinstall clicktrain") from error
    check(content, str(path))
    ends = np.cumsum([math.prod(shape) for shape in _SHAPES])
    parts = np.split(np.frombuffer(bytearray(content), np.uint8), ends[:-1])
    return Arrays(*(_columns_first(part.reshape(shape)) for part, shape in zip(parts, _SHAPES, strict=True)))


def check(content: bytes, origin: str) -> None:
    """Raise DataError, naming `origin`, unless `content` is that of the embedded file, decoded."""
    digest = hashlib.sha256(content).hexdigest()
    if digest != EMBEDDED_SHA256:
        raise DataError(
            f"{origin}: holds other data than the {TRAIN_COUNT} + {TEST_COUNT} images of Fashion-MNIST "
            f"expected (SHA-256 {digest[:12]}..., expected {EMBEDDED_SHA256[:12]}...)"
        )


def load_embedded() -> tuple[ArraySplit, ArraySplit]:
    """Return the training and the test split of the embedded file, padded to 32x32.

    Raises
    ------
    DataError
        As `decode`.
    """
    train_images, train_labels, test_images, test_labels = map(torch.from_numpy, decode())
    return padded_split(train_images, train_labels), padded_split(test_images, test_labels)


def padded_split(images: Tensor, labels: Tensor) -> ArraySplit:
    """Return the split of images (N, 28, 28) uint8, zero-padded to 32x32, and labels (N,) of any integers."""
    margin = (PADDED_SIDE - IMAGE_SIDE) // 2
    return ArraySplit(F.pad(images.unsqueeze(1), (margin, margin, margin, margin)), labels.long())


def _columns_first(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Swap rows and columns of images; labels stay as they are."""
    return array.swapaxes(1, 2) if array.ndim == 3 else array
