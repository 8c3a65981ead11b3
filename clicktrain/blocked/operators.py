"""What stays blocked: the operators of convolutional networks, forward and backward, on BlockedTensors.

Batch normalisation computes its statistics at once but defers the normalisation itself, so that the addition, the
ReLU and the pooling that follow it in most networks take part in one pass over memory; likewise, the backward of a
pooling and of a ReLU wait for the normalisation's. All of it is below autograd: the derivatives are PyTorch's own
formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clicktrain.blocked.kernels import kernels, shares_nchw
from clicktrain.blocked.tensor import HANDLERS, Activation, BlockedTensor, Handler
from clicktrain.kernels.cpu.blocked_ops import Window

aten = torch.ops.aten


def handles(operator: Any) -> Callable[[Handler], Handler]:
    """Register a function as the blocked version of an operator; it returns None where it does not apply."""

    def register(handler: Handler) -> Handler:
        HANDLERS[operator] = handler
        return handler

    return register


@dataclass(frozen=True)
class Affine:
    """Deferred scale * x + shift (+ residual) by channel, perhaps with a ReLU behind it."""

    x: Tensor
    images: int
    scale: Tensor
    shift: Tensor
    residual: Tensor | None = None
    relu: bool = False

    @property
    def device(self) -> torch.device:
        """Where its result will be."""
        return self.x.device

    def compute(self) -> Tensor:
        """Compute it."""
        return kernels(self.x).affine(self.x, self.images, self.scale, self.shift, self.residual, self.relu)


@dataclass(frozen=True)
class PoolGradient:
    """Deferred gradient behind a max pooling, whose maxima came from `places`."""

    dy: Tensor
    places: Tensor
    window: Window

    @property
    def device(self) -> torch.device:
        """Where its result will be."""
        return self.dy.device

    def compute(self) -> Tensor:
        """Compute it."""
        w = self.window
        return kernels(self.dy).max_pool_backward(
            self.dy, self.places, (w.height, w.width), w.size, w.stride, w.padding
        )


@dataclass(frozen=True)
class ReluGradient:
    """Deferred gradient behind a ReLU: `dy` where its result `y` is positive; `argument`: what `y` is the ReLU of."""

    dy: Activation
    y: Activation
    argument: Affine | None

    @property
    def device(self) -> torch.device:
        """Where its result will be."""
        return self.dy.device

    def compute(self) -> Tensor:
        """Compute it."""
        result: Tensor = aten.threshold_backward(self.dy.blocked(), self.y.blocked(), 0)
        return result


def activation(x: Tensor) -> Activation:
    """Return the memory of a BlockedTensor, or of a plain tensor, packed."""
    return x.activation if isinstance(x, BlockedTensor) else Activation(len(x), kernels(x).pack(x.contiguous()))


def blocked(x: Tensor) -> Tensor:
    """Return the blocked tensor of a BlockedTensor, or of a plain tensor, packed."""
    return activation(x).blocked()


def _deferred_affine(x: Tensor) -> Affine | None:
    deferred = x.activation.deferred if isinstance(x, BlockedTensor) else None
    return deferred if isinstance(deferred, Affine) else None


@handles(aten.detach.default)
def _detach(x: BlockedTensor) -> Tensor:
    return BlockedTensor(x.activation, tuple(x.shape), x.dtype)


@handles(aten.view.default)
def _view(x: BlockedTensor, size: Sequence[int]) -> Tensor | None:
    return _detach(x) if tuple(size) == tuple(x.shape) else None


# Elementwise ------------------------------------------------------------------------------------------------------


def _rectified(x: BlockedTensor) -> tuple[Tensor | Affine, Affine | None]:
    """Return the ReLU of x and, for its backward, what x is if that was deferred."""
    affine = _deferred_affine(x)
    if affine is None or affine.relu:
        return torch.relu(blocked(x)), None
    remembered = affine.residual is None and torch.is_grad_enabled()
    return replace(affine, relu=True), affine if remembered else None


@handles(aten.relu.default)
def _relu(x: BlockedTensor) -> Tensor:
    return BlockedTensor(Activation(len(x), *_rectified(x)), tuple(x.shape))


@handles(aten.relu_.default)
def _relu_in_place(x: BlockedTensor) -> Tensor | None:
    if x.activation.is_plain:
        return None
    x.activation.replace(*_rectified(x))
    return x


@handles(aten.threshold_backward.default)
def _threshold_backward(dy: Tensor, y: Tensor, threshold: float) -> Tensor | None:
    if threshold != 0:
        return None
    argument = y.activation.relu_of if isinstance(y, BlockedTensor) else None
    return BlockedTensor.wrap(
        ReluGradient(activation(dy), activation(y), argument if isinstance(argument, Affine) else None), tuple(y.shape)
    )


def _sum_of(x: Tensor, other: Tensor, alpha: float) -> Tensor | Affine | None:
    """Return x + alpha * other; None if shapes or types are none that stay blocked."""
    if alpha != 1 or not isinstance(other, Tensor) or x.dtype != torch.float32 or other.dtype != torch.float32:
        return None
    if other.shape == x.shape:
        for one, two in ((x, other), (other, x)):
            affine = _deferred_affine(one)
            if affine is not None and affine.residual is None and not affine.relu:
                return replace(affine, residual=blocked(two))
        return blocked(x) + blocked(other)
    if isinstance(x, BlockedTensor) and other.shape[-3:] == (x.shape[1], 1, 1) and other.numel() == x.shape[1]:
        return Affine(blocked(x), len(x), torch.ones_like(other).flatten(), other.flatten().clone())
    return None


@handles(aten.add.Tensor)
def _add(x: Tensor, other: Tensor, *, alpha: float = 1) -> Tensor | None:
    result = _sum_of(x, other, alpha)
    return result if result is None else BlockedTensor.wrap(result, tuple(x.shape))


@handles(aten.add_.Tensor)
def _add_in_place(x: Tensor, other: Tensor, *, alpha: float = 1) -> Tensor | None:
    if not isinstance(x, BlockedTensor) or x.activation.is_plain:
        return None
    result = _sum_of(x, other, alpha)
    if result is None:
        return None
    x.activation.replace(result)
    return x


# Reductions -------------------------------------------------------------------------------------------------------


@handles(aten.sum.dim_IntList)
def _sum(x: BlockedTensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: Any = None) -> Tensor | None:
    """Sum by channel: the gradient of a bias."""
    if dim is None or {d % 4 for d in dim} != {0, 2, 3} or dtype not in (None, torch.float32):
        return None
    sums = kernels(x).channel_sums(blocked(x), len(x))
    return sums[None, :, None, None] if keepdim else sums


@handles(aten.mean.dim)
def _mean(x: BlockedTensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: Any = None) -> Tensor | None:
    """Average over the pixels: global pooling, where most networks end."""
    if dim is None or {d % 4 for d in dim} != {2, 3} or dtype not in (None, torch.float32):
        return None
    means = blocked(x).mean((2, 3)).transpose(1, 2).flatten(0, 1)[: len(x)].contiguous()
    return means[:, :, None, None] if keepdim else means


# Batch normalisation ----------------------------------------------------------------------------------------------


# On a GPU torch asks cuDNN for it, by another name, wherever that can do it.


@handles(aten.cudnn_batch_norm.default)
def _cudnn_batch_norm(
    x: BlockedTensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:  # fmt: skip
    normalised = _batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
    return None if normalised is None else (*normalised, weight.new_empty(0, dtype=torch.uint8))


@handles(aten.cudnn_batch_norm_backward.default)
def _cudnn_batch_norm_backward(
    x: Tensor, dy: Tensor, weight: Tensor, running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor,
    invstd: Tensor, eps: float, reserve: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:  # fmt: skip
    rest = (weight, running_mean, running_var, mean, invstd, True, eps, (True, True, True))
    return _batch_norm_backward(dy, x, *rest)  # type: ignore[no-any-return]


@handles(aten.native_batch_norm.default)
def _batch_norm(
    x: BlockedTensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, training: bool, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    if not _all_float32(x, weight, bias, running_mean, running_var):
        return None
    if training:
        mean, invstd, scale, shift = kernels(x).normalisation(
            blocked(x), len(x), weight, bias, eps, momentum, running_mean, running_var
        )
    else:
        mean, invstd = _running(running_mean, running_var, eps)
        scale = invstd if weight is None else weight * invstd
        shift = -mean * scale if bias is None else bias - mean * scale
        mean, invstd = mean.new_empty(0), mean.new_empty(0)  # nothing of them is saved
    return BlockedTensor.wrap(Affine(blocked(x), len(x), scale, shift), tuple(x.shape)), mean, invstd


@handles(aten.native_batch_norm_backward.default)
def _batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    mean: Tensor, invstd: Tensor, training: bool, eps: float, output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:  # fmt: skip
    if not isinstance(x, BlockedTensor) or not _all_float32(dy, x, weight):
        return None
    if not training:
        mean, invstd = _running(running_mean, running_var, eps)
    dx, dweight, dbias = kernels(x).batch_norm_backward(
        x=blocked(x), images=len(x), mean=mean, invstd=invstd, weight=weight, training=training,
        needs_input=output_mask[0], **_behind(activation(dy), blocked(x)),
    )  # fmt: skip
    return (
        None if dx is None else BlockedTensor.wrap(dx, tuple(x.shape)),
        dweight if output_mask[1] else None,
        dbias if output_mask[2] else None,
    )


def _behind(gradient: Activation, x: Tensor) -> dict[str, Any]:
    """Return the gradient, and what of the operators behind the normalisation of `x` takes part in its backward."""
    relu = gradient.deferred
    if not isinstance(relu, ReluGradient):
        return {"dy": gradient.blocked()}
    argument, pool = relu.argument, relu.dy.deferred
    if argument is None or argument.x is not x:
        return {"dy": relu.dy.blocked(), "relu_output": relu.y.blocked()}
    affine = {"relu_affine": (argument.scale, argument.shift)}
    if isinstance(pool, PoolGradient) and pool.window.halves:
        return {"dy": pool.dy, "places": pool.places, **affine}
    return {"dy": relu.dy.blocked(), **affine}


def _running(mean: Tensor | None, variance: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    assert mean is not None, "outside training, torch.nn.functional.batch_norm demands running statistics"
    assert variance is not None
    return mean, torch.rsqrt(variance + eps)


def _all_float32(*tensors: Tensor | None) -> bool:
    return all(tensor is None or tensor.dtype == torch.float32 for tensor in tensors)


# Pooling ----------------------------------------------------------------------------------------------------------


class Places(Activation):
    """Where the maxima of a pooling came from, as one byte each: the place in the window. Plain to all others."""

    def __init__(self, images: int, places: Tensor, window: Window) -> None:
        super().__init__(images, places)
        self.places, self.window = places, window

    @property
    def is_plain(self) -> bool:
        """True: there is no blocked form of indices."""
        return True

    def copied(self) -> Tensor:
        """Return indices into each flattened input plane, int64 NCHW, as torch gives them."""
        w = self.window
        places = self.places.permute(0, 4, 1, 2, 3).flatten(0, 1)[: self.images].long()
        rows, columns = (torch.arange(size, device=places.device) for size in (w.out_height, w.out_width))
        rows = rows[:, None] * w.stride[0] - w.padding[0] + places // w.size[1]
        return rows * w.width + columns * w.stride[1] - w.padding[1] + places % w.size[1]


@handles(aten.max_pool2d_with_indices.default)
def _max_pool(
    x: BlockedTensor, size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,), ceil_mode: bool = False,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    geometry = (_pair(size), _pair(stride or size), _pair(padding))
    window = Window.over(x, *geometry)
    if ceil_mode or set(dilation) != {1} or not kernels(x).pools(window):
        return None
    affine = _deferred_affine(x)
    if affine is None or affine.residual is not None:
        y, places = kernels(x).max_pool(blocked(x), len(x), *geometry)
    else:
        function = (affine.scale, affine.shift), affine.relu
        y, places = kernels(x).max_pool(affine.x, len(x), *geometry, *function)
    shape = (*x.shape[:2], *y.shape[2:4])
    indices = Places(len(x), places, window)
    return BlockedTensor.wrap(y, shape), BlockedTensor(indices, shape, torch.int64)


@handles(aten.max_pool2d_with_indices_backward.default)
def _max_pool_backward(
    dy: Tensor, x: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], ceil_mode: bool, indices: Tensor,
) -> Tensor | None:  # fmt: skip
    places = indices.activation if isinstance(indices, BlockedTensor) else None
    if not isinstance(places, Places):
        return None
    return BlockedTensor.wrap(PoolGradient(blocked(dy), places.places, places.window), tuple(x.shape))


# Averages are those of 3-d pooling on the blocked memory, (height, width, lane) taken as its three axes. Where a block
# is one image, torch's own are as good.


@handles(aten.avg_pool2d.default)
def _avg_pool(
    x: BlockedTensor, size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,), *rest: Any
) -> Tensor | None:
    if shares_nchw(x.device):
        return None
    y = aten.avg_pool3d(blocked(x), (*_pair(size), 1), (*_pair(stride or size), 1), (*_pair(padding), 0), *rest)
    return BlockedTensor.wrap(y, (*x.shape[:2], *y.shape[2:4]))


@handles(aten.avg_pool2d_backward.default)
def _avg_pool_backward(
    dy: Tensor, x: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int], *rest: Any
) -> Tensor | None:
    if not isinstance(x, BlockedTensor) or shares_nchw(x.device):
        return None
    geometry = (*_pair(size), 1), (*_pair(stride or size), 1), (*_pair(padding), 0)
    return BlockedTensor.wrap(aten.avg_pool3d_backward(blocked(dy), blocked(x), *geometry, *rest), tuple(x.shape))


@handles(aten._adaptive_avg_pool2d.default)
def _adaptive_avg_pool(x: BlockedTensor, size: Sequence[int]) -> Tensor | None:
    if shares_nchw(x.device):
        return None
    memory = blocked(x)
    y = aten._adaptive_avg_pool3d(memory, (*_pair(size), memory.shape[4]))
    return BlockedTensor.wrap(y, (*x.shape[:2], *y.shape[2:4]))


@handles(aten._adaptive_avg_pool2d_backward.default)
def _adaptive_avg_pool_backward(dy: Tensor, x: Tensor) -> Tensor | None:
    if not isinstance(x, BlockedTensor) or shares_nchw(x.device):
        return None
    return BlockedTensor.wrap(aten._adaptive_avg_pool3d_backward(blocked(dy), blocked(x)), tuple(x.shape))


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return (values[0], values[-1])
