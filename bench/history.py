"""The history of benchmarks that asv keeps: `python -m bench.history [REVISIONS] [--quick]`.

Measures revisions, each built in an environment of asv's own, adds them to the history in `.asv/results` and
publishes it as `.asv/html/index.html`. With `--quick` instead: runs every benchmark once, in the present environment
and on the installed code, and keeps nothing; it fails if any benchmark does.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.suite.optional import STRICT

ROOT = Path(__file__).parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run asv; returns its exit code, which is not 0 if a benchmark failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.history", description=__doc__)
    parser.add_argument("revisions", nargs="?", default="HEAD^!", help="of git, such as v1..main (default: the last)")
    parser.add_argument("--quick", action="store_true", help="try every benchmark once: proves that it runs, no more")
    parser.add_argument("--bench", default=".", metavar="REGEX", help="only benchmarks whose name matches")
    parser.add_argument("--machine", help="whose history it is (default: the name of this machine)")
    options = parser.parse_args(arguments)
    machine = ["--machine", options.machine] if options.machine else []
    if code := _asv("machine", "--yes", *machine):
        return code
    if options.quick:
        here = ["--python=same", "--set-commit-hash", "HEAD", "--dry-run"]
        return _asv("run", "--quick", *here, *machine, "--show-stderr", "--bench", options.bench, **{STRICT: "1"})
    code = _asv("run", *machine, "--show-stderr", "--bench", options.bench, options.revisions)
    return _asv("publish") or code  # what did not fail is history, too


def _asv(*words: str, **environment: str) -> int:
    command = [sys.executable, "-m", "asv", *words]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode


if __name__ == "__main__":
    sys.exit(main())
