"""`clicktrain.record` and when trainers use it, with a recorder of calls in the place of CUDA; see also test_gpu.py."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import clicktrain
from baselines.dpf import DPF
from clicktrain import recording
from clicktrain.blocked import kernels
from clicktrain.errors import InvalidArgument
from clicktrain.method import Method
from clicktrain.training.replica import Replica


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture
def recorded(monkeypatch):
    """Let the CPU play the GPU: what torch is asked to record is run once and noted, and then computes as it is."""
    calls, outputs = [], []

    def make_graphed_callables(module, arguments, allow_unused_input):
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        outputs.append(module(*arguments))
        assert outputs[-1].requires_grad
        calls.append((module, tuple(arguments[0].shape)))

    monkeypatch.setattr(kernels, "GPU", "cpu")
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    yield calls
    assert all(output.grad_fn is None for output in outputs)  # and so keeps no gradient on its stream


def test_a_tensor_on_the_cpu_is_refused():
    with pytest.raises(InvalidArgument, match="x is on cpu: expected a CUDA device"):
        clicktrain.record(Network(), torch.zeros(2, 3, 4, 4))


def test_the_model_stays_as_it_is(recorded):
    model, x = Network().train(), torch.randn(4, 3, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graphs = clicktrain.record(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(map(id, graphs.parameters())) == list(map(id, model.parameters()))
    assert graphs.training
    assert not clicktrain.record(model.eval(), x).training
    assert len(recorded) == 2
    assert not model._forward_pre_hooks


def test_what_waits_for_the_device_is_not_recorded(recorded):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), torch.randn(4, 3, 8, 8)
    keep = clicktrain.Assignment(torch.zeros(8, 8, dtype=torch.uint8), clicktrain.official_pool(4))
    clicktrain.convert(model, {"2": keep}, backend="reference")
    with pytest.raises(InvalidArgument, match="model: 2 computes by the reference backend"):
        clicktrain.record(model, x)
    recorder = recording.Recorder()
    for _ in range(3):
        recorder(model, x)
    assert not recorded


def shapes(calls):
    return [shape for _, shape in calls]


def test_what_comes_twice_in_a_row_is_recorded_and_the_last_batch_of_an_epoch_is_not(recorded):
    model, recorder = Network(), recording.Recorder()
    for images in (4, 4, 4, 3, 4, 4, 3, 4):
        assert recorder(model, torch.randn(images, 3, 8, 8)).shape == (images, 5)
    assert shapes(recorded) == [(4, 3, 8, 8)]
    for images in (6, 6):
        recorder(model, torch.randn(images, 3, 8, 8))
    assert shapes(recorded) == [(4, 3, 8, 8), (6, 3, 8, 8)]


@pytest.mark.parametrize("change", ["parameter", "memory", "buffer"])
def test_other_tensors_are_recorded_anew(recorded, change):
    model, recorder, x = Network(), recording.Recorder(), torch.randn(4, 3, 8, 8)
    for _ in range(3):
        recorder(model, x)
    with torch.no_grad():
        model.conv.weight.mul_(2)
        model.norm.running_mean.zero_()
    recorder(model, x)
    assert len(recorded) == 1
    if change == "parameter":
        model.conv.weight = nn.Parameter(model.conv.weight.detach().clone())
    elif change == "memory":
        model.conv.weight.data = model.conv.weight.detach().clone()
    else:
        model.norm.running_mean = model.norm.running_mean.clone()
    for _ in range(2):
        recorder(model, x)
    assert len(recorded) == 2


def test_evaluation_and_the_environment_variable_leave_the_model_alone(recorded, monkeypatch):
    model, recorder, x = Network(), recording.Recorder(), torch.randn(4, 3, 8, 8)
    for _ in range(2):
        recorder(model.eval(), x)
    monkeypatch.setenv(recording.DISABLED, "1")
    for _ in range(2):
        recorder(model.train(), x)
    assert not recorded


def test_trainers_record_where_the_method_allows_it(recorded):
    x = torch.randn(4, 3, 8, 8)
    for allowed, autocast, count in ((False, False, 0), (True, True, 0), (True, False, 1)):
        method = Method()
        method.model, method.recordable = Network(), allowed
        call = Replica(method, autocast)
        for _ in range(2):
            assert call(x).shape == (4, 5)
        assert len(recorded) == count


def test_masks_that_change_keep_their_memory():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    method = DPF(2.0, epochs=2)
    method.setup(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.zeros(1, 3, 8, 8))
    layer = method._layers["1"]
    address = layer.mask.data_ptr()
    keep = torch.rand(layer.weight.shape) > 0.5
    method.adopt({"1": keep})
    assert layer.mask.data_ptr() == address
    assert torch.equal(layer.mask, keep)
