"""Splits: labelled images that can be fetched in batches, wherever they are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from clicktrain.data.augment import crop_flip
from clicktrain.errors import InvalidArgument


@dataclass(frozen=True, eq=False)
class Draw:
    """One batch to fetch.

    Parameters
    ----------
    indices : Tensor, (B,) int64
        Which images, on the CPU.
    generator : torch.Generator, optional
        Source of the augmentation's random numbers; without it the images come as they are.
    part : slice
        Which images of the batch are given, augmented as if all were.
    """

    indices: Tensor
    generator: torch.Generator | None = None
    part: slice = field(default_factory=lambda: slice(None))


class Split(ABC):
    """Labelled images of one size: a training, validation or test set."""

    augmentation: ClassVar[str]
    """Name of the random augmentation that these images get in training."""

    labels: Tensor
    """Classes, (N,) int64."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that `fetch` gives."""

    @abstractmethod
    def fetch(self, draws: Iterable[Draw]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, for each draw, its images (B, C, H, W) uint8 and its labels (B,) int64."""

    @abstractmethod
    def subset(self, indices: Tensor) -> Self:
        """Return the split of the images at `indices` (int64, in this order)."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Return the split with what it keeps in memory moved to `device`."""

    @abstractmethod
    def content(self) -> Iterator[bytes | memoryview]:
        """Yield what identifies the images and their labels, to be hashed."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ArraySplit(Split):
    """Images in memory.

    Parameters
    ----------
    images : Tensor, (N, C, H, W) uint8
        Pixels.
    labels : Tensor, (N,) int64
        Classes, on the same device.

    Raises
    ------
    InvalidArgument
        If a tensor has another dtype or the shapes do not fit.
    """

    augmentation: ClassVar[str] = "crop-flip"

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            found = f"{self.images.dtype} {tuple(self.images.shape)}"
            raise InvalidArgument(f"images are {found}: expected torch.uint8 (N, C, H, W)")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            found = f"{self.labels.dtype} {tuple(self.labels.shape)}"
            raise InvalidArgument(f"labels are {found}: expected torch.int64 ({len(self.images)},)")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def fetch(self, draws: Iterable[Draw]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels of each draw, augmented by `crop_flip` where it has a generator."""
        for draw in draws:
            indices = draw.indices.to(self.images.device)
            images = self.images[indices]
            if draw.generator is not None:
                images = crop_flip(images, draw.generator)
            yield images[draw.part], self.labels[indices][draw.part]

    def subset(self, indices: Tensor) -> Self:
        """Return the split of the images at `indices`."""
        return type(self)(self.images[indices], self.labels[indices])

    def to(self, device: torch.device | str) -> Self:
        """Return the split with images and labels on `device`."""
        return type(self)(self.images.to(device), self.labels.to(device))

    def content(self) -> Iterator[bytes | memoryview]:
        """Yield shape, pixels and labels."""
        yield str(tuple(self.images.shape)).encode()
        yield self.images.cpu().contiguous().numpy().data
        yield self.labels.cpu().contiguous().numpy().data


def balanced_subset(labels: Tensor, count: int) -> Tensor:
    """Choose `count` samples, equally many of each class, the first ones in their order.

    Parameters
    ----------
    labels : Tensor, (N,) int64
        Classes.
    count : int
        How many, 1 .. N. Where it does not divide, lower classes get one more; a class that runs out
        leaves its share to the others.

    Returns
    -------
    Tensor, (count,) int64
        Ascending indices. A smaller count chooses a subset of what a larger one chooses.

    Raises
    ------
    InvalidArgument
        If `count` is not in 1 .. N.
    """
    if not 1 <= count <= len(labels):
        raise InvalidArgument(f"train_limit={count}: expected 1 to {len(labels)}, the images there are")
    by_class = torch.argsort(labels, stable=True)
    sizes = torch.bincount(labels)
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(labels)  # how many of the same class stand before each sample
    rank[by_class] = torch.arange(len(labels)) - starts[labels[by_class]]
    return torch.argsort(rank * len(sizes) + labels)[:count].sort().values
