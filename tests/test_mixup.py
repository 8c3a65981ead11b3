"""Mixup."""

import pytest
import torch
from torch.nn import functional as F

from clicktrain.errors import InvalidArgument
from clicktrain.mixup import mixup


def batch():
    random = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, 4, 4, generator=random), torch.randint(0, 5, (8,), generator=random)


def test_targets_are_the_weights_of_the_images():
    """Class means of one-hot images mix exactly as the targets do."""
    _, y = batch()
    x = F.one_hot(y, 5).float()[:, :, None, None]
    mixed, targets = mixup(x, y, 5, 0.3, (1, 2, 3))
    torch.testing.assert_close(mixed[:, :, 0, 0], targets)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))


def test_soft_cross_entropy_is_the_weighted_sum_of_two():
    x, y = batch()
    _, targets = mixup(x, y, 5, 1.0, (0, 0, 1))
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    row = next(r for r in targets if (r > 0).sum() == 2)
    n = next(i for i, r in enumerate(targets) if torch.equal(r, row))
    expected = sum(row[c] * F.cross_entropy(logits[n : n + 1], torch.tensor([c])) for c in range(5))
    torch.testing.assert_close(F.cross_entropy(logits[n : n + 1], row[None]), expected)


def test_equal_keys_give_equal_draws_and_others_do_not():
    x, y = batch()
    state = torch.get_rng_state()
    first, again, other = (mixup(x, y, 5, 0.3, key)[0] for key in ((1, 2, 3), (1, 2, 3), (1, 2, 4)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_alpha_must_be_positive():
    with pytest.raises(InvalidArgument, match="alpha=0"):
        mixup(*batch(), 5, 0, (0,))
