"""SIGKILL at any moment: started again, a run ends with the same bits as one that was never killed."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from clicktrain.config import RunConfig
from tests.helpers import toy
from tests.helpers.victim import MOMENTS, Victim, fingerprint


def undisturbed(config: RunConfig, out: Path) -> dict[str, str]:
    Victim(config, out).finish()
    return fingerprint(out)


def kill_at_random(config: RunConfig, out: Path, dice: random.Random) -> None:
    """Start, and kill after 0 to 3 records and up to 5 ms."""
    victim = Victim(config, out)
    victim.wait_for(dice.randint(0, 3))
    time.sleep(dice.uniform(0, 0.005))
    victim.kill()


def kill_in_write(config: RunConfig, out: Path, moment: str, number: int) -> None:
    victim = Victim(config, out, stop=(moment, number))
    victim.wait_for(1)
    victim.kill()


def test_a_few_kills(tmp_path: Path) -> None:
    config = toy.clicktrain_config()
    expected = undisturbed(config, tmp_path / "undisturbed")
    dice = random.Random(1)
    for moment in ("half written", "before rename"):
        kill_at_random(config, tmp_path / "killed", dice)
        kill_in_write(config, tmp_path / "killed", moment, 1)
    Victim(config, tmp_path / "killed").finish()
    assert fingerprint(tmp_path / "killed") == expected
    assert not list((tmp_path / "killed").rglob("*.tmp")), "leavings of the kills"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["clicktrain", "two phases"])
def test_twenty_kills_of_which_five_in_a_write(tmp_path: Path, method: str) -> None:
    options = toy.OPTIONS | {"select_at": 4, "prune_at": 8}
    config = {
        "clicktrain": toy.config("clicktrain", options, epochs=14),
        "two phases": toy.config(toy.TWO_PHASES, epochs=14),
    }[method]
    expected = undisturbed(config, tmp_path / "undisturbed")
    dice = random.Random(2)
    writes = [*MOMENTS, "half written"]
    kills = ["random"] * 15 + writes
    dice.shuffle(kills)
    for kill in kills:
        if kill == "random":
            kill_at_random(config, tmp_path / "killed", dice)
        else:
            kill_in_write(config, tmp_path / "killed", kill, dice.randint(1, 2))
    Victim(config, tmp_path / "killed").finish()
    assert fingerprint(tmp_path / "killed") == expected
