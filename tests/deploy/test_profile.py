"""`clicktrain.deploy.profile`: every operation is there, with times that add up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clicktrain import deploy
from clicktrain.deploy import profile
from clicktrain.errors import InvalidArgument
from clicktrain.kernels.cpu import library
from tests.deploy.models import pruned

pytestmark = pytest.mark.skipif(library.available() is not True, reason=f"{library.available()}")


@pytest.mark.parametrize("batch", [1, 8])
def test_a_profile_has_every_operation(batch: int, tmp_path: Path) -> None:
    compiled = deploy.compile(pruned("vgg11", width=0.1), torch.empty(batch, 3, 32, 32))
    made = profile.profile(compiled, rounds=3)
    nodes = compiled.graph.nodes
    pooled = {layer.number for layer in made.layers if layer.op.endswith("+pool")}
    numbers = [
        number
        for number, node in nodes.items()
        if node.op not in ("input", "reshape") and not (node.op == "pool" and node.inputs[0] in pooled)
    ]
    assert [layer.number for layer in made.layers if layer.number] == numbers, "0 is the packing of the input"
    assert sum(layer.ms for layer in made.layers) == pytest.approx(made.total_ms)
    assert sum(layer.share for layer in made.layers) == pytest.approx(1)
    convolutions = [layer for layer in made.layers if layer.op.startswith("conv+relu")]
    assert len(convolutions) == 8
    assert convolutions[0].density == 1
    assert all(0.1 < (layer.density or 0) < 0.25 for layer in convolutions[1:])  # 4 of 9 in 40 % of the kernels
    assert all(layer.dense_ms and layer.share_of_peak and layer.ms > 0 for layer in convolutions)
    assert made.as_dict()["layers"][0]["shape"] == "3x32x32"
    assert len(made.to_text().splitlines()) == len(made.layers) + 2
    pytest.importorskip("matplotlib")
    profile.plot(made, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_rounds_must_be_positive() -> None:
    compiled = deploy.compile(torch.nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8))
    with pytest.raises(InvalidArgument, match="rounds=0"):
        profile.profile(compiled, 0)
