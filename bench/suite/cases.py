"""Operands of a workload, and what can be timed on them: dense, blocked, and NCHW to NCHW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from .optional import need, need_backend
from .strips import StripConvolution
from .workloads import Workload

if TYPE_CHECKING:
    from clicktrain.timing import Contender

aten = torch.ops.aten

DENSE = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
"""The dense contenders: torch's memory formats."""
FUNCTIONS = ("forward", "grad_input", "grad_values")
"""What a pattern convolution computes."""
TOLERANCE = 1e-4  # dense and sparse sum in different orders; the tests hold the sparse kernels to 1e-5 of float64


class Case:
    """Operands of a workload, and contenders for the three functions on them.

    Parameters
    ----------
    workload : Workload
        The layer with its sparsity and batch.

    Raises
    ------
    NotImplementedError
        Where there are no CPU kernels: asv skips the benchmark.
    """

    def __init__(self, workload: Workload) -> None:
        self._backend = need_backend("cpu")
        self._contender: type[Contender] = need("clicktrain.timing:Contender")
        self.workload, self.shape = workload, workload.shape
        self.assignment = workload.assignment()
        self.x, self.dy, weight = workload.operands()
        self.weight = weight * self.assignment.mask()
        self.values = self.assignment.gather(self.weight).contiguous()
        make_plan = need("clicktrain.kernels:plan")
        self.plan = make_plan(self.assignment, None, workload.input_shape, self.shape.stride, self.shape.padding)
        self.xb, self.dyb = self._backend.pack(self.x), self._backend.pack(self.dy)

    @property
    def flops(self) -> int:
        """Floating-point operations of each function, kept weights only."""
        height, width = self.shape.output_size
        return 2 * self.values.numel() * self.workload.batch * height * width

    def reference(self, function: str) -> Tensor:
        """Return the right result, computed by torch."""
        dense = self.dense(function, torch.contiguous_format)
        assert dense.result is not None
        return cast(Tensor, dense.result(dense.run()))

    def dense(self, function: str, layout: torch.memory_format) -> Contender:
        """Return the dense contender in a memory format."""
        x, dy, w = (tensor.contiguous(memory_format=layout) for tensor in (self.x, self.dy, self.weight))
        stride, padding = [self.shape.stride] * 2, [self.shape.padding] * 2
        if function == "forward":
            return self._contender(lambda: F.conv2d(x, w, None, stride, padding))

        def backward(wanted: int) -> Tensor:
            mask = [wanted == 0, wanted == 1, False]
            gradients = aten.convolution_backward(dy, x, w, None, stride, padding, [1, 1], False, [0, 0], 1, mask)
            return gradients[wanted]  # type: ignore[no-any-return]

        if function == "grad_input":
            return self._contender(lambda: backward(0))
        return self._contender(lambda: backward(1), lambda dw: self.assignment.gather(cast(Tensor, dw)))

    def blocked(self, function: str) -> Contender:
        """Return the sparse contender on blocked activations; they are strips where few images leave lanes empty."""
        backend, plan = self._backend, self.plan
        if function == "forward" and self.workload.batch < backend.LANES:
            return self._strips()

        def unpacked(y: object) -> object:
            return backend.unpack(cast(Tensor, y), self.workload.batch)

        if function == "forward":
            return self._contender(lambda: backend.forward_blocked(self.xb, self.values, plan), unpacked)
        if function == "grad_input":
            return self._contender(lambda: backend.grad_input_blocked(self.dyb, self.values, plan), unpacked)
        return self._contender(lambda: backend.grad_values_blocked(self.xb, self.dyb, plan))

    def _strips(self) -> Contender:
        convolution = StripConvolution(self.plan)
        xs = convolution.pack(self.x)
        return self._contender(lambda: convolution(xs, self.values), lambda ys: convolution.unpack(cast(Tensor, ys)))

    def nchw(self, function: str) -> Contender:
        """Return the sparse contender that packs and unpacks."""
        backend, plan = self._backend, self.plan
        if function == "forward":
            return self._contender(lambda: backend.forward(self.x, self.values, plan))
        if function == "grad_input":
            return self._contender(lambda: backend.grad_input(self.dy, self.values, plan))
        return self._contender(lambda: backend.grad_values(self.x, self.dy, plan))

    def sparse(self, function: str) -> Contender:
        """Return the sparse contender as networks compute: blocked, unless a small batch would leave lanes empty."""
        return self.nchw(function) if self.workload.batch < self._backend.LANES else self.blocked(function)

    def checked(self, function: str) -> Contender:
        """Return `sparse` after one call whose result was right.

        Raises
        ------
        RuntimeError
            If it was wrong: it must not be timed.
        """
        contender = self.sparse(function)
        assert contender.result is not None
        error = need("clicktrain.timing:relative_error")(contender.result(contender.run()), self.reference(function))
        if not error <= TOLERANCE:
            raise RuntimeError(f"{function} of {self.workload.name} is wrong: relative error {error:.3g}: not timed")
        return contender


@dataclass(frozen=True)
class Figures:
    """What one function of a workload reaches.

    Attributes
    ----------
    speedup : float
        Times faster than the best dense layout of torch.
    gflops : float
        10^9 floating-point operations a second, kept weights only.
    share_of_peak : float
        Of what the machine can do in registers, from the same rounds.
    """

    speedup: float
    gflops: float
    share_of_peak: float


@torch.inference_mode()
def figures(workload: Workload, function: str, rounds: int = 9) -> Figures:
    """Check and time the sparse contender beside the dense ones and the machine's peak, all in the same rounds."""
    case, timing = Case(workload), need("clicktrain.timing")
    peak = timing.peak()
    contenders = {name: case.dense(function, layout) for name, layout in DENSE.items()}
    contenders |= {"sparse": case.sparse(function), "peak": timing.Contender(peak.run, None)}
    times = timing.compare(
        contenders, case.reference(function), tolerance=TOLERANCE, warmup_seconds=0.05, rounds=rounds
    )
    return Figures(
        times.speedup(times.best(*DENSE), "sparse"),
        case.flops / times["sparse"].median_ms / 1e6,
        times.speedup("peak", "sparse") * case.flops / peak.flops,
    )
