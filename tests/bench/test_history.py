"""`python -m bench.history`: what it asks asv for, and that a failed benchmark is a failed command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from bench import history
from bench.suite.optional import STRICT


@pytest.fixture
def asv(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """Record calls of asv; a range named `bad` holds a benchmark that fails."""
    calls: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], *, cwd: object, env: dict[str, str]) -> Any:
        assert command[:3] == [sys.executable, "-m", "asv"]
        assert cwd == history.ROOT
        calls.append((command[3:], env))
        return SimpleNamespace(returncode=2 if command[3] == "run" and "bad" in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_the_last_commit_is_added_and_published(asv: list[tuple[list[str], dict[str, str]]]) -> None:
    assert history.main([]) == 0
    commands = [words for words, _ in asv]
    assert commands == [
        ["machine", "--yes"],
        ["run", "--show-stderr", "--bench", ".", "HEAD^!"],
        ["publish"],
    ]
    assert STRICT not in asv[1][1], "an old commit may lack names"


def test_a_benchmark_that_fails_fails_the_command_after_publishing(asv: list[tuple[list[str], dict[str, str]]]) -> None:
    assert history.main(["bad", "--machine", "nightly"]) == 2
    assert [words[0] for words, _ in asv] == ["machine", "run", "publish"]
    assert all("nightly" in words for words, _ in asv[:2])


def test_quick_keeps_nothing_and_takes_the_present_code(asv: list[tuple[list[str], dict[str, str]]]) -> None:
    assert history.main(["--quick", "--bench", "bad"]) == 2
    words, environment = asv[-1]
    assert {"--quick", "--python=same", "--dry-run"} < set(words)
    assert environment[STRICT]


def test_the_configuration_of_asv() -> None:
    text = (history.ROOT / "asv.conf.json").read_text()
    config = json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))
    assert (history.ROOT / config["benchmark_dir"] / "workloads.py").exists()
    assert all(config[name].startswith(".asv/") for name in ("env_dir", "results_dir", "html_dir"))
    assert "asv==0.6.5" in (history.ROOT / "pyproject.toml").read_text()
