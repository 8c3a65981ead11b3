"""Removing channels: the groups that share them, the smaller network, and the three methods that do it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from baselines import NetworkSlimming, PruneTrain, SmallDense
from baselines.channels import ChannelGraph
from baselines.shrinking import RemovedConv2d, Shrinking
from clicktrain import models
from clicktrain.errors import InvalidArgument
from clicktrain.flops import compression, conv_macs, layer_costs
from clicktrain.method import Method
from clicktrain.models.blocks import BasicBlock, Bottleneck
from clicktrain.models.resnet import ResNet
from tests.baselines.test_contract import step, train
from tests.helpers.toy import CLASSES, ToyNet

Block = type[BasicBlock] | type[Bottleneck]


def resnet(block: Block = BasicBlock) -> ResNet:
    return ResNet(block, ((8, 2), (16, 2)), num_classes=CLASSES, in_channels=1, width=1.0)


def ready(method: Shrinking, model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    method.setup(model, SGD(model.parameters(), lr=0.05, momentum=0.9), torch.zeros(1, 1, 8, 8))
    return model


def images() -> Tensor:
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def group_of(graph: ChannelGraph, *producers: str) -> int:
    return next(number for number, group in enumerate(graph.groups) if set(group.producers) == set(producers))


def test_residual_joins_share_their_channels() -> None:
    graph = ChannelGraph(resnet())
    stem = graph.groups[group_of(graph, "conv1", "layer1.0.conv2", "layer1.1.conv2")]
    assert set(stem.consumers) == {"layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.shortcut.0"}
    assert set(stem.norms) == {"bn1", "layer1.0.bn2", "layer1.1.bn2"}
    last = graph.groups[group_of(graph, "layer2.0.conv2", "layer2.0.shortcut.0", "layer2.1.conv2")]
    assert set(last.consumers) == {"layer2.1.conv1", "fc"}
    assert graph.groups[group_of(graph, "fc")].is_output


@pytest.mark.parametrize("name", ["vgg11", "resnet32", "prunetrain_resnet50", "imagenet_resnet18"])
def test_channels_of_our_networks_can_be_followed(name: str) -> None:
    model = models.create(name, 10)
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert set(ChannelGraph(model).reads) == layers


def silence(model: nn.Module, method: Shrinking, number: int, channels: list[int]) -> None:
    """Make channels of a group zero, so that removing them changes nothing."""
    group = method.graph.groups[number]
    with torch.no_grad():
        for name in [*group.producers, *group.norms]:
            layer = model.get_submodule(name)
            layer.weight[channels] = 0
            if layer.bias is not None:
                layer.bias[channels] = 0


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_the_smaller_network_equals_the_masked_one(block: Block) -> None:
    method = PruneTrain(epochs=1)
    model = ready(method, resnet(block))
    train(method)  # statistics and momentum
    left = {}
    for number, group in enumerate(method.graph.groups):
        if not group.is_fixed:
            silence(model, method, number, [0, 3])
            left[number] = torch.tensor([c for c in range(group.channels) if c not in (0, 3)])
    expected = model.eval()(images())
    momentum = method.optimizer.state[model.conv1.weight]["momentum_buffer"].clone()
    before = sum(p.numel() for p in model.parameters())
    method.shrink(left)
    assert torch.allclose(model.eval()(images()), expected, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) < 0.8 * before
    kept = left[group_of(method.graph, *method.graph.groups[method.graph.writes["conv1"]].producers)]
    assert torch.equal(method.optimizer.state[model.conv1.weight]["momentum_buffer"], momentum[kept])
    assert {id(p) for g in method.optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


def test_the_neurons_behind_a_flattened_map_go_with_their_channel() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, CLASSES))
    method = PruneTrain(epochs=1)
    ready(method, model)
    silence(model, method, 1, [1])
    expected = model(images())
    method.shrink({1: torch.tensor([0, 2])})
    assert model[3].in_features == 72
    assert torch.allclose(model(images()), expected, atol=1e-6)


@pytest.mark.parametrize(("block", "dead"), [(BasicBlock, "conv1"), (Bottleneck, "conv1"), (Bottleneck, "conv2")])
def test_a_residual_branch_with_a_dead_layer_is_removed(block: Block, dead: str) -> None:
    method = PruneTrain(epochs=4, every=1)
    model = ready(method, resnet(block))
    train(method, 0, 1)
    graph = method.graph
    number = graph.writes[f"layer1.1.{dead}"]
    with torch.no_grad():
        for name in graph.groups[number].producers:
            model.get_submodule(name).weight.zero_()
        for name in graph.groups[number].consumers:
            model.get_submodule(name).weight.zero_()
    before = sum(p.numel() for p in model.parameters())
    method.reconfigure()
    branch = {name for name in graph.reads if name.startswith("layer1.1.conv")}
    assert branch <= method.removed
    assert all(isinstance(model.get_submodule(name), RemovedConv2d) for name in branch)
    assert sum(p.numel() for p in model.parameters()) < before
    assert method.densities()[f"layer1.1.{dead}"] == (0, 0, 0)
    stem = model.get_submodule("layer1.0")(torch.relu(model.bn1(model.conv1(images()))))
    assert torch.equal(model.get_submodule("layer1.1")(stem), torch.relu(stem))
    train(method, 1)  # and training goes on


def test_a_dead_layer_without_a_way_around_keeps_its_strongest_channel() -> None:
    method = PruneTrain(epochs=2)
    model = ready(method, ToyNet(CLASSES))
    with torch.no_grad():
        model[3].weight.mul_(1e-9)
        model[7].weight.mul_(1e-9)
    strongest = int((model[3].weight.square().sum((1, 2, 3)) + model[7].weight.square().sum((0, 2, 3))).argmax())
    method.reconfigure()
    assert method.left[method.graph.writes["3"]].tolist() == [strongest]
    assert method.removed == set()


@pytest.mark.parametrize(("test", "left"), [("signed", [0]), ("magnitude", [0, 1])])
def test_both_readings_of_the_threshold(test: str, left: list[int]) -> None:
    """Channel 0 has a large positive weight, 1 a large negative one, the others nothing."""
    method = PruneTrain(epochs=1, test=test)  # type: ignore[arg-type]
    model = ready(method, ToyNet(CLASSES))
    with torch.no_grad():
        model[3].weight.zero_()
        model[7].weight.zero_()
        model[3].weight[0, 0, 0, 0], model[3].weight[1, 0, 0, 0] = 1.0, -1.0
        model[3].weight[0, :, 1, 1] = 1.0  # so that every input channel is read
    method.reconfigure()
    assert method.left[method.graph.writes["3"]].tolist() == left


def test_a_channel_that_any_layer_of_a_join_needs_stays() -> None:
    method = PruneTrain(epochs=1)
    model = ready(method, resnet())
    number = method.graph.writes["conv1"]
    group = method.graph.groups[number]
    with torch.no_grad():
        for name in group.producers:
            model.get_submodule(name).weight[:3] = 0
        for name in group.consumers:
            model.get_submodule(name).weight[:, :3] = 0
        model.get_submodule("layer1.1.conv2").weight[1] = 1.0
    method.reconfigure()
    assert method.left[number].tolist() == [1, 3, 4, 5, 6, 7]


def test_the_penalty_starts_as_the_share_that_was_asked_for() -> None:
    method = PruneTrain(epochs=1, ratio=0.25)
    model = ready(method, ToyNet(CLASSES))
    before = copy.deepcopy(model.state_dict())
    x, y = images(), torch.arange(6) % CLASSES
    method.on_epoch(0, [(x, y)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    macs = sum(cost.macs for cost in layer_costs(model, (1, 8, 8)))
    assert method.extra_flops == 6 * 2 * macs
    assert method.strength is not None
    model[6].eval()  # dropout draws anew
    penalty = float(method.penalty().detach())
    loss = penalty * 0.75 / 0.25
    assert loss == pytest.approx(float(nn.functional.cross_entropy(model(x), y).detach()), rel=0.2)


def test_the_lasso_is_that_of_its_groups() -> None:
    method = PruneTrain(epochs=1)
    model = ready(method, nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(2 * 64, CLASSES)))
    conv, linear = model[0].weight, model[2].weight
    expected = conv.flatten(1).norm(dim=1).sum() + linear.view(CLASSES, 2, 64).norm(dim=(0, 2)).sum()
    assert float(method.lasso().detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_prunetrain_resumes_after_a_branch_is_gone() -> None:
    method, again = PruneTrain(epochs=3, every=1), PruneTrain(epochs=3, every=1)
    model = ready(method, resnet())
    train(method, 0, 1)
    with torch.no_grad():
        for name in ("layer1.1.conv1", "layer1.1.conv2"):
            model.get_submodule(name).weight.zero_()
    train(method, 1, 2)
    assert method.removed
    state = copy.deepcopy([method.state_dict(), model.state_dict(), method.optimizer.state_dict()])
    train(method, 2)
    copied = ready(again, resnet())
    again.load_state_dict(state[0])
    copied.load_state_dict(state[1])
    again.optimizer.load_state_dict(state[2])
    train(again, 2)
    found = copied.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())


def test_slimming_removes_the_channels_with_the_smallest_scales() -> None:
    method = NetworkSlimming(0.5, epochs=1, finetune_epochs=1)
    model = ready(method, ToyNet(CLASSES))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.1, -5.0, 0.2, 4.0]))
        model[4].weight.copy_(torch.tensor([1.0, 0.3, -2.0, 0.05, 3.0, 0.01]))
    method.begin_phase(1, SGD(model.parameters(), lr=0.1))
    assert method.left[method.graph.writes["0"]].tolist() == [1, 3]
    assert method.left[method.graph.writes["3"]].tolist() == [0, 2, 4]
    assert method.log()["channels_left"] == 0.5


def test_slimming_pulls_scales_to_zero() -> None:
    method = NetworkSlimming(0.5, epochs=1, strength=0.25)
    model = ready(method, ToyNet(CLASSES))
    model[1].weight.grad = torch.zeros(4)
    method.after_backward()
    assert model[1].weight.grad.tolist() == [0.25] * 4


def vgg19() -> nn.Module:
    """The VGG-19 of network slimming: one linear layer."""
    layers: list[nn.Module] = []
    c_in = 3
    for stage, (channels, convs) in enumerate([(64, 2), (128, 2), (256, 4), (512, 4), (512, 4)]):
        if stage:
            layers.append(nn.MaxPool2d(2))
        for _ in range(convs):
            layers += [nn.Conv2d(c_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
            c_in = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def test_slimming_of_vgg19_starts_from_the_published_size() -> None:
    model = vgg19()
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == "20.04"
    method = NetworkSlimming(0.7, epochs=160)
    method.setup(model, SGD(model.parameters(), lr=0.1), torch.zeros(1, 3, 32, 32))
    for number in method.graph.norm_of.values():
        nn.init.uniform_(model.get_submodule(number).weight)
    method.begin_phase(1, SGD(model.parameters(), lr=0.1))
    left = sum(len(left) for left, group in zip(method.left, method.graph.groups, strict=True) if not group.is_fixed)
    assert left == 5504 - int(0.7 * 5504)


@pytest.mark.parametrize(("target", "by"), [(4.0, "target_flops"), (8.0, "target_flops"), (4.0, "target_compression")])
def test_small_dense_is_the_widest_network_within_the_budget(target: float, by: str) -> None:
    method = SmallDense(epochs=1, **{by: target})
    model = resnet()
    dense = layer_costs(model, (1, 8, 8))
    ready(method, model)
    costs = layer_costs(model, (1, 8, 8))
    if by == "target_flops":
        reached = conv_macs(dense)["dense"] / conv_macs(costs)["dense"]
    else:
        reached = compression(dense, {cost.name: cost.kept for cost in costs if cost.kind == "conv"})
    assert target <= reached < 1.1 * target
    step(method, images(), torch.arange(6) % CLASSES)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Joined(lambda x, y: x + y), "residual join add of the image"),
        (lambda: Joined(lambda x, y: torch.cat([x, y], 1)), "followed through cat"),
        (lambda: Joined(lambda x, y: x if x.sum() > 0 else y), "channels cannot be followed"),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2)), "layer 1 has groups=2"),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4)), "a GroupNorm"),
    ],
)
def test_channels_that_cannot_be_followed_are_named(model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        ready(PruneTrain(epochs=1), model())


class Joined(nn.Module):
    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.conv(x))


def test_slimming_needs_batchnorm() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, CLASSES))
    with pytest.raises(InvalidArgument, match="expected a BatchNorm"):
        ready(NetworkSlimming(epochs=1), model)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PruneTrain(ratio=1.0), r"ratio=1\.0"),
        (lambda: PruneTrain(every=0), "every=0"),
        (lambda: PruneTrain(threshold=0.0), r"threshold=0\.0"),
        (lambda: PruneTrain(test="absolute"), "test='absolute'"),
        (lambda: PruneTrain(epochs=0), "epochs=0"),
        (lambda: NetworkSlimming(1.0), r"prune=1\.0"),
        (lambda: NetworkSlimming(strength=-1.0), r"strength=-1\.0"),
        (lambda: NetworkSlimming(finetune_epochs=0), "finetune_epochs=0"),
        (lambda: SmallDense(), "exactly one of"),
        (lambda: SmallDense(2.0, target_flops=2.0), "exactly one of"),
    ],
)
def test_mistakes_are_named(build: Callable[[], Method], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        build()


def test_a_width_that_no_network_has_is_an_error() -> None:
    with pytest.raises(InvalidArgument, match=r"target_flops=1000\.0: feasible are 1 to"):
        ready(SmallDense(target_flops=1000.0), ToyNet(CLASSES))
