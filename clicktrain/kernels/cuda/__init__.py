"""CUDA backend: raw kernels, compiled by NVRTC and launched through CuPy on torch's stream and memory."""
