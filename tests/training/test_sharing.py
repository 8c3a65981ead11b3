"""Runs that begin with the dense epochs of another end with the same bits as runs that trained them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from baselines import Dense, MagnitudePruneFinetune, OneShotNM, RigL, TrainPruneFinetune
from clicktrain import ClickTrain
from clicktrain.config import RunConfig
from clicktrain.errors import CheckpointError, ConfigError, InvalidArgument
from clicktrain.method import Method, Phase
from clicktrain.schedule import LRSchedule
from clicktrain.training import Callback, train
from clicktrain.training.metrics import read_metrics
from tests.helpers import toy
from tests.helpers.victim import Victim, fingerprint

EPOCHS = 4
DENSE = toy.config("dense", epochs=EPOCHS, eval_every=3)
CLICKTRAIN = toy.config("clicktrain", toy.OPTIONS | {"select_at": 2, "prune_at": 3}, epochs=EPOCHS, eval_every=3)
PAT_OPTIONS = {"target_compression": 2.5, "finetune_epochs": 2, "backend": "reference"}
PAT = toy.config("baselines:TrainPruneFinetune", PAT_OPTIONS, epochs=EPOCHS, eval_every=3)
ADMM_OPTIONS = PAT_OPTIONS | {"admm_epochs": 1}
ADMM = toy.config("baselines:AdmmPattern", ADMM_OPTIONS, epochs=EPOCHS, eval_every=3)  # inherits what PAT promises
MASKED_OPTIONS = {"target_compression": 2.5, "admm_epochs": 1, "finetune_epochs": 2}
MASKED = toy.config("baselines:AdmmElementwise", MASKED_OPTIONS, epochs=EPOCHS, eval_every=3)
SHARED = {
    "clicktrain": (CLICKTRAIN, 2),
    "pat": (PAT, EPOCHS),
    "admm": (ADMM, EPOCHS),
    "element-wise": (MASKED, EPOCHS),
}


class Notes(Callback):
    """Collects messages and epochs; raises after step `until` as if the process were interrupted there."""

    def __init__(self, until: int = -1) -> None:
        self.texts: list[str] = []
        self.epochs: list[int] = []
        self._until = until

    def on_note(self, text: str) -> None:
        self.texts.append(text)

    def on_step(self, record: dict[str, Any]) -> None:
        if record["step"] == self._until:
            raise KeyboardInterrupt

    def on_epoch(self, record: dict[str, Any]) -> None:
        self.epochs.append(record["epoch"])


class Renamed(toy.Plain):
    """Two epochs like dense training, in phases and a stage of other names, one of them empty; then others."""

    name = "renamed"
    dense = 2

    @property
    def phases(self) -> Sequence[Phase]:
        schedule = LRSchedule("cosine")
        return [Phase("empty", 0), Phase("warm", self.epochs, schedule=schedule), Phase("rest", 1, optimizer="adam")]

    @property
    def dense_epochs(self) -> int:
        return self.dense

    @property
    def stage(self) -> str:
        return "early"


class Rate(Renamed):
    @property
    def phases(self) -> Sequence[Phase]:
        return [Phase("warm", 2, lr=0.05, schedule=LRSchedule("constant")), Phase("rest", 2)]


class Decay(Renamed):
    @property
    def phases(self) -> Sequence[Phase]:
        return [Phase("warm", self.epochs, weight_decay=0.0)]


class Adam(Renamed):
    @property
    def phases(self) -> Sequence[Phase]:
        return [Phase("warm", self.epochs, optimizer="adam")]


class Batch(Renamed):
    @property
    def phases(self) -> Sequence[Phase]:
        return [Phase("warm", self.epochs, batch_size=6)]


class Restart(Renamed):
    @property
    def phases(self) -> Sequence[Phase]:
        return [Phase("one", 1), Phase("two", self.epochs - 1)]


class Widened(Renamed):
    """Breaks the promise that setup leaves the network as it is."""

    def setup(self, model: nn.Module, optimizer: Optimizer, example_input: Tensor) -> None:
        super().setup(model, optimizer, example_input)
        model.register_buffer("extra", torch.zeros(1))


def own(method: type[toy.Plain], **train_fields: Any) -> RunConfig:
    fields = {"epochs": EPOCHS, "eval_every": 3, **train_fields}
    return toy.config(f"tests.training.test_sharing:{method.__name__}", **fields)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dense run that kept its epochs 2 and 4; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "dense"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clicktrain.data.load", toy.load_data)
        patch.setattr("clicktrain.models.create", toy.create_model)
        train(DENSE, out, callbacks=[], concurrent_runs=0, keep_epochs=[2, EPOCHS])
    return out


def alone(config: RunConfig, out: Path) -> dict[str, str]:
    train(config, out, callbacks=[])
    return fingerprint(out)


def record(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((out / "provenance.json").read_text())
    return loaded


def kept_steps(out: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (out / "shared").glob("*.pt"))


@pytest.mark.parametrize("name", SHARED)
def test_a_run_begun_from_dense_epochs_has_the_bits_of_one_trained_alone(
    tmp_path: Path, dense: Path, name: str
) -> None:
    config, epochs = SHARED[name]
    notes = Notes()
    result = train(config, tmp_path / "begun", callbacks=[notes], begin_from=dense)
    assert fingerprint(tmp_path / "begun") == alone(config, tmp_path / "alone")
    assert notes.epochs[0] == epochs
    began_from, theirs = record(tmp_path / "begun")["began_from"], json.loads((dense / "result.json").read_text())
    assert (began_from["config_id"], began_from["seed"], began_from["epochs"]) == (DENSE.config_id(), 0, epochs)
    assert (began_from["method"], began_from["concurrent_runs"], len(began_from["code"])) == ("dense", [0], 1)
    assert notes.texts == [f"begins with {epochs} epochs of another run: {began_from['seconds']:.1f} s"]
    assert 0 < began_from["seconds"] <= theirs["seconds"]["total"]
    assert result["seconds"]["shared"] == began_from["seconds"] < result["seconds"]["total"]
    assert theirs["seconds"]["shared"] == 0.0


def test_memory_that_only_the_shared_epochs_needed_counts(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clicktrain.memory.peak", lambda device: 10)
    theirs = json.loads((dense / "result.json").read_text())["peak_memory_bytes"]
    assert 10 < train(CLICKTRAIN, tmp_path, callbacks=[], begin_from=dense)["peak_memory_bytes"] <= theirs


def test_the_times_of_shared_epochs_are_the_donors(tmp_path: Path, dense: Path) -> None:
    train(CLICKTRAIN, tmp_path, callbacks=[], begin_from=dense)
    mine, theirs = ([r for r in read_metrics(run / "metrics.jsonl") if r["epoch"] < 2] for run in (tmp_path, dense))
    assert len(mine) == 12
    assert [{**r, "phase": ""} for r in mine] == [{**r, "phase": ""} for r in theirs]
    assert {r["phase"] for r in mine if r["kind"] == "epoch"} == {"clicktrain"}


def test_names_of_phases_and_stages_are_the_runs_own(tmp_path: Path, dense: Path) -> None:
    train(own(Renamed), tmp_path / "begun", callbacks=[], begin_from=dense)
    assert fingerprint(tmp_path / "begun") == alone(own(Renamed), tmp_path / "alone")
    records = list(read_metrics(tmp_path / "begun" / "metrics.jsonl"))
    assert {r["stage"] for r in records} == {"early"}
    assert [r["phase"] for r in records if r["kind"] == "epoch"] == ["warm"] * 4 + ["rest"]


@pytest.mark.parametrize("step", [10, 11, 13, 19])
def test_an_interrupted_run_needs_its_donor_no_more(tmp_path: Path, dense: Path, step: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(CLICKTRAIN, tmp_path / "begun", callbacks=[Notes(until=step)], begin_from=dense)
    began_from = record(tmp_path / "begun")["began_from"]
    result = train(CLICKTRAIN, tmp_path / "begun", callbacks=[], begin_from=tmp_path / "gone")
    assert fingerprint(tmp_path / "begun") == alone(CLICKTRAIN, tmp_path / "alone")
    assert record(tmp_path / "begun")["began_from"] == began_from
    assert result["seconds"]["shared"] == began_from["seconds"]


@pytest.mark.parametrize("again", [True, False])
def test_killed_before_its_first_checkpoint_a_run_begins_as_the_next_call_says(
    tmp_path: Path, dense: Path, again: bool
) -> None:
    victim = Victim(PAT, tmp_path / "begun", stop=("before rename", 1), begin_from=dense)
    victim.wait_for(1)
    victim.kill()
    assert record(tmp_path / "begun")["began_from"]["epochs"] == EPOCHS
    assert not list((tmp_path / "begun" / "checkpoints").glob("*.pt"))
    result = train(PAT, tmp_path / "begun", callbacks=[], begin_from=dense if again else None)
    assert fingerprint(tmp_path / "begun") == alone(PAT, tmp_path / "alone")
    assert (record(tmp_path / "begun")["began_from"] is not None) is again
    assert (result["seconds"]["shared"] > 0) is again


def test_kept_epochs_survive_pruning_and_kills(tmp_path: Path) -> None:
    for write in (1, 2):  # of two files that an epoch to be kept writes, the kept one and the checkpoint
        config, out = toy.config("dense", epochs=EPOCHS, eval_every=3, checkpoint_every=0), tmp_path / str(write)
        victim = Victim(config, out, stop=("before rename", 1 + write), keep_epochs=[1, 3])
        victim.wait_for(1)
        victim.kill()
        assert kept_steps(out) == ([5] if write == 2 else [])
        train(config, out, callbacks=[], keep_epochs=[1, 3])
        assert kept_steps(out) == [5, 15]
        state = torch.load(min((out / "shared").iterdir()), weights_only=True)
        assert state["trainer"]["position"]["epoch"] == 1
        options = toy.OPTIONS | {"select_at": 3, "prune_at": 3}
        sparse = toy.config("clicktrain", options, epochs=EPOCHS, eval_every=3)
        train(sparse, out / "begun", callbacks=[], begin_from=out)
        assert record(out / "begun")["began_from"]["epochs"] == 3


def test_an_epoch_is_kept_late_while_its_checkpoint_is_the_last(tmp_path: Path) -> None:
    config = toy.config("dense", epochs=EPOCHS, checkpoint_every=0)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, callbacks=[Notes(until=12)])
    train(config, tmp_path, callbacks=[], keep_epochs=[1, 2])
    assert kept_steps(tmp_path) == [10]


def test_a_run_that_was_begun_can_be_begun_from(tmp_path: Path, dense: Path) -> None:
    train(own(Renamed), tmp_path / "first", callbacks=[], begin_from=dense, keep_epochs=[2], concurrent_runs=1)
    train(CLICKTRAIN, tmp_path / "second", callbacks=[], begin_from=tmp_path / "first")
    assert fingerprint(tmp_path / "second") == alone(CLICKTRAIN, tmp_path / "alone")
    assert record(tmp_path / "second")["began_from"]["concurrent_runs"] == [1, 0]


@pytest.mark.parametrize("epochs", [[0], [2, 5]])
def test_an_epoch_that_never_comes_cannot_be_kept(tmp_path: Path, epochs: list[int]) -> None:
    with pytest.raises(InvalidArgument, match=r"keep_epochs=\[.*\]: expected numbers from 1 to 4"):
        train(DENSE, tmp_path, callbacks=[], keep_epochs=epochs)
    assert not (tmp_path / "config.toml").exists()


REFUSALS: list[tuple[RunConfig, int, str]] = [
    (CLICKTRAIN, 1, "seed = 1, not 0"),
    (toy.config("clicktrain", toy.OPTIONS, epochs=EPOCHS, eval_every=3, lr=0.1), 0, "train.lr = 0.1, not 0.05"),
    (toy.config("clicktrain", toy.OPTIONS, epochs=3, eval_every=3), 0, "train.epochs = 3, not 4"),
    (toy.config(epochs=EPOCHS, eval_every=3), 0, r"method plain has no epoch of dense training .*dense_epochs = 0"),
    (toy.config("clicktrain", toy.OPTIONS, epochs=EPOCHS, eval_every=3), 0, "kept none of its first 1 epochs: train"),
    (own(Rate), 0, r"learning rate at epoch 0.2 = 0.05, not 0.0496"),
    (own(Decay), 0, r"weight_decay of epoch 0 = 0.0, not 0.0005"),
    (own(Adam), 0, r"optimizer of epoch 0 = 'adam', not 'sgd'"),
    (own(Batch), 0, r"batch_size of epoch 0 = 6, not 5"),
]


@pytest.mark.parametrize(("config", "seed", "message"), REFUSALS)
def test_what_differs_is_named_and_nothing_is_begun(
    tmp_path: Path, dense: Path, config: RunConfig, seed: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"cannot begin from {dense}: .*{message}") as caught:
        train(config, tmp_path, seed=seed, callbacks=[], begin_from=dense)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "config.toml").exists()


def test_an_optimizer_made_anew_between_is_a_difference(tmp_path: Path) -> None:
    constant = {"kind": "constant"}
    config = toy.config("dense", epochs=EPOCHS, eval_every=3, schedule=constant)
    train(config, tmp_path / "dense", callbacks=[], keep_epochs=[2])
    with pytest.raises(ConfigError, match="begin of a phase of epoch 1 = True, not False"):
        train(own(Restart, schedule=constant), tmp_path / "begun", callbacks=[], begin_from=tmp_path / "dense")


def test_a_donor_that_is_never_dense_is_refused(tmp_path: Path) -> None:
    train(toy.config(epochs=EPOCHS), tmp_path / "plain", callbacks=[], keep_epochs=[1])
    config = toy.config("clicktrain", toy.OPTIONS, epochs=EPOCHS)
    with pytest.raises(ConfigError, match="method plain has no epoch of dense training"):
        train(config, tmp_path / "begun", callbacks=[], begin_from=tmp_path / "plain")


def test_fields_that_change_no_number_may_differ(tmp_path: Path, dense: Path) -> None:
    options = toy.OPTIONS | {"select_at": 2, "prune_at": 3}
    config = toy.config("clicktrain", options, epochs=EPOCHS, eval_every=3, checkpoint_every=0, keep=1)
    train(config, tmp_path, callbacks=[], begin_from=dense)
    assert record(tmp_path)["began_from"]["epochs"] == 2


def test_other_data_are_refused(tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clicktrain.data.DataSet.fingerprint", "other images")
    with pytest.raises(ConfigError, match="its data set has other content"):
        train(CLICKTRAIN, tmp_path, callbacks=[], begin_from=dense)


@pytest.mark.parametrize(
    ("section", "key", "value"), [("cpu", "model", "Other"), ("threads", "torch", 99), ("packages", "torch", "1.0")]
)
def test_another_machine_is_refused(tmp_path: Path, dense: Path, section: str, key: str, value: Any) -> None:
    copy = tmp_path / "dense"
    copy.mkdir()
    (copy / "config.toml").write_bytes((dense / "config.toml").read_bytes())
    theirs = record(dense)
    theirs[section][key] = value
    (copy / "provenance.json").write_text(json.dumps(theirs))
    with pytest.raises(ConfigError, match=rf"{section}.{key} of the machine is .*, not {value!r}"):
        train(CLICKTRAIN, tmp_path / "begun", callbacks=[], begin_from=copy)


def test_a_method_that_changes_the_network_is_told(tmp_path: Path, dense: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"dense_epochs=2 of method renamed: its setup changes the network"):
        train(own(Widened), tmp_path, callbacks=[], begin_from=dense, or_from_start=True)


def copied(dense: Path, out: Path) -> Path:
    """Return a copy of a run that may be damaged."""
    (out / "shared").mkdir(parents=True)
    for path in [*dense.glob("*.*"), *dense.glob("shared/*")]:
        (out / path.relative_to(dense)).write_bytes(path.read_bytes())
    return out


def test_a_damaged_epoch_is_passed_over(tmp_path: Path, dense: Path) -> None:
    donor = copied(dense, tmp_path / "donor")
    first, last = sorted((donor / "shared").iterdir())
    last.write_bytes(b"damaged")
    notes = Notes()
    train(PAT, tmp_path / "begun", callbacks=[notes], begin_from=donor)
    assert f"checkpoint {last} is damaged" in notes.texts[0]
    assert record(tmp_path / "begun")["began_from"]["epochs"] == 2
    assert fingerprint(tmp_path / "begun") == alone(PAT, tmp_path / "alone")
    first.write_bytes(b"damaged too")
    with pytest.raises(CheckpointError, match="is damaged"):
        train(PAT, tmp_path / "again", callbacks=[], begin_from=donor)


@pytest.mark.parametrize(("content", "message"), [(b"", "has lost lines"), (b"{", "cannot read the metrics")])
def test_lost_metrics_are_noticed(tmp_path: Path, dense: Path, content: bytes, message: str) -> None:
    donor = copied(dense, tmp_path / "donor")
    (donor / "metrics.jsonl").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        train(PAT, tmp_path / "begun", callbacks=[], begin_from=donor)


def test_where_no_run_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        train(CLICKTRAIN, tmp_path / "begun", callbacks=[], begin_from=tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_run_that_may_train_from_the_start_says_why_it_does(tmp_path: Path, dense: Path) -> None:
    notes = Notes()
    result = train(CLICKTRAIN, tmp_path, seed=1, callbacks=[notes], begin_from=dense, or_from_start=True)
    assert notes.texts == [f"cannot begin from {dense}: seed = 1, not 0; trains from the start"]
    assert notes.epochs == [0, 1, 2, 3]
    assert (record(tmp_path)["began_from"], result["seconds"]["shared"]) == (None, 0.0)


def test_dense_epochs_of_the_methods() -> None:
    assert Method().dense_epochs == 0
    assert Dense(7).dense_epochs == 7
    assert TrainPruneFinetune(6.0, epochs=7).dense_epochs == 7
    assert MagnitudePruneFinetune(6.0, epochs=7).dense_epochs == 7
    assert OneShotNM(epochs=7).dense_epochs == 7
    assert RigL(6.0, epochs=7).dense_epochs == 0  # sparse from its first step on
    assert ClickTrain(6.0, epochs=190).dense_epochs == 55
