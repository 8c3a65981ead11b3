"""Which runs of a study share epochs: those of one seed that begin with their dense run's own training."""

from __future__ import annotations

from clicktrain.config import RunConfig
from clicktrain.errors import ClickTrainError
from clicktrain.training.session import build_method
from clicktrain.training.sharing import differences
from reproductions.preset import Preset, RunSpec


class Sharing:
    """Knows of each run what it keeps for others, and whose epochs it can begin with.

    Parameters
    ----------
    preset : Preset or None
        The study; None: no run shares anything.
    """

    def __init__(self, preset: Preset | None) -> None:
        runs = preset.runs() if preset else []
        self._runs = runs
        dense = {row.name: preset.dense_of(row).name for row in preset.methods} if preset else {}
        by_label = {run.label: run for run in runs}
        self._donors = {run.label: by_label[f"{dense[run.method]}/{run.seed}"] for run in runs}

    def donor(self, spec: RunSpec) -> RunSpec | None:
        """Return the dense run that a run can begin from, or None."""
        return self._donors[spec.label] if self.shared_epochs(spec) else None

    def shared_epochs(self, spec: RunSpec) -> int:
        """Return how many epochs a run takes over from its dense run."""
        donor = self._donors.get(spec.label)
        return self._shared(spec, donor) if donor is not None else 0

    def kept_epochs(self, spec: RunSpec) -> list[int]:
        """Return after how many epochs the state of a run is wanted by others."""
        siblings = [run for run in self._runs if self._donors[run.label] == spec]
        return sorted({self._shared(run, spec) for run in siblings} - {0})

    def _shared(self, spec: RunSpec, donor: RunSpec) -> int:
        """Return how many epochs a run could take over; the trainer has the last word."""
        if spec == donor or differences(spec.config, donor.config):
            return 0
        return min(_dense_epochs(spec.config), _dense_epochs(donor.config))


def _dense_epochs(config: RunConfig) -> int:
    try:
        return build_method(config).dense_epochs
    except ClickTrainError:  # said where the run itself is chosen; it must not stop others
        return 0
