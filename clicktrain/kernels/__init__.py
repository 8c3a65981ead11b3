"""Compute kernels of the pattern convolution, behind one operator and one contract for every backend."""

from clicktrain.kernels.backends import available
from clicktrain.kernels.ops import pattern_conv2d
from clicktrain.kernels.plan import Plan, plan

__all__ = ["Plan", "available", "pattern_conv2d", "plan"]
