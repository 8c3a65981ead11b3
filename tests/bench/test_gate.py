"""`python -m bench.gate`: what it measures, when it is sure, and that it never passes in silence."""

from __future__ import annotations

import ast
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.gate import __main__ as gate
from bench.gate import measuring
from bench.gate.decision import FALSE_ALARM, FOR, Verdict, decide, judge
from bench.gate.items import ITEMS, KERNEL_SOURCES, Item
from bench.gate.measuring import BenchmarkFailed, Build, Measurer, Rounds
from bench.gate.revisions import Repository
from bench.gate.table import summary, table
from clicktrain.errors import ClickTrainError, InvalidArgument
from clicktrain.kernels import build
from clicktrain.kernels.cpu import library

CLONE = Path(__file__).parents[2]
SLOWDOWNS = sorted((Path(__file__).parent / "slowdowns").glob("*.patch"))
PACK = next(item for item in ITEMS if item.kernel == "pack")

needs_library = pytest.mark.skipif(library.available() is not True, reason=f"{library.available()}")


def git(root: Path, *words: str) -> str:
    name = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    run = subprocess.run(["git", "-C", str(root), *name, *words], check=True, capture_output=True, text=True)
    return run.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a repository of three commits: a first one, one in gradient.h, one in the documentation."""
    root = tmp_path / "repository"
    header = root / "clicktrain" / "kernels" / "cpu" / "gradient.h"
    header.parent.mkdir(parents=True)
    git(tmp_path, "init", "--quiet", "--initial-branch=main", str(root))
    for path, text in ((header, "// one"), (header, "// two"), (root / "README.md", "three")):
        path.write_text(text)
        git(root, "add", "--all")
        git(root, "commit", "--quiet", "--message", text)
    return root


class Noise:
    """Stands for a machine: rounds that differ by noise, and by what some items are slower.

    Each session moves each process by a log-normal factor, as memory does, one in twenty by a lot.
    """

    def __init__(self, seed: int, noise: float, slower: Mapping[str, float] | None = None) -> None:
        self._random, self._noise, self._slower = np.random.default_rng(seed), noise, slower or {}
        self.seconds = 0.0

    def __call__(self, items: Sequence[Item]) -> dict[str, Rounds]:
        self.seconds += 4 + 0.4 * len(items)
        return {item.name: {side: self._side(side, item) for side in measuring.SIDES} for item in items}

    def _side(self, side: str, item: Item) -> list[float]:
        random = self._random
        width = self._noise * (8 if random.random() < 0.05 else 1)
        factor = self._slower.get(item.kernel, 1.0) if side == "head" else 1.0
        return list(factor * np.exp(random.normal(0, width) + random.normal(0, self._noise, 7)))

    def verdicts(self, items: Sequence[Item] = ITEMS, seconds: float = 100) -> dict[str, Verdict]:
        return decide(items, self, seconds, clock=lambda: self.seconds)[0]


def states(verdicts: Mapping[str, Verdict]) -> set[str]:
    return {verdict.state for verdict in verdicts.values()}


@pytest.mark.parametrize("noise", [0.005, 0.02])
def test_equal_commits_pass(noise: float) -> None:
    alarms = sum(states(Noise(seed, noise).verdicts()) != {"not slower"} for seed in range(100))
    assert alarms <= 2


@pytest.mark.parametrize(("factor", "noise"), [(1.2, 0.01), (1.5, 0.01), (1.2, 0.03), (1.5, 0.03)])
def test_a_slower_kernel_is_found_and_no_other(factor: float, noise: float) -> None:
    for seed in range(20):
        verdicts = Noise(seed, noise, {"grad_values": factor}).verdicts()
        slower = {name.partition(" of ")[0] for name, verdict in verdicts.items() if verdict.state == "slower"}
        assert slower == {"grad_values"}
        found = [verdict for name, verdict in verdicts.items() if name.startswith("grad_values")]
        assert sum(verdict.state == "slower" for verdict in found) >= 5, "nearly all of its six layers"
        assert np.median([verdict.ratio for verdict in found]) == pytest.approx(factor, rel=0.1)
        assert min(verdict.confidence for verdict in found if verdict.state == "slower") > 1 - 2 * FALSE_ALARM


def test_a_faster_kernel_is_not_slower() -> None:
    assert states(Noise(0, 0.02, {"forward": 0.7}).verdicts()) == {"not slower"}


def test_what_cannot_be_told_in_time_stays_open() -> None:
    machine = Noise(1, 0.4)
    verdicts = machine.verdicts(seconds=60)
    assert "open" in states(verdicts)
    assert machine.seconds <= 60 + 4 + 0.4 * len(ITEMS)


def test_one_session_alone_decides_nothing() -> None:
    quiet: Rounds = {side: [1.0] * 5 for side in measuring.SIDES}
    disturbed = {**quiet, "head": [9.0] * 5}
    verdict = judge({"a": [disturbed], "b": [quiet]})["a"]
    assert verdict.state == "open"
    assert verdict.confidence == pytest.approx(1 / (1 + math.exp(-FOR)))
    assert judge({"a": [disturbed, quiet, quiet, quiet], "b": [quiet] * 4})["a"].state == "not slower"
    assert judge({"a": [disturbed] * 3, "b": [quiet] * 3})["a"].state == "open"
    assert judge({"a": [disturbed] * 4, "b": [quiet] * 4})["a"].state == "slower"


def test_a_disturbed_twin_does_not_look_like_a_faster_head() -> None:
    rounds: Rounds = {"base": [1.0] * 5, "head": [1.2] * 5, "twin": [1.0, 1.0, 1.0, 9.0, 9.0]}
    assert judge({"a": [rounds] * 3})["a"].ratio == pytest.approx(1.2)


def test_items_have_unique_names_and_sources_that_exist() -> None:
    assert len({item.name for item in ITEMS}) == len(ITEMS)
    for prefix in {prefix for item in ITEMS for prefix in (*item.uses, *item.unused)}:
        found = list(CLONE.glob(f"{prefix}*"))
        assert found or prefix == "clicktrain/deploy/", f"{prefix} stands for nothing"


@pytest.mark.parametrize(
    ("path", "kernels"),
    [
        ("clicktrain/kernels/cpu/gradient.h", {"grad_values", "inference", "training step"}),
        ("clicktrain/kernels/cpu/codegen.py", {"forward", "grad_input", "inference", "training step"}),
        (
            "clicktrain/kernels/cpu/convolution.h",
            {"forward", "grad_input", "grad_values", "inference", "training step"},
        ),
        ("clicktrain/kernels/cpu/blocked_ops.inc", {"inference", "training step"}),
        ("clicktrain/blocked/tensor.py", {"inference", "training step"}),
        ("clicktrain/kernels/cpu/lanes.h", {item.kernel for item in ITEMS}),
        ("clicktrain/kernels/cpu/a_new_one.h", {item.kernel for item in ITEMS}),
        ("setup.py", {item.kernel for item in ITEMS}),
        ("clicktrain/kernels/cuda/layout.py", set()),
        ("clicktrain/training/loop.py", set()),
    ],
)
def test_what_a_change_affects(path: str, kernels: set[str]) -> None:
    assert {item.kernel for item in ITEMS if item.is_affected([path, "README.md"])} == kernels


def test_small_batches_are_affected_by_packing() -> None:
    affected = {item.layer for item in ITEMS if item.is_affected(["clicktrain/kernels/cpu/layout.h"])}
    assert {"resnet18.256x14@1 4.5x official4", "64x32x32@32"} < affected
    assert "vgg13.512x4@32 2.25x official4" not in affected


def test_kernels_import_nothing_but_their_sources() -> None:
    seen, queue = set(), ["clicktrain.kernels.cpu.backend"]
    while queue:
        module = queue.pop()
        path = CLONE / (module.replace(".", "/") + ".py")
        if module in seen or not path.exists():
            continue
        seen.add(module)
        assert str(path.relative_to(CLONE)).startswith(KERNEL_SOURCES), f"{module} is not among KERNEL_SOURCES"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clicktrain"):
                queue += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    assert "clicktrain.patterns" in seen


def test_revisions(repository: Path, tmp_path: Path) -> None:
    found = Repository(repository)
    head = found.commit("main")
    assert head == found.commit("HEAD") == git(repository, "rev-parse", "HEAD")
    assert found.changed("HEAD~2", head) == ["clicktrain/kernels/cpu/gradient.h"]
    assert found.changed("HEAD~1", head) == [], "documentation makes nothing slower"
    found.export(found.commit("HEAD~2"), tmp_path)
    assert (tmp_path / "clicktrain/kernels/cpu/gradient.h").read_text() == "// one"
    for name in ("no-such", "--all", "HEAD:README.md", ""):
        with pytest.raises(InvalidArgument, match="no such commit"):
            found.commit(name)


def test_a_tree_is_clean_if_all_that_counts_is_committed(repository: Path, tmp_path: Path) -> None:
    found = Repository(repository)
    (repository / "notes.txt").write_text("untracked, and no source")
    found.check_clean()
    (repository / "clicktrain" / "new.py").write_text("")
    with pytest.raises(InvalidArgument, match=r"commit or stash first: clicktrain/new.py"):
        found.check_clean()
    (repository / "clicktrain" / "new.py").unlink()
    (repository / "README.md").write_text("changed")
    with pytest.raises(InvalidArgument, match=r"commit or stash first: README.md"):
        found.check_clean()
    with pytest.raises(ClickTrainError):
        Repository(tmp_path).check_clean()


def run_gate(repository: Path, *words: str) -> int:
    return gate.main(["--repository", str(repository), *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--base", "no-such"), "error: revision 'no-such': no such commit in "),
        (("--base", "HEAD", "--only", "no-such"), "error: --only 'no-such': no item has that in its name"),
    ],
)
def test_bad_words(words: tuple[str, ...], message: str, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_gate(repository, *words) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1


def test_a_dirty_tree_is_not_measured(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / "README.md").write_text("changed")
    assert run_gate(repository, "--base", "HEAD") == 2
    assert "the working tree differs from its last commit" in capsys.readouterr().err


def test_without_a_compiler(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    build.compiler.cache_clear()
    try:
        assert run_gate(repository, "--base", "HEAD~2") == 2
    finally:
        monkeypatch.delenv("CXX")
        build.compiler.cache_clear()
    assert capsys.readouterr().err.startswith("error: no C++ compiler: 'no-such-compiler' is not on the PATH")


def test_nothing_to_measure_is_said(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_gate(repository, "--base", "HEAD~1", "--table", str(tmp_path / "table.md")) == 0
    printed = capsys.readouterr().out
    assert "Nothing was measured: no change can have made a kernel slower." in printed
    assert (tmp_path / "table.md").read_text() == printed
    assert "has changed (layers): forward (6), grad_input (6), grad_values (6), pack (1), unpack (1), " in printed


@pytest.mark.parametrize(("factor", "noise", "code"), [(1.0, 0.01, 0), (1.3, 0.01, 1), (1.0, 0.5, 1)])
def test_the_command_with_a_machine_of_known_speed(
    factor: float,
    noise: float,
    code: int,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Machine(Noise):
        made: Machine

        def __init__(self, *builds: Build) -> None:
            super().__init__(3, noise, {"grad_values": factor})
            Machine.made = self
            assert [(b.name, (b.tree / "clicktrain/kernels/cpu/gradient.h").read_text()) for b in builds] == [
                ("base", "// one"),
                ("head", "// two"),
            ]

        def prepare(self, items: Sequence[Item]) -> dict[str, str]:
            assert {item.kernel for item in items} == {"grad_values", "inference", "training step"}
            return {items[-1].name: "no training step"}

    monkeypatch.setattr(gate, "Measurer", Machine)
    out = tmp_path / "gate.json"
    monkeypatch.setattr(gate, "decide", partial(decide, clock=lambda: Machine.made.seconds))
    assert run_gate(repository, "--base", "HEAD~2", "--out", str(out), "--seconds", "60") == code
    report: dict[str, Any] = json.loads(out.read_text())
    assert report["changed"] == ["clicktrain/kernels/cpu/gradient.h"]
    assert report["ceilings"]["gflops"] > 0
    assert set(report["rounds"]) == set(report["verdicts"])
    printed = capsys.readouterr().out
    assert "Not in the base commit: no training step" in printed
    assert "Not measured, as nothing that they use has changed (layers): forward (6), grad_input (6), " in printed


def test_a_base_that_has_nothing_of_it_is_no_pass(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Machine(Noise):
        def __init__(self, *builds: Build) -> None:
            super().__init__(0, 0.01)

        def prepare(self, items: Sequence[Item]) -> dict[str, str]:
            return {item.name: f"{item.name} cannot be measured on base" for item in items}

    monkeypatch.setattr(gate, "Measurer", Machine)
    assert run_gate(repository, "--base", "HEAD~2") == 2
    assert "error: nothing can be compared: grad_values of " in capsys.readouterr().err


def test_the_table_names_kernel_layer_ratio_and_confidence() -> None:
    slow, fast, unsure = ITEMS[0], ITEMS[1], ITEMS[2]
    verdicts = {
        fast.name: Verdict("not slower", 0.99, 0.01, 0.998, 2),
        slow.name: Verdict("slower", 1.234, 0.021, 0.9997, 3),
        unsure.name: Verdict("open", 1.04, 0.2, 0.4, 9),
    }
    lines = table(ITEMS[:4], verdicts, {}, "b" * 40, "h" * 40).splitlines()
    assert f"| {slow.kernel} | {slow.layer} | 1.234 | 2.1% | 3 | **slower** | 99.97% |" in lines
    assert [line for line in lines if line.startswith("| forward")][1].count("**not sure**") == 1
    assert lines[-1].endswith(f"has changed (layers): {ITEMS[3].kernel} (1).")
    said = summary(verdicts)
    assert said.startswith(f"Slower: {slow.name} (1.23 x). To accept that, ")
    assert f"Could not be told in the time given, for the noise of this machine: {unsure.name} (1.04 x)." in said


@pytest.fixture
def here(tmp_path: Path) -> Build:
    return Build("base", CLONE, tmp_path)


@needs_library
def test_a_session_times_every_process_in_every_round(here: Build) -> None:
    measurer = Measurer(here, Build("head", CLONE, here.cache))
    assert measurer.prepare([PACK]) == {}
    (rounds,) = measurer([PACK]).values()
    assert set(rounds) == set(measuring.SIDES)
    counts = {len(samples) for samples in rounds.values()}
    assert len(counts) == 1
    assert counts <= set(range(measuring.MIN_ROUNDS, measuring.MAX_ROUNDS + 1))
    assert min(min(samples) for samples in rounds.values()) > 0


def test_a_benchmark_that_raises_fails_the_gate(here: Build) -> None:
    broken = Item("forward", "none", "kernels:Time.time_kernel", ("none", "forward"), (), ())
    with pytest.raises(BenchmarkFailed, match="forward of none raised on base: KeyError: 'none'"):
        Measurer(here, here).prepare([broken])


def test_a_process_that_cannot_start_or_dies_fails_the_gate(here: Build, tmp_path: Path) -> None:
    (tmp_path / "clicktrain").mkdir()
    (tmp_path / "clicktrain" / "__init__.py").write_text("import os\nos._exit(3)\n")
    dying = Build("head", tmp_path, tmp_path)
    with pytest.raises(BenchmarkFailed, match="start ended the process of head: exit code 3"):
        Measurer(here, dying).prepare([PACK])


def test_the_library_of_another_commit_is_noticed(tmp_path: Path) -> None:
    with (
        measuring.Process(Build("head", tmp_path, tmp_path), None) as process,
        pytest.raises(BenchmarkFailed, match=r"start raised on head: .*clicktrain"),
    ):
        process.answer("start")


def test_the_base_of_continuous_integration_is_a_commit() -> None:
    name = (CLONE / "bench" / "gate-base").read_text().strip()
    assert len(name) == 40, "a branch would move by itself"
    assert set(name) <= set("0123456789abcdef")


@pytest.mark.parametrize("patch", SLOWDOWNS, ids=lambda path: path.stem)
def test_planted_slowdowns_still_apply(patch: Path, tmp_path: Path) -> None:
    shutil.copytree(CLONE / "clicktrain" / "kernels", tmp_path / "clicktrain" / "kernels")
    subprocess.run(["git", "apply", "--check", str(patch)], cwd=tmp_path, check=True)


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize("patch", [path for path in SLOWDOWNS if "10" not in path.stem], ids=lambda path: path.stem)
def test_a_planted_slowdown_is_found(patch: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    git(tmp_path, "clone", "--quiet", str(CLONE), str(copy))
    git(copy, "apply", "--index", str(patch))
    git(copy, "commit", "--quiet", "--message", "Plant a slow-down")
    out = tmp_path / "gate.json"
    words = ["--base", "HEAD~1", "--repository", str(copy), "--only", "grad", "--all", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "CLICKTRAIN_DISABLE_JIT"}
    run = subprocess.run([sys.executable, "-m", "bench.gate", *words], cwd=CLONE, env=environment)
    assert run.returncode == 1
    verdicts = json.loads(out.read_text())["verdicts"]
    slower = {name.partition(" of ")[0] for name, verdict in verdicts.items() if verdict["state"] == "slower"}
    assert slower == {"grad_values"}, "a kernel that nobody touched is not blamed"
