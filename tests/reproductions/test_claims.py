"""Every claim's experiment runs, in a smoke version, from the training to a row in the table of verdicts."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch

import clicktrain.data
from bench import cpu
from bench.suite.workloads import LayerShape, Workload
from clicktrain.data import DataSet
from clicktrain.kernels.cpu import library
from reproductions import kernels, preset
from reproductions.claims import BY_ID, CLAIMS, Claim
from reproductions.paths import StudyDirectory
from reproductions.preset import Preset
from reproductions.runner import Runner
from reproductions.store import load_study
from reproductions.summary import check
from reproductions.verdicts import QUICK_BENCHMARK, SMOKE
from tests.helpers.executors import InThisProcess

TRAINED = [claim for claim in CLAIMS if not claim.is_of_kernels]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(autouse=True)
def _few_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    original = clicktrain.data.load

    def load(*arguments: object, **options: object) -> DataSet:
        found = original(*arguments, **options)
        return dataclasses.replace(found, test=found.test.subset(torch.arange(60)))

    monkeypatch.setattr("clicktrain.data.load", load)


@cache
def presets() -> dict[str, Preset]:
    """Return the shrunk presets by name, those with few runs first."""
    loaded = {name: preset.load(preset.find(name), smoke=True) for name in preset.names()}
    return dict(sorted(loaded.items(), key=lambda item: len(item[1].methods)))


@pytest.mark.parametrize("claim", TRAINED, ids=lambda claim: claim.id)
def test_a_smoke_version_of_every_claim_runs_to_its_verdict(claim: Claim, results: Path) -> None:
    name = next((name for name, each in presets().items() if claim.id in each.claims), None)
    assert name is not None, "no preset checks it"
    chosen = presets()[name]
    directory = StudyDirectory(results / name)
    subject = chosen.subjects(claim)[0]
    only = [subject.name, chosen.dense_of(subject).name, *([subject.rivals[claim.rival]] if claim.rival else [])]
    assert Runner(directory, chosen, executor=InThisProcess(), say=lambda line: None).run(only) == []
    (row,) = [row for row in check(load_study(directory)) if row.claim == claim and row.subject in (subject.name, "")]
    assert (row.subject, row.verdict.word) == (subject.name, SMOKE)
    assert row.verdict.estimate is not None
    assert row.dense_accuracy is not None


@pytest.mark.skipif(library.available() is not True, reason=f"{library.available()}")
def test_a_smoke_version_of_the_kernel_claims_runs_to_its_verdict() -> None:
    row = cpu.measure(Workload(LayerShape("test", "small", 9, 10, (6, 5)), 9, 4.5), "forward", rounds=2)
    record = {
        "quick": True,
        "provenance": clicktrain.provenance.collect(),
        "rows": [dataclasses.asdict(row)],
    }
    benchmark = kernels.read("small.json", record)
    assert benchmark is not None
    assert not benchmark.on_gpu
    assert benchmark.layers[0].least == pytest.approx(row.speedup_blocked)
    verdict = benchmark.verdict(BY_ID["kernel-speedup-cpu"])
    assert verdict.word == QUICK_BENCHMARK
    assert verdict.estimate is not None
    assert verdict.estimate.mean == benchmark.layers[0].least
