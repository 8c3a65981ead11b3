"""A split whose images stay files."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clicktrain.data.augment import RESIZED_CROP_DRAWS
from clicktrain.data.decoding import central_part, random_part
from clicktrain.data.splits import Draw, Split

_AHEAD = 2  # batches that are being decoded while one is in use

_Images = list[Future[NDArray[np.uint8]]]


@dataclass(frozen=True, eq=False)
class FolderSplit(Split):
    """Images decoded from disk by threads, a few batches ahead.

    Parameters
    ----------
    root : Path
        Folder of the split.
    names : tuple of str
        Files, relative to `root`, with "/" between folders.
    labels : Tensor, (N,) int64
        Their classes.
    image_size : int
        Height and width that images are resized to. Unaugmented, they show their middle: a square of
        224/256 of the shorter side.
    """

    augmentation: ClassVar[str] = "resized-crop-flip"

    root: Path
    names: tuple[str, ...]
    labels: Tensor
    image_size: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return 3, self.image_size, self.image_size

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [self.root / name for name in self.names]

    def fetch(self, draws: Iterable[Draw]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels of each draw, randomly cropped and flipped where it has a generator.

        Raises
        ------
        DataError
            If a file is missing or no image.
        """
        pool = ThreadPoolExecutor(torch.get_num_threads())
        pending: deque[tuple[_Images, Tensor]] = deque()
        try:
            for draw in draws:
                pending.append((self._start(pool, draw), self.labels[draw.indices][draw.part]))
                if len(pending) > _AHEAD:
                    yield _finish(*pending.popleft())
            while pending:
                yield _finish(*pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def subset(self, indices: Tensor) -> Self:
        """Return the split of the images at `indices`."""
        names = tuple(self.names[i] for i in indices.tolist())
        return type(self)(self.root, names, self.labels[indices], self.image_size)

    def to(self, device: torch.device | str) -> Self:
        """Return the split itself: none of its images are in memory."""
        return self

    def content(self) -> Iterator[bytes | memoryview]:
        """Yield name and size of each file; the name begins with the class's folder."""
        for name, path in zip(self.names, self.paths, strict=True):
            yield f"{name}\0{os.path.getsize(path)}\0".encode()

    def _start(self, pool: ThreadPoolExecutor, draw: Draw) -> _Images:
        paths = [self.root / self.names[i] for i in draw.indices[draw.part].tolist()]
        if draw.generator is None:
            return [pool.submit(central_part, path, self.image_size) for path in paths]
        # drawn here and not by the threads, whose order is left to chance
        shape = (len(draw.indices), RESIZED_CROP_DRAWS + 1)
        rows = torch.rand(shape, generator=draw.generator, dtype=torch.float64)[draw.part].numpy()
        return [pool.submit(random_part, path, self.image_size, row) for path, row in zip(paths, rows, strict=True)]


def _finish(images: _Images, labels: Tensor) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.stack([image.result() for image in images])), labels
