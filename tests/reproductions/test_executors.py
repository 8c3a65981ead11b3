"""Workers on a Ray cluster of this machine; those of the runner itself are tested with it."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clicktrain.errors import ConfigError
from clicktrain.training.metrics import read_metrics
from clicktrain.training.rundir import RunDirectory
from reproductions import paths, preset
from reproductions.executors import DIED, Executor, Local, Ray
from reproductions.paths import StudyDirectory
from reproductions.runner import Runner
from tests.helpers import toy
from tests.helpers.studies import TOY, write_preset

PATIENCE = 120  # seconds
SLOW = TOY.replace("epochs = 2", "epochs = 5\ncheckpoint_every = 1\neval_every = 5")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Start Ray with two CPUs, apart from any cluster that is there."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


def study(folder: Path, executor: Executor, jobs: int = 2) -> tuple[Runner, list[RunDirectory], list[str]]:
    """Return a runner of two trainings, their directories, and what it says."""
    said: list[str] = []
    loaded = preset.load(write_preset(folder / "toy.toml", SLOW))
    directory = StudyDirectory(folder / "toy")
    runner = Runner(directory, loaded, jobs=jobs, exclusive=False, sharing=False, executor=executor, say=said.append)
    return runner, [directory.run(spec.config.config_id(), spec.seed) for spec in loaded.runs()], said


def kill_worker_of(run: RunDirectory) -> None:
    """Kill the process that started a training, once that has a checkpoint."""
    end = time.monotonic() + PATIENCE
    while len(list(run.checkpoints.glob("*.pt"))) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(list(run.checkpoints.glob("*.pt"))) >= 2, "no checkpoints came"
    training = run.lock.read_text()
    os.kill(int(training), signal.SIGSTOP)  # else it may be done before its parent is dead
    parent = Path(f"/proc/{training}/stat").read_text().rpartition(")")[2].split()[1]
    assert "ray::" in Path(f"/proc/{parent}/cmdline").read_text()
    os.kill(int(parent), signal.SIGKILL)


def numbers(run: RunDirectory) -> list[dict[str, object]]:
    return [toy.without_times(record) for record in read_metrics(run.metrics)]


@pytest.mark.usefixtures("cluster")
def test_a_killed_ray_worker_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(paths.CLONE)
    for name in ("killed", "undisturbed"):
        (tmp_path / name).mkdir()
    runner, runs, said = study(tmp_path / "killed", Ray(jobs=2))
    killer = threading.Thread(target=kill_worker_of, args=(runs[1],))
    killer.start()
    assert runner.run() == []
    killer.join()
    assert [line for line in said if "its process died" in line] == [
        "run 2 of 2: ClickTrain/0: its process died; starts again"
    ]
    assert [len(run.read_record()["resumed"]) for run in runs] == [0, 1]
    # In new processes, too: this one may have chosen otherwise how layers are cut up.
    undisturbed, others, _ = study(tmp_path / "undisturbed", Local())
    assert undisturbed.run() == []
    for run, other in zip(runs, others, strict=True):
        for record, expected in zip(numbers(run), numbers(other), strict=True):
            assert record == expected  # one by one: so a failure names the first step that differs


@pytest.mark.usefixtures("cluster")
def test_output_and_exit_code_of_a_worker_on_ray(tmp_path: Path) -> None:
    executor, log = Ray(jobs=2), tmp_path / "log"
    script = "import os, sys; print(os.environ['OMP_NUM_THREADS']); sys.exit(3)"
    assert executor.execute([sys.executable, "-c", script], log, {"OMP_NUM_THREADS": "7"}, print) == 3
    assert log.read_text() == "7\n"
    with pytest.raises(ConfigError, match="--gpus 1: the Ray cluster has 0 GPUs"):
        Ray(jobs=1, gpus=1)


@pytest.mark.usefixtures("cluster")
def test_a_stopped_executor_cancels_what_runs(tmp_path: Path) -> None:
    executor, codes = Ray(jobs=2), list[int]()
    script = f"open({str(tmp_path / 'begun')!r}, 'w'); import time; time.sleep(600)"
    command = [sys.executable, "-c", script]
    thread = threading.Thread(target=lambda: codes.append(executor.execute(command, tmp_path / "log", {}, print)))
    thread.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    executor.stop()
    thread.join(PATIENCE)
    assert codes == [DIED]


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs the package ray.*pip install 'clicktrain\[distributed\]'"):
        Ray(jobs=1)


def test_a_local_worker_hears_of_its_settings_and_is_heard(tmp_path: Path) -> None:
    said: list[str] = []
    script = "import json, os; print(json.dumps(os.environ['SETTING']))"
    assert Local().execute([sys.executable, "-c", script], tmp_path / "log", {"SETTING": "x"}, said.append) == 0
    assert (tmp_path / "log").read_text() == json.dumps("x") + "\n"
    assert said == ['"x"']
