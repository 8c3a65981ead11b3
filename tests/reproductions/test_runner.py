import fcntl
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clicktrain.errors import ConfigError, DataError, InvalidArgument
from clicktrain.training.rundir import RunDirectory
from reproductions import paths, preset
from reproductions.paths import StudyDirectory
from reproductions.preset import RunSpec
from reproductions.runner import Runner, check_jobs, lock, select
from reproductions.store import State, state
from tests.helpers.studies import PRESET, write_preset

FINISH = """(out / 'result.json').write_text('{"schema": 1}')"""


class ScriptedRunner(Runner):
    """A runner whose workers are scripts of a line or two instead of trainings."""

    script: Callable[[RunSpec], str]

    def command(self, spec: RunSpec, run: RunDirectory) -> list[str]:
        header = f"import os, pathlib, sys, time; out = pathlib.Path({str(run.path)!r})\n"
        return [sys.executable, "-c", header + self.script(spec)]


def _runner(
    tmp_path: Path, script: Callable[[RunSpec], str], jobs: int = 1, text: str = PRESET
) -> tuple[ScriptedRunner, list[str]]:
    said: list[str] = []
    loaded = preset.load(write_preset(tmp_path / "toy.toml", text))
    study = StudyDirectory(tmp_path / "toy")
    runner = ScriptedRunner(study, loaded, jobs=jobs, exclusive=jobs == 1, say=said.append)
    runner.script = script
    return runner, said


def _directory(tmp_path: Path, label: str) -> RunDirectory:
    loaded = preset.load(tmp_path / "toy.toml")
    spec = next(spec for spec in loaded.runs() if spec.label == label)
    return StudyDirectory(tmp_path / "toy").run(spec.config.config_id(), spec.seed)


def test_finished_runs_are_skipped(tmp_path: Path) -> None:
    runner, said = _runner(tmp_path, lambda spec: FINISH)
    assert runner.run(["dense"]) == []
    assert sum("starts" in line for line in said) == 3
    again, said_again = _runner(tmp_path, lambda spec: "raise SystemExit('must not run')")
    assert again.run(["dense"]) == []
    assert [line for line in said_again if "already done" in line] == said_again


def test_a_worker_that_dies_is_started_once_more(tmp_path: Path) -> None:
    die_first = "first = not (out / 'seen').exists(); (out / 'seen').touch()\nif first: os.kill(os.getpid(), 9)\n"
    runner, said = _runner(tmp_path, lambda spec: die_first + FINISH)
    assert runner.run(["PAT/0"]) == []
    assert "run 1 of 1: PAT/0: its process died; starts again" in said
    assert state(_directory(tmp_path, "PAT/0")) is State.DONE


def test_a_crash_costs_one_run_and_is_noted(tmp_path: Path) -> None:
    def script(spec: RunSpec) -> str:
        return "print('out of luck'); os.kill(os.getpid(), 9)" if spec.label == "PAT/0" else FINISH

    runner, said = _runner(tmp_path, script)
    failed = runner.run(["*/0"])
    assert [spec.label for spec in failed] == ["PAT/0"]
    directory = _directory(tmp_path, "PAT/0")
    assert state(directory) is State.FAILED
    assert json.loads(paths.failure(directory).read_text()) == {"exit_code": -9, "reason": "out of luck"}
    assert paths.log(directory).read_text().splitlines() == ["out of luck"] * 2
    assert state(_directory(tmp_path, "ClickTrain/0")) is State.DONE
    assert any(line.endswith("FAILED with signal 9") for line in said)


def test_a_refused_configuration_is_not_tried_again(tmp_path: Path) -> None:
    runner, said = _runner(tmp_path, lambda spec: "print('error: no such thing'); sys.exit(2)")
    assert len(runner.run(["PAT/0"])) == 1
    assert not any("starts again" in line for line in said)


def test_a_failed_run_is_tried_again_by_the_next_runner(tmp_path: Path) -> None:
    _runner(tmp_path, lambda spec: "sys.exit(2)")[0].run(["PAT/0"])
    assert _runner(tmp_path, lambda spec: FINISH)[0].run(["PAT/0"]) == []
    assert not paths.failure(_directory(tmp_path, "PAT/0")).exists()


def test_several_jobs_share_the_cores(tmp_path: Path) -> None:
    meet = "(out / 'here').touch()\nwhile len(list(out.parent.glob('*/here'))) < 2: time.sleep(0.01)\n"
    note = "(out / 'threads').write_text(os.environ.get('OMP_NUM_THREADS', ''))\n"
    runner, _ = _runner(tmp_path, lambda spec: meet + note + FINISH, jobs=2)
    assert runner.run(["dense/0", "dense/1"]) == []
    threads = [(_directory(tmp_path, label).path / "threads").read_text() for label in ("dense/0", "dense/1")]
    assert all(int(count) >= 1 for count in threads)


