"""Conversion of a model and its optimizer."""

import gc

import pytest
import torch
from torch import nn

from clicktrain.assignment import assign
from clicktrain.conversion import convert, to_dense
from clicktrain.errors import InvalidArgument
from clicktrain.layers import PatternConv2d
from clicktrain.patterns import official_pool


def trained(optimizer_class=torch.optim.SGD, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.Flatten(),
                          nn.Linear(8 * 36, 4))  # fmt: skip
    optimizer = optimizer_class(
        [{"params": [model[0].weight, model[2].weight], "weight_decay": 0.1}, {"params": [*model[4].parameters()]}],
        lr=0.01,
        **options,
    )
    for _ in range(3):
        model(torch.randn(4, 3, 6, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def assignments(model):
    return {"2": assign(model[2].weight.detach() ** 2, official_pool(4), 20)}


@pytest.mark.parametrize(
    ("optimizer_class", "options", "keys"),
    [(torch.optim.SGD, {"momentum": 0.9}, {"momentum_buffer"}), (torch.optim.Adam, {}, {"exp_avg", "exp_avg_sq"})],
)
def test_state_of_kept_weights_carries_over(optimizer_class, options, keys):
    model, optimizer = trained(optimizer_class, **options)
    chosen = assignments(model)
    before = {key: optimizer.state[model[2].weight][key].clone() for key in keys}
    layers = convert(model, chosen, optimizer)
    state = optimizer.state[layers["2"].values]
    for key in keys:
        assert torch.equal(state[key], chosen["2"].gather(before[key]))
    assert optimizer.param_groups[0]["params"][1] is layers["2"].values
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    optimizer.step()


def test_a_step_after_conversion_equals_a_masked_dense_step():
    model, optimizer = trained(momentum=0.9)
    chosen = assignments(model)
    mask = chosen["2"].mask()
    twin, twin_optimizer = trained(momentum=0.9)
    twin[2].weight.data *= mask
    twin_optimizer.state[twin[2].weight]["momentum_buffer"] *= mask
    convert(model, chosen, optimizer)
    x = torch.randn(4, 3, 6, 6)
    for net, opt in ((model, optimizer), (twin, twin_optimizer)):
        net(x).square().mean().backward()
        opt.step()
    torch.testing.assert_close(model[2].dense_weight(), twin[2].weight.detach() * mask)


def test_no_dense_tensor_of_a_pruned_layer_is_alive():
    """Neither parameter, gradient nor optimizer state of shape [C_out, C_in, 3, 3]."""
    model, optimizer = trained(momentum=0.9)
    convert(model, assignments(model), optimizer)
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    optimizer.step()
    gc.collect()
    alive = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and tuple(t.shape) == (8, 6, 3, 3)]
    assert alive == []
    held = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    assert all(tuple(t.shape) != (8, 6, 3, 3) for t in held + tensors)
    assert sum(p.numel() for p in held) == 6 * 3 * 9 + 20 * 4 + 8 * 36 * 4 + 4


def test_to_dense_gives_the_same_function():
    model, _ = trained()
    convert(model, assignments(model))
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    assert not any(isinstance(m, PatternConv2d) for m in to_dense(model).modules())
    torch.testing.assert_close(model(x), expected)


def test_a_layer_that_is_no_convolution_changes_nothing():
    model, _ = trained()
    with pytest.raises(InvalidArgument, match=r"'4'.*Linear"):
        convert(model, {**assignments(model), "4": assignments(model)["2"]})
    assert isinstance(model[2], nn.Conv2d)
