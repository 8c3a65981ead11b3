"""Data sets by name."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from clicktrain.data import fashion_mnist, folders, torchvision_sets
from clicktrain.data.dataset import DataSet
from clicktrain.data.splits import ArraySplit, balanced_subset
from clicktrain.errors import DataError, InvalidArgument

_EMBEDDED = "fashion-mnist-small"
_IMAGENET = "imagenet"
_FOLDER_PREFIX = "imagefolder:"


def names() -> tuple[str, ...]:
    """Return the names that `load` knows; ``imagefolder:PATH`` stands for any path."""
    return _EMBEDDED, *torchvision_sets.SOURCES, _IMAGENET, f"{_FOLDER_PREFIX}PATH"


def load(
    name: str,
    root: str | PathLike[str] | None = None,
    *,
    train_limit: int | None = None,
    image_size: int | None = None,
) -> DataSet:
    """Load a data set.

    Parameters
    ----------
    name : str
        - ``fashion-mnist-small``: 10,000 training and 5,000 test images of Fashion-MNIST, which come with the
          library; 1x32x32 pixels (padded with zeros).
        - ``fashion-mnist`` (padded too), ``cifar10``, ``cifar100``: torchvision's files below `root`,
          downloaded where they are missing and there is a network.
        - ``imagenet``: `root` holds the folders ``train`` and ``val``, each with a folder per class.
        - ``imagefolder:PATH``: PATH (relative to `root`, if given) holds ``train`` and ``test`` or ``val``.
    root : path-like, optional
        Folder of the data; the embedded set does without.
    train_limit : int, optional
        Use only so many training images, equally many of each class: its first ones.
    image_size : int, optional
        Height and width for image folders. Without it images that all have one size keep that size, others
        get 224.

    Returns
    -------
    DataSet
        In memory, but for folders of images that differ in size or take more than 1 GiB: those are decoded
        while they are used.

    Raises
    ------
    InvalidArgument
        If the name is unknown or an option cannot work for this data set.
    DataError
        If files are missing or damaged or hold something else.
    """
    base = None if root is None else Path(root)
    for what, value in (("train_limit", train_limit), ("image_size", image_size)):
        if value is not None and value < 1:
            raise InvalidArgument(f"{what}={value}: expected at least 1")
    if name == _IMAGENET:
        home = _required(base, name)
        return _folder_set(name, home / "train", home / "val", train_limit, image_size)
    if name.startswith(_FOLDER_PREFIX):
        home = (base or Path()) / name.removeprefix(_FOLDER_PREFIX)
        return _folder_set(name, home / "train", _test_folder(home), train_limit, image_size)
    if name not in names():
        raise InvalidArgument(f"unknown data set {name!r}: expected one of {', '.join(names())}")
    if image_size is not None:
        raise InvalidArgument(f"image_size={image_size}: only image folders can be resized, not {name!r}")
    return _array_set(name, base, train_limit)


def _array_set(name: str, root: Path | None, train_limit: int | None) -> DataSet:
    train: ArraySplit
    if name == _EMBEDDED:
        classes, mean, std = fashion_mnist.CLASSES, fashion_mnist.MEAN, fashion_mnist.STD
        train, test = fashion_mnist.load_embedded()
    else:
        source = torchvision_sets.SOURCES[name]
        mean, std = source.mean, source.std
        classes, train, test = torchvision_sets.read(source, _required(root, name))
    if train_limit is not None:
        train = train.subset(balanced_subset(train.labels, train_limit))
    return DataSet(name, classes, train, test, mean, std)


def _folder_set(
    name: str, train_root: Path, test_root: Path, train_limit: int | None, image_size: int | None
) -> DataSet:
    classes, train, test = folders.read(train_root, test_root, train_limit, image_size)
    return DataSet(name, classes, train, test, folders.MEAN, folders.STD)


def _test_folder(home: Path) -> Path:
    for candidate in (home / "test", home / "val"):
        if candidate.is_dir():
            return candidate
    raise DataError(f"{home}: expected a folder 'train' and a folder 'test' or 'val' in it")


def _required(root: Path | None, name: str) -> Path:
    if root is None:
        raise InvalidArgument(f"data set {name!r} is read from disk: root, the folder that holds it, is needed")
    return root
