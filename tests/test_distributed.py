"""Several processes train one network: two of them, started by torchrun, against references in one process."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clicktrain import distributed
from clicktrain.config import RunConfig
from clicktrain.errors import InvalidArgument
from clicktrain.training import Callback, Trainer, build, train
from clicktrain.training.metrics import read_metrics
from tests.helpers import torchrun, toy

CLICKTRAIN = toy.clicktrain_config(batch_size=8, lr=0.02)
CLOSE = {"rel": 2e-4, "abs": 2e-5}  # float32 sums in another order, over 9 steps


@pytest.fixture(autouse=True)
def _as_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use toy data and networks, and put things back afterwards, whatever a test makes of them."""
    _use_toy(monkeypatch)


def _use_toy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("clicktrain.data.load", toy.load_data)
    patch.setattr("clicktrain.models.create", toy.create_model)


class Stop(Callback):
    """Interrupts a run in its regularised stage."""

    def on_step(self, record: dict[str, Any]) -> None:
        if record["step"] == 4:
            raise KeyboardInterrupt


def alone(kind: str, config: RunConfig, out: Path) -> dict[str, Any]:
    """Train in this process."""
    torchrun.use(kind)
    return train(config, out, callbacks=[])


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl") if record["kind"] == "step"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in two processes: batch norm, group norm, a run begun in one, and a run that dies in its sparse stage."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        _use_toy(patch)
        torchrun.use("batch")
        train(CLICKTRAIN, folder / "begun", callbacks=[Stop()])
    config = CLICKTRAIN.model_dump(exclude_none=True)
    kinds = {name: {"network": name} for name in ("batch", "group")}
    kinds |= {"begun": {"network": "batch"}, "dead": {"network": "batch", "die_at": 8}}
    done = torchrun.launch(
        folder, [{"config": config, "out": str(folder / name), **run} for name, run in kinds.items()]
    )
    assert done.returncode != 0, "the last run was to die"
    assert "exitcode  : 9" in done.stderr, done.stderr
    return folder


def test_losses_are_those_of_one_process_that_normalises_each_half_on_its_own(runs: Path, tmp_path: Path) -> None:
    alone("halves", CLICKTRAIN, tmp_path / "reference")
    assert losses(runs / "batch") == pytest.approx(losses(tmp_path / "reference"), **CLOSE)
    alone("batch", CLICKTRAIN, tmp_path / "plain")
    assert losses(runs / "batch") != pytest.approx(losses(tmp_path / "plain"), **CLOSE), "the test sees no difference"


def test_without_batch_norm_a_run_is_the_one_of_one_process(runs: Path, tmp_path: Path) -> None:
    result = alone("group", CLICKTRAIN, tmp_path / "plain")
    assert losses(runs / "group") == pytest.approx(losses(tmp_path / "plain"), **CLOSE)
    shared = json.loads((runs / "group" / "result.json").read_text())
    for key in ("layers", "patterns", "compression", "training_flops", "config_id"):
        assert shared[key] == result[key], key
    assert shared["stages"][-1]["name"] == "sparse"


def test_all_processes_take_the_same_assignment_and_keep_the_same_weights(runs: Path) -> None:
    seen = [json.loads((runs / "batch" / f"checked_{rank}.json").read_text()) for rank in (0, 1)]
    assert [what for what, _ in seen[0]] == ["the weights", "the assignment", "the weights", "the weights"]
    assert seen[0] == seen[1]
    assert len({digest for _, digest in seen[0]}) == 4


def test_processes_that_disagree_all_stop(runs: Path) -> None:
    for rank in (0, 1):
        said = (runs / f"disagreed_{rank}.txt").read_text()
        assert said.startswith("a number: not the same in all 2 processes (SHA-256 ")


def test_the_record_says_how_many_processes_there_were(runs: Path) -> None:
    record = json.loads((runs / "batch" / "provenance.json").read_text())
    assert record["distributed"] == {"processes": 2}
    assert len(list((runs / "batch" / "checkpoints").glob("*.pt"))) == 2


def test_a_run_of_two_processes_goes_on_in_one(runs: Path) -> None:
    begun = losses(runs / "dead")
    assert not (runs / "dead" / "result.json").exists()
    result = alone("batch", CLICKTRAIN, runs / "dead")
    assert result["status"] == "done"
    record = json.loads((runs / "dead" / "provenance.json").read_text())
    assert [record["distributed"], record["resumed"][0]["distributed"]] == [{"processes": 2}, None]
    assert losses(runs / "dead")[: len(begun)] == begun
    assert losses(runs / "dead")[:8] == losses(runs / "batch")[:8]
    assert losses(runs / "dead") == pytest.approx(losses(runs / "batch"), rel=0.3)


def test_a_run_of_one_process_goes_on_in_two(runs: Path) -> None:
    record = json.loads((runs / "begun" / "provenance.json").read_text())
    assert [record["distributed"], record["resumed"][0]["distributed"]] == [None, {"processes": 2}]
    assert json.loads((runs / "begun" / "result.json").read_text())["status"] == "done"
    assert losses(runs / "begun")[:4] != losses(runs / "batch")[:4]
    assert losses(runs / "begun") == pytest.approx(losses(runs / "batch"), rel=0.3)


def test_one_process_is_not_in_any_group() -> None:
    assert (distributed.processes(), distributed.rank()) == (1, 0)
    assert distributed.total(3.0) == 3.0
    assert range(10)[distributed.share(10)] == range(10)
    tensors = [torch.ones(2)]
    assert distributed.averaged(tensors, 5) is tensors
    assert distributed.from_first(lambda: 7) == 7
    distributed.check_equal("nothing", iter([]))


def test_shares_cover_a_batch_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "processes", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(list(range(8)[distributed.share(8)]))
    assert shares == [[0, 1], [2, 3, 4], [5, 6, 7]]


def test_a_batch_with_too_few_images_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "processes", lambda: 5)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    with pytest.raises(InvalidArgument, match="a batch of 4 images cannot be shared out to 5 processes"):
        Trainer(build(toy.config(batch_size=10), 0))
