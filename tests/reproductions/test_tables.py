import json
import re
from pathlib import Path

import pytest

from clicktrain.errors import ConfigError
from reproductions import arithmetic, cpu_tables, gpu_tables, paths, retained, tables
from reproductions.claims import BY_ID, CLAIMS
from reproductions.stats import Estimate
from reproductions.summary import StoredRow
from reproductions.verdicts import EXCEEDED, NOT_EXCLUSIVE, NOT_REPRODUCED, Verdict
from tests.helpers.studies import make_study


@pytest.mark.parametrize("path", tables.FILES, ids=lambda path: path.name)
def test_files_say_what_the_evidence_says(path: Path) -> None:
    made = tables.replaced(path, tables.FILES[path]())
    assert path.read_text(encoding="utf-8") == made, "run: python -m reproductions tables --write"


def test_tables_come_from_the_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "EVIDENCE", tmp_path / "evidence")
    monkeypatch.setattr(paths, "BENCHMARKS", tmp_path)
    make_study(tmp_path / "evidence" / "long")
    make_study(tmp_path / "evidence" / "short", skip=("ClickTrain/1", "ClickTrain/2"))
    make_study(tmp_path / "evidence" / "tuning")
    preset = tmp_path / "evidence" / "tuning" / "study.toml"
    preset.write_text(re.sub(r"claims = \[.*?\]", "claims = []", preset.read_text(), flags=re.DOTALL))
    text = f"{tables.verdicts()}\n\n{tables.details()}"
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
    text = tables.verdicts()
    assert all(claim.statement in text or f"`{claim.id}`" in text for claim in CLAIMS)


def test_tables_are_written_between_their_markers(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.write(file, "| claim |")
    text = file.read_text()
    assert text.startswith(f"before\n{tables.BEGIN}\n\n| claim |")
    assert text.endswith(f"\n\n{tables.END}\nafter\n")
    assert "\nold\n" not in text
    tables.write(file, "| claim |")
    assert file.read_text() == text
    file.write_text("nothing\n")
    with pytest.raises(ConfigError, match="expected the lines"):
        tables.write(file, "")


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
    assert cpu_tables.inference() == []
    timings = [{"name": name, "median_ms": ms, "error": 1e-7} for name, ms in (("clicktrain", 2.0), ("torch", 9.0))]
    cost = {"load_ms": 3.2, "peak_mb": 20.4, "file_mb": 6.66}
    row = {
        "network": "VGG", "compression": 9.0, "batch": 1, "speedup": {"torch": 4.5}, "goals": {"torch": 5.0},
        "timings": [*timings, {"name": "peak", "median_ms": 1.0, "error": None}], "costs": {"clicktrain": cost},
    }  # fmt: skip
    made = {"cpu": {"model": "a CPU"}, "threads": {"torch": 2}, "code": {"commit": "0123456789ab"}}
    record = {"provenance": made, "rows": [row]}
    (tmp_path / "inference.json").write_text(json.dumps(record))
    ((title, _, rows),) = cpu_tables.inference()
    assert "a CPU, 2 threads (`bench/evidence/inference.json`, commit 0123456)" in title
    assert rows == [
        ("VGG, 9.0x, batch 1", "clicktrain", "2.00", "", "1e-07", "3", "20", "6.7"),
        ("VGG, 9.0x, batch 1", "torch", "9.00", "4.50x (goal 5.0x, missed)", "1e-07", "", "", ""),
    ]


def test_goals_of_cpus_stand_beside_what_each_machine_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "BENCHMARKS", tmp_path)
    assert cpu_tables.kernels() == []
    made = {"cpu": {"model": "a CPU"}, "threads": {"torch": 2}, "code": {"commit": "0123456789ab"}}
    machine = {"provenance": made, "ceilings": {"gflops": 149.6}}
    goals = [{"name": "8.1x", "reached": 6.5, "at_least": 7.0}, {"name": "stride 2", "reached": 4.6, "at_least": 4.5}]
    (tmp_path / "cpu.json").write_text(json.dumps({**machine, "goals": goals}))
    (tmp_path / "cpu_avx2.json").write_text(json.dumps({**machine, "goals": goals[1:]}))
    steps = {"torch": {"name": "step", "reached": 3.0, "at_least": 4.0}}
    (tmp_path / "training.json").write_text(json.dumps({**machine, "times": steps}))
    operators = {
        "pieces": [machine], "means": {"vgg13 8x": {"CSR": 0.5, "pattern": 4.0}},
        "crossovers": {"vgg13": {"CSR": {"a": 0.01, "b": 0.03}}},
    }  # fmt: skip
    (tmp_path / "operators.json").write_text(json.dumps(operators))
    convolutions, training, ratios, crossing = cpu_tables.kernels()
    assert "a CPU, 2 threads (`bench/evidence/cpu_avx2.json`, commit 0123456), 150 GFLOP/s" in convolutions[0]
    assert convolutions[1:] == (
        ("layers", "goal", "cpu.json", "cpu_avx2.json"),
        [["8.1x", "7x", "6.50x (missed)", "-"], ["stride 2", "4.5x", "4.60x", "4.60x"]],
    )
    assert training[2] == [["step", "4x", "3.00x (missed)"]]
    assert ratios[2] == [["vgg13 8x", "0.50x", "4.00x"]]
    assert crossing[2] == [["vgg13", "2.0 %"]]


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
    (tmp_path / "gpu_gradient.json").write_text(json.dumps(report | {"rows": [], "summary": {}, "deployment": []}))
    *_, steps, training = gpu_tables.stored()
    assert steps[0].startswith("Newer (`gpu_gradient.json`")
    assert len(gpu_tables.stored()) == 4


def test_a_study_that_may_not_decide_stands_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(source: str, word: str, n: int) -> StoredRow:
        return StoredRow(source, "ours", BY_ID["fast-time"], Verdict(word, Estimate(0.8, 0.7, 0.9, 0.1, n)))

    shared, alone, small = row("shared", NOT_EXCLUSIVE, 8), row("alone", NOT_REPRODUCED, 5), row("small", EXCEEDED, 3)
    for rows, shown in (([shared, alone, small], "alone"), ([shared], "shared")):
        monkeypatch.setattr(tables, "stored_evidence", lambda rows=rows: {"fast-time": rows})
        lines = [line for line in tables.claims_table().splitlines() if line.startswith("| Sparse training is faster")]
        assert [line.split(" | ")[-1].strip(" |") for line in lines] == [shown]
