"""BlockedTensor: a tensor of shape (N, C, H, W) whose memory is blocked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from clicktrain.blocked.kernels import kernels, name_of, shares_nchw
from clicktrain.kernels.backends import availability
from clicktrain.kernels.cpu.runtime import fills_lanes


class Deferred(Protocol):
    """A computation put off because a later one may join it."""

    @property
    def device(self) -> torch.device:
        """Where its result will be."""
        ...

    def compute(self) -> Tensor:
        """Return the blocked result."""
        ...


class Activation:
    """Memory of a BlockedTensor and of its aliases, in one of three states.

    Blocked: [ceil(N/B), C, H, W, B], B images a block (8 on the CPU, with zeros in the lanes beyond N; 1 on a GPU),
    never written to after its creation (an in-place operator puts a new tensor in its place). Deferred: a
    computation whose result nobody needed yet. Plain: NCHW, in memory of its own, once an operator had to have it
    so; this is final, for views of it may exist, and a write through one must show.

    Parameters
    ----------
    images : int
        Size N of the batch.
    content : Tensor or Deferred
        The blocked tensor or its computation.
    relu_of : Deferred, optional
        What the content is the ReLU of: its backward may prefer that to the content.
    """

    def __init__(self, images: int, content: Tensor | Deferred, relu_of: Deferred | None = None) -> None:
        self.images, self.device = images, content.device
        self.relu_of = relu_of
        self._content: Tensor | Deferred | None = content
        self._plain: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the memory has become plain."""
        return self._plain is not None

    @property
    def deferred(self) -> Deferred | None:
        """The computation, if nobody needed its result yet."""
        return None if isinstance(self._content, Tensor) else self._content

    def blocked(self) -> Tensor:
        """Return the blocked tensor, not to be written to."""
        if self._plain is not None:
            return kernels(self._plain).pack(self._plain)
        if not isinstance(self._content, Tensor):
            assert self._content is not None
            self._content = self._content.compute()
        return self._content

    def plain(self) -> Tensor:
        """Return the NCHW tensor; it is the memory from now on."""
        if self._plain is None:
            self._plain = self.copied()
            self._content = None
        return self._plain

    def readable(self) -> Tensor:
        """Return the NCHW tensor, not to be written to and not to be kept."""
        if self.is_plain or not shares_nchw(self.device):
            return self.plain()
        memory = self.blocked()
        return kernels(memory).unpack(memory, self.images)

    def copied(self) -> Tensor:
        """Return the values as an NCHW tensor in memory of its own."""
        if self._plain is not None:
            return self._plain.clone()
        memory = self.blocked()
        values = kernels(memory).unpack(memory, self.images)
        return values.clone() if shares_nchw(memory.device) else values

    def replace(self, content: Tensor | Deferred, relu_of: Deferred | None = None) -> None:
        """Put another content in the place of a blocked or deferred one."""
        assert not self.is_plain
        self._content, self.relu_of = content, relu_of


Handler = Callable[..., Any]
HANDLERS: dict[Any, Handler] = {}
"""ATen operator -> its blocked version, which returns None where it does not apply."""


class BlockedTensor(torch.Tensor):
    """A float32 tensor of shape (N, C, H, W) in blocked memory; see `Activation`.

    Autograd sees an ordinary tensor; below autograd, `HANDLERS` compute on blocked memory, and any other operator
    gets plain tensors, and gives them.

    Parameters
    ----------
    activation : Activation
        The memory.
    shape : tuple of int
        (N, C, H, W).
    dtype : torch.dtype
        float32, but for the indices of a pooling.
    """

    activation: Activation
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, activation: Activation, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> BlockedTensor:
        """Wrap the memory; no values are copied."""
        made: BlockedTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=activation.device)
        made.activation = activation
        return made

    @classmethod
    def wrap(cls, content: Tensor | Deferred, shape: tuple[int, ...]) -> BlockedTensor:
        """Return a tensor of a shape for a blocked tensor or a computation of one."""
        return cls(Activation(shape[0], content), shape)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute blocked where that is known how, else plain."""
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        if handler is not None and args[0].dtype == torch.float32:
            result = handler(*args, **kwargs)
            if result is not None:
                return result
        args, kwargs = tree_map_only(BlockedTensor, _readable if _only_reads(func) else _plain_memory, (args, kwargs))
        return func(*args, **kwargs)

    def numpy(self, *, force: bool = False) -> Any:
        """Return the values as an NCHW numpy array."""
        return plain(self).numpy(force=force)

    def tolist(self) -> Any:
        """Return the values as nested lists."""
        return plain(self).tolist()

    def __deepcopy__(self, memo: Any) -> Any:
        return plain(self).__deepcopy__(memo)  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"BlockedTensor({self.activation.plain()!r})"


def _plain_memory(tensor: BlockedTensor) -> Tensor:
    return tensor.activation.plain()


def _readable(tensor: BlockedTensor) -> Tensor:
    return tensor.activation.readable()


@cache
def _only_reads(operator: Any) -> bool:
    """Tell whether an operator writes to none of its arguments and returns a view of none."""
    return all(argument.alias_info is None for argument in operator._schema.arguments)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return BlockedTensor.wrap(kernels(x).pack(x.contiguous()), tuple(x.shape))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return plain(dy)


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: BlockedTensor) -> Tensor:
        return x.activation.copied()  # the result of an autograd function must not share memory

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def pack(x: Tensor) -> Tensor:
    """Return `x` (N, C, H, W) in blocked memory if that is possible and worthwhile (`suits`), else `x` itself."""
    return _Pack.apply(x) if suits(x) else x  # type: ignore[no-untyped-call]


def plain(x: Tensor) -> Tensor:
    """Return `x` (N, C, H, W) as an ordinary tensor; `x` itself if it is one."""
    return _Plain.apply(x) if isinstance(x, BlockedTensor) else x  # type: ignore[no-untyped-call]


_enabled = True


@contextmanager
def disabled() -> Iterator[None]:
    """Keep every activation plain inside the block: for comparisons and to rule out a suspect."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def suits(x: Tensor) -> bool:
    """Tell whether a plain input should be packed.

    It must be a float32 tensor (N, C, H, W) on a device with kernels, computed on for real rather than traced. On the
    CPU its batch must fill at least three quarters of the lanes: smaller ones run faster as strips of images, which
    the convolution's NCHW entry makes.
    """
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if traced or not _enabled or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    if x.ndim != 4 or x.dtype != torch.float32 or x.numel() == 0:
        return False
    name = name_of(x)
    if name is None or (name == "cpu" and not fills_lanes(len(x))) or availability(name) is not True:
        return False
    return not (torch.is_autocast_enabled(x.device.type) or torch._C._are_functorch_transforms_active())
