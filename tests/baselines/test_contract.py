"""What every training method promises; a new one is tested by standing in METHODS."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from baselines import Dense, TrainPruneFinetune
from clicktrain import ClickTrain, Method, PatternConv2d
from clicktrain.errors import InvalidArgument
from tests.helpers.toy import CLASSES, ToyNet

EPOCHS = 4
Batch = tuple[Tensor, Tensor]

METHODS: dict[str, Callable[[], Method]] = {
    "dense": lambda: Dense(epochs=EPOCHS),
    "train-prune-finetune": lambda: TrainPruneFinetune(2.5, epochs=EPOCHS),
    "clicktrain": lambda: ClickTrain(2.5, epochs=EPOCHS, batches=1),
}


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


def test_masks_and_densities_describe_the_model(method: Method) -> None:
    prepared(method)
    assert method.masks() == {}
    assert method.densities() == {}
    train(method)
    model, masks = method.finish(), method.masks()
    assert set(method.densities()) == set(masks)
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, PatternConv2d)
        assert torch.equal(layer.get_assignment().mask(), mask)
        density = float(mask.float().mean())
        assert method.densities()[name] == pytest.approx((density,) * 3)


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


def test_pruned_weights_have_no_dense_parameter_or_state(method: Method) -> None:
    prepared(method)
    train(method)
    shapes = {tuple(mask.shape) for mask in method.masks().values()}
    alive = [*method.model.parameters(), *(p for group in method.optimizer.param_groups for p in group["params"])]
    for states in method.optimizer.state.values():
        alive += [state for state in states.values() if isinstance(state, Tensor)]
    assert not shapes & {tuple(tensor.shape) for tensor in alive}


def test_rivals_keep_as_many_weights_as_clicktrain_at_the_same_target() -> None:
    kept = {}
    for name in ("train-prune-finetune", "clicktrain"):
        method = METHODS[name]()
        prepared(method)
        train(method)
        kept[name] = sum(int(mask.sum()) for mask in method.masks().values())
    # The target is met to the kernel; layers' kernels cost the same here, so the counts are equal.
    assert kept["train-prune-finetune"] == kept["clicktrain"]


@pytest.mark.parametrize("build", [TrainPruneFinetune, ClickTrain])
def test_an_impossible_target_names_what_is_feasible(build: Callable[..., Method]) -> None:
    for target in (0.5, 1000.0):
        with pytest.raises(InvalidArgument, match=f"target_compression={target}: feasible are"):
            prepared(build(target, epochs=EPOCHS))
