from pathlib import Path

import pytest

from clicktrain.errors import CheckpointError
from reproductions import report, retained
from reproductions.retained import Retained
from tests.helpers.studies import make_study


def _measurements() -> list[Retained]:
    return [
        Retained(seed, score, pool, size, 50.0 + size + seed)
        for seed in (0, 1)
        for score in ("magnitude", "taylor")
        for pool in ("coverage", "official")
        for size in (4, 12)
    ]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    study = make_study(tmp_path / "toy")
    assert retained.read(study.directory) == []
    retained.write(study.directory, _measurements())
    assert retained.read(study.directory) == _measurements()
    assert "Retained importance" in report.render(study)


def test_rows_are_means_over_seeds() -> None:
    rows = retained.rows(_measurements())
    assert [(row.score, row.size) for row in rows] == [
        ("magnitude", 4), ("magnitude", 12), ("taylor", 4), ("taylor", 12),
    ]  # fmt: skip
    assert rows[0].pools["coverage"].mean == 54.5
    assert rows[1].pools["official"].n == 2


def test_a_study_without_checkpoints_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        retained.measure_study(make_study(tmp_path / "toy"))
    with pytest.raises(CheckpointError, match="no dense run is finished"):
        retained.measure_study(make_study(tmp_path / "none", skip=("dense/0", "dense/1", "dense/2")))
