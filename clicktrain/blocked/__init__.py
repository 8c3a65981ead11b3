"""Blocked activations through a network: pack once, compute, unpack once.

The pattern convolutions of the CPU backend work on activations of layout [ceil(N/8), C, H, W, 8], eight images
side by side. Packing for each layer would cost up to 40 % of the convolution, so in a converted model the
activations stay packed between the layers, in a `BlockedTensor`. It is an ordinary tensor to the model's code and to
autograd, of shape (N, C, H, W); operators that know the layout compute in it, forward and backward, and before any
other one it turns into plain NCHW memory by itself. See `tensor` for the type, `operators` for what stays
blocked, `model` for the borders.
"""

from clicktrain.blocked import operators as operators  # the import registers what stays blocked
from clicktrain.blocked.convolution import pattern_convolution
from clicktrain.blocked.model import install, installed, remove
from clicktrain.blocked.tensor import BlockedTensor, disabled, pack, plain, suits

__all__ = [
    "BlockedTensor",
    "disabled",
    "install",
    "installed",
    "pack",
    "pattern_convolution",
    "plain",
    "remove",
    "suits",
]
