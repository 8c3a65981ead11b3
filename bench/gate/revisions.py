"""Commits to be compared: which they are, what differs between them, and their sources."""

from __future__ import annotations

import subprocess
import zipfile
from io import BytesIO
from pathlib import Path

from clicktrain.errors import ClickTrainError, InvalidArgument

SOURCES = ("clicktrain", "setup.py")
"""What a commit's speed depends on; the benchmarks themselves are those of the working tree for both commits."""


class Repository:
    """A git repository with a working tree.

    Parameters
    ----------
    root : Path
        Its top directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def commit(self, name: str) -> str:
        """Return the 40 digits of a revision.

        Raises
        ------
        InvalidArgument
            If there is no such commit here.
        """
        try:
            return self._git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}").strip()
        except ClickTrainError:
            raise InvalidArgument(
                f"revision {name!r}: no such commit in {self.root} (a shallow clone? git fetch --unshallow)"
            ) from None

    def check_clean(self) -> None:
        """Raise InvalidArgument if the working tree is not its last commit: what is not committed is not measured."""
        changed = self._git("status", "--porcelain", "--untracked-files=no").splitlines()
        changed += self._git("status", "--porcelain", "--", *SOURCES).splitlines()
        names = sorted({line[3:] for line in changed})
        if names:
            listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise InvalidArgument(f"the working tree differs from its last commit, commit or stash first: {listed}")

    def changed(self, base: str, head: str) -> list[str]:
        """Return the source files that differ between two commits."""
        return self._git("diff", "--name-only", "--no-renames", base, head, "--", *SOURCES).splitlines()

    def export(self, commit: str, target: Path) -> None:
        """Write the sources of a commit into a directory."""
        run = subprocess.run(
            ["git", "-C", str(self.root), "archive", "--format=zip", commit, "--", "clicktrain"], capture_output=True
        )
        if run.returncode:
            raise ClickTrainError(f"commit {commit[:12]} cannot be exported: {run.stderr.decode().strip()}")
        with zipfile.ZipFile(BytesIO(run.stdout)) as archive:
            archive.extractall(target)

    def _git(self, *words: str) -> str:
        try:
            run = subprocess.run(["git", "-C", str(self.root), *words], capture_output=True, text=True)
        except OSError as error:
            raise ClickTrainError(f"git cannot be run: {error.strerror}") from error
        if run.returncode:
            raise ClickTrainError(f"git {words[0]}: {run.stderr.strip() or 'failed'}")
        return run.stdout
