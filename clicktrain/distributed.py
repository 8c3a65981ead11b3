"""Several processes that train one network, as torchrun starts them: each computes on its share of every batch.

Whatever decides about the network is made equal here: gradients are averaged over the processes before importance
squares them, and what was chosen is compared by its hash. All functions do nothing where there is one process.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from clicktrain.errors import OutOfStep

_T = TypeVar("_T")


def processes() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process among them: 0 for the first, which alone writes files."""
    return dist.get_rank() if processes() > 1 else 0


@contextmanager
def group() -> Iterator[None]:
    """Join the processes that torchrun started, and leave them at the end; a process on its own joins nobody.

    On CPUs they talk through gloo, on GPUs through NCCL. Inside of a group this joins nothing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def share(count: int) -> slice:
    """Return which of `count` items, in their order, are this process's own: as equal parts as can be."""
    mine, all_ = rank(), processes()
    return slice(count * mine // all_, count * (mine + 1) // all_)


def total(number: float) -> float:
    """Return the sum of a number over the processes."""
    if processes() == 1:
        return number
    value = torch.tensor(number, dtype=torch.float64, device=_device())
    dist.all_reduce(value)
    return float(value)


def averaged(tensors: Sequence[Tensor], images: int) -> Sequence[Tensor]:
    """Return means over the images of all processes, from the means over this one's `images`."""
    if processes() == 1:
        return tensors
    flat = torch.cat([tensor.flatten() * images for tensor in tensors])
    dist.all_reduce(flat)
    parts = torch.split(flat / total(images), [tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def from_first(find: Callable[[], _T]) -> _T:
    """Return what `find` returns in the first process, in all of them; the others do not call it."""
    if rank() == 0:
        return send(find())
    found: _T = receive()
    return found


def send(found: _T) -> _T:
    """Give an object to the other processes, which wait for it in `receive`, and return it."""
    if processes() > 1:
        dist.broadcast_object_list([found], src=0)
    return found


def receive() -> Any:
    """Return the object that the first process gives with `send`."""
    box: list[Any] = [None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def check_equal(what: str, parts: Iterable[bytes | memoryview]) -> None:
    """Compare the hash of some content over the processes.

    Parameters
    ----------
    what : str
        Name of the content, for the message.
    parts : iterable of bytes-like
        The content; not read where there is one process.

    Raises
    ------
    OutOfStep
        It is not the same in all of them; raised in all of them.
    """
    if processes() == 1:
        return
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    digests: list[str] = [""] * processes()
    dist.all_gather_object(digests, digest.hexdigest())
    if len(set(digests)) > 1:
        short = ", ".join(each[:12] for each in digests)
        raise OutOfStep(f"{what}: not the same in all {processes()} processes (SHA-256 {short})")


def content(tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    """Return the bytes of tensors, for `check_equal`."""
    for tensor in tensors:
        yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
