"""deepsparse in a process of its own, because it needs older packages: the worker, and how to talk to it.

Run as a program by deepsparse's interpreter it imports neither torch nor anything of this project. It loads the model
and the batch once; each line that it then reads is a request to run, and it answers with a line when it is done. So a
timed call contains one exchange over pipes, some tens of microseconds.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class Worker:
    """A running deepsparse engine.

    Parameters
    ----------
    python : str
        Interpreter of deepsparse's environment.
    model : Path
        ONNX file.
    x : Tensor
        The batch.
    folder : Path
        Where batch and result are exchanged.
    threads : int
        Cores to use.

    Raises
    ------
    OSError
        If the worker does not start; the text is its own last line.
    """

    def __init__(self, python: str, model: Path, x: Tensor, folder: Path, threads: int) -> None:
        self._result = folder / "result.npy"
        np.save(folder / "batch.npy", x.numpy())
        self._process = subprocess.Popen(
            [python, __file__, str(model), str(folder / "batch.npy"), str(self._result), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        if self._answer() != "ready":
            assert self._process.stderr is not None
            said = self._process.stderr.read().strip().splitlines()
            raise OSError(f"deepsparse does not run: {said[-1] if said else 'it ended without a word'}")

    def run(self) -> None:
        """Run the batch once."""
        self._ask("run")

    def result(self) -> Tensor:
        """Return the result of the batch."""
        import torch

        self._ask("save")
        return torch.from_numpy(np.load(self._result))

    def _ask(self, what: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        if self._answer() != "done":
            raise OSError("deepsparse ended while it ran")

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() in ("ready", "done"):
                return line.strip()
        return ""

    def __del__(self) -> None:
        if process := getattr(self, "_process", None):
            process.kill()
            process.wait()


def main(model: str, batch: str, result: str, threads: str) -> None:
    """Answer requests until there are no more."""
    import deepsparse

    x = np.load(batch)
    engine = deepsparse.Engine(model=model, batch_size=len(x), num_cores=int(threads))
    outputs = engine.run([x])
    print("ready", flush=True)
    for line in sys.stdin:
        outputs = engine.run([x])
        if line.strip() == "save":
            np.save(result, outputs[0])
        print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
