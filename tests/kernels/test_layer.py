"""What the layouts of all passes are made with."""

import numpy as np
import pytest

from clicktrain.kernels.cpu.layer import stable_order


@pytest.mark.parametrize("size", [1, 2, 1000, 1 << 16, (1 << 16) + 1, 1 << 20, 1 << 32])
def test_keys_are_sorted_and_equal_ones_left_as_they_are(size: int) -> None:
    random = np.random.default_rng(size)
    keys = np.append(random.integers(0, size, 5000), [size - 1, 0, size - 1])
    keys = np.append(keys, keys[:1000])
    assert np.array_equal(stable_order(keys, size), np.argsort(keys, kind="stable"))


def test_no_keys_have_an_order() -> None:
    assert len(stable_order(np.zeros(0, np.int64), 1 << 20)) == 0
