"""Batches whose content depends on (seed, epoch, batch index) and on nothing that happened before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from clicktrain import distributed
from clicktrain.data.seeding import derived_generator
from clicktrain.data.splits import Draw, Split
from clicktrain.errors import InvalidArgument


class Loader:
    """Normalised batches of a split.

    Order and augmentation are functions of the seed, the epoch and the batch index: iterating twice, or
    starting in the middle, gives the same batches again. No global random state is read or changed.

    Parameters
    ----------
    split : Split
        The images; kept on `device` where they are in memory.
    batch_size : int
        Images in a batch; the last one of an epoch may have fewer.
    train : bool
        Shuffle and augment. Otherwise the images come in order and unaugmented.
    seed : int
        Of order and augmentation.
    mean, std : sequence of C floats
        A pixel p in 0 .. 1 becomes (p - mean) / std. Padding that a crop shows is black, p = 0.
    augment : str
        ``"none"`` or the split's own `augmentation`; used in training only.
    device : torch.device or str
        Where the batches are.
    drop_last : bool
        Leave out a last batch that is not full.
    shared : bool
        Give of each batch the share of this process, see `clicktrain.distributed`.

    Raises
    ------
    InvalidArgument
        If a value cannot work, such as a training batch larger than the split.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        train: bool,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
        augment: str = "none",
        device: torch.device | str = "cpu",
        drop_last: bool = False,
        shared: bool = False,
    ) -> None:
        _check(split, batch_size, train, augment, mean, std)
        self.split = split.to(device)
        self.batch_size = batch_size
        self.train = train
        self.seed = seed
        self.epoch = 0
        self.device = torch.device(device)
        self._shared = shared
        self._augment = train and augment != "none"
        self._length = len(split) // batch_size if drop_last else -(-len(split) // batch_size)
        deviation = torch.tensor(std).view(-1, 1, 1)
        self._scale = (1 / (255 * deviation)).to(device)
        self._shift = (torch.tensor(mean).view(-1, 1, 1) / deviation).to(device)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the iterations that start from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self._length

    def images(self, batch: int) -> int:
        """Return the number of images in a batch of an epoch, those of all processes together."""
        return min(self.batch_size, len(self.split) - batch * self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.batches()

    def batches(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the epoch from batch `start` on.

        Parameters
        ----------
        start : int
            Index of the first batch to give, 0 .. len(self).

        Returns
        -------
        iterator of (Tensor, Tensor)
            Images (B, C, H, W) float32, normalised, and labels (B,) int64.

        Raises
        ------
        InvalidArgument
            If the epoch has no such batch.
        """
        if not 0 <= start <= len(self):
            raise InvalidArgument(f"start={start}: expected 0 to {len(self)}, the batches of an epoch")
        return map(self._finish, self.split.fetch(self._draws(self.epoch, start)))

    def _draws(self, epoch: int, start: int) -> Iterator[Draw]:
        order = self._order(epoch)
        for batch in range(start, len(self)):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            generator = derived_generator("augment", self.seed, epoch, batch) if self._augment else None
            yield Draw(indices, generator, distributed.share(len(indices)) if self._shared else slice(None))

    def _order(self, epoch: int) -> Tensor:
        if not self.train:
            return torch.arange(len(self.split))
        return torch.randperm(len(self.split), generator=derived_generator("order", self.seed, epoch))

    def _finish(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images = batch[0].to(self.device, torch.float32)
        return images.mul_(self._scale).sub_(self._shift), batch[1].to(self.device)


def _check(
    split: Split,
    batch_size: int,
    train: bool,
    augment: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    if batch_size < 1:
        raise InvalidArgument(f"batch_size={batch_size}: expected at least 1")
    if train and batch_size > len(split):
        raise InvalidArgument(f"batch_size={batch_size}: the training split holds only {len(split)} images")
    if augment not in ("none", split.augmentation):
        raise InvalidArgument(f"augment={augment!r}: expected 'none' or {split.augmentation!r} for this data set")
    channels = split.image_shape[0]
    for what, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise InvalidArgument(f"{what}={tuple(values)}: expected {channels} values, one for each channel")
    if min(std) <= 0:
        raise InvalidArgument(f"std={tuple(std)}: expected positive values")
