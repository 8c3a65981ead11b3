import pytest
import torch
from torch.optim import SGD

from baselines import TrainPruneFinetune
from clicktrain.errors import ClickTrainError, InvalidArgument
from clicktrain.importance import measure
from clicktrain.patterns import official_pool
from clicktrain.pool import coverage_pool
from clicktrain.selection import prunable_layers
from tests.baselines.test_contract import prepared, train
from tests.helpers.toy import CLASSES, ToyNet


def test_lengths_are_those_of_the_published_code() -> None:
    dense, finetune = TrainPruneFinetune(6.0).phases
    assert (dense.epochs, finetune.epochs) == (160, 40)
    assert dense.lr is None
    assert dense.schedule is None
    assert finetune.lr == 1e-3
    assert finetune.schedule is not None
    assert {finetune.schedule.factor(position, 40) for position in (0.0, 20.0, 39.9)} == {1.0}


@pytest.mark.parametrize(("epochs", "expected"), [(10, 2), (2, 1), (1, 1), (6, 2)])
def test_short_runs_finetune_for_at_least_an_epoch(epochs: int, expected: int) -> None:
    assert TrainPruneFinetune(6.0, epochs=epochs).phases[1].epochs == expected


def test_length_and_rate_can_be_chosen() -> None:
    phase = TrainPruneFinetune(6.0, epochs=8, finetune_epochs=5, finetune_lr=0.02).phases[1]
    assert (phase.epochs, phase.lr) == (5, 0.02)


def test_the_largest_weights_of_the_trained_network_stay() -> None:
    method = TrainPruneFinetune(2.5, epochs=2, pool="official")
    model = prepared(method)
    train(method, 0, 2)
    convs = prunable_layers(model, (1, 8, 8))
    trained = {name: conv.weight.detach().clone() for name, conv in convs.items()}
    method.begin_phase(1, SGD(model.parameters(), lr=0.01))
    for name, assignment in method.assignments.items():
        assert assignment.pool == official_pool(4)
        layer = model.get_submodule(name)
        assert torch.equal(layer.values, assignment.gather(trained[name]))
        retained = torch.stack([(trained[name].square() * mask).sum((2, 3)) for mask in official_pool(4).masks()])
        kept = assignment.index != 255
        assert torch.equal(assignment.index[kept].long(), retained.argmax(0)[kept])


def test_the_pool_is_chosen_on_squared_weights() -> None:
    method = TrainPruneFinetune(2.5, epochs=1)
    model = prepared(method)
    scores = measure(model, {n: c.weight for n, c in prunable_layers(model, (1, 8, 8)).items()}, score="magnitude")
    method.begin_phase(1, SGD(model.parameters(), lr=0.01))
    assert all(assignment.pool == coverage_pool(scores.values(), 4) for assignment in method.assignments.values())


def test_stages_follow_one_another() -> None:
    method = TrainPruneFinetune(2.5, epochs=4)
    prepared(method)
    train(method, 0, 4)
    assert method.stage == "dense"
    with pytest.raises(ClickTrainError, match="before the prune after epoch 4"):
        method.finish()
    train(method, 4)
    assert method.stage == "finetune"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finetune_lr": 0.0}, "finetune_lr=0.0"),
        ({"finetune_epochs": 0}, "finetune_epochs=0"),
        ({"target_flops": 3.0}, "expected one of"),
        ({"pool": "dynamic"}, "pool='dynamic'"),
        ({"backend": "gpu"}, "gpu"),
    ],
)
def test_mistakes_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        TrainPruneFinetune(6.0, **options)


def test_the_toy_network_has_layers_to_prune() -> None:
    assert len(prunable_layers(ToyNet(CLASSES), (1, 8, 8))) == 2