@pytest.mark.parametrize("jobs", [1, 2])
def test_each_run_whose_time_counts_compiles_its_kernels_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    monkeypatch.setenv("CLICKTRAIN_CACHE_DIR", str(tmp_path / "everyone's"))
    compile_ = (
        "cache = pathlib.Path(os.environ['CLICKTRAIN_CACHE_DIR']); cache.mkdir(exist_ok=True)\n"
        "(out / 'cache').write_text(f'{cache} {len(list(cache.iterdir()))}'); (cache / out.name).touch()\n"
    )
    runner, _ = _runner(tmp_path, lambda spec: compile_ + FINISH, jobs=jobs)
    labels = ["dense/0", "dense/1"]
    assert runner.run(labels) == []
    directories = [_directory(tmp_path, label) for label in labels]
    used = [(directory.path / "cache").read_text().rsplit(" ", 1) for directory in directories]
    if jobs == 1:  # times count
        assert used == [[str(paths.kernels(directory)), "0"] for directory in directories]
    else:
        assert {place for place, _ in used} == {str(tmp_path / "everyone's")}
    assert not any(paths.kernels(directory).exists() for directory in directories)


def test_a_second_runner_is_refused(tmp_path: Path) -> None:
    runner, _ = _runner(tmp_path, lambda spec: FINISH)
    with lock(tmp_path / "toy" / "lock"), pytest.raises(ConfigError, match="another runner is at work"):
        runner.run()


def test_an_orphaned_worker_is_waited_for(tmp_path: Path) -> None:
    runner, said = _runner(tmp_path, lambda spec: "raise SystemExit('must not run')")
    directory = _directory(tmp_path, "dense/0")
    directory.path.mkdir(parents=True)
    with directory.lock.open("w") as orphan:
        fcntl.flock(orphan, fcntl.LOCK_EX)
        assert state(directory) is State.RUNNING
        thread = threading.Thread(target=runner.run, args=(["dense/0"],))
        thread.start()
        while not said:
            time.sleep(0.01)
        directory.result.write_text('{"schema": 1}')
    thread.join(timeout=10)
    assert "still at work on it" in said[0]
    assert "already done" in said[1]


def test_filters_take_methods_seeds_and_wildcards(tmp_path: Path) -> None:
    loaded = preset.load(write_preset(tmp_path / "toy.toml"))

    def labels(*only: str) -> list[str]:
        return [run.label for run in select(loaded, only)]

    assert labels("PAT") == ["PAT/0", "PAT/1", "PAT/2"]
    assert labels("*/1") == ["dense/1", "PAT/1", "ClickTrain/1"]
    assert labels("PAT/2", "dense/0") == ["dense/0", "PAT/2"]
    assert select(loaded, []) == loaded.runs()
    with pytest.raises(InvalidArgument, match="--only PTA: matches none of the runs dense/0"):
        labels("PAT", "PTA")


def test_a_claim_stands_for_the_runs_that_its_verdict_takes(tmp_path: Path) -> None:
    loaded = preset.load(write_preset(tmp_path / "toy.toml"))
    chosen = {claim: {run.method for run in select(loaded, [claim])} for claim in loaded.claims}
    assert chosen["accuracy-vs-dense"] == chosen["inference-flops-saved"] == {"dense", "ClickTrain"}
    assert chosen["accuracy-vs-pat"] == {"dense", "PAT", "ClickTrain"}
    with pytest.raises(InvalidArgument, match="does not check that claim: it needs PruneTrain"):
        select(loaded, ["accuracy-vs-pdt"])


def test_runs_whose_times_are_compared_never_share_the_machine(tmp_path: Path) -> None:
    loaded = preset.load(write_preset(tmp_path / "toy.toml"))
    with pytest.raises(InvalidArgument, match=r"--jobs 2: no-time-overhead compare times.*--shared"):
        Runner(StudyDirectory(tmp_path / "toy"), loaded, jobs=2).run()
    assert not (tmp_path / "toy").exists()
    check_jobs(loaded, loaded.runs(), 2, exclusive=False)
    check_jobs(loaded, loaded.runs(), 1, exclusive=True)
    check_jobs(loaded, select(loaded, ["PAT"]), 2, exclusive=True)  # no claim of this study compares its time


def test_results_of_another_version_are_refused_before_any_run(tmp_path: Path) -> None:
    runner, said = _runner(tmp_path, lambda spec: FINISH)
    directory = _directory(tmp_path, "ClickTrain/2")
    directory.path.mkdir(parents=True)
    directory.result.write_text('{"schema": 99}')
    with pytest.raises(DataError, match="of format 99, expected 1: go on with the version that wrote it"):
        runner.run()
    assert said == []


