"""What every training method promises; a new one is tested by standing in METHODS."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

import baselines
from baselines import (
    DPF,
    SET,
    SRSTE,
    AdmmElementwise,
    AdmmPattern,
    Dense,
    GradualMagnitude,
    MagnitudePruneFinetune,
    NetworkSlimming,
    OneShotNM,
    PruneTrain,
    RigL,
    SmallDense,
    TrainPruneFinetune,
)
from baselines.masking import Masked
from baselines.straight_through import SoftMasked
from clicktrain import ClickTrain, Method, PatternConv2d
from clicktrain.errors import ClickTrainError, InvalidArgument
from clicktrain.flops import LayerCost, TrainingCost, layer_costs
from tests.helpers.toy import CLASSES, ToyNet

EPOCHS = 4
Batch = tuple[Tensor, Tensor]

TARGET = 2.5

METHODS: dict[str, Callable[[], Method]] = {
    "dense": lambda: Dense(epochs=EPOCHS),
    "train-prune-finetune": lambda: TrainPruneFinetune(TARGET, epochs=EPOCHS),
    "clicktrain": lambda: ClickTrain(TARGET, epochs=EPOCHS, batches=1),
    "admm-pattern": lambda: AdmmPattern(TARGET, epochs=EPOCHS),
    "admm-elementwise": lambda: AdmmElementwise(TARGET, epochs=EPOCHS),
    "magnitude": lambda: MagnitudePruneFinetune(TARGET, epochs=EPOCHS),
    "magnitude iterative": lambda: MagnitudePruneFinetune(TARGET, epochs=EPOCHS, rounds=2, distribution="uniform"),
    "one-shot-nm": lambda: OneShotNM(1, 2, epochs=EPOCHS, retrain_epochs=2),
    "gradual-magnitude": lambda: GradualMagnitude(TARGET, epochs=EPOCHS),
    "gradual-magnitude global": lambda: GradualMagnitude(TARGET, epochs=EPOCHS, distribution="global"),
    "set": lambda: SET(TARGET, epochs=EPOCHS),
    "rigl": lambda: RigL(TARGET, epochs=EPOCHS, every=2),
    "rigl uniform": lambda: RigL(TARGET, epochs=EPOCHS, every=2, distribution="uniform"),
    "dpf": lambda: DPF(TARGET, epochs=EPOCHS, every=2),
    "network-slimming": lambda: NetworkSlimming(0.5, epochs=EPOCHS, finetune_epochs=2),
    "prunetrain": lambda: PruneTrain(epochs=EPOCHS, every=2, threshold=0.16),
    "small-dense": lambda: SmallDense(TARGET, epochs=EPOCHS),
    "sr-ste": lambda: SRSTE(1, 2, epochs=EPOCHS),
}
"""Every method at settings for a run of a few steps."""

PATTERN = ("train-prune-finetune", "clicktrain", "admm-pattern")
"""Those that end in layers without dense weights; their budgets are met to the kernel."""

WITHOUT_TARGET = ("network-slimming", "prunetrain", "one-shot-nm", "sr-ste")
"""Those whose budget is not a compression."""


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]()


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 1, 8, 8, generator=generator), torch.arange(6) % CLASSES) for _ in range(3)]


def prepared(method: Method) -> nn.Module:
    torch.manual_seed(0)
    model = ToyNet(CLASSES)
    method.setup(model, SGD(model.parameters(), lr=0.05, momentum=0.9), batches()[0][0])
    return model


def epochs_of(method: Method) -> list[int]:
    """Return for each epoch of the run the index of its phase."""
    return [index for index, phase in enumerate(method.phases) for _ in range(phase.epochs)]


def train(method: Method, first: int = 0, last: int | None = None) -> None:
    """Train the epochs [first, last) as the loop in the documentation of `Method` does."""
    phases = epochs_of(method)
    for epoch in range(first, len(phases) if last is None else last):
        if epoch and phases[epoch] != phases[epoch - 1]:
            rate = method.phases[phases[epoch]].lr or 0.05
            method.begin_phase(phases[epoch], SGD(method.model.parameters(), lr=rate, momentum=0.9))
        torch.manual_seed(epoch)
        method.on_epoch(epoch, batches())
        for x, y in batches():
            step(method, x, y)


def step(method: Method, x: Tensor, y: Tensor) -> None:
    x, y = method.prepare_batch(x, y)
    method.before_forward()
    penalty = method.penalty()
    assert penalty.shape == ()
    (F.cross_entropy(method.model(x), y) + penalty).backward()
    method.after_backward()
    method.optimizer.step()
    method.optimizer.zero_grad()
    method.after_step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_phases_are_named_and_have_a_length(method: Method) -> None:
    assert all(phase.name and phase.epochs > 0 for phase in method.phases)
    assert method.phases[0].epochs == EPOCHS
    assert isinstance(method.name, str)


def test_a_whole_run_ends_with_a_model_that_predicts(method: Method) -> None:
    prepared(method)
    train(method)
    logits = method.finish().eval()(batches()[0][0])
    assert logits.shape == (6, CLASSES)
    assert bool(torch.isfinite(logits).all())


def test_every_baseline_stands_here() -> None:
    tested = {type(build()).__name__ for build in METHODS.values()}
    assert set(baselines.__all__) <= tested


def kernel_of(layer: nn.Module) -> Tensor:
    """Return the weight of a convolution in its dense shape."""
    return (layer.to_conv2d() if isinstance(layer, PatternConv2d) else layer).weight


def test_masks_and_densities_describe_the_model(method: Method) -> None:
    prepared(method)
    sparse = {name for name, shares in method.densities().items() if shares[0] < 1}
    convs = {name for name, module in method.model.named_modules() if isinstance(module, nn.Conv2d)}
    assert sparse & convs <= set(method.masks())
    train(method)
    model, masks = method.finish(), method.masks()
    for name, mask in masks.items():
        assert method.densities()[name][:2] == pytest.approx((float(mask.float().mean()),) * 2)
        if mask.shape == kernel_of(model.get_submodule(name)).shape:  # else the layer itself is smaller
            assert not kernel_of(model.get_submodule(name))[~mask].any()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dense"])
def test_the_budget_is_met(name: str) -> None:
    method = METHODS[name]()
    prepared(method)
    costs = layer_costs(ToyNet(CLASSES), (1, 8, 8))
    train(method)
    method.finish()
    kept = {layer: int(mask.sum()) for layer, mask in method.masks().items()}
    assert sum(kept.values()) > 0
    if isinstance(method, Masked):
        assert sum(kept.values()) == method.budget  # to the weight
    if name not in WITHOUT_TARGET:
        allowed = sum(cost.weights for cost in costs if cost.kind == "conv") / TARGET
        # Left over is less than the method's next unit: a kernel's pattern, a channel of the widest layer, a weight.
        unit = 4 if name in PATTERN else 9 * 8 if name == "small-dense" else 1
        assert 0 <= allowed - total_kept(costs, kept) < unit


def total_kept(costs: list[LayerCost], kept: dict[str, int]) -> int:
    return sum(kept.get(cost.name, cost.weights) for cost in costs if cost.kind == "conv")


def test_an_unfinished_budget_is_an_error() -> None:
    for name in ("gradual-magnitude", "magnitude", "dpf", "admm-elementwise", "admm-pattern", "one-shot-nm"):
        method = METHODS[name]()
        prepared(method)
        train(method, 0, 1)
        with pytest.raises(ClickTrainError, match=r"finish\(\)"):
            method.finish()


def test_the_cost_of_a_step_is_that_of_its_nonzeros(method: Method) -> None:
    """Forward and grad-input multiply by what exists; gradients are made for that, or for all weights."""
    prepared(method)
    costs = layer_costs(ToyNet(CLASSES), (1, 8, 8))
    train(method)
    total = TrainingCost(costs)
    total.add_step(method.densities(), batch_size=1)
    final = {cost.name: cost.kept for cost in layer_costs(method.finish(), (1, 8, 8))}
    exists = final | {name: int(mask.sum()) for name, mask in method.masks().items()}
    macs = 0
    for cost in (cost for cost in costs if cost.macs):
        used = exists.get(cost.name, 0) * cost.positions
        macs += used + (0 if cost.is_first else used)  # forward and grad-input
        macs += cost.macs if isinstance(method, SoftMasked) else used  # grad-weight
    assert total.flops == pytest.approx(2 * macs)


def test_equal_seeds_give_equal_weights(method: Method) -> None:
    again = copy.deepcopy(method)
    prepared(method), prepared(again)
    train(method), train(again)
    expected, found = weights(method.finish()), weights(again.finish())
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("split", range(1, EPOCHS + 1))
def test_a_run_taken_up_again_ends_the_same(method: Method, split: int) -> None:
    if split >= len(epochs_of(method)):
        split = len(epochs_of(method)) - 1
    resumed = copy.deepcopy(method)
    prepared(method)
    train(method, 0, split)
    state = copy.deepcopy([method.state_dict(), weights(method.model), method.optimizer.state_dict()])
    train(method, split)

    model = prepared(resumed)
    resumed.load_state_dict(state[0])
    model.load_state_dict(state[1])
    resumed.optimizer.load_state_dict(state[2])
    train(resumed, split)
    expected, found = weights(method.finish()), weights(resumed.finish())
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("name", PATTERN)
def test_pruned_weights_have_no_dense_parameter_or_state(name: str) -> None:
    method = METHODS[name]()
    prepared(method)
    train(method)
    shapes = {tuple(mask.shape) for mask in method.masks().values()}
    alive = [*method.model.parameters(), *(p for group in method.optimizer.param_groups for p in group["params"])]
    for states in method.optimizer.state.values():
        alive += [state for state in states.values() if isinstance(state, Tensor)]
    assert not shapes & {tuple(tensor.shape) for tensor in alive}


def test_rivals_keep_as_many_weights_as_clicktrain_at_the_same_target() -> None:
    kept = {}
    for name in PATTERN:
        method = METHODS[name]()
        prepared(method)
        train(method)
        kept[name] = sum(int(mask.sum()) for mask in method.masks().values())
    # The target is met to the kernel; layers' kernels cost the same here, so the counts are equal.
    assert len(set(kept.values())) == 1


@pytest.mark.parametrize(
    "build",
    [TrainPruneFinetune, ClickTrain, AdmmPattern, AdmmElementwise, MagnitudePruneFinetune, GradualMagnitude, SET],
)
def test_an_impossible_target_names_what_is_feasible(build: Callable[..., Method]) -> None:
    for target in (0.5, 1000.0):
        with pytest.raises(InvalidArgument, match=f"target_compression={target}: feasible are"):
            prepared(build(target, epochs=EPOCHS))


def test_the_example_of_the_readme_is_a_method(tmp_path: Path) -> None:
    readme = (Path(baselines.__file__).parent / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    path = tmp_path / "random_pruning.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("random_pruning", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(code.splitlines()) <= 35
    method = module.RandomPruning(TARGET, epochs=EPOCHS, at=2)
    prepared(method)
    train(method)
    method.finish()
    assert sum(int(mask.sum()) for mask in method.masks().values()) == method.budget
