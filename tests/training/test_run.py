from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clicktrain.config import RunConfig
from clicktrain.errors import CheckpointError, ClickTrainError, ConfigError, DivergedError, InvalidArgument
from clicktrain.training import Callback, evaluate_run, train
from clicktrain.training.metrics import read_metrics
from clicktrain.training.rundir import RunDirectory
from tests.helpers import toy
from tests.helpers.victim import fingerprint

CONFIG = toy.clicktrain_config()


class Notes(Callback):
    """Collects messages; raises in step `until` as if the process were interrupted there."""

    def __init__(self, until: int = -1) -> None:
        self.texts: list[str] = []
        self._until = until

    def on_note(self, text: str) -> None:
        self.texts.append(text)

    def on_step(self, record: dict[str, Any]) -> None:
        if record["step"] == self._until:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished ClickTrain run; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clicktrain.data.load", toy.load_data)
        patch.setattr("clicktrain.models.create", toy.create_model)
        train(CONFIG, out, callbacks=[])
    return out


def interrupt(out: Path, step: int, config: RunConfig = CONFIG) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(config, out, callbacks=[Notes(until=step)])


def content(folder: Path) -> dict[str, bytes]:
    """Return all files of a run but its lock, which names whoever looked last."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} | {
        "lock": b""
    }


def test_a_run_leaves_its_files(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == [
        "checkpoints",
        "config.toml",
        "lock",
        "metrics.jsonl",
        "provenance.json",
        "result.json",
    ]
    assert len(list((finished / "checkpoints").iterdir())) == CONFIG.train.keep
    assert RunConfig.from_toml(finished / "config.toml") == CONFIG
    record = json.loads((finished / "provenance.json").read_text())
    assert (record["seed"], record["resumed"]) == (0, [])
    assert record["data_fingerprint"] == toy.load_data("toy").fingerprint


def test_the_result_has_every_figure(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    epochs = [record for record in read_metrics(finished / "metrics.jsonl") if record["kind"] == "epoch"]
    assert (result["schema"], result["status"], result["seed"], result["method"]) == (1, "done", 0, "clicktrain")
    assert (result["model"], result["dataset"]) == ("toy", "toy")
    assert result["config_id"] == CONFIG.config_id()
    assert result["accuracy"]["last"] == epochs[-1]["test_accuracy"]
    best = max(epochs, key=lambda epoch: epoch["val_accuracy"])
    assert result["accuracy"]["best"] == best["test_accuracy"]
    assert result["accuracy"]["best_after_prune"] == epochs[-1]["test_accuracy"]
    assert result["val_accuracy"]["best"] == best["val_accuracy"]
    assert result["compression"]["paper"] == pytest.approx(2.5, rel=0.05)
    macs = result["inference_macs"]
    assert result["inference_flops_saved_percent"] == pytest.approx(100 * (1 - macs["sparse"] / macs["dense"]))
    flops = result["training_flops"]
    assert flops["used"] == epochs[-1]["flops"] == pytest.approx(sum(flops["by_stage"].values()))
    assert flops["saved_percent"] == pytest.approx(100 * (1 - flops["used"] / flops["dense"]))
    assert set(result["accountings"]) == set("ABCD")
    assert [(stage["name"], stage["epochs"], stage["steps"]) for stage in result["stages"]] == [
        ("dense", 1, 5),
        ("regularized", 1, 5),
        ("sparse", 1, 5),
    ]
    seconds = result["seconds"]
    assert seconds["train"] == pytest.approx(sum(stage["seconds"] for stage in result["stages"]))
    assert seconds["total"] > seconds["train"] + seconds["eval"] + seconds["select"] > 0
    assert result["parameters"]["kept"] < result["parameters"]["dense"]
    assert result["peak_memory_bytes"] > 10_000_000


def test_a_dense_run_saves_nothing(tmp_path: Path) -> None:
    result = train(toy.config(epochs=1), tmp_path, callbacks=[])
    assert result["accuracy"]["best_after_prune"] is None
    assert result["compression"] == {"paper": 1.0, "all_convs": 1.0, "released_counter": None}
    assert (result["training_flops"]["saved_percent"], result["accountings"]) == (0.0, None)


def test_a_finished_run_is_left_alone(finished: Path) -> None:
    before, notes = content(finished), Notes()
    result = train(CONFIG, finished, callbacks=[notes])
    assert notes.texts == [f"{finished}: this run is done, nothing left to do"]
    assert result == json.loads((finished / "result.json").read_text())
    assert content(finished) == before


@pytest.mark.parametrize("step", [0, 1, 4, 7, 14])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, finished: Path, step: int) -> None:
    interrupt(tmp_path, step)
    assert not (tmp_path / "result.json").exists()
    notes = Notes()
    train(CONFIG, tmp_path, callbacks=[notes])
    assert fingerprint(tmp_path) == fingerprint(finished)
    saved = (step + 1) // 2 * 2  # a checkpoint comes every 2 steps
    assert notes.texts == ([f"going on after step {saved} of 15"] if saved else [])
    assert len(json.loads((tmp_path / "provenance.json").read_text())["resumed"]) == 1


def test_times_of_all_segments_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(tmp_path, 9)
    (checkpoint, *_) = sorted((tmp_path / "checkpoints").iterdir(), reverse=True)
    before = torch.load(checkpoint, weights_only=True)["seconds"]
    monkeypatch.setattr("clicktrain.training.run._Run._seconds", lambda self: self._earlier_seconds + 1000)
    assert train(CONFIG, tmp_path, callbacks=[])["seconds"]["total"] == before + 1000


@pytest.mark.parametrize(("later", "peak"), [(10, 2**50), (2**51, 2**51)])
def test_memory_is_that_of_the_process_that_needed_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: int, peak: int
) -> None:
    monkeypatch.setattr("clicktrain.memory.peak", lambda device: 2**50)
    interrupt(tmp_path, 9)
    monkeypatch.setattr("clicktrain.memory.peak", lambda device: later)
    assert train(CONFIG, tmp_path, callbacks=[])["peak_memory_bytes"] == peak


def test_a_damaged_checkpoint_costs_a_few_steps_only(tmp_path: Path, finished: Path) -> None:
    interrupt(tmp_path, 8)
    (newest, *_) = sorted((tmp_path / "checkpoints").iterdir(), reverse=True)
    newest.write_bytes(newest.read_bytes()[:-100])
    notes = Notes()
    train(CONFIG, tmp_path, callbacks=[notes])
    assert "is damaged" in notes.texts[0]
    assert notes.texts[1] == "going on after step 6 of 15"
    assert fingerprint(tmp_path) == fingerprint(finished)


def _damage_all(out: Path) -> None:
    for path in (out / "checkpoints").iterdir():
        path.write_bytes(b"damaged")


def _empty_metrics(out: Path) -> None:
    (out / "metrics.jsonl").write_bytes(b"")


def _remove_config(out: Path) -> None:
    (out / "config.toml").unlink()


def _remove_record(out: Path) -> None:
    (out / "provenance.json").unlink()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_damage_all, CheckpointError, "every checkpoint in .* is damaged"),
        (_empty_metrics, CheckpointError, "has lost lines"),
        (_remove_config, ConfigError, "holds files of a run but no config.toml: use another --out"),
        (_remove_record, CheckpointError, "cannot read the record of the run"),
    ],
)
def test_a_damaged_directory_is_refused_and_left_alone(
    tmp_path: Path, damage: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    interrupt(tmp_path, 8)
    damage(tmp_path)
    before = content(tmp_path)
    with pytest.raises(error, match=message):
        train(CONFIG, tmp_path, callbacks=[])
    after = content(tmp_path)
    assert {name: after[name] for name in before if name != "provenance.json"} == {
        name: before[name] for name in before if name != "provenance.json"
    }


@pytest.mark.parametrize(
    ("config", "seed", "message"),
    [
        (toy.clicktrain_config(lr=0.1), 0, "train.lr = 0.1, not 0.05; use another --out"),
        (toy.config(), 0, "method.name = 'tests.helpers.toy:Plain', not 'clicktrain'"),
        (CONFIG, 5, "seed = 5, not 0"),
    ],
)
def test_another_configuration_is_refused_and_nothing_is_lost(
    finished: Path, config: RunConfig, seed: int, message: str
) -> None:
    before = content(finished)
    with pytest.raises(ConfigError, match=f"holds a run of another configuration: {message}"):
        train(config, finished, seed=seed, callbacks=[])
    assert content(finished) == before


def test_leavings_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    interrupt(tmp_path, 8)
    for name in (".result.json.abc.tmp", "checkpoints/.step-000000008-0123.pt.abc.tmp"):
        (tmp_path / name).write_text("half")
    train(CONFIG, tmp_path, callbacks=[])
    assert not list(tmp_path.rglob("*.tmp"))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with RunDirectory(tmp_path).claim(), pytest.raises(InvalidArgument, match=r"is in use: process \d+ trains in it"):
        train(CONFIG, tmp_path, callbacks=[])
    train(toy.config(epochs=1), tmp_path, callbacks=[])


def test_an_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match=r"cannot write the run directory .*file/run: Not a directory"):
        train(CONFIG, tmp_path / "file" / "run", callbacks=[])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"name": "cifar11"}}, "cifar11"),
        ({"model": {"name": "vgg14"}}, "vgg14"),
        ({"train": {"batch_size": 25}}, "batch_size=25"),
        ({"train": {"device": "cuda:77"}}, "cuda:77"),
        ({"train": {"augment": "rotate"}}, "rotate"),
        ({"method": {"options": {"target_compression": 0.5}}}, "0.5"),
        ({"method": {"options": {"target_compression": 1000.0}}}, "1000"),
        ({"method": {"options": {"target_compression": 2.5, "ratios": [1.0]}}}, "ratios"),
        ({"method": {"options": {"ratios": [10.0]}}}, "ratios"),
    ],
)
def test_what_cannot_work_is_one_error_that_names_it(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    values = CONFIG.model_dump(exclude_none=True)
    for section, fields in change.items():
        values[section] = values[section] | fields
    with pytest.raises(ClickTrainError, match=message) as caught:
        train(RunConfig.from_dict(values), tmp_path, callbacks=[])
    assert "\n" not in str(caught.value)
    train(CONFIG, tmp_path, callbacks=[])  # corrected, the same command works in the same directory


def test_changed_data_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(tmp_path, 8)
    monkeypatch.setattr("clicktrain.data.DataSet.fingerprint", "other images")
    with pytest.raises(CheckpointError, match="the data set has changed since this run began"):
        train(CONFIG, tmp_path, callbacks=[])


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(tmp_path, 8)
    monkeypatch.setattr("clicktrain.training.checkpoint.CHECKPOINT_SCHEMA", 2)
    with pytest.raises(CheckpointError, match="holds checkpoints of format 1, expected 2"):
        train(CONFIG, tmp_path, callbacks=[])


def test_divergence_names_the_step_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    config = toy.config(lr=1e30, schedule={"kind": "constant"})
    with pytest.raises(
        DivergedError, match=r"the loss is \w+ in step \d+ .*; last good checkpoint: .*step-\d+"
    ) as error:
        train(config, tmp_path, callbacks=[])
    named = Path(str(error.value).rpartition(": ")[2])
    weights = torch.load(named, weights_only=True)["trainer"]["model"]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(method: toy.Plain) -> None:
        method.model[0].weight.data[0, 0, 1, 1] = float("inf")

    monkeypatch.setattr(toy.Plain, "after_step", overflow)
    config = toy.config(checkpoint_every=1)
    with pytest.raises(DivergedError, match=r"0.weight is no longer finite after step 0; last .*step-000000000"):
        train(config, tmp_path, callbacks=[])


def test_the_use_of_the_test_set_is_said(tmp_path: Path) -> None:
    notes = Notes()
    values = toy.config(epochs=1).model_dump() | {"data": {"name": "toy", "validation": 0.0, "eval_on": "test"}}
    result = train(RunConfig.from_dict(values), tmp_path, callbacks=[notes])
    assert notes.texts == ["the best epoch is chosen on the test set, as in the official code: optimistic"]
    assert result["val_accuracy"] == {"last": None, "best": None, "best_after_prune": None}


def test_the_measured_memory_format_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy.config(channels_last="auto")
    monkeypatch.setattr("clicktrain.training.run.faster_in_channels_last", lambda *_: True)
    interrupt(tmp_path, 0, config)
    monkeypatch.setattr("clicktrain.training.run.faster_in_channels_last", lambda *_: pytest.fail("measured again"))
    train(config, tmp_path, callbacks=[])
    (newest, *_) = sorted((tmp_path / "checkpoints").iterdir(), reverse=True)
    assert torch.load(newest, weights_only=True)["trainer"]["channels_last"] is True


def test_measuring_the_memory_format_changes_nothing(tmp_path: Path) -> None:
    train(toy.config(channels_last="auto"), tmp_path / "auto", callbacks=[])
    (newest, *_) = sorted((tmp_path / "auto" / "checkpoints").iterdir(), reverse=True)
    chosen = torch.load(newest, weights_only=True)["trainer"]["channels_last"]
    train(toy.config(channels_last="on" if chosen else "off"), tmp_path / "fixed", callbacks=[])
    one, other = fingerprint(tmp_path / "auto"), fingerprint(tmp_path / "fixed")
    assert {key: one[key] for key in one if key != "result"} == {key: other[key] for key in other if key != "result"}


def test_tensorboard_logs_every_epoch(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(toy.config(epochs=2, tensorboard=True), tmp_path, callbacks=[])
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("step/loss")] == list(range(10))
    assert len(events.Scalars("epoch/test_accuracy")) == 2


def test_tensorboard_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clicktrain.training.callbacks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package tensorboard"):
        train(toy.config(tensorboard=True), tmp_path, callbacks=[])


def test_eval_repeats_the_result_of_a_finished_run(finished: Path) -> None:
    before = content(finished)
    figures, result = evaluate_run(finished), json.loads((finished / "result.json").read_text())
    assert figures["accuracy"] == {"validation": result["val_accuracy"]["last"], "test": result["accuracy"]["last"]}
    for key in ("compression", "inference_macs", "inference_flops_saved_percent", "parameters"):
        assert figures[key] == result[key]
    assert (figures["epoch"], figures["step"], figures["stage"]) == (3, 15, "sparse")
    assert content(finished) == before


def test_eval_of_an_unfinished_run(tmp_path: Path) -> None:
    interrupt(tmp_path, 8)
    figures = evaluate_run(tmp_path)
    assert (figures["epoch"], figures["step"], figures["stage"]) == (1, 8, "regularized")


def test_eval_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        evaluate_run(tmp_path)
    directory = RunDirectory(tmp_path)
    directory.begin(CONFIG, {"seed": 0})
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        evaluate_run(tmp_path)


@pytest.mark.parametrize("writes", [1, 3, 6])
def test_a_disk_that_fills_up_costs_no_more_than_what_it_could_not_hold(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    fsync, done = os.fsync, 0

    def fill_up(handle: int) -> None:
        nonlocal done
        done += 1
        if done > writes:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as full:
        full.setattr("os.fsync", fill_up)
        with pytest.raises((ClickTrainError, OSError), match="No space left on device"):
            train(CONFIG, tmp_path, callbacks=[])
    assert not (tmp_path / "result.json").exists()
    assert train(CONFIG, tmp_path, callbacks=[])["status"] == "done"
    assert fingerprint(tmp_path) == fingerprint(finished)