def test_a_full_disk_ends_the_study_with_its_name_and_harms_nothing(tmp_path: Path) -> None:
    assert _runner(tmp_path, lambda spec: FINISH)[0].run(["dense/0"]) == []
    full = paths.log(_directory(tmp_path, "PAT/0"))
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")  # where every write fails as on a full disk
    runner, _ = _runner(tmp_path, lambda spec: "print('x' * 10000)\nsys.exit(1)")
    with pytest.raises(OSError, match="No space left on device"):
        runner.run(["PAT/0"])
    assert [state(_directory(tmp_path, label)) for label in ("dense/0", "PAT/0")] == [State.DONE, State.TO_COME]
    full.unlink()
    assert _runner(tmp_path, lambda spec: FINISH)[0].run(["*/0"]) == []


def test_a_run_in_several_processes_is_started_by_torchrun(tmp_path: Path) -> None:
    loaded = preset.load(write_preset(tmp_path / "toy.toml"))
    runner = Runner(StudyDirectory(tmp_path / "toy"), loaded, processes=2)
    command = runner.command(loaded.runs()[0], _directory(tmp_path, "dense/0"))
    assert command[1:7] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "clicktrain"]


def test_jobs_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="--jobs 0"):
        _runner(tmp_path, lambda spec: FINISH, jobs=0)[0].run()


def test_an_unwritable_results_directory_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write the results directory"), lock(tmp_path / "file" / "lock"):
        pass


def _command(tmp_path: Path, label: str, *, text: str = PRESET, sharing: bool = True) -> str:
    """Return the end of a worker's command line, with the directory of the study as STUDY."""
    loaded = preset.load(write_preset(tmp_path / "toy.toml", text))
    runner = Runner(StudyDirectory(tmp_path / "toy"), loaded, sharing=sharing)
    spec = next(spec for spec in loaded.runs() if spec.label == label)
    command = runner.command(spec, _directory(tmp_path, label))
    return " ".join(command[command.index("--concurrent-runs") + 2 :])


def test_the_dense_run_keeps_what_its_siblings_begin_from(tmp_path: Path) -> None:
    donor = _directory_of(tmp_path, "dense/1").path
    assert _command(tmp_path, "dense/1") == "--keep-epoch 1 --keep-epoch 2"
    assert _command(tmp_path, "PAT/1") == f"--begin-from {donor} --or-from-start"
    assert _command(tmp_path, "ClickTrain/1") == f"--begin-from {donor} --or-from-start"


def test_without_sharing_every_run_trains_all_its_epochs(tmp_path: Path) -> None:
    assert [_command(tmp_path, f"{name}/0", sharing=False) for name in ("dense", "PAT", "ClickTrain")] == ["", "", ""]


def test_runs_of_other_settings_share_nothing(tmp_path: Path) -> None:
    text = PRESET.replace(
        'config = { method = { name = "clicktrain"', 'config = { train = { lr = 0.2 }, method = { name = "clicktrain"'
    )
    assert _command(tmp_path, "ClickTrain/0", text=text) == ""
    assert _command(tmp_path, "dense/0", text=text) == "--keep-epoch 2"


def test_a_method_that_is_dense_at_no_time_shares_nothing(tmp_path: Path) -> None:
    text = PRESET.replace('"clicktrain", options = {', '"clicktrain", options = { select_at = 0,')
    assert _command(tmp_path, "ClickTrain/0", text=text) == ""
    assert _command(tmp_path, "dense/0", text=text) == "--keep-epoch 2"


_DENSE_LAST = PRESET[: PRESET.index("[[methods]]")] + "\n".join(
    f"[[methods]]{part}" for part in reversed(PRESET.split("[[methods]]")[1:])
)


@pytest.mark.parametrize("jobs", [1, 2, 4])
@pytest.mark.parametrize("text", [PRESET, _DENSE_LAST], ids=["dense first", "dense last"])
def test_siblings_wait_for_the_dense_run_of_their_seed(tmp_path: Path, jobs: int, text: str) -> None:
    dense = {seed: _directory_of(tmp_path, f"dense/{seed}", text).result for seed in (0, 1, 2)}

    def script(spec: RunSpec) -> str:
        check = "" if spec.method == "dense" else f"assert pathlib.Path({str(dense[spec.seed])!r}).exists()\n"
        return check + FINISH

    runner, said = _runner(tmp_path, script, jobs, text)
    assert runner.run() == []
    assert sum("starts" in line for line in said) == 9


def test_siblings_of_a_dense_run_that_fails_start_all_the_same(tmp_path: Path) -> None:
    runner, _ = _runner(tmp_path, lambda spec: "sys.exit(2)" if spec.method == "dense" else FINISH, jobs=2)
    assert [spec.label for spec in runner.run(["*/0"])] == ["dense/0"]


def test_siblings_of_a_dense_run_that_was_not_chosen_do_not_wait(tmp_path: Path) -> None:
    runner, _ = _runner(tmp_path, lambda spec: FINISH)
    assert runner.run(["PAT", "ClickTrain/1"]) == []


def _directory_of(tmp_path: Path, label: str, text: str = PRESET) -> RunDirectory:
    write_preset(tmp_path / "toy.toml", text)
    return _directory(tmp_path, label)
