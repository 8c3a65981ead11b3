"""`python -m bench.operators`: that it measures what it says, goes on where it stopped, and finds crossovers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baselines.operators import OPERATORS, Operator, Problem
from bench import operators
from bench.operators import Row, crossover, crossovers, means
from bench.problems import problem
from bench.suite.workloads import LayerShape, Workload
from clicktrain import timing

SMALL = LayerShape("test", "small", 8, 16, (6, 5))
WITHOUT_COMPILER = {name: operator for name, operator in OPERATORS.items() if name != "dense compiled"}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "NETWORKS", {"one": (SMALL,), "two": (SMALL,)})
    monkeypatch.setattr(operators, "OPERATORS", WITHOUT_COMPILER)


def row(network: str, layer: str, density: float, **speedups: float) -> Row:
    named = {name.replace("_", " "): value for name, value in speedups.items()}
    whole = {name: value for name, value in named.items() if not name.endswith("product")}
    products = {name: value for name, value in named.items() if name.endswith("product")}
    return Row(network, layer, f"{layer} {density}", 1 / density, density, "dense NCHW", whole, products, {}, [])


def test_the_problem_of_a_workload_has_its_mask() -> None:
    workload = Workload(SMALL, 2, 4.5)
    asked = problem(workload, "grad_input")
    assert asked.function == "grad_input"
    assert torch.equal(asked.mask, workload.assignment().mask())
    assert not asked.weight[~asked.mask].any()
    assert asked.macs == 2 * 30 * workload.assignment().kept_weights


def test_a_row_has_every_operator_or_the_reason_why_not() -> None:
    measured = operators.measure("one", Workload(SMALL, 2, 4.5), rounds=2)
    assert measured.speedups.keys() | measured.product_speedups.keys() | measured.not_run.keys() == {*WITHOUT_COMPILER}
    assert "cuda" in measured.not_run["cupyx CSR im2col"]
    medians = {str(timed["name"]): float(str(timed["median_ms"])) for timed in measured.timings}
    dense = [name for name in ("dense NCHW", "dense channels_last", "GEMM im2col") if name in medians]
    assert measured.dense == min(dense, key=medians.__getitem__)
    assert measured.speedups[measured.dense] == 1.0
    assert measured.product_speedups["GEMM product"] == 1.0
    assert measured.density == pytest.approx(1 / 4.5, rel=0.05)
    assert measured.workload in str(measured)


def test_the_best_dense_operator_is_a_whole_float32_one() -> None:
    assert operators.DENSE == ["dense NCHW", "dense channels_last", "dense compiled", "GEMM im2col"]


def test_an_operator_is_held_to_its_own_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(type(OPERATORS["dense NCHW"])):  # type: ignore[misc]
        def prepare(self, asked: Problem) -> timing.Contender:
            return super().prepare(replace(asked, weight=asked.weight * 1.001))

    wrong: Operator = Wrong("NCHW")
    monkeypatch.setattr(operators, "OPERATORS", WITHOUT_COMPILER | {"dense NCHW": wrong})
    with pytest.raises(timing.WrongResult, match=r"dense NCHW is wrong: relative error 0\.001"):
        operators.measure("one", Workload(SMALL, 2, 4.5), rounds=1)


def test_a_crossover_lies_between_densities() -> None:
    assert crossover({0.4: 0.5, 0.1: 2.0}) == pytest.approx(0.2)
    assert crossover({0.4: 0.5, 0.1: 0.9}) == 0.0
    assert crossover({0.4: 1.5, 0.1: 3.0}) == 0.4
    assert crossover({0.4: 1.2, 0.2: 0.5, 0.05: 2.0}) == pytest.approx(0.1), "from there on down, not by chance above"


def test_crossovers_are_those_of_each_layer_and_of_sparse_operators() -> None:
    rows = [
        row("n", "a", 0.4, CSR_im2col=0.5, GEMM_im2col=0.5, CSR_product=2.0),
        row("n", "a", 0.1, CSR_im2col=2.0, GEMM_im2col=2.0, CSR_product=3.0),
        row("n", "b", 0.4, CSR_im2col=0.5, CSR_product=0.5),
    ]
    found = crossovers(rows)["n"]
    assert found == {"CSR im2col": {"a": pytest.approx(0.2), "b": 0.0}, "CSR product": {"a": 0.4, "b": 0.0}}


def test_means_are_geometric_and_over_layers_that_have_the_operator() -> None:
    rows = [row("n", "a", 0.25, CSR_im2col=2.0, BSR_im2col=1.0), row("n", "b", 0.25, CSR_im2col=8.0)]
    assert means(rows) == {"n 4x": {"CSR im2col": pytest.approx(4.0)}}


def test_the_command_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "operators.json"
    assert operators.main(["--network", "two", "--rounds", "1", "--out", str(out)]) == 0
    first = json.loads(out.read_text())
    assert [r["compression"] for r in first["rows"]] == [2.25, 4.5, 8.1, 16.2, 64.8]
    assert set(first["crossovers"]) == {"two"}
    assert operators.main(["--rounds", "1", "--minutes", "0", "--out", str(out)]) == 0
    assert "5 workloads are left" in capsys.readouterr().out
    assert operators.main(["--rounds", "1", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["rows"][:5] == first["rows"]
    assert [r["network"] for r in report["rows"]] == ["two"] * 5 + ["one"] * 5
    assert report["rows"][-1]["piece"] == len(report["pieces"]) - 1
    assert all(piece["provenance"]["packages"]["torch"] for piece in report["pieces"])
    assert report["means"]["one 4.5x"].keys() == report["rows"][6]["speedups"].keys()


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"schema": 0}'])
def test_another_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    out = tmp_path / "other.json"
    out.write_text(content)
    assert operators.main(["--quick", "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {out}: ")
    assert out.read_text() == content
