"""VGG-13 at the official 9.0x, deployed: one CUDA graph, beside the dense network in another and torch as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import clicktrain
from bench.suite.networks import Setting
from clicktrain import deploy, timing
from clicktrain.deploy.compiled import CompiledModel
from clicktrain.timing import Contender

BATCHES = (1, 128)
TOLERANCE = 1e-4
OURS, RECORDED, RECORDED_TF32, TORCH = "compiled", "dense, recorded", "dense, recorded, TF32", "torch"


@dataclass(frozen=True)
class Deployed:
    """One batch size.

    Attributes
    ----------
    dense_layers : int
        Convolutions that the compiled network computes dense, because that was measured to be faster.
    speedups : dict
        Contender -> times that the compiled network is faster, median over the rounds.
    """

    batch: int
    dense_layers: int
    speedups: dict[str, float]
    timings: list[dict[str, object]]

    def __str__(self) -> str:
        ratios = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in self.speedups.items())
        return f"VGG-13 9.0x, batch {self.batch}: {self.timings[0]['median_ms']:.3f} ms  {ratios}"


@torch.no_grad()
def measure(rounds: int, width: float = 1.0) -> list[dict[str, Any]]:
    """Compile, check and time each batch size; all in float32, but for the yardstick with TF32."""
    made = [_measure(batch, rounds, width) for batch in BATCHES]
    print(*made, sep="\n", flush=True)
    return [asdict(row) for row in made]


def _measure(batch: int, rounds: int, width: float) -> Deployed:
    with _precision(tf32=False):
        sparse = Setting(width, batch).sparse("reference").eval()
        x = torch.randn(batch, 3, 32, 32)
        ours = deploy.compile(sparse, x, "cuda", strict=True, tune=True)
        dense, x = clicktrain.to_dense(sparse).cuda(), x.cuda()
        contenders = {
            OURS: Contender(_recorded(ours, x, tf32=False)),
            RECORDED: Contender(_recorded(_dense(ours), x, tf32=False)),
            RECORDED_TF32: Contender(_recorded(_dense(ours), x, tf32=True), None),
            TORCH: Contender(partial(dense, x)),
        }
        times = timing.compare(
            contenders, dense(x), tolerance=TOLERANCE, warmup_seconds=0.02, rounds=rounds, device="cuda"
        )
    return Deployed(
        batch, sum(node.is_dense for node in ours.graph.nodes.values()),
        {name: times.speedup(name, OURS) for name in contenders if name != OURS},
        [timed.as_dict() for timed in times.timings.values()],
    )  # fmt: skip


def _precision(tf32: bool) -> Any:
    return torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32)


def _recorded(model: CompiledModel, x: Tensor, tf32: bool) -> Callable[[], Tensor]:
    """Return what replays a model; it is recorded here, in the precision that it shall have."""
    with _precision(tf32):
        model(x)
    return partial(model, x)


def _dense(model: CompiledModel) -> CompiledModel:
    """Return the same network with every convolution dense."""
    nodes = {
        number: replace(node, attributes={**node.attributes, "dense": True}) if node.op == "conv" else node
        for number, node in model.graph.nodes.items()
    }
    return CompiledModel(replace(model.graph, nodes=nodes), model.batch, device="cuda")
