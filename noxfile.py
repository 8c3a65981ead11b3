"""Sessions of nox: `nox` reproduces the quick study and runs the tests; `nox -l` lists all.

Words after ``--`` go to the command of the session: ``nox -s tests -- -k assignment``.

On Linux the torch that PyPI holds brings CUDA along, several gigabytes of it. Where there is no NVIDIA
driver, torch is therefore taken from PyTorch's own index of CPU builds, if that can be reached; everything
else comes from wherever pip is set up to look. CLICKTRAIN_TORCH_INDEX names another index, or turns this off
if it is "none".
"""

from __future__ import annotations

import os
import shutil
import sys
import urllib.request

import nox
from nox.virtualenv import PassthroughEnv

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["reproduce", "tests"]

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CPU_INDEX_TIMEOUT_SECONDS = 5


@nox.session
def reproduce(session: nox.Session) -> None:
    """Run the quick study on embedded data and write its report (4 to 10 minutes on 2 cores)."""
    install(session, "report")
    session.run("python", "-m", "reproductions", "run", "quick", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Check style and types, and run all tests that need no GPU (9 to 20 minutes on 2 cores)."""
    install(session, "dev")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "--strict", "clicktrain", "baselines", "reproductions", "bench")
    # One process a core, one thread each: threads that wait for one another in tiny networks only cost time.
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    words = ["-n", "auto", "--dist", "loadfile", "-p", "no:benchmark"]
    session.run("pytest", *words, *session.posargs, env=one_thread)


@nox.session(default=False)
def slow(session: nox.Session) -> None:
    """Run the long tests: kill tests, sanitizers, planted slow-downs."""
    install(session, "dev")
    session.run("pytest", "-m", "slow", *session.posargs)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Add the last commit to the history of benchmarks and publish it; `-- --quick` tries each once (see bench/)."""
    install(session, "bench")
    # asv installs every commit into an environment of its own, with pip and what pip needs to know about torch.
    indexes = [os.environ.get("PIP_EXTRA_INDEX_URL"), torch_index()]
    extra = " ".join(index for index in indexes if index)
    session.run("python", "-m", "bench.history", *session.posargs, env={"PIP_EXTRA_INDEX_URL": extra} if extra else {})


@nox.session(default=False)
def bench_gate(session: nox.Session) -> None:
    """Tell whether the last commit made a kernel slower: `-- --base REVISION [--all]` (2 minutes besides building)."""
    install(session, "bench")
    session.run("python", "-m", "bench.gate", *session.posargs)


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """Run the tests and the benchmark that need an NVIDIA GPU; fails where there is none."""
    install(session, "dev", "cuda")
    session.run("python", "-m", "bench.gpu", *session.posargs)
    session.run("pytest", "-m", "gpu")


def install(session: nox.Session, *extras: str) -> None:
    """Install the project in place with some of its extras, and first a torch that suits the machine.

    With ``--no-venv`` nothing is installed: the environment that nox runs in is taken as it is.
    """
    if isinstance(session.virtualenv, PassthroughEnv):
        return
    index = torch_index()
    if index:
        session.install(*torch_requirements(), "--extra-index-url", index)
    session.install("-e", f".[{','.join(extras)}]")


def torch_requirements() -> list[str]:
    """Return the project's requirements of torch and torchvision, version ranges included."""
    dependencies = nox.project.load_toml("pyproject.toml")["project"]["dependencies"]
    return [requirement for requirement in dependencies if requirement.startswith("torch")]


def torch_index() -> str | None:
    """Return the index that CPU builds of torch come from, or None where pip's own settings decide."""
    index = os.environ.get("CLICKTRAIN_TORCH_INDEX", CPU_INDEX)
    has_driver = shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia")
    if index == "none" or sys.platform != "linux" or has_driver:
        return None
    try:
        # pip would try an index that cannot be reached again and again, for each package: ask first, once.
        urllib.request.urlopen(f"{index}/torch/", timeout=CPU_INDEX_TIMEOUT_SECONDS).close()
    except (OSError, ValueError):
        return None
    return index
