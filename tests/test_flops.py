"""The cost model against hand-worked layers, fvcore and torch's own FLOP counter."""

from __future__ import annotations

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from clicktrain import models
from clicktrain.assignment import Assignment
from clicktrain.errors import InvalidArgument
from clicktrain.flops import (
    DEFINITIONS,
    LayerCost,
    TrainingCost,
    accountings,
    compression,
    compressions,
    conv_macs,
    fvcore_handles,
    layer_costs,
    pruned,
)
from clicktrain.layers import PatternConv2d
from clicktrain.patterns import PRUNED, official_pool


class Toy(nn.Module):
    """A stem, a strided 3x3 layer beside a shortcut, and a linear layer; 3x8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 6, 1, stride=2, bias=False), nn.BatchNorm2d(6))
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = (self.conv2(x) + self.shortcut(x)).relu()
        return self.fc(self.drop(x.mean((2, 3))))


def conv(name: str, weights: int, positions: int = 1, **more: object) -> LayerCost:
    return LayerCost(name, "conv", weights, weights, 0, positions, (3, 3), (1, 1, positions), **more)


def pattern_layer(kept: int = 7) -> PatternConv2d:
    """A 4 -> 6 convolution that keeps the first `kept` of 24 kernels, four weights each."""
    index = torch.full((24,), PRUNED, dtype=torch.uint8)
    index[:kept] = torch.arange(kept, dtype=torch.uint8) % 4
    assignment = Assignment(index.view(6, 4), official_pool(4))
    return PatternConv2d.from_conv2d(Toy().conv2, assignment, backend="reference")


def test_layers_of_a_toy_network_by_hand() -> None:
    layers = layer_costs(Toy(), (3, 8, 8))
    assert [(c.name, c.kind, c.weights, c.bias, c.positions, c.macs) for c in layers] == [
        ("conv1", "conv", 108, 4, 64, 108 * 64),
        ("bn1", "other", 8, 0, 0, 0),
        ("conv2", "conv", 216, 0, 16, 216 * 16),
        ("shortcut.0", "conv", 24, 0, 16, 24 * 16),
        ("shortcut.1", "other", 12, 0, 0, 0),
        ("fc", "linear", 30, 5, 1, 30),
    ]
    by_name = {layer.name: layer for layer in layers}
    assert [name for name, layer in by_name.items() if layer.is_first] == ["conv1"]
    assert [name for name, layer in by_name.items() if layer.is_shortcut] == ["shortcut.0"]
    assert (by_name["conv2"].kernel_size, by_name["conv2"].out_shape) == ((3, 3), (6, 4, 4))
    assert by_name["fc"].out_shape == (5,)
    assert all(layer.kept == layer.weights for layer in layers)


def test_layers_come_in_the_order_in_which_they_run() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Conv2d(4, 4, 3)
            self.first = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    layers = layer_costs(Backwards(), (3, 8, 8))
    assert [(layer.name, layer.is_first) for layer in layers] == [("first", True), ("second", False)]


def test_a_layer_that_runs_twice_costs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    (layer,) = layer_costs(Twice(), (3, 8, 8))
    assert layer.positions == 36 + 16
    assert layer.weights == 81


def test_a_grouped_convolution_costs_what_its_weights_do() -> None:
    (layer,) = layer_costs(nn.Conv2d(8, 8, 3, groups=8, bias=False, padding=1), (8, 5, 5))
    assert layer.macs == 72 * 25


def test_pattern_convolution_counts_dense_and_kept_weights() -> None:
    model = Toy()
    model.conv2 = pattern_layer(kept=7)
    by_name = {layer.name: layer for layer in layer_costs(model, (3, 8, 8))}
    sparse = by_name["conv2"]
    assert (sparse.weights, sparse.kept, sparse.bias) == (216, 28, 0)
    assert (sparse.macs, sparse.sparse_macs) == (216 * 16, 28 * 16)
    assert not sparse.is_shortcut


def test_a_pattern_convolution_can_be_the_first() -> None:
    layers = layer_costs(nn.Sequential(pattern_layer(), nn.Conv2d(6, 2, 3)), (4, 8, 8))
    assert [layer.is_first for layer in layers] == [True, False]


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = Toy().train()
    model.shortcut.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    random_state = torch.get_rng_state()
    layer_costs(model, (3, 8, 8))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_measuring_takes_its_hooks_away_when_the_model_fails() -> None:
    model = Toy().train()
    with pytest.raises(RuntimeError):
        layer_costs(model, (5, 8, 8))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_convolutions_outside_of_the_model_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ConvTranspose2d(3, 3, 3))
    with pytest.raises(InvalidArgument, match="layer 1 is a ConvTranspose2d, expected 2-d convolutions only"):
        layer_costs(model, (3, 8, 8))
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("name", ["resnet32", "resnet50", "vgg11", "vgg13", "vgg16", "prunetrain_resnet50"])
def test_macs_by_layer_equal_fvcores(name: str) -> None:
    model = models.create(name, 10, width=0.25).eval()
    counted = FlopCountAnalysis(model, torch.zeros(1, 3, 32, 32)).unsupported_ops_warnings(False).by_module()
    ours = {layer.name: layer.macs for layer in layer_costs(model, (3, 32, 32)) if layer.kind != "other"}
    assert ours == {layer: counted[layer] for layer in ours}


def test_macs_of_a_torchvision_network_equal_fvcores() -> None:
    model = models.create("imagenet_resnet18", 1000, input_size=64).eval()
    analysis = FlopCountAnalysis(model, torch.zeros(1, 3, 64, 64)).unsupported_ops_warnings(False)
    assert conv_macs(layer_costs(model, (3, 64, 64)))["dense"] == analysis.by_operator()["conv"]


@pytest.mark.parametrize("batch", [1, 3])
def test_fvcore_counts_our_operator_with_the_handles(batch: int) -> None:
    model = Toy().eval()
    model.conv2 = pattern_layer(kept=7)
    analysis = FlopCountAnalysis(model, torch.zeros(batch, 3, 8, 8)).set_op_handle(**fvcore_handles())
    counted = analysis.unsupported_ops_warnings(False).by_module()
    assert counted["conv2"] == batch * 28 * 16
    assert not any("pattern_conv2d" in operator for operator in analysis.unsupported_ops())
    kept = {layer.name: layer.sparse_macs for layer in layer_costs(model, (3, 8, 8)) if layer.kind != "other"}
    assert {name: batch * macs for name, macs in kept.items()} == {name: counted[name] for name in kept}


def test_compression_by_the_three_definitions_by_hand() -> None:
    layers = layer_costs(Toy(), (3, 8, 8))
    kept = {"conv2": 16}
    assert compression(layers, kept) == (108 + 216) / (108 + 16)
    assert compression(layers, kept, "all_convs") == (108 + 216 + 24) / (108 + 16 + 24)
    assert compression(layers, kept, "released_counter") == (108 + 4 + 216) / (108 + 4 + 16)
    assert compressions(layers, kept) == {name: compression(layers, kept, name) for name in DEFINITIONS}
    assert compressions(layers) == {"paper": 1.0, "all_convs": 1.0, "released_counter": 1.0}


def test_the_released_counter_counts_batch_norm_inside_features() -> None:
    layers = layer_costs(models.create("vgg11", 10), (3, 32, 32))
    batch_norm = sum(layer.weights for layer in layers if layer.kind == "other")
    assert batch_norm == 2 * (64 + 128 + 2 * 256 + 4 * 512)
    kept = {"features.25": 1000}
    dense = 9_217_728 + batch_norm
    assert compression(layers, kept, "released_counter") == dense / (dense - 512 * 512 * 9 + 1000)


def test_compression_reads_pattern_layers_without_being_told() -> None:
    model = Toy()
    model.conv2 = pattern_layer(kept=7)
    assert compression(layer_costs(model, (3, 8, 8))) == (108 + 216) / (108 + 28)


def test_compression_to_nothing_is_infinite() -> None:
    assert compression([conv("conv", 9)], {"conv": 0}) == float("inf")


def test_conv_macs_leave_linear_layers_out() -> None:
    layers = layer_costs(Toy(), (3, 8, 8))
    dense = 108 * 64 + 216 * 16 + 24 * 16
    assert conv_macs(layers) == {"dense": dense, "sparse": dense}
    assert conv_macs(layers, {"conv2": 16}) == {"dense": dense, "sparse": dense - 200 * 16}


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"conv3": 1}, "kept: the model has no layer 'conv3'"),
        ({"conv": 10}, r"kept\['conv'\]: expected 0 to 9 weights, got 10"),
        ({"conv": -1}, r"kept\['conv'\]: expected 0 to 9 weights, got -1"),
    ],
)
def test_impossible_numbers_of_kept_weights_are_refused(kept: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        pruned([conv("conv", 9)], kept)


def test_unknown_definition_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="definition: expected one of paper, all_convs, released_counter, got"):
        compression([conv("conv", 9)], {}, "nominal")  # type: ignore[arg-type]


def test_dense_training_step_equals_torchs_flop_counter() -> None:
    model = models.create("resnet32", 10, width=0.25)
    cost = TrainingCost(layer_costs(model, (3, 32, 32)))
    cost.add_step({}, batch_size=4)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert cost.flops == cost.dense_flops == counter.get_total_flops()


def test_each_pass_is_charged_with_its_own_density() -> None:
    layers = [conv("first", 10, is_first=True), conv("second", 100)]
    cost = TrainingCost(layers)
    cost.add_step({"first": (0.5, 0.25, 0.75), "second": (0.5, 0.25, 1.0)}, batch_size=3, steps=2)
    assert cost.dense_flops == 6 * 2 * (2 * 10 + 3 * 100)
    assert cost.flops == 6 * 2 * (10 * (0.5 + 0.75) + 100 * (0.5 + 0.25 + 1.0))


def test_training_cost_adds_up_and_saves_nothing_before_the_first_step() -> None:
    cost = TrainingCost([conv("first", 10, is_first=True), conv("second", 40)])
    assert (cost.flops, cost.saved_percent) == (0, 0)
    cost.add_step({}, batch_size=1)
    cost.add_step({"second": (0.0, 0.0, 0.0)}, batch_size=1)
    assert cost.saved_percent == pytest.approx(100 * 240 / 560)
    cost.extra(600)
    assert cost.flops == 280 + 40 + 600
    assert cost.dense_flops == 560
    assert cost.saved_percent < 0


def test_training_cost_goes_on_from_its_state() -> None:
    layers = [conv("first", 10, is_first=True), conv("second", 40)]
    steps: list[dict[str, tuple[float, float, float]]] = [{}, {"second": (0.3, 0.7, 0.1)}, {"second": (0.1, 0.1, 1.0)}]
    whole, first = TrainingCost(layers), TrainingCost(layers)
    for densities in steps:
        whole.add_step(densities, 7)
    first.add_step(steps[0], 7)
    second = TrainingCost(layers)
    second.load_state_dict(first.state_dict())
    for densities in steps[1:]:
        second.add_step(densities, 7)
    assert second.state_dict() == whole.state_dict()


def test_densities_of_an_unknown_layer_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="densities: the dense model has no layer 'third'"):
        TrainingCost([conv("first", 10)]).add_step({"third": (1.0, 1.0, 1.0)}, 1)


@pytest.mark.parametrize(
    ("accounting", "share"),
    [
        ("A", lambda epoch: (0.0, 0.0, 0.0) if epoch < 7 else (1.0, 1.0, 1.0)),
        ("B", lambda epoch: (0.0, 0.0, 0.0) if epoch < 3 else (1.0, 1.0, 1.0)),
        ("C", lambda epoch: (0.0, 0.0, 0.0) if epoch < 3 else (1.0, 1.0, 0.0)),
        ("D", lambda epoch: (min(max((epoch + 0.5 - 3) / 4, 0.0), 1.0),) * 3),
    ],
)
def test_accountings_equal_the_integral_over_the_schedule_that_they_suppose(accounting: str, share: object) -> None:
    layers = [conv("first", 10), conv("second", 100), LayerCost("fc", "linear", 50, 50, 5, 1, (1, 1), (5,))]
    kept = {"second": 20}
    cost = TrainingCost(layers)  # no layer marked first: the accountings charge its grad-input as well
    for epoch in range(10):
        densities = tuple(1 - 0.8 * part for part in share(epoch))
        cost.add_step({"second": densities}, batch_size=1)
    saved = accountings(layers, kept, epochs=10, select_at=3, prune_at=7)
    assert saved[accounting] == pytest.approx(cost.saved_percent)
