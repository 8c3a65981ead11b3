"""Folders of images, one folder per class: into memory where that is possible, else streamed from disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clicktrain.data.decoding import EXTENSIONS, decode, pixels
from clicktrain.data.splits import ArraySplit, Split, balanced_subset
from clicktrain.data.streaming import FolderSplit
from clicktrain.errors import DataError

# Of ImageNet's training images, as torchvision's models are trained. Every folder is normalised with them, so
# that a network sees the images of any folder on the same scale.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DEFAULT_IMAGE_SIZE = 224
MEMORY_LIMIT = 1 << 30  # bytes of pixels that a split may take in memory
_CHUNK = 256  # images that a thread reads in one go


def read(
    train_root: Path, test_root: Path, train_limit: int | None, image_size: int | None
) -> tuple[tuple[str, ...], Split, Split]:
    """Find the images of a training and a test set, and read them if they may stay in memory.

    They may if all images of both sets have one size (`image_size`, if that is given) and neither set takes
    more than `MEMORY_LIMIT` bytes.

    Parameters
    ----------
    train_root, test_root : Path
        Folders that hold one folder of images per class, the same classes in both. Images may lie in folders
        further down; hidden files are ignored.
    train_limit : int, optional
        Number of training images to keep, equally many of each class; no other one is read.
    image_size : int, optional
        Height and width in pixels. If None: the images' own size in memory, else `DEFAULT_IMAGE_SIZE`.

    Returns
    -------
    classes : tuple of str
        Names of the class folders, sorted.
    train, test : Split
        The images, as `ArraySplit` or `FolderSplit`.

    Raises
    ------
    DataError
        If a folder is missing or empty, the two sets have other classes, or a file is no image.
    """
    classes, test_classes = _class_folders(train_root), _class_folders(test_root)
    if classes != test_classes:
        different = sorted(set(classes) ^ set(test_classes))
        raise DataError(f"{train_root} and {test_root} hold different classes; only one has: {different[:5]}")
    side = image_size or DEFAULT_IMAGE_SIZE
    train, test = _find(train_root, classes, side), _find(test_root, classes, side)
    if train_limit is not None:
        train = train.subset(balanced_subset(train.labels, train_limit))

    size = decode(train.paths[0]).size
    if image_size in (None, size[0]) and image_size in (None, size[1]):
        train_images, test_images = _read_all(train, size), _read_all(test, size)
        if train_images is not None and test_images is not None:
            return classes, ArraySplit(train_images, train.labels), ArraySplit(test_images, test.labels)
    return classes, train, test


def _class_folders(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected one that holds a folder of images for each class")
    folders = (entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    classes = tuple(sorted(folders))
    if not classes:
        raise DataError(f"{root}: holds no folders; expected a folder of images for each class")
    return classes


def _find(root: Path, classes: tuple[str, ...], image_size: int) -> FolderSplit:
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(file.relative_to(root).as_posix() for file in _image_files(root / name))
        if not found:
            raise DataError(f"{root / name}: holds no images; expected those of class {name!r}")
        names += found
        labels += [label] * len(found)
    return FolderSplit(root, tuple(names), torch.tensor(labels), image_size)


def _image_files(folder: Path) -> Iterator[Path]:
    for place, _, files in os.walk(folder, followlinks=True):
        for file in files:
            path = Path(place, file)
            if file.startswith("."):
                continue
            if path.suffix.lower() not in EXTENSIONS:
                raise DataError(f"{path}: is no image; expected only {', '.join(sorted(EXTENSIONS))} files")
            yield path


def _read_all(split: FolderSplit, size: tuple[int, int]) -> Tensor | None:
    """Return all images (N, 3, H, W), or None if one is not of this size (W, H) or they are too many."""
    width, height = size
    paths = split.paths
    if len(paths) * 3 * height * width > MEMORY_LIMIT:
        return None
    images = np.empty((len(paths), 3, height, width), np.uint8)

    def read_chunk(start: int) -> bool:
        for i, path in enumerate(paths[start : start + _CHUNK], start):
            image = decode(path)
            if image.size != size:
                return False
            images[i] = pixels(image)
        return True

    pool = ThreadPoolExecutor(torch.get_num_threads())
    try:
        same_size = all(pool.map(read_chunk, range(0, len(paths), _CHUNK)))
    finally:
        pool.shutdown(cancel_futures=True)
    return torch.from_numpy(images) if same_size else None
