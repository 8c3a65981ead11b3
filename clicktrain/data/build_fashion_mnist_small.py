"""Rebuild the embedded part of Fashion-MNIST from the four original files.

Usage: ``python -m clicktrain.data.build_fashion_mnist_small SOURCE_DIR OUT``, where SOURCE_DIR holds
train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz and the two t10k-... files beside them.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from clicktrain.data import fashion_mnist
from clicktrain.data.splits import balanced_subset
from clicktrain.errors import DataError
from clicktrain.files import write_atomic

_IDX_UINT8 = b"\x00\x00\x08"  # then one byte with the number of dimensions, and each as big-endian uint32


def build(source: Path, out: Path) -> None:
    """Write the embedded file.

    Parameters
    ----------
    source : Path
        Folder of the original files.
    out : Path
        File to write.

    Raises
    ------
    DataError
        If an original file is missing, damaged or another one, or `out` cannot be written.
    """
    train = _first_of_each_class(source, "train", fashion_mnist.TRAIN_COUNT)
    test = _first_of_each_class(source, "t10k", fashion_mnist.TEST_COUNT)
    content = fashion_mnist.Arrays(*train, *test).content()
    fashion_mnist.check(content, str(source))
    try:
        write_atomic(out, fashion_mnist.encode(content))
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error})") from error


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a gzipped idx file of bytes.

    Raises
    ------
    DataError
        If it is missing, truncated or not such a file.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a gzipped idx file") from error
    if len(content) < 4 or content[:3] != _IDX_UINT8:
        raise DataError(f"{path}: is not an idx file of bytes")
    start = 4 + 4 * content[3]
    shape = tuple(int(n) for n in np.frombuffer(content[4:start], ">u4"))
    if len(content) - start != int(np.prod(shape)):
        raise DataError(f"{path}: holds {len(content) - start} bytes of data, expected {shape}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; return its exit code."""
    parser = argparse.ArgumentParser(description="Rebuild the embedded part of Fashion-MNIST.")
    parser.add_argument("source_dir", type=Path, help="folder of the four original .gz files")
    parser.add_argument("out", type=Path, help="file to write")
    options = parser.parse_args(arguments)
    try:
        build(options.source_dir, options.out)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {options.out.stat().st_size} bytes")
    return 0


def _first_of_each_class(source: Path, prefix: str, count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
    side = fashion_mnist.IMAGE_SIDE
    if images.shape[1:] != (side, side) or labels.shape != images.shape[:1] or len(labels) < count:
        raise DataError(
            f"{source}: {prefix} images have shape {images.shape} and labels {labels.shape}, "
            f"expected at least {count} images of {side}x{side} and as many labels"
        )
    chosen = balanced_subset(torch.from_numpy(labels.astype(np.int64)), count).numpy()
    return images[chosen], labels[chosen]


if __name__ == "__main__":
    sys.exit(main())
