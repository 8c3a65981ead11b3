"""A training step of VGG-13 at the official 9.0x, sparse and dense in the same rounds, each in several ways.

Dense contenders have the sparse network's weights, zeros where it is pruned, so that all losses can be compared. They
compute as much as any dense network: cuDNN does not look at the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import clicktrain
from bench.suite.networks import LEARNING_RATE, Setting
from clicktrain import timing
from clicktrain.timing import Contender

TOLERANCE = 1e-3
SPARSE, DENSE, TF32 = "sparse", "dense", "dense, TF32"
EAGER, RECORDED, COMPILED, CHANNELS_LAST = "eager", "recorded", "compiled", "channels_last"
WAYS = {
    f"{SPARSE}, {RECORDED}": (SPARSE, RECORDED), f"{DENSE}, {RECORDED}": (DENSE, RECORDED),
    f"{DENSE}, {CHANNELS_LAST}, {RECORDED}": (DENSE, CHANNELS_LAST), f"{TF32}, {RECORDED}": (TF32, RECORDED),
    f"{SPARSE}, {EAGER}": (SPARSE, EAGER), f"{DENSE}, {EAGER}": (DENSE, EAGER),
    f"{DENSE}, {COMPILED}": (DENSE, COMPILED), f"{SPARSE}, {COMPILED}": (SPARSE, COMPILED),
}  # fmt: skip
"""Contender -> network, and how its passes run: kernel by kernel, or as CUDA graphs, of torch's modules (in NCHW or
channels_last) or of what torch.compile makes of them."""


@dataclass(frozen=True)
class Steps:
    """Times of a step.

    Attributes
    ----------
    batch : int
        Images of a step.
    best_sparse, best_dense : str
        The fastest contenders in float32.
    speedup : float
        Times that the first is faster than the second, median over the rounds.
    timings : list of dict
        Of each contender.
    left_out : dict
        Contender -> why it was not timed.
    """

    batch: int
    best_sparse: str
    best_dense: str
    speedup: float
    timings: list[dict[str, object]]
    left_out: dict[str, str]

    def __str__(self) -> str:
        times = "  ".join(f"{timed['name']} {timed['median_ms']:.2f} ms" for timed in self.timings)
        return f"VGG-13 9.0x, step of batch {self.batch}: {times}  best over best {self.speedup:.2f}x"


def measure(rounds: int, setting: Setting | None = None, device: str = "cuda") -> dict[str, Any]:
    """Check and time all ways to compute a step; what torch cannot compile is left out, with the reason.

    Returns
    -------
    dict
        `Steps`, for JSON.
    """
    setting = setting or Setting(batch=128)
    loss = _step(setting, "reference", "", device)()
    contenders, left_out = {}, dict[str, str]()
    for name, (network, way) in WAYS.items():
        try:
            step = _step(setting, network, way, device)
            contenders[name] = Contender(step, None) if network == TF32 else Contender(step)
        except Exception as error:
            if way != COMPILED:
                raise
            left_out[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    times = timing.compare(
        contenders, loss, tolerance=TOLERANCE, warmup_seconds=0.05, rounds=rounds, device=device
    )  # fmt: skip
    best = {
        network: times.best(*(name for name in contenders if WAYS[name][0] == network)) for network in (SPARSE, DENSE)
    }
    made = Steps(
        setting.batch, best[SPARSE], best[DENSE], times.speedup(best[DENSE], best[SPARSE]),
        [timed.as_dict() for timed in times.timings.values()], left_out,
    )  # fmt: skip
    print(made, flush=True)
    return asdict(made)


def _step(setting: Setting, network: str, way: str, device: str) -> Callable[[], Tensor]:
    """Return what does a step, always on the same images, and returns its loss; its graphs are recorded here."""
    model = _network(setting, network, device)
    images, classes = (t.to(device) for t in setting.images(0))
    if way == CHANNELS_LAST:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stubs
        images = images.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
    forward: Callable[[Tensor], Tensor] = model

    def step(update: bool = True) -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=network == TF32):
            loss = F.cross_entropy(forward(images), classes)
            loss.backward()  # type: ignore[no-untyped-call]
            if update:
                optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

    if way == COMPILED:
        forward = torch.compile(model, mode="reduce-overhead")
    elif way in (RECORDED, CHANNELS_LAST) and device == "cuda":
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=network == TF32):
            forward = clicktrain.record(model, images)
    for _ in range(3 if way else 0):  # what compiles or records does so now, with the weights as they are
        step(update=False)
    return step


def _network(setting: Setting, network: str, device: str) -> nn.Module:
    """Return the network without dropout, which draws other units in every way to compute."""
    model, assignments = setting.model()
    model.to(device)
    clicktrain.convert(model, assignments, backend=device if network == SPARSE else "reference")
    if network in (DENSE, TF32):
        model = clicktrain.to_dense(model)
    if network == SPARSE and device == "cuda":
        clicktrain.tune(model, (setting.batch, 3, 32, 32))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()
