"""PatternConv2d as a module."""

import copy
import pickle

import pytest
import torch
from torch import nn

from clicktrain.assignment import Assignment, assign
from clicktrain.errors import InvalidArgument
from clicktrain.layers import PatternConv2d
from clicktrain.patterns import PRUNED, full_pool, official_pool


def make(bias=True, **kwargs):
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 7, 3, padding=1, bias=bias, **kwargs)
    assignment = assign(conv.weight.detach() ** 2, official_pool(8), 20)
    return conv, assignment


@pytest.mark.parametrize("bias", [True, False])
def test_weights_at_kept_positions_carry_over_bit_for_bit(bias):
    conv, assignment = make(bias)
    layer = PatternConv2d.from_conv2d(conv, assignment)
    assert torch.equal(layer.dense_weight(), conv.weight * assignment.mask())
    back = layer.to_conv2d()
    assert torch.equal(back.weight, conv.weight * assignment.mask())
    assert (back.bias is None) == (not bias)
    again = PatternConv2d.from_conv2d(back, layer.get_assignment())
    assert torch.equal(again.values, layer.values)


def test_an_assignment_may_be_a_tensor_with_its_pool():
    conv, assignment = make()
    layer = PatternConv2d.from_conv2d(conv, assignment.index, official_pool(8))
    x = torch.randn(2, 5, 6, 6)
    torch.testing.assert_close(layer(x), PatternConv2d.from_conv2d(conv, assignment)(x))


def test_the_layer_is_its_own_copy():
    conv, assignment = make()
    layer = PatternConv2d.from_conv2d(conv, assignment)
    before = layer.values.detach().clone()
    conv.weight.data.zero_()
    assert torch.equal(layer.values, before)


def test_only_kept_weights_are_parameters():
    conv, assignment = make()
    layer = PatternConv2d.from_conv2d(conv, assignment)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {"values": (20, 4), "bias": (7,)}
    assert set(layer.state_dict()) == {"values", "bias", "assignment", "pool_masks"}


def test_state_dict_copy_and_pickle_keep_the_function():
    conv, assignment = make()
    layer = PatternConv2d.from_conv2d(conv, assignment)
    x = torch.randn(2, 5, 6, 6)
    other = PatternConv2d(Assignment(torch.flip(assignment.index, [0]), assignment.pool), padding=1, bias=True)
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x), layer(x))


def test_repr_tells_the_sparsity():
    conv, assignment = make()
    assert "kept_kernels=20/35, entries=4, patterns=8" in repr(PatternConv2d.from_conv2d(conv, assignment))


def test_a_layer_with_nothing_kept_gives_its_bias():
    conv = nn.Conv2d(2, 3, 1)
    nothing = Assignment(torch.full((3, 2), PRUNED, dtype=torch.uint8), full_pool(1))
    y = PatternConv2d.from_conv2d(conv, nothing)(torch.randn(1, 2, 4, 4))
    torch.testing.assert_close(y, conv.bias[None, :, None, None].expand(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("conv", "text"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "groups=2"),
        (nn.Conv2d(4, 4, 3, dilation=2), "dilation"),
        (nn.Conv2d(4, 4, 3, padding="same"), "padding='same'"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "reflect"),
        (nn.Conv2d(4, 4, (3, 1)), r"\(3, 1\)"),
        (nn.Conv2d(8, 4, 3), r"\(4, 8, 3, 3\)"),
    ],
)
def test_convolutions_of_another_kind_are_refused(conv, text):
    assignment = Assignment(torch.zeros(4, 4, dtype=torch.uint8), official_pool(4))
    with pytest.raises(InvalidArgument, match=text):
        PatternConv2d.from_conv2d(conv, assignment)


def test_a_tensor_without_pool_is_refused():
    with pytest.raises(InvalidArgument, match="pool"):
        PatternConv2d.from_conv2d(nn.Conv2d(1, 1, 3), torch.zeros(1, 1, dtype=torch.uint8))


def test_an_unknown_backend_is_refused():
    conv, assignment = make()
    with pytest.raises(InvalidArgument, match=r"backend='typo'.*reference"):
        PatternConv2d.from_conv2d(conv, assignment, backend="typo")
