"""Compiles C++ on first use and keeps the libraries in a cache that can be trusted.

An entry's name holds the SHA-256 of everything that it depends on: sources, headers, flags, the compiler's
version and the package's. Beside each library lies its digest, verified before it is loaded; a damaged entry is
built again. Writes are atomic and builds hold a lock on a node-local file, so that processes neither collide nor
wait for a lock on a network drive. Any number of threads may ask for libraries: as many compilers run at once as
there are cores, and those that still run when the process ends are stopped. Nothing is compiled or written when this
module is imported.

Environment: CLICKTRAIN_CACHE_DIR moves the cache, CLICKTRAIN_DISABLE_JIT=1 forbids compiling, CXX names the
compiler (GCC).
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import hashlib
import os
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from clicktrain.errors import BackendUnavailable
from clicktrain.files import sha256_file, write_atomic
from clicktrain.kernels.sources import DIRECTORY, FLAGS, LINK_FLAGS, headers

T = TypeVar("T")


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
        directory cannot be trusted, written to or executed from.
    """
    path = ensure(library)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendUnavailable(f"{path} cannot be loaded: {error}") from error


def ensure_all(libraries: Iterable[Library]) -> list[Path]:
    """Return the paths of several libraries, compiling what is missing in parallel."""
    return in_parallel([partial(ensure, library) for library in libraries])


def ensure(library: Library) -> Path:
    """Return the path of a sound compiled copy; raises as `load`."""
    directory = cache_directory()
    path = directory / f"{library.name}-{library.key()[:32]}.so"
    try:
        if not _sound(path):
            with _lock(path):
                if not _sound(path):
                    _build(library, path)
    except OSError as error:  # a full disk, no memory for another process
        raise BackendUnavailable(f"{library.name} cannot be compiled into {directory}: {error}") from error
    return path


def be_nice() -> None:
    """Let the compilers that this thread starts from now on give way to everything else on the machine."""
    _thread.nice = ("nice", "-n", "10") if shutil.which("nice") else ()


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
    nice = getattr(_thread, "nice", ())
    with _work_directory(library) as work:
        objects = in_parallel([partial(_compile, library, work / name, nice) for name, _ in library.sources])
        result = work / path.name
        _run([*compiler(), *LINK_FLAGS, "-o", str(result), *map(str, objects)])
        data = result.read_bytes()
    write_atomic(path, data)
    write_atomic(path.with_suffix(".sha256"), hashlib.sha256(data).hexdigest())


def _compile(library: Library, source: Path, nice: tuple[str, ...]) -> Path:
    target = source.with_suffix(".o")
    _run([*nice, *compiler(), *library.flags, f"-I{DIRECTORY}", "-c", "-o", str(target), str(source)])
    return target


@contextmanager
def _work_directory(library: Library) -> Iterator[Path]:
    """Hold the sources in a directory that goes after the build, and with the process in any case."""
    with _starting:
        _refuse_at_end()
        work = Path(tempfile.mkdtemp(prefix="clicktrain-"))
        _works.add(work)
        for name, text in library.sources:
            (work / name).write_text(text)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _works.discard(work)


_thread = threading.local()
_slots = threading.BoundedSemaphore(len(os.sched_getaffinity(0)))
_running: set[subprocess.Popen[str]] = set()
_works: set[Path] = set()
_ending = threading.Event()
_starting = threading.Lock()


def _run(command: list[str]) -> None:
    """Run a compiler, when a core is free for it."""
    with _slots:
        with _starting:  # none may start unseen by `_stop_all`
            _refuse_at_end()
            # A session of its own, so that the compiler can be stopped together with the processes that it starts.
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
            _running.add(process)
        try:
            _, messages = process.communicate()
        finally:
            _running.discard(process)
            _stop(process)  # after an interrupt by the user
    if process.returncode:
        raise BackendUnavailable(f"compiling failed: {shlex.join(command)}\n{messages.strip()[-2000:]}")


def _refuse_at_end() -> None:
    if _ending.is_set():
        raise BackendUnavailable("compiling was given up: the process ends")


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@atexit.register
def _stop_all() -> None:
    with _starting:
        _ending.set()
    for process in list(_running):
        _stop(process)
        process.wait()
    for work in list(_works):  # the threads that would do it may be gone already
        shutil.rmtree(work, ignore_errors=True)


def in_parallel(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Return what several functions return, each in a thread of its own that does not keep the process alive.

    The first error is raised, after all have ended.
    """
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(number: int, call: Callable[[], T]) -> None:
        try:
            results[number] = call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(threads))]
