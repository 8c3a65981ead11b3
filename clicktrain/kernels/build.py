"""Compiles C++ on first use and keeps the libraries in a cache that can be trusted.

An entry's name holds the SHA-256 of everything that it depends on: sources, headers, flags, the compiler's
version and the package's. Beside each library lies its digest, verified before it is loaded; a damaged entry is
built again. Writes are atomic and builds hold a lock on a node-local file, so that processes neither collide nor
wait for a lock on a network drive. Nothing is compiled or written when this module is imported.

Environment: CLICKTRAIN_CACHE_DIR moves the cache, CLICKTRAIN_DISABLE_JIT=1 forbids compiling, CXX names the
compiler (GCC).
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from clicktrain.errors import BackendUnavailable
from clicktrain.files import sha256_file, write_atomic
from clicktrain.kernels.sources import DIRECTORY, FLAGS, LINK_FLAGS, headers


@dataclass(frozen=True)
class Library:
    """A shared library to be compiled.

    Attributes
    ----------
    name : str
        For humans: the first part of the file's name.
    sources : tuple of (str, str)
        File name and text of each translation unit; they may include the headers of `kernels/cpu`.
    flags : tuple of str
        Compiler flags.
    """

    name: str
    sources: tuple[tuple[str, str], ...]
    flags: tuple[str, ...] = FLAGS

    def key(self) -> str:
        """Return the SHA-256 of all that the compiled library depends on."""
        included = [(path.name, sha256_file(path)) for path in headers()]
        facts = (self.sources, self.flags, LINK_FLAGS, included, compiler_version(), _package_version())
        return hashlib.sha256(repr(facts).encode()).hexdigest()


def load(library: Library) -> ctypes.CDLL:
    """Return the loaded library; compile it if the cache has no sound copy.

    Raises
    ------
    BackendUnavailable
        If it has to be compiled and there is no compiler, compiling is disabled or fails, or the cache
        directory cannot be trusted.
    """
    return ctypes.CDLL(str(ensure(library)))


def ensure_all(libraries: Iterable[Library]) -> list[Path]:
    """Return the paths of several libraries, compiling what is missing in parallel."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(ensure, libraries))


def ensure(library: Library) -> Path:
    """Return the path of a sound compiled copy; raises as `load`."""
    directory = cache_directory()
    path = directory / f"{library.name}-{library.key()[:32]}.so"
    if not _sound(path):
        with _lock(path):
            if not _sound(path):
                _build(library, path)
    return path


def cache_directory() -> Path:
    """Return the cache directory, made if need be.

    Raises
    ------
    BackendUnavailable
        If it belongs to someone else or others may write to it: a library in it could be anyone's code.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = Path(os.environ.get("CLICKTRAIN_CACHE_DIR") or os.path.join(home, "clicktrain"))
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        raise BackendUnavailable(f"cache directory {directory}: {error.strerror}") from error
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BackendUnavailable(
            f"cache directory {directory}: owner {status.st_uid}, mode {stat.filemode(status.st_mode)}; "
            "expected one that only you can write to (chmod go-w, or set CLICKTRAIN_CACHE_DIR)"
        )
    return directory


@cache
def compiler() -> tuple[str, ...]:
    """Return the compiler's command.

    Raises
    ------
    BackendUnavailable
        If there is none.
    """
    command = tuple(shlex.split(os.environ.get("CXX") or "g++"))
    if not command or shutil.which(command[0]) is None:
        raise BackendUnavailable(f"no C++ compiler: {' '.join(command)!r} is not on the PATH (install g++ or set CXX)")
    return command


@cache
def compiler_version() -> str:
    """Return the first line of what the compiler says about its version."""
    run = subprocess.run([*compiler(), "--version"], capture_output=True, text=True)
    return f"{' '.join(compiler())}: {run.stdout.partition(chr(10))[0]}"


def _package_version() -> str:
    try:
        return version("clicktrain")
    except PackageNotFoundError:  # run from a source tree
        return "source"


def _sound(path: Path) -> bool:
    """Whether a library and its digest are there and agree."""
    try:
        return path.with_suffix(".sha256").read_text() == sha256_file(path)
    except FileNotFoundError:
        return False


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock of a cache entry: one of 256 files in the temporary directory, which is on this machine."""
    name = hashlib.sha256(str(path).encode()).hexdigest()[:2]
    file = os.path.join(tempfile.gettempdir(), f"clicktrain-{os.geteuid()}-{name}.lock")
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _build(library: Library, path: Path) -> None:
    if os.environ.get("CLICKTRAIN_DISABLE_JIT", "0") not in ("", "0"):
        raise BackendUnavailable(f"{library.name} is not compiled and CLICKTRAIN_DISABLE_JIT forbids compiling it")
    with tempfile.TemporaryDirectory(prefix="clicktrain-") as work:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: _compile(library, Path(work), *source), library.sources))
        result = Path(work) / path.name
        _run([*compiler(), *LINK_FLAGS, "-o", str(result), *map(str, objects)])
        data = result.read_bytes()
    write_atomic(path, data)
    write_atomic(path.with_suffix(".sha256"), hashlib.sha256(data).hexdigest())


def _compile(library: Library, work: Path, name: str, text: str) -> Path:
    source, target = work / name, (work / name).with_suffix(".o")
    source.write_text(text)
    _run([*compiler(), *library.flags, f"-I{DIRECTORY}", "-c", "-o", str(target), str(source)])
    return target


def _run(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise BackendUnavailable(f"compiling failed: {shlex.join(command)}\n{run.stderr.strip()[-2000:]}")
