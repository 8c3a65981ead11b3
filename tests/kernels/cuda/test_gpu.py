"""On a GPU: the kernels through CuPy, against the reference, inside autograd, on any stream (`nox -s gpu`)."""

from __future__ import annotations

import pytest
import torch

from bench.gpu import checks
from clicktrain.errors import InvalidArgument
from clicktrain.kernels import backends, pattern_conv2d
from clicktrain.kernels.cuda import backend, launch
from clicktrain.patterns import official_pool
from tests.kernels.cases import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(launch.available() is not True, reason=f"not run on this hardware: {launch.available()}"),
]
CASE = Case(official_pool(4), 33, 48, 9, (14, 13), (1, 1), (1, 1), 0.4, seed=1)


def test_random_convolutions():
    assert checks.check(120, 300.0).cases >= 9


def test_auto_takes_the_cuda_backend():
    assert backends.select("auto", torch.zeros(1, 1, 1, 1, device="cuda")) is backend


def test_autograd_equals_the_reference():
    made, x, values, dy = CASE.operands()
    gradients = {}
    for name in ("cuda", "reference"):
        inputs = [t.cuda().requires_grad_() for t in (x, values)]
        # With TF32, torch's default, the reference would be the less exact of the two.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            gradients[name] = torch.autograd.grad(pattern_conv2d(*inputs, made, name), inputs, dy.cuda())
    for got, want in zip(gradients["cuda"], gradients["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_work_goes_to_the_current_stream_and_twice_gives_the_same_bits():
    made, x, values, dy = (t.cuda() if isinstance(t, torch.Tensor) else t for t in CASE.operands())
    want = backend.grad_values(x, dy, made)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = backend.grad_values(x, dy, made)
        y = backend.forward(x, values, made)
    stream.synchronize()
    assert torch.equal(want, again)
    assert torch.equal(y, backend.forward(x, values, made))


def test_a_tensor_on_the_cpu_is_refused():
    with pytest.raises(InvalidArgument, match="x is on cpu"):
        backends.select("cuda", torch.zeros(1, 1, 1, 1))
