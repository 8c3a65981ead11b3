"""Compute kernels of the pattern convolution, behind one operator and one contract for every backend."""

from clicktrain.kernels.backends import available
from clicktrain.kernels.choices import choices, tune, use_choices
from clicktrain.kernels.ops import pattern_conv2d
from clicktrain.kernels.plan import Plan, plan
from clicktrain.kernels.preparation import Preparation, prepare

__all__ = ["Plan", "Preparation", "available", "choices", "pattern_conv2d", "plan", "prepare", "tune", "use_choices"]
