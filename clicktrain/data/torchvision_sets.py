"""Fashion-MNIST and CIFAR in torchvision's layouts, downloaded by torchvision where they are not yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clicktrain._torchvision import load_torchvision
from clicktrain.data import fashion_mnist
from clicktrain.data.splits import ArraySplit
from clicktrain.errors import DataError


def _colour_split(images: Tensor, labels: Tensor) -> ArraySplit:
    """Return the split of images (N, H, W, 3), as CIFAR's files hold them."""
    return ArraySplit(images.permute(0, 3, 1, 2).contiguous(), labels.long())


@dataclass(frozen=True)
class Source:
    """What is expected of one of torchvision's data sets.

    Parameters
    ----------
    dataset : str
        Class in ``torchvision.datasets``.
    layout : str
        Where its files are, below the root folder.
    num_classes : int
        Number of classes.
    train_count, test_count : int
        Number of images.
    shape : tuple of int
        Shape of one image in its ``data``.
    to_split : callable
        Makes a split of ``data`` and ``targets`` as tensors.
    mean, std : tuple of float
        Statistics for the normalisation.
    """

    dataset: str
    layout: str
    num_classes: int
    train_count: int
    test_count: int
    shape: tuple[int, ...]
    to_split: Callable[[Tensor, Tensor], ArraySplit]
    mean: tuple[float, ...]
    std: tuple[float, ...]


# The released ClickTrain code normalises both CIFAR sets with these. The deviations are the well-known mean of
# each image's own deviation, not that of all pixels (.247, .243, .262).
_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)

SOURCES = {
    "fashion-mnist": Source(
        "FashionMNIST", "FashionMNIST/raw/*-ubyte", 10, 60_000, 10_000, (28, 28),
        fashion_mnist.padded_split, fashion_mnist.MEAN, fashion_mnist.STD,
    ),
    "cifar10": Source(
        "CIFAR10", "cifar-10-batches-py", 10, 50_000, 10_000, (32, 32, 3),
        _colour_split, _CIFAR_MEAN, _CIFAR_STD,
    ),
    "cifar100": Source(
        "CIFAR100", "cifar-100-python", 100, 50_000, 10_000, (32, 32, 3),
        _colour_split, _CIFAR_MEAN, _CIFAR_STD,
    ),
}  # fmt: skip


def read(source: Source, root: Path) -> tuple[tuple[str, ...], ArraySplit, ArraySplit]:
    """Read one of torchvision's data sets into memory, downloading what is missing.

    Parameters
    ----------
    source : Source
        Which one.
    root : Path
        The folder that torchvision calls root; must exist.

    Returns
    -------
    classes : tuple of str
        Names of the classes.
    train, test : ArraySplit
        The images.

    Raises
    ------
    DataError
        If the files are missing or damaged and cannot be downloaded, or hold something else.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected the one that holds (or is to hold) {source.layout}")
    train_data, train = _read_split(source, root, train=True)
    _, test = _read_split(source, root, train=False)
    return tuple(train_data.classes), train, test


def _read_split(source: Source, root: Path, train: bool) -> tuple[Any, ArraySplit]:
    dataset = getattr(load_torchvision().datasets, source.dataset)
    try:
        data = dataset(str(root), train=train, download=True)
    # torchvision checks some files by asserting and by reshaping, so these are what a damaged file raises
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{root / source.layout}: missing or damaged, and could not be read or downloaded ({reason})"
        ) from error
    images, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets)
    count = source.train_count if train else source.test_count
    if tuple(images.shape) != (count, *source.shape) or tuple(labels.shape) != (count,):
        raise DataError(
            f"{root / source.layout}: {'training' if train else 'test'} images have shape "
            f"{tuple(images.shape)} and labels {tuple(labels.shape)}, "
            f"expected {(count, *source.shape)} and {(count,)}"
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < source.num_classes:
        raise DataError(f"{root / source.layout}: labels outside 0 .. {source.num_classes - 1}")
    return data, source.to_split(images, labels)
