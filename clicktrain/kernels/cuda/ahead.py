"""Compiles CUDA texts into CuPy's cache: run as a script by several processes at once, each with its own texts.

NVRTC takes seconds for a unit and one core. A script, not a module of the package: it starts without torch.
"""

import json
import sys


def main() -> None:
    """Compile what standard input holds: a list of options and a list of texts, as JSON."""
    import cupy

    options, texts = json.load(sys.stdin)
    for text in texts:
        cupy.RawModule(code=text, options=tuple(options), backend="nvrtc").compile()


if __name__ == "__main__":
    main()
