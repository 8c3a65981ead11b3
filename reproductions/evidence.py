"""Evidence: results small enough to be committed, without weights and without paths of a machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clicktrain.errors import InvalidArgument
from clicktrain.files import write_atomic
from reproductions.paths import StudyDirectory
from reproductions.store import Run, Study


def export(study: Study, destination: Path) -> int:
    """Copy a study's finished runs as evidence, and return how many were new.

    Of a run it takes configuration, provenance, result and the metrics of each epoch; `load_study` and the
    report read the copy as they read the original. Runs that are already there are left as they are.

    Parameters
    ----------
    study : Study
        The study.
    destination : Path
        Directory of the evidence, by custom ``reproductions/evidence/STUDY``; created if absent.

    Raises
    ------
    InvalidArgument
        A run's data set is addressed by an absolute path, or the destination cannot be written.
    """
    for run in study.runs:
        data = run.spec.config.data
        if any(Path(place).is_absolute() for place in (data.name.partition(":")[2], data.root or "")):
            raise InvalidArgument(
                f"{run.spec.label}: its data set {data.name!r} lies at a place of this machine; evidence needs a path "
                "relative to the project, as in imagefolder:data/NAME"
            )
    copy = StudyDirectory(destination)
    try:
        copy.path.mkdir(parents=True, exist_ok=True)
        write_atomic(copy.preset, study.preset.to_toml())
        if study.directory.retained.is_file():
            write_atomic(copy.retained, study.directory.retained.read_text())
        return sum(_export_run(run, copy) for run in study.runs)
    except OSError as error:
        raise InvalidArgument(f"cannot write {destination}: {error.strerror}") from None


def _export_run(run: Run, copy: StudyDirectory) -> bool:
    target = copy.run(run.result["config_id"], run.spec.seed)
    if target.result.exists():
        return False
    target.path.mkdir(parents=True, exist_ok=True)
    write_atomic(target.config, run.spec.config.to_toml())
    write_atomic(target.provenance, _json(_without_paths(run.provenance)))
    write_atomic(target.metrics, "".join(json.dumps(record) + "\n" for record in run.epochs))
    write_atomic(target.result, _json(run.result))  # last: where it is, the run is whole
    return True


def _without_paths(record: Any) -> Any:
    """Return a provenance record with absolute paths cut down to their last part."""
    if isinstance(record, dict):
        return {key: _without_paths(value) for key, value in record.items()}
    if isinstance(record, list):
        return [_without_paths(value) for value in record]
    return Path(record).name if isinstance(record, str) and record.startswith("/") else record


def _json(record: Any) -> str:
    return json.dumps(record, indent=2) + "\n"
