import json
from pathlib import Path

import pytest

from reproductions import kernels, paths
from reproductions.claims import BY_ID
from reproductions.summary import stored_verdicts
from reproductions.verdicts import QUICK_BENCHMARK, REPRODUCED
from tests.helpers.studies import make_study

MACHINE = {"cpu": {"model": "Some CPU"}, "threads": {"torch": 2}, "gpu": None}


def cpu_record(blocked: float, *, quick: bool = False) -> dict:
    times = {"NCHW": 9.0, "channels_last": 6.0, "blocked": blocked, "peak": 0.5}
    timings = [{"name": name, "median_ms": time} for name, time in times.items()]
    row = {"workload": "a layer", "function": "forward", "speedup_blocked": 6.0 / blocked, "timings": timings}
    return {"quick": quick, "provenance": MACHINE, "rows": [row, row | {"function": "grad_input"}]}


def gpu_record() -> dict:
    speedups = {"cuDNN fp32": 4.6, "cuDNN bf16": 0.5, "cuBLAS im2col": 5.0, "cuSPARSE product": 1.5, "sparse bf16": 1.0}
    rows = [{"workload": "a layer", "function": "forward", "speedups": speedups}]
    return {"provenance": MACHINE | {"gpu": {"model": "Some GPU"}}, "rows": rows}


def test_kernels_are_compared_with_the_fastest_library_in_float32() -> None:
    on_cpu, on_gpu = kernels.read("cpu.json", cpu_record(1.5)), kernels.read("gpu.json", gpu_record())
    assert on_cpu is not None
    assert on_gpu is not None
    assert [layer.speedups for layer in on_cpu.layers] == [{"torch NCHW": 6.0, "torch channels_last": 4.0}]
    assert on_cpu.layers[0].least == 4.0
    assert on_gpu.layers[0].least == 4.6
    assert (on_cpu.machine, on_gpu.machine) == ("Some CPU, 2 threads", "Some GPU")
    assert on_gpu.verdict(BY_ID["kernel-speedup"]).word == REPRODUCED


def test_quick_benchmarks_decide_nothing() -> None:
    benchmark = kernels.read("cpu.json", cpu_record(1.0, quick=True))
    assert benchmark is not None
    assert benchmark.verdict(BY_ID["kernel-speedup-cpu"]).word == QUICK_BENCHMARK


@pytest.mark.parametrize("record", [[], {}, {"rows": []}, {"rows": [{"function": "step"}]}])
def test_other_records_are_no_benchmarks_of_kernels(record: object) -> None:
    assert kernels.read("other.json", record) is None


def test_stored_benchmarks_stand_beside_the_claims_about_their_hardware(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "EVIDENCE", tmp_path / "none")
    monkeypatch.setattr(paths, "BENCHMARKS", tmp_path / "bench" / "evidence")
    paths.BENCHMARKS.mkdir(parents=True)
    for name, record in {"cpu": cpu_record(1.3), "gpu": gpu_record(), "training": {"steps": []}}.items():
        (paths.BENCHMARKS / f"{name}.json").write_text(json.dumps(record))
    found = stored_verdicts(make_study(tmp_path / "toy"))
    assert {claim: [row.source for row in rows] for claim, rows in found.items()} == {
        "kernel-speedup": ["bench/evidence/gpu.json, Some GPU"],
        "kernel-speedup-cpu": ["bench/evidence/cpu.json, Some CPU, 2 threads"],
    }


def test_stored_benchmarks_can_be_read() -> None:
    assert all(benchmark.layers for benchmark in kernels.stored())
