"""The compile cache: keys, damage, locks, directories that cannot be trusted, no compiler."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clicktrain.errors import BackendUnavailable
from clicktrain.kernels import build
from clicktrain.kernels.build import Library

pytestmark = pytest.mark.skipif(subprocess.call(["which", "g++"], stdout=subprocess.DEVNULL) != 0, reason="no g++")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("CLICKTRAIN_CACHE_DIR", str(tmp_path / "cache"))
    cached = (build.compiler, build.compiler_version)  # tests replace them
    yield tmp_path / "cache"
    for function in cached:
        function.cache_clear()


def answer(number: int) -> Library:
    return Library("answer", (("answer.cpp", f'extern "C" int answer() {{ return {number}; }}'),), ("-fPIC",))


def ask(path: Path) -> int:
    """Load in another process: this one would not load a path twice."""
    program = f"import ctypes; print(ctypes.CDLL({str(path)!r}).answer())"
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


def test_compiles_once(cache: Path) -> None:
    library: ctypes.CDLL = build.load(answer(42))
    assert library.answer() == 42
    path = build.ensure(answer(42))
    before = path.stat().st_mtime_ns
    assert build.ensure(answer(42)) == path
    assert path.stat().st_mtime_ns == before
    assert sorted(entry.suffix for entry in cache.iterdir()) == [".sha256", ".so"]


def test_the_key_holds_source_flags_compiler_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {answer(1).key(), answer(2).key(), Library("answer", answer(1).sources, ("-fPIC", "-O1")).key()}
    monkeypatch.setattr(build, "_package_version", lambda: "another")
    keys.add(answer(1).key())
    monkeypatch.undo()
    monkeypatch.setattr(build, "compiler_version", lambda: "another")
    keys.add(answer(1).key())
    assert len(keys) == 5


def test_a_damaged_entry_is_built_again() -> None:
    path = build.ensure(answer(7))
    path.write_bytes(path.read_bytes()[:-100])
    assert ask(build.ensure(answer(7))) == 7
    path.with_suffix(".sha256").unlink()
    assert ask(build.ensure(answer(7))) == 7
    assert path.with_suffix(".sha256").exists()


def test_two_processes_do_not_collide(cache: Path) -> None:
    program = (
        "from tests.kernels.test_build import answer, build\n"
        "print(build.load(answer(11)).answer())\n"
    )  # fmt: skip
    runs = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [run.communicate()[0].strip() for run in runs] == ["11"] * 3
    assert len(list(cache.glob("*.so"))) == 1
    assert not list(cache.glob(".*"))  # no temporary file is left


def test_several_at_once(cache: Path) -> None:
    paths = build.ensure_all([answer(n) for n in range(4)])
    assert [ask(path) for path in paths] == [0, 1, 2, 3]


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_directory_that_others_can_write_to_is_refused(cache: Path, mode: int) -> None:
    cache.mkdir()
    cache.chmod(mode)
    with pytest.raises(BackendUnavailable, match="expected one that only you can write to"):
        build.load(answer(1))


def test_a_directory_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLICKTRAIN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(BackendUnavailable, match=r"cache directory .*file/cache"):
        build.load(answer(1))


def test_compiling_can_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.ensure(answer(5))
    monkeypatch.setenv("CLICKTRAIN_DISABLE_JIT", "1")
    assert build.ensure(answer(5)) == path  # what is there is used
    with pytest.raises(BackendUnavailable, match="CLICKTRAIN_DISABLE_JIT forbids"):
        build.ensure(answer(6))


def test_a_missing_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    build.compiler.cache_clear()
    build.compiler_version.cache_clear()
    with pytest.raises(BackendUnavailable, match="'no-such-compiler -x' is not on the PATH"):
        build.load(answer(1))


def test_a_compiler_error_is_shown(cache: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"compiling failed: .*\n(.|\n)*does_not_exist"):
        build.load(Library("broken", (("broken.cpp", "int f() { return does_not_exist; }"),)))
    assert not list(cache.iterdir())


def test_without_a_compiler_the_generic_kernel_serves(tmp_path: Path) -> None:
    program = (
        "import torch, clicktrain.kernels.cpu.library as library\n"
        "library.load()\n"  # the precompiled library, or one from before the compiler went away
        "import os; os.environ['CLICKTRAIN_DISABLE_JIT'] = '1'\n"
        "from tests.kernels.test_cpu_backend import LARGE, run, expected, relative_error\n"
        "want, got = expected(*LARGE.operands()), run(LARGE)\n"
        "assert all(relative_error(got[name], want[name]) < 1e-5 for name in want)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the generic one is slower: sweep is not compiled") == 1


def test_importing_writes_and_compiles_nothing(tmp_path: Path) -> None:
    program = "import clicktrain, clicktrain.kernels, clicktrain.kernels.cpu.backend"
    environment = {**os.environ, "CLICKTRAIN_CACHE_DIR": str(tmp_path / "new"), "CXX": "false"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert not (tmp_path / "new").exists()
