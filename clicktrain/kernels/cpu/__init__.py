"""CPU backend: C++ kernels on activations in blocks of eight images, called through ctypes."""
