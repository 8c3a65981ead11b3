"""The network of a run as it is called in training: plain in one process, in step with the others in several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clicktrain import distributed
from clicktrain.method import Method
from clicktrain.recording import Recorder
from clicktrain.training.seeding import seed_torch


class Replica:
    """Calls the network of a method.

    In one process and float32, the passes are replayed as CUDA graphs where the method allows that (`Recorder`).
    In several processes a call goes through `DistributedDataParallel`, which averages gradients as soon as there are
    any, so that methods see averaged ones. It is built anew whenever the network has other parameters, as after the
    hard prune. BatchNorm normalises each process's share of a batch on its own and keeps the first one's statistics.

    Parameters
    ----------
    method : Method
        Of which `model` is called.
    autocast : bool
        Whether it is called under autocast.
    """

    def __init__(self, method: Method, autocast: bool = False) -> None:
        self._method = method
        self._recorder = Recorder() if method.recordable and not autocast else None
        self._parallel: DistributedDataParallel | None = None
        self._parameters: list[nn.Parameter] = []

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits of this process's images."""
        model = self._method.model
        logits: Tensor
        if distributed.processes() > 1:
            logits = self._in_step()(x)
        else:
            logits = self._recorder(model, x) if self._recorder else model(x)
        return logits

    def _in_step(self) -> DistributedDataParallel:
        parameters = list(self._method.model.parameters())
        same = len(parameters) == len(self._parameters) and all(map(_is, parameters, self._parameters))
        if self._parallel is None or not same:
            self._parallel = None  # first: its hooks on parameters that stay must be gone
            # statistics of the others are never read: the first process evaluates and writes checkpoints
            self._parallel = DistributedDataParallel(self._method.model, broadcast_buffers=False)
            self._parameters = parameters
        return self._parallel


def _is(left: object, right: object) -> bool:
    return left is right


@contextmanager
def own_randomness(*key: int) -> Iterator[None]:
    """Let dropout differ between processes, and nothing else: what a method draws stays the same in all."""
    if distributed.rank() == 0:
        yield
        return
    with torch.random.fork_rng():
        seed_torch("process", *key, distributed.rank())
        yield
