"""A data set: what is to be learned, and what is known about it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clicktrain.data.seeding import derived_generator
from clicktrain.data.splits import Split
from clicktrain.errors import InvalidArgument


@dataclass(frozen=True, eq=False)
class DataSet:
    """Labelled training and test images.

    Parameters
    ----------
    name : str
        The name that `load` was given.
    classes : tuple of str
        Names of the classes, in the order of the labels.
    train, test : Split
        The images.
    mean, std : tuple of float
        Statistics for the normalisation, one value for each channel, of pixels in 0 .. 1.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of pixels and labels (of file names and sizes where images stay files), as 64 hex digits."""
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            for part in split.content():
                digest.update(part)
        return digest.hexdigest()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def augmentation(self) -> str:
        """Name of the augmentation that the training images get."""
        return self.train.augmentation

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.train.image_shape

    def split_validation(self, fraction: float, seed: int = 0) -> tuple[Split, Split]:
        """Set a part of each class's training images aside.

        Parameters
        ----------
        fraction : float
            Share of every class that goes into the validation split, between 0 and 1, exclusive.
        seed : int
            Which images: equal seeds choose equal images.

        Returns
        -------
        train, validation : Split
            Disjoint, together the training split, each in its order.

        Raises
        ------
        InvalidArgument
            If `fraction` is not between 0 and 1 or leaves one of the splits empty.
        """
        if not 0 < fraction < 1:
            raise InvalidArgument(f"fraction={fraction}: expected more than 0 and less than 1")
        chosen = _stratified_mask(self.train.labels, fraction, seed)
        held_out = int(chosen.sum())
        if not 0 < held_out < len(self.train):
            raise InvalidArgument(
                f"fraction={fraction}: would hold out {held_out} of the {len(self.train)} training images"
            )
        kept, set_aside = torch.nonzero(~chosen).flatten(), torch.nonzero(chosen).flatten()
        return self.train.subset(kept), self.train.subset(set_aside)


def _stratified_mask(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Mark round(fraction * n) random samples of each class with n samples."""
    generator = derived_generator("validation", seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        members = torch.nonzero(labels == label).flatten()
        shuffled = members[torch.randperm(len(members), generator=generator)]
        mask[shuffled[: round(fraction * len(members))]] = True
    return mask
