"""The table of layers: names, sizes, sparsity."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.suite import workloads
from bench.suite.workloads import COMPRESSIONS, GOALS, LAYERS, POOLS, LayerShape, Workload
from clicktrain import models


def test_names_are_unique() -> None:
    tables = (
        *workloads.VGG13, *workloads.RESNET32, *workloads.RESNET18, *workloads.RESNET50_POINTWISE, *workloads.ODD,
    )  # fmt: skip
    assert len(LAYERS) == len(tables)
    assert len({goal.name for goal in GOALS}) == len(GOALS)


@pytest.mark.parametrize(
    ("network", "shapes", "input_size"),
    [
        ("vgg13", workloads.VGG13, 32),
        ("resnet32", workloads.RESNET32, 32),
        ("imagenet_resnet18", workloads.RESNET18, 224),
        ("imagenet_resnet50", workloads.RESNET50_POINTWISE, 224),
    ],
)
def test_layers_exist_in_their_networks(network: str, shapes: tuple[LayerShape, ...], input_size: int) -> None:
    seen = set()

    def note(layer: nn.Conv2d, inputs: tuple[torch.Tensor], _output: torch.Tensor) -> None:
        _, c_in, *size = inputs[0].shape
        seen.add((c_in, layer.out_channels, tuple(size), layer.kernel_size[0], layer.stride[0], layer.padding[0]))

    with torch.device("meta"):
        model = models.create(network, 10, input_size=input_size).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(note)
    model(torch.empty(1, 3, input_size, input_size, device="meta"))
    for s in shapes:
        assert (s.in_channels, s.out_channels, s.size, s.kernel_size, s.stride, s.padding) in seen, s.name


@pytest.mark.parametrize("shape", LAYERS.values(), ids=lambda shape: shape.name)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_sparsity_is_what_the_name_says(shape: LayerShape, compression: float) -> None:
    workload = Workload(shape, 2, compression)
    assignment = workload.assignment()
    weights = shape.in_channels * shape.out_channels * shape.kernel_size**2
    patterns_alone = shape.kernel_size**2 / assignment.pool.entries
    reached = weights / assignment.kept_weights
    assert reached == pytest.approx(max(compression, patterns_alone), rel=0.03)
    assert workload.assignment().digest() == assignment.digest(), "the same every time"


def test_operands_have_the_shapes_of_the_convolution() -> None:
    workload = Workload(LAYERS["odd.3-16x33x17/2"], 3, 4.5)
    x, dy, weight = workload.operands()
    shape = workload.shape
    assert nn.functional.conv2d(x, weight, None, shape.stride, shape.padding).shape == dy.shape == workload.output_shape
    assert shape.macs(3) == 3 * 16 * 3 * 9 * 17 * 9


def test_pools_have_as_many_patterns_as_they_say() -> None:
    assert {name: len(make()) for name, make in POOLS.items()} == {"official4": 4, "official8": 8, "official12": 12}
