"""Run a study: one worker process per run, so that a crash costs one run and nothing else."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from clicktrain.errors import ConfigError, InvalidArgument
from clicktrain.files import write_atomic
from clicktrain.training.rundir import RunDirectory
from clicktrain.training.session import build_method
from reproductions import paths
from reproductions.claims import BY_ID
from reproductions.executors import Executor, Local
from reproductions.paths import StudyDirectory
from reproductions.preset import Preset, RunSpec
from reproductions.sharing import Sharing
from reproductions.store import State, check_version, is_locked, state

USER_ERROR = 2
"""Exit code of a worker that refused its configuration: trying again cannot help."""

_ATTEMPTS = 2
_POLL_SECONDS = 0.5


def select(preset: Preset, only: Sequence[str]) -> list[RunSpec]:
    """Return the runs that any filter names, seeds outermost.

    Parameters
    ----------
    preset : Preset
        The study.
    only : sequence of str
        METHOD or METHOD/SEED, with shell wildcards (``"*/0"`` is seed 0 of every method), or CLAIM: all runs that a
        verdict on it takes; empty: all runs.

    Raises
    ------
    InvalidArgument
        A filter names no run.
    """
    runs = preset.runs()
    for pattern in only:
        if not any(_matches(preset, run, pattern) for run in runs):
            raise InvalidArgument(f"--only {pattern}: {_why_none(preset, pattern)}")
    return [run for run in runs if not only or any(_matches(preset, run, pattern) for pattern in only)]


def _matches(preset: Preset, run: RunSpec, pattern: str) -> bool:
    if pattern in preset.claims:
        return run.method in {row.name for row in preset.compared(BY_ID[pattern])}
    return fnmatchcase(run.method, pattern) or fnmatchcase(run.label, pattern)


def _why_none(preset: Preset, pattern: str) -> str:
    if pattern in BY_ID:
        return f"this preset does not check that claim: it needs {BY_ID[pattern].needs}"
    labels = ", ".join(run.label for run in preset.runs())
    return f"matches none of the runs {labels}, nor any of the claims {', '.join(preset.claims)}"


def check_jobs(preset: Preset, runs: Sequence[RunSpec], jobs: int, *, exclusive: bool) -> None:
    """Refuse to run several at a time where claims about time would be judged by it.

    Raises
    ------
    InvalidArgument
        There is less than one job, or runs that a claim about time compares would share the machine.
    """
    if jobs < 1:
        raise InvalidArgument(f"--jobs {jobs}: expected at least 1")
    methods = {run.method for run in runs}
    timed = [claim for claim in preset.claims if BY_ID[claim].exclusive]
    spoiled = [claim for claim in timed if methods & {row.name for row in preset.compared(BY_ID[claim])}]
    if jobs > 1 and exclusive and spoiled:
        raise InvalidArgument(
            f"--jobs {jobs}: {', '.join(spoiled)} compare times, which takes one run at a time; use --jobs 1, or "
            "--shared to give up these claims"
        )


class Runner:
    """Brings a study to its end, from wherever it stands.

    Finished runs are skipped, broken-off ones go on, a worker that dies is started once more; a run that
    still fails is noted and the others go on.

    Parameters
    ----------
    study : StudyDirectory
        Where the runs go.
    preset : Preset
        What to run.
    jobs : int
        Runs at the same time; each gets its share of the cores.
    exclusive : bool
        Whether nothing but this runner uses the machine; goes into the provenance of each run.
    sharing : bool
        Whether runs begin with the epochs that they share with the dense run of their seed.
    executor : Executor, optional
        Where the workers run; on this machine if unset.
    processes : int
        Processes of one run, see `clicktrain.distributed`.
    say : callable
        Prints a line.
    """

    def __init__(
        self,
        study: StudyDirectory,
        preset: Preset,
        *,
        jobs: int = 1,
        exclusive: bool = True,
        sharing: bool = True,
        executor: Executor | None = None,
        processes: int = 1,
        say: Callable[[str], None] = print,
    ) -> None:
        self._study = study
        self._preset = preset
        self._jobs = jobs
        self._exclusive = exclusive
        self._sharing = Sharing(preset if sharing else None)
        self._executor = executor or Local()
        self._processes = processes
        self._say = say
        self._stopping = threading.Event()

    def run(self, only: Sequence[str] = ()) -> list[RunSpec]:
        """Execute what is not finished, seeds outermost; return the runs that failed.

        A run that shares epochs with the dense run of its seed waits for that one, if it is among the chosen.

        Parameters
        ----------
        only : sequence of str
            Filters of `select`.

        Raises
        ------
        ClickTrainError
            A method refuses its options, runs would share the machine that must not, another runner is at work on
            the study, or another version was.
        """
        runs = select(self._preset, only)
        check_jobs(self._preset, runs, self._jobs, exclusive=self._exclusive)
        for spec in runs:
            build_method(spec.config)  # options that a method refuses are found now, not hours later
            check_version(self._study.run(spec.config.config_id(), spec.seed))
        with lock(self._study.lock), ThreadPoolExecutor(self._jobs) as pool:
            write_atomic(self._study.preset, self._preset.to_toml())
            try:
                finished = self._bring_all_to_end(runs, pool)
            finally:
                self._stop()
        return [spec for spec in runs if not finished[spec.label]]

    def _bring_all_to_end(self, runs: list[RunSpec], pool: ThreadPoolExecutor) -> dict[str, bool]:
        """Execute runs in order, but none before its donor has ended; tell by label which are finished now.

        Only runs that may start are given to the pool, so that none holds a place there while it waits.
        """
        titles = {spec.label: f"run {number} of {len(runs)}: {spec.label}" for number, spec in enumerate(runs, 1)}
        waiting, working = list(runs), dict[Future[bool], RunSpec]()
        finished: dict[str, bool] = {}
        while waiting or working:
            for spec in self._ready(waiting, titles.keys() - finished.keys())[: self._jobs - len(working)]:
                waiting.remove(spec)
                working[pool.submit(self._bring_to_end, spec, titles[spec.label])] = spec
            for future in wait(working, return_when=FIRST_COMPLETED).done:
                finished[working.pop(future).label] = future.result()
        return finished

    def _ready(self, waiting: list[RunSpec], unfinished: Set[str]) -> list[RunSpec]:
        """Return the waiting runs whose donor is not about to come."""
        donors = [(spec, self._sharing.donor(spec)) for spec in waiting]
        return [spec for spec, donor in donors if donor is None or donor.label not in unfinished]

    def _bring_to_end(self, spec: RunSpec, title: str) -> bool:
        """Execute one run unless it is finished; tell whether it is now."""
        config_id = spec.config.config_id()
        run = self._study.run(config_id, spec.seed)
        self._wait_for_earlier_worker(run, title)
        if state(run) is State.DONE:
            self._say(f"{title}: already done")
            return True
        run.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self._study.config(config_id), spec.config.to_toml())
        for attempt in range(1, _ATTEMPTS + 1):
            if self._stopping.is_set():
                return False
            self._say(f"{title}: {'starts' if attempt == 1 else 'its process died; starts again'}")
            code = self._work(spec, run)
            if code == 0:
                paths.failure(run).unlink(missing_ok=True)
                shutil.rmtree(paths.kernels(run), ignore_errors=True)
                return True
            if code == USER_ERROR:
                break
        self._note_failure(run, code, title)
        return False

    def _wait_for_earlier_worker(self, run: RunDirectory, title: str) -> None:
        """Wait while a worker that outlived its killed runner still writes into the directory."""
        if is_locked(run.lock):
            self._say(f"{title}: a process of an earlier runner is still at work on it; waiting for its end")
        while is_locked(run.lock) and not self._stopping.is_set():
            time.sleep(_POLL_SECONDS)

    def _work(self, spec: RunSpec, run: RunDirectory) -> int:
        """Train in a process of its own and return its exit code (negative: the signal that ended it)."""
        say = lambda line: self._say(f"  {spec.label}  {line}")  # noqa: E731
        return self._executor.execute(self.command(spec, run), paths.log(run), self._settings(run), say)

    def command(self, spec: RunSpec, run: RunDirectory) -> list[str]:
        """Return the command line of a worker."""
        options = {
            "config": self._study.config(spec.config.config_id()),
            "seed": spec.seed,
            "out": run.path,
        }
        if self._exclusive:
            options["concurrent-runs"] = self._jobs - 1
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [sys.executable, *self._launcher(), "-m", "clicktrain", "train", *words, *self._sharing_words(spec)]

    def _launcher(self) -> list[str]:
        """Return the words that start a run in several processes, or none."""
        if self._processes == 1:
            return []
        return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self._processes}"]

    def _sharing_words(self, spec: RunSpec) -> list[str]:
        """Return the options that make a run keep epochs for others, or begin from another run's."""
        words = [word for epoch in self._sharing.kept_epochs(spec) for word in ("--keep-epoch", str(epoch))]
        donor = self._sharing.donor(spec)
        if donor is not None:
            run = self._study.run(donor.config.config_id(), donor.seed)
            words += ["--begin-from", str(run.path), "--or-from-start"]
        return words

    def _settings(self, run: RunDirectory) -> dict[str, str]:
        """Return the variables of a worker.

        With several workers at a time, each takes its share of the cores. Where times count, each compiles its
        kernels anew: else the first run with a pool of patterns would pay for all others.
        """
        settings = {}
        if self._exclusive and not self._preset.smoke:
            settings["CLICKTRAIN_CACHE_DIR"] = str(paths.kernels(run).resolve())
        workers = self._jobs * self._processes
        if workers > 1:
            threads = str(max(1, len(os.sched_getaffinity(0)) // workers))
            settings |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        return settings

    def _note_failure(self, run: RunDirectory, code: int, title: str) -> None:
        lines = paths.log(run).read_text().splitlines()
        reason = lines[-1] if lines else "it printed nothing"
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        write_atomic(paths.failure(run), json.dumps({"exit_code": code, "reason": reason}, indent=2) + "\n")
        self._say(f"{title}: FAILED with {how}")

    def _stop(self) -> None:
        """End what is still running (only when the runner itself is interrupted)."""
        self._stopping.set()
        self._executor.stop()


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold a file's lock; the kernel gives it back however the process ends.

    Raises
    ------
    ConfigError
        Another process holds it, or the directory cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise ConfigError(f"cannot write the results directory {path.parent}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{path.parent}: another runner is at work in it") from None
        yield
