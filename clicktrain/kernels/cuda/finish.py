"""Adds up what the blocks of threads of a gradient of the values have found, each for its share of the images."""

from __future__ import annotations

from torch import Tensor

from clicktrain.kernels.cuda.launch import Launcher
from clicktrain.kernels.cuda.region import LANES

THREADS = 256


def add_up(
    launcher: Launcher, text: str, partial: Tensor, dvalues: Tensor, words: int, splits: int,
    places: Tensor | None = None, pitch: int = 0,
) -> None:  # fmt: skip
    """Launch the kernel of finish.cuh, which is part of the unit.

    Parameters
    ----------
    words, splits : int
        Of each split, and how many there are.
    places, pitch : Tensor or None, int
        Where the sums of a kernel lie in a split, times `pitch` words; None: one after another.
    """
    count, entries = dvalues.numel(), dvalues.shape[1]
    launcher.launch(
        text, "finish", -(-count // LANES), THREADS, 4 * THREADS,
        (partial, dvalues, places, count, entries, pitch, words, splits),
    )  # fmt: skip
