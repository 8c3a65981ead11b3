"""Where everything of a study lies; no other module spells these names.

::

    RESULTS/STUDY/study.toml                    the preset as it was run
    RESULTS/STUDY/report.html
    RESULTS/STUDY/retained.json                 retained importance, where it was measured
    RESULTS/STUDY/CONFIG_ID/config.toml         the configuration that all seeds of a method share
    RESULTS/STUDY/CONFIG_ID/seed_N/             one run: a RunDirectory of the trainer, and the two below
    RESULTS/STUDY/CONFIG_ID/seed_N/train.log    what its worker processes printed
    RESULTS/STUDY/CONFIG_ID/seed_N/failure.json why the last attempt failed
    RESULTS/STUDY/CONFIG_ID/seed_N/kernels/     compiled for this run alone, while it is under way
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clicktrain.training.rundir import RunDirectory

PACKAGE = Path(__file__).parent
CLONE = PACKAGE.parent
README = CLONE / "README.md"
DETAILS = PACKAGE / "RESULTS.md"
PRESETS = PACKAGE / "presets"
TEMPLATES = PACKAGE / "templates"
EVIDENCE = PACKAGE / "evidence"
BENCHMARKS = CLONE / "bench" / "evidence"
RESULTS = Path("results")


@dataclass(frozen=True)
class StudyDirectory:
    """The directory of one study."""

    path: Path

    @property
    def name(self) -> str:
        """Name of the study."""
        return self.path.name

    @property
    def preset(self) -> Path:
        """File that holds the preset as it was run."""
        return self.path / "study.toml"

    @property
    def report(self) -> Path:
        """File of the report."""
        return self.path / "report.html"

    @property
    def retained(self) -> Path:
        """File of the retained importance of pattern pools."""
        return self.path / "retained.json"

    @property
    def lock(self) -> Path:
        """File that is locked while a runner works on the study."""
        return self.path / "lock"

    def config(self, config_id: str) -> Path:
        """Return the file with the configuration that all seeds of a method share."""
        return self.path / config_id / "config.toml"

    def run(self, config_id: str, seed: int) -> RunDirectory:
        """Return the directory of one run."""
        return RunDirectory(self.path / config_id / f"seed_{seed}")


def failure(run: RunDirectory) -> Path:
    """Return the file that says why the last attempt of a run failed."""
    return run.path / "failure.json"


def kernels(run: RunDirectory) -> Path:
    """Return the folder of the kernels that are compiled for a run whose time counts."""
    return run.path / "kernels"


def log(run: RunDirectory) -> Path:
    """Return the file that holds what the worker processes of a run printed."""
    return run.path / "train.log"
