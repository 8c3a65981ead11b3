import json
import re
from pathlib import Path

import pytest

from clicktrain.errors import ConfigError
from reproductions import arithmetic, gpu_tables, paths, retained, tables
from reproductions.claims import BY_ID, CLAIMS
from reproductions.stats import Estimate
from reproductions.summary import StoredRow
from reproductions.verdicts import EXCEEDED, NOT_EXCLUSIVE, NOT_REPRODUCED, Verdict
from tests.helpers.studies import make_study


def test_the_readme_says_what_the_evidence_says() -> None:
    readme = paths.README.read_text(encoding="utf-8")
    assert readme == tables.replaced(readme, paths.README), "run: python -m reproductions tables --write"


def test_tables_come_from_the_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "EVIDENCE", tmp_path / "evidence")
    monkeypatch.setattr(paths, "BENCHMARKS", tmp_path)
    make_study(tmp_path / "evidence" / "long")
    make_study(tmp_path / "evidence" / "short", skip=("ClickTrain/1", "ClickTrain/2"))
    make_study(tmp_path / "evidence" / "tuning")
    preset = tmp_path / "evidence" / "tuning" / "study.toml"
    preset.write_text(re.sub(r"claims = \[.*?\]", "claims = []", preset.read_text(), flags=re.DOTALL))
    text = tables.render()
    (row,) = [line for line in text.splitlines() if line.startswith("| The pruned network is within 1 point")]
    assert row.startswith("| The pruned network is within 1 point of the dense one | ClickTrain |")
    assert row.endswith(", n = 3 | **reproduced** | long study, toy data |")
    assert "short study" not in text.split("Toy study")[0]
    assert text.count("| ClickTrain | 3 | 89.60") == 1
    missing = text[text.index("Not measured yet") :].split("\n")[0]
    assert "`kernel-speedup`" in missing
    assert "`accuracy-vs-dense`" not in missing
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


