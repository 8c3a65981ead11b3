"""`python -m bench.reconfiguration`: the networks are really smaller, and their steps are timed in the same rounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import reconfiguration


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_the_network_has_only_its_living_channels(share: float) -> None:
    layers = [m for m in reconfiguration.reconfigured(share, 0.25).modules() if isinstance(m, nn.Conv2d)]
    whole = [m for m in reconfiguration.reconfigured(1.0, 0.25).modules() if isinstance(m, nn.Conv2d)]
    assert layers[0].in_channels == 3
    assert [conv.out_channels for conv in layers] == [round(share * conv.out_channels) for conv in whole]
    assert [conv.in_channels for conv in layers[1:]] == [round(share * conv.in_channels) for conv in whole[1:]]


def test_a_reconfigured_network_learns() -> None:
    model = reconfiguration.reconfigured(0.5, 0.25)
    before = [parameter.clone() for parameter in model.parameters()]
    reconfiguration._step(model, torch.contiguous_format, 4).run()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_the_command_stores_smaller_and_smaller_networks(tmp_path: Path) -> None:
    out = tmp_path / "reconfiguration.json"
    assert reconfiguration.main(["--width", "0.125", "--batch", "4", "--rounds", "2", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    rows = report["rows"]
    assert [row["share"] for row in rows] == list(reconfiguration.SHARES)
    for key in ("parameters", "macs"):
        sizes = [row[key] for row in rows]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == len(sizes)
    assert rows[0]["speedup"] == 1.0
    assert all(row["step_ms"] > 0 and row["layout"] in reconfiguration.LAYOUTS for row in rows)
    assert report["provenance"]["packages"]["torch"]
