"""`models.create`: names, widths, image sizes, channels, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clicktrain import models
from clicktrain.errors import InvalidArgument
from clicktrain.models.blocks import scaled

CIFAR_NETWORKS = [name for name in models.names() if not name.startswith("imagenet_")]


@pytest.mark.parametrize("name", CIFAR_NETWORKS)
@pytest.mark.parametrize(("size", "channels"), [(32, 3), (16, 1), (28, 1), (45, 3), (64, 5)])
def test_any_image_size_and_channel_count(name: str, size: int, channels: int) -> None:
    model = models.create(name, 7, width=0.25, in_channels=channels, input_size=size)
    assert model(torch.randn(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", CIFAR_NETWORKS)
def test_parameters_do_not_depend_on_the_image_size(name: str) -> None:
    small, large = (models.create(name, 10, width=0.25, input_size=size) for size in (32, 224))
    assert {n: p.shape for n, p in small.named_parameters()} == {n: p.shape for n, p in large.named_parameters()}


@pytest.mark.parametrize("name", CIFAR_NETWORKS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = models.create(name, 10, width=0.25)
    nn.functional.cross_entropy(model(torch.randn(8, 3, 32, 32)), torch.arange(8)).backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.isfinite().all(), parameter


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    [
        (64, 1.0, 64), (512, 0.25, 128), (64, 0.05, 8), (64, 0.0001, 8), (16, 0.75, 16),  # 12 lies half-way: up
        (64, 0.3, 16), (64, 0.33, 24), (128, 1.5, 192), (256, 2.0, 512),
    ],
)  # fmt: skip
def test_scaled_channels_are_multiples_of_eight(channels: int, width: float, expected: int) -> None:
    assert scaled(channels, width) == expected


def test_width_scales_every_layer_of_vgg() -> None:
    model = models.create("vgg13", 10, width=0.25)
    outputs = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert outputs == [16, 16, 32, 32, 64, 64, 128, 128, 128, 128]
    assert [m.in_features for m in model.modules() if isinstance(m, nn.Linear)] == [128, 128, 128]


def test_width_scales_every_stage_of_resnet() -> None:
    model = models.create("resnet50", 10, width=0.5)
    assert [model.get_submodule(f"layer{i}.0.conv3").out_channels for i in (1, 2, 3, 4)] == [128, 256, 512, 1024]
    assert model.conv1.out_channels == 32
    assert model.fc.in_features == 1024


def test_creation_is_reproducible() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(models.create("vgg11", 10, width=0.25).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", ["imagenet_resnet18", "imagenet_resnet50"])
def test_torchvision_networks_take_other_channels_and_sizes(name: str) -> None:
    model = models.create(name, 5, in_channels=1, input_size=64)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 5)


def test_first_convolution_of_torchvisions_vgg_is_replaced_in_kind() -> None:
    with torch.device("meta"):
        first = models.create("imagenet_vgg16_bn", 5, in_channels=1, input_size=64).features[0]
    assert first.weight.shape == (64, 1, 3, 3)
    assert first.padding == (1, 1)
    assert first.bias is not None


def test_replaced_first_convolution_is_drawn_anew() -> None:
    torch.manual_seed(0)
    conv = models.create("imagenet_resnet18", 5, in_channels=2, input_size=64).conv1
    assert conv.weight.std().item() == pytest.approx((2 / (49 * 64)) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vgg12"}, r"unknown name 'vgg12' \(did you mean vgg1[136]\?\).*prunetrain_resnet32"),
        ({"name": "transformer"}, r"unknown name 'transformer'; known: resnet32, resnet50, vgg11"),
        ({"num_classes": 0}, "num_classes: expected a positive integer, got 0"),
        ({"in_channels": -1}, "in_channels: expected a positive integer, got -1"),
        ({"input_size": 0}, "input_size: expected a positive integer, got 0"),
        ({"width": 0.0}, "width: expected a positive channel multiplier, got 0.0"),
        ({"width": float("nan")}, "width: expected a positive channel multiplier, got nan"),
        ({"width": float("inf")}, "width: expected a positive channel multiplier, got inf"),
        ({"input_size": 15}, "input_size: 15 is too small for vgg13.*at least 16"),
        ({"name": "imagenet_resnet18", "width": 0.5}, "width: imagenet_resnet18 .* width 1 only, got 0.5"),
        ({"name": "imagenet_vgg16_bn", "input_size": 31}, "input_size: imagenet_vgg16_bn needs at least 32 .* 31"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        models.create(**{"name": "vgg13", "num_classes": 10, **arguments})