@pytest.mark.parametrize(("concurrent", "said"), [(0, False), (None, True), (2, True)])
def test_a_table_says_where_other_work_ran_beside(concurrent: int | None, said: bool, tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", concurrent=concurrent)
    assert ("Other work ran beside some of the runs" in tables.methods_table(study)) == said


def test_every_claim_is_in_a_table_or_named_as_not_measured() -> None:
    text = tables.render()
    assert all(claim.statement in text or f"`{claim.id}`" in text for claim in CLAIMS)


def test_tables_are_written_between_their_markers(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.write(file)
    text = file.read_text()
    assert text.startswith(f"before\n{tables.BEGIN}\n\n| claim |")
    assert text.endswith(f"\n\n{tables.END}\nafter\n")
    assert "\nold\n" not in text
    tables.write(file)
    assert file.read_text() == text
    file.write_text("nothing\n")
    with pytest.raises(ConfigError, match="expected the lines"):
        tables.write(file)


def test_the_paper_schedule_is_what_the_published_training_flops_imply() -> None:
    groups = {group.name: group for group in arithmetic.groups()}
    assert groups["released, A"].inside == groups["released, B"].inside == 0
    assert groups["paper, A"].inside == max(group.inside for group in groups.values())
    assert all(35 <= value <= 45.2 for value in groups["paper, A"].savings)
    assert all(value > 45.2 for value in groups["fast, A"].savings)
    low, high = arithmetic.PUBLISHED_INFERENCE
    assert sum(low <= value <= high for value in arithmetic.inference()) == 12


def test_retained_importance_stands_beside_accuracy(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    assert "importance retained" not in tables.methods_table(study)
    for row in study.preset.methods:
        if row.name == "ClickTrain":
            row.config["method"]["options"] |= {"pool": "frequency", "patterns": 8, "score": "magnitude"}
    found = [
        retained.Retained(seed, score, pool, size, 70.0 + seed + size)
        for seed in (0, 1)
        for score in ("taylor", "magnitude")
        for pool in ("coverage", "frequency")
        for size in (4, 8)
    ]
    retained.write(study.directory, found)
    lines = tables.methods_table(study).splitlines()
    (row,) = [line for line in lines if line.startswith("| ClickTrain |")]
    assert row.endswith("| 78.5 ± 0.7 |")
    (dense,) = [line for line in lines if line.startswith("| dense |")]
    assert dense.endswith("| - |")


def test_engines_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "BENCHMARKS", tmp_path)
    assert tables.inference_tables() == []
    timings = [{"name": name, "median_ms": ms, "error": 1e-7} for name, ms in (("clicktrain", 2.0), ("torch", 9.0))]
    cost = {"load_ms": 3.2, "peak_mb": 20.4, "file_mb": 6.66}
    row = {
        "network": "VGG", "compression": 9.0, "batch": 1, "speedup": {"torch": 4.5}, "goals": {"torch": 5.0},
        "timings": [*timings, {"name": "peak", "median_ms": 1.0, "error": None}], "costs": {"clicktrain": cost},
    }  # fmt: skip
    record = {"provenance": {"cpu": {"model": "a CPU"}, "threads": {"torch": 2}}, "rows": [row]}
    (tmp_path / "inference.json").write_text(json.dumps(record))
    (text,) = tables.inference_tables()
    assert "a CPU (`bench/evidence/inference.json`), 2 threads" in text
    assert "| VGG, 9.0x, batch 1 | clicktrain | 2.00 | - | 1e-07 | 3 | 20 | 6.7 |" in text
    assert "| VGG, 9.0x, batch 1 | torch | 9.00 | 4.50x (goal 5.0x, missed) | 1e-07 | - | - | - |" in text


def test_the_gpu_report_becomes_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "BENCHMARKS", tmp_path)
    assert gpu_tables.stored() == []
    means = {"cuDNN fp32": 3.5, "best layer, cuDNN fp32": 5.0, "share of the FP32 rate": 0.25}
    run = {"method": "sparse", "seed": 0, "epochs": 19, "accuracy": 0.9, "step_ms": {"dense": 7.0, "sparse": 4.0}}
    speedups = dict.fromkeys(("cuDNN fp32", "cuDNN tf32", "cuDNN bf16", "cuSPARSE im2col"), 2.0)
    faster = dict.fromkeys(speedups, 8.0)
    report = {
        "provenance": {"gpu": {"model": "Some GPU"}},
        "rows": [
            {"workload": "vgg13.64x32@128 8x", "function": "forward", "compression": 8.0, "speedups": speedups},
            {"workload": "vgg13.128x16@128 8x", "function": "forward", "compression": 8.0, "speedups": faster},
            {"workload": "resnet18.64x56@64 8x", "function": "forward", "compression": 8.0, "speedups": speedups},
            {"workload": "resnet18.64x56@64 4.5x", "function": "forward", "compression": 4.5, "speedups": speedups},
        ],
        "summary": {"forward 8x": means | {"share of copy bandwidth": 0.1}},
        "training": [run, run | {"seed": 1, "accuracy": 0.8, "step_ms": {"dense": 8.0, "sparse": 5.0}}],
        "deployment": [
            {"batch": 1, "dense_layers": 2, "speedups": {"torch": 3.0}, "timings": [{"median_ms": 0.5, "error": 1e-6}]}
        ],
        "steps": {
            "best_sparse": "sparse", "left_out": {"dense, compiled": "no compiler"},
            "timings": [{"name": "sparse", "median_ms": 4.0}, {"name": "dense", "median_ms": 7.0}],
        },
    }  # fmt: skip
    (tmp_path / "gpu.json").write_text(json.dumps(report))
    kernels, networks, steps, training, deployed = gpu_tables.stored()
    assert "Some GPU" in kernels[0]
    assert "layers of vgg13, resnet18;" in kernels[0]
    (cells,) = kernels[2]
    assert dict(zip(kernels[1], cells, strict=True))["cuDNN fp32"] == "3.50x"
    assert cells[:2] == ("forward 8x", "3")
    assert networks[2] == [
        ("forward, resnet18", "1", *["2.00x"] * 5), ("forward, vgg13", "2", *["4.00x"] * 4, "8.00x"),
    ]  # fmt: skip
    assert steps[2] == [
        ("sparse", "4.00", "1.00x"),
        ("dense", "7.00", "1.75x"),
        ("dense, compiled", "-", "no compiler"),
    ]
    assert training[2] == [("sparse", "2", "19", "7.50", "4.50", "85.00")]
    assert deployed[2] == [("1", "0.500", "2", "3.00x", "1e-06")]
    (tmp_path / "gpu.json").write_text(json.dumps(report | {"training": [], "deployment": [], "steps": {}}))
    assert len(gpu_tables.stored()) == 2


def test_a_study_that_may_not_decide_stands_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(source: str, word: str, n: int) -> StoredRow:
        return StoredRow(source, "ours", BY_ID["fast-time"], Verdict(word, Estimate(0.8, 0.7, 0.9, 0.1, n)))

    shared, alone, small = row("shared", NOT_EXCLUSIVE, 8), row("alone", NOT_REPRODUCED, 5), row("small", EXCEEDED, 3)
    for rows, shown in (([shared, alone, small], "alone"), ([shared], "shared")):
        monkeypatch.setattr(tables, "stored_evidence", lambda rows=rows: {"fast-time": rows})
        lines = [line for line in tables.claims_table().splitlines() if line.startswith("| Sparse training is faster")]
        assert [line.split(" | ")[-1].strip(" |") for line in lines] == [shown]
