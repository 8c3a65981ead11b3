"""The networks are the published ones: structure, initialisation, parameter and MAC counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from clicktrain import models
from clicktrain.flops import conv_macs, layer_costs

VGG_CHANNELS = {
    "vgg11": [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512],
    "vgg13": [64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512],
    "vgg16": [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512],
}


def convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


@pytest.mark.parametrize(
    ("name", "parameters", "million_macs", "number_of_convs"),
    [
        ("resnet32", 20_101_450, "1083.90", 34),
        ("resnet50", 23_520_842, "1297.81", 53),
        ("vgg11", 9_753_674, "152.76", 8),
        ("vgg13", 9_938_378, "228.26", 10),
        ("vgg16", 15_249_354, "313.20", 13),
        ("prunetrain_resnet32", 466_906, "69.1", 33),
        ("prunetrain_resnet50", 776_794, "114.0", 76),
    ],
)
def test_sizes_are_the_published_ones(name: str, parameters: int, million_macs: str, number_of_convs: int) -> None:
    model = models.create(name, 10)
    macs = conv_macs(layer_costs(model, (3, 32, 32)))
    digits = len(million_macs.partition(".")[2])
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert f"{macs['dense'] / 1e6:.{digits}f}" == million_macs
    assert len(convs(model)) == number_of_convs


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("imagenet_resnet18", 11_689_512),
        ("imagenet_resnet50", 25_557_032),
        ("imagenet_vgg16_bn", 138_365_992),
    ],
)
def test_torchvision_networks_have_their_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):  # 138 million weights need no values here
        model = models.create(name, 1000, input_size=224)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", VGG_CHANNELS)
def test_vgg_layers(name: str) -> None:
    model = models.create(name, 10)
    layout = [
        "M" if isinstance(m, nn.MaxPool2d) else m.out_channels
        for m in model.features
        if isinstance(m, nn.MaxPool2d | nn.Conv2d)
    ]
    assert layout == VGG_CHANNELS[name]
    for i, module in enumerate(model.features):
        if isinstance(module, nn.Conv2d):
            assert (module.kernel_size, module.padding, module.stride, module.bias) == ((3, 3), (1, 1), (1, 1), None)
            assert [type(m) for m in model.features[i + 1 : i + 3]] == [nn.BatchNorm2d, nn.ReLU]
    assert [type(m) for m in model.classifier] == [
        nn.Dropout, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear, nn.ReLU, nn.Linear,
    ]  # fmt: skip
    assert [m.p for m in model.classifier if isinstance(m, nn.Dropout)] == [0.5, 0.5]


def test_vgg_head_equals_the_official_pool_at_32_pixels() -> None:
    model = models.create("vgg11", 10)
    features = model.features(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, 512, 2, 2)
    torch.testing.assert_close(model.pool(features), nn.functional.avg_pool2d(features, 2))


@pytest.mark.parametrize(("name", "features"), [("resnet32", 512), ("resnet50", 2048)])
def test_resnet_head_equals_the_official_pool_at_32_pixels(name: str, features: int) -> None:
    model = models.create(name, 10).eval()
    images = torch.randn(2, 3, 32, 32)
    last = {}
    model.layer4.register_forward_hook(lambda module, inputs, output: last.update(output=output))
    logits = model(images)
    assert last["output"].shape == (2, features, 4, 4)
    pooled = nn.functional.avg_pool2d(last["output"], 4).flatten(1)
    torch.testing.assert_close(logits, model.fc(pooled))


def test_resnet50_structure() -> None:
    model = models.create("resnet50", 10)
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)] == [3, 4, 6, 3]
    found = convs(model)
    shortcuts = [name for name in found if "shortcut" in name]
    assert shortcuts == [f"layer{i}.0.shortcut.0" for i in (1, 2, 3, 4)]
    strided = [name for name, conv in found.items() if conv.stride == (2, 2) and name not in shortcuts]
    assert strided == [f"layer{i}.0.conv2" for i in (2, 3, 4)]
    assert all(conv.bias is None for conv in found.values())


def test_resnet32_structure() -> None:
    model = models.create("resnet32", 10)
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)] == [3, 4, 5, 3]
    assert (model.conv1.kernel_size, model.conv1.stride) == ((3, 3), (1, 1))
    strided = [name for name, conv in convs(model).items() if conv.stride == (2, 2)]
    assert strided == [f"layer{i}.0.{part}" for i in (2, 3, 4) for part in ("conv1", "shortcut.0")]


def test_vgg_initialisation_is_the_official_one() -> None:
    torch.manual_seed(0)
    model = models.create("vgg13", 10)
    for conv in convs(model).values():
        expected = math.sqrt(2 / (9 * conv.out_channels))
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.05)
        assert abs(conv.weight.mean().item()) < 0.1 * expected
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.unique().tolist() == [0.5]
            assert not module.bias.any()
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.05)
            assert not module.bias.any()


def test_vgg_logits_keep_their_scale_at_other_widths() -> None:
    torch.manual_seed(0)
    narrow = models.create("vgg13", 10, width=0.25)
    stds = [m.weight.std().item() for m in narrow.modules() if isinstance(m, nn.Linear)]
    assert stds == pytest.approx([0.02, 0.02, 0.02], rel=0.05)


def test_resnet_initialisation_is_torchs_default() -> None:
    torch.manual_seed(0)
    for conv in convs(models.create("resnet32", 10)).values():
        bound = 1 / math.sqrt(conv.weight[0].numel())  # kaiming_uniform with a = sqrt(5)
        assert 0.95 * bound < conv.weight.abs().max().item() <= bound


@pytest.mark.parametrize("name", ["prunetrain_resnet32", "prunetrain_resnet50"])
def test_prunetrain_networks_are_drawn_from_a_normal_distribution(name: str) -> None:
    torch.manual_seed(0)
    conv = models.create(name, 10).layer3[1].conv2
    expected = math.sqrt(2 / (9 * conv.out_channels))
    assert conv.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert conv.weight.abs().max().item() > 3 * expected


@pytest.mark.parametrize("name", ["resnet32", "resnet50", "vgg16", "prunetrain_resnet50"])
def test_the_released_counter_finds_convolutions_by_name_but_no_shortcut(name: str) -> None:
    for layer in convs(models.create(name, 10, width=0.25)):
        assert ("conv" in layer or "feature" in layer) != ("shortcut" in layer)


def test_torchvision_shortcuts_are_named_downsample() -> None:
    with torch.device("meta"):
        model = models.create("imagenet_resnet18", 10, input_size=64)
    pointwise = [name for name, conv in convs(model).items() if conv.kernel_size == (1, 1)]
    assert pointwise == [f"layer{i}.0.downsample.0" for i in (2, 3, 4)]
