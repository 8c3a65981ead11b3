from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clicktrain import cli
from clicktrain.config import RunConfig
from clicktrain.timing import Ceilings
from tests.helpers import toy


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clicktrain.data.load", toy.load_data)
    monkeypatch.setattr("clicktrain.models.create", toy.create_model)
    monkeypatch.setattr("sys.path", list(sys.path))  # main() adds the current directory


@pytest.fixture
def toy_file(tmp_path: Path) -> Path:
    path = tmp_path / "toy.toml"
    path.write_text(toy.clicktrain_config().to_toml())
    return path


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_training_keeps_its_memory(tmp_path: Path, toy_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr("clicktrain.memory.keep", lambda: kept.append(True))
    assert call("train", "--config", toy_file, "--out", tmp_path / "run") == 0
    assert kept == [True]


def test_train_then_eval_then_train_again(tmp_path: Path, toy_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert call("train", "--config", toy_file, "--out", out, "--seed", "4", "--concurrent-runs", "0") == 0
    printed = capsys.readouterr().out
    assert "epoch   3  sparse" in printed
    assert "compression     2.5" in printed
    record = json.loads((out / "provenance.json").read_text())
    assert (record["seed"], record["concurrency"]["declared"]) == (4, 0)

    assert call("eval", out, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    result = json.loads((out / "result.json").read_text())
    assert figures["accuracy"]["test"] == result["accuracy"]["last"]
    assert figures["inference_macs"] == result["inference_macs"]
    assert call("eval", out) == 0
    printed = capsys.readouterr().out
    assert f"accuracy        {result['accuracy']['last']:.2f} % (test)" in printed
    assert "inference MACs" in printed

    assert call("train", "--config", toy_file, "--out", out, "--seed", "4") == 0
    assert "this run is done" in capsys.readouterr().out


def test_export_then_profile(tmp_path: Path, toy_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, compiled, program = tmp_path / "run", tmp_path / "compiled", tmp_path / "program.pt2"
    assert call("train", "--config", toy_file, "--out", run) == 0
    assert call("export", run, compiled, "--batch", "8") == 0
    printed = capsys.readouterr().out
    assert "fallbacks       none" in printed
    assert "relative error" in printed
    assert call("export", run, program, "--format", "program") == 0
    assert program.stat().st_size > 0

    capsys.readouterr()
    assert call("profile", compiled, "--rounds", "2", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["batch"] == 8
    assert "conv" in {layer["op"].removesuffix("+relu") for layer in made["layers"]}
    assert call("profile", compiled, "--rounds", "2", "--batch", "1") == 0
    assert "median of 2 runs" in capsys.readouterr().out


def test_options_change_the_file(tmp_path: Path, toy_file: Path) -> None:
    out = tmp_path / "run"
    changes = ["--set", "train.epochs=1", "--set", "train.lr=0.125", "--method", toy.DENSE]
    assert call("train", "--config", toy_file, "--out", out, *changes) == 0
    config = RunConfig.from_toml(out / "config.toml")
    assert (config.train.epochs, config.train.lr, config.train.batch_size) == (1, 0.125, toy.BATCH)
    assert (config.method.name, config.method.options) == (toy.DENSE, {})


def test_options_are_those_of_the_method_that_was_named(
    tmp_path: Path, toy_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--method", "baselines:SmallDense", "--set", "method.options.target_compression=0.5"]
    assert call("train", "--config", toy_file, "--out", tmp_path / "run", *words) == 2
    assert "target_compression=0.5" in capsys.readouterr().err


def test_a_preset_with_changes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = ["data.name=toy", "model.name=toy", "train.epochs=3", "train.batch_size=8"]
    options = [word for change in changes for word in ("--set", change)]
    assert call("train", "--preset", "quick", "--out", out, *options, "--method", toy.DENSE) == 0
    config = RunConfig.from_toml(out / "config.toml")
    assert (config.model.width, config.data.name, config.method.options) == (0.25, "toy", {})


def test_a_run_begins_from_epochs_that_another_kept(
    tmp_path: Path, toy_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    donor, out = tmp_path / "dense", tmp_path / "run"
    words = ("train", "--config", toy_file, "--out")
    assert call(*words, donor, "--method", "dense", "--keep-epoch", "1", "--keep-epoch", "2") == 0
    capsys.readouterr()
    assert call(*words, out, "--seed", "1", "--begin-from", donor) == 2
    assert capsys.readouterr().err == f"error: cannot begin from {donor}: seed = 1, not 0\n"
    assert call(*words, out, "--begin-from", donor) == 0
    assert "begins with 1 epochs of another run" in capsys.readouterr().out
    assert call(*words, tmp_path / "other", "--seed", "1", "--begin-from", donor, "--or-from-start") == 0
    assert f"cannot begin from {donor}: seed = 1, not 0; trains from the start" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing command"),
        (("trian",), "No such command 'trian'"),
        (("train",), "Missing option '--out'"),
        (("train", "--out", "OUT", "--sed", "1"), "No such option: --sed"),
        (("train", "--out", "OUT", "--seed", "one"), "Invalid value for '--seed'"),
        (("train", "--out", "OUT", "--seed", "-1"), "Invalid value for '--seed'"),
        (("train", "--out", "OUT", "--config", "none.toml"), "none.toml: cannot read the configuration"),
        (("train", "--out", "OUT", "--set", "train.epoch=3"), "unknown key 'epoch' in [train]: did you mean epochs?"),
        (("train", "--out", "OUT", "--set", "epochs=3"), "'epochs=3' is not of the form section.key=value"),
        (("train", "--out", "OUT", "--preset", "quik"), "preset = 'quik': did you mean quick?"),
        (("train", "--out", "OUT", "--method", "clicktrian"), "method.name = 'clicktrian'"),
        (("train", "--out", "OUT", "--method", "no.such:Thing"), "No module named 'no'"),
        (("train", "--out", "OUT", "--set", "data.name=cifar11"), "unknown data set 'cifar11'"),
        (("train", "--out", "OUT", "--set", "model.name=vgg14"), "unknown name 'vgg14'"),
        (("train", "--out", "OUT", "--set", "train.batch_size=1000"), "batch_size=1000"),
        (("train", "--out", "OUT", "--set", "method.options.target_compression=0.5"), "target_compression=0.5"),
        (("train", "--out", "OUT", "--set", "method.options.target_compression=1000"), "target_compression=1000"),
        (("train", "--out", "OUT", "--set", "method.options.select_at=9"), "select_at=9"),
        (("train", "--out", "/proc/no/such"), "cannot write the run directory /proc/no/such"),
        (("eval", "OUT"), "holds no run"),
        (("export", "OUT", "FILE"), "holds no run"),
        (("profile", "FILE"), "No such file"),
        (("plan", "--model", "toy", "--dataset", "cifar11"), "unknown name 'cifar11'"),
    ],
)
def test_errors_are_one_line_and_exit_2(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    toy_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(tmp_path / "run") if word == "OUT" else word for word in arguments]
    if arguments[:1] == ("train",) and "--config" not in words and "--preset" not in words:
        words += ["--config", str(toy_file)]
    assert call(*words) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert "Traceback" not in printed.err + printed.out


def test_a_programming_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("clicktrain.training.evaluate_run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["eval", "somewhere"])


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clicktrain.training.train", interrupt)
    assert call("train", "--out", tmp_path / "run") == 130
    assert "the same command goes on from the last checkpoint" in capsys.readouterr().err


def test_plan_prints_what_planning_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {}

    class Report:
        def to_json(self) -> str:
            return '{"json": true}'

        def to_text(self) -> str:
            return "a table"

    def plan_report(**arguments: Any) -> Report:
        asked.update(arguments)
        return Report()

    monkeypatch.setattr("clicktrain.planning.plan_report", plan_report)
    assert call("plan", "--model", "vgg13", "--config", "official:cifar10_vgg13", "--width", "0.5", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"json": True}
    assert {key: value for key, value in asked.items() if value is not None} == {
        "model": "vgg13",
        "config": "official:cifar10_vgg13",
        "width": 0.5,
    }
    assert call("plan", "--model", "vgg13") == 0
    assert capsys.readouterr().out == "a table\n"


def test_info_lists_versions_devices_and_backends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("clicktrain.kernels.available", lambda: {"reference": True, "fast": "no compiler here"})
    assert call("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"] == {"reference": True, "fast": "no compiler here"}
    assert "torch" in facts["packages"]
    assert facts["cpu"]["usable"] >= 1
    assert call("info") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  reference            yes" in lines
    assert "  fast                 no compiler here" in lines
    assert "ceilings" not in lines


def test_info_measures_the_ceilings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("clicktrain.timing.ceilings", lambda: Ceilings(123.45, 6.78, 2, "registers", 55.0))
    assert call("info", "--measure", "--json") == 0
    assert json.loads(capsys.readouterr().out)["ceilings"] == {
        "gflops": 123.45,
        "gigabytes_per_second": 6.78,
        "threads": 2,
        "source": "registers",
        "core_round_trip_ns": 55.0,
    }
    assert call("info", "--measure") == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("ceilings")
    assert [line.split() for line in lines[at + 1 : at + 3]] == [["gflops", "123.5"], ["gigabytes_per_second", "6.8"]]


def test_help_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("train", "eval", "export", "profile", "plan", "info"))


def test_the_module_runs_and_commands_import_what_they_need_only() -> None:
    code = "import sys, clicktrain.cli; print([m for m in ('torchvision', 'pydantic', 'fvcore') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    run = subprocess.run([sys.executable, "-m", "clicktrain", "eval", "/no/such"], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (2, "error: /no/such holds no run: there is no config.toml in it\n")
