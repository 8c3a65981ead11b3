"""The CUDA backend on a GPU: `python -m bench.gpu`. Needs torch, CuPy and NumPy, and no installation of the project."""
