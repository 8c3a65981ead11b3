"""PatternConv2d: the convolution layer that holds and computes only kept weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clicktrain import blocked
from clicktrain.assignment import Assignment
from clicktrain.errors import InvalidArgument
from clicktrain.kernels.backends import check_name
from clicktrain.kernels.ops import plan_of
from clicktrain.kernels.plan import Pair, pair
from clicktrain.patterns import PatternPool


class PatternConv2d(nn.Module):
    """A 2-d convolution whose kernels each keep one pattern of a pool, or are removed.

    Only kept weights exist: as parameter `values`, hence also in gradients, momentum and checkpoints.

    Parameters
    ----------
    assignment : Assignment
        The sparsity; its shape gives C_out, C_in and the kernel size.
    stride, padding : int or (int, int)
        As in `torch.nn.Conv2d` (padding with zeros; no dilation, groups=1).
    bias : bool
        Whether there is a bias of shape (C_out,).
    backend : str
        "auto", or a name from `clicktrain.kernels.available()`.

    Attributes
    ----------
    values : Parameter, (kept_kernels, entries) float32
        Kept weights in canonical order.
    assignment : Tensor, (C_out, C_in) uint8
        Pattern of each kernel, 255 = removed.
    pool_masks : Tensor, (P, k, k) bool
        The patterns.
    blocked_on : str or None
        Type of the device on which it computes on, and returns, blocked memory where that is possible; see
        `clicktrain.blocked.install`.
    """

    values: nn.Parameter
    assignment: Tensor
    pool_masks: Tensor
    blocked_on: str | None = None

    def __init__(
        self,
        assignment: Assignment,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.out_channels, self.in_channels, k, _ = assignment.dense_shape
        self.kernel_size = (k, k)
        self.stride = pair(stride, "stride")
        self.padding = pair(padding, "padding")
        self.backend = check_name(backend)
        device = assignment.index.device
        self.values = nn.Parameter(torch.zeros(assignment.kept_kernels, assignment.pool.entries, device=device))
        self.bias = nn.Parameter(torch.zeros(self.out_channels, device=device)) if bias else None
        self.register_buffer("assignment", assignment.index.clone())
        self.register_buffer("pool_masks", assignment.pool.masks().to(device))

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        assignment: Assignment | Tensor,
        pool: PatternPool | None = None,
        backend: str = "auto",
    ) -> PatternConv2d:
        """Prune a dense convolution; its weights at kept positions carry over, bit for bit.

        Parameters
        ----------
        conv : nn.Conv2d
            groups=1, dilation=1, zero padding given in numbers.
        assignment : Assignment or Tensor, (C_out, C_in) uint8
            Pattern of each kernel, 255 = removed.
        pool : PatternPool, optional
            Needed beside a tensor; an Assignment brings its own.
        backend : str
            See the class.

        Raises
        ------
        InvalidArgument
            If the convolution is of a kind that cannot be pattern-pruned, or the assignment is not for it.
        """
        if isinstance(assignment, Tensor):
            if pool is None:
                raise InvalidArgument("pool: expected the PatternPool that the assignment tensor refers to")
            assignment = Assignment(assignment, pool)
        check_prunable(conv, "conv")
        if tuple(conv.weight.shape) != assignment.dense_shape:
            raise InvalidArgument(
                f"assignment is for a weight of shape {assignment.dense_shape}, conv has {tuple(conv.weight.shape)}"
            )
        assignment = Assignment(assignment.index.to(conv.weight.device), assignment.pool)
        layer = cls(assignment, conv.stride, conv.padding, conv.bias is not None, backend)  # type: ignore[arg-type]
        with torch.no_grad():
            layer.values = nn.Parameter(assignment.gather(conv.weight).clone(), conv.weight.requires_grad)
            if conv.bias is not None and layer.bias is not None:
                layer.bias.copy_(conv.bias)
        return layer.train(conv.training)

    def to_conv2d(self) -> nn.Conv2d:
        """Return the dense convolution with zeros where this one is pruned."""
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding,
            bias=self.bias is not None, device=self.values.device, dtype=self.values.dtype,
        )  # fmt: skip
        with torch.no_grad():
            conv.weight.copy_(self.dense_weight())
            if conv.bias is not None and self.bias is not None:
                conv.bias.copy_(self.bias)
        return conv.train(self.training)

    def get_assignment(self) -> Assignment:
        """Return the sparsity as an Assignment."""
        return Assignment(self.assignment, PatternPool.from_masks(self.pool_masks.cpu().numpy()))

    def dense_weight(self) -> Tensor:
        """Return the weight as a dense (C_out, C_in, k, k) tensor with zeros where pruned."""
        return self.get_assignment().scatter(self.values)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (N, C_in, H, W); returns (N, C_out, H_out, W_out)."""
        y = self._convolve(blocked.pack(x) if x.device.type == self.blocked_on else x)
        return y if self.bias is None else y + self.bias[:, None, None]

    def _convolve(self, x: Tensor) -> Tensor:
        sparsity = self.assignment, self.pool_masks
        if x.device.type == self.blocked_on and isinstance(x, blocked.BlockedTensor):
            made = plan_of(*sparsity, x.shape, self.stride, self.padding)
            return blocked.pattern_convolution(x, self.values, made)
        y: Tensor = torch.ops.clicktrain.pattern_conv2d(
            x, self.values, *sparsity, self.stride, self.padding, self.backend
        )
        return y

    def extra_repr(self) -> str:
        """Describe shapes and sparsity for `repr`."""
        kept, total = self.values.shape[0], self.in_channels * self.out_channels
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, kept_kernels={kept}/{total}, entries={self.values.shape[1]}, "
            f"patterns={self.pool_masks.shape[0]}, backend={self.backend!r}"
        )


def check_prunable(conv: nn.Conv2d, name: str) -> None:
    """Raise InvalidArgument unless `conv` is of a kind that PatternConv2d can compute."""
    kinds = (
        ("groups", conv.groups, 1),
        ("dilation", conv.dilation, (1, 1)),
        ("padding_mode", conv.padding_mode, "zeros"),
    )
    for attribute, value, expected in kinds:
        if value != expected:
            raise InvalidArgument(f"{name} has {attribute}={value!r}: pattern pruning needs {attribute}={expected!r}")
    if isinstance(conv.padding, str) or conv.kernel_size[0] != conv.kernel_size[1]:
        raise InvalidArgument(
            f"{name} has kernel_size={conv.kernel_size}, padding={conv.padding!r}: "
            "expected a square kernel and padding in numbers"
        )


def is_shortcut(name: str, conv: nn.Module) -> bool:
    """Tell whether a layer is the 1x1 convolution of a residual shortcut, by its dotted name."""
    parts = name.split(".")
    return getattr(conv, "kernel_size", None) == (1, 1) and ("shortcut" in parts or "downsample" in parts)
