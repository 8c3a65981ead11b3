"""Importance scores."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clicktrain.errors import InvalidArgument
from clicktrain.importance import measure


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def batches(count=3):
    random = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 3, 8, 8, generator=random), torch.tensor([0, 1, 2, 3, 0, 1])) for _ in range(count)]


def weights(model):
    return {"0": model[0].weight, "4": model[4].weight}


def test_taylor_is_the_mean_of_squared_products(model):
    model[3].p = 0.0
    measured = measure(model, weights(model), batches())
    expected = 0
    for x, y in batches():
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        expected = expected + (model[4].weight * model[4].weight.grad).square() / 3
    torch.testing.assert_close(measured["4"], expected.detach())


def test_one_batch_equals_the_gradient_of_a_plain_step(model):
    """As in the released code: the batch that chooses is the batch of the next step, dropout included."""
    torch.manual_seed(7)
    measured = measure(model, weights(model), batches(1))
    torch.manual_seed(7)
    x, y = batches(1)[0]
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(measured["0"], (model[0].weight * model[0].weight.grad).square().detach())


def test_nothing_is_disturbed(model):
    model.eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    measure(model, weights(model), batches())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert not any(module.training for module in model.modules())


def test_magnitude_needs_no_data(model):
    measured = measure(model, weights(model), score="magnitude")
    assert torch.equal(measured["4"], model[4].weight.detach() ** 2)


def test_bad_requests_are_named(model):
    with pytest.raises(InvalidArgument, match="score='typo'"):
        measure(model, weights(model), batches(), score="typo")
    with pytest.raises(InvalidArgument, match="at least one batch"):
        measure(model, weights(model), [])
