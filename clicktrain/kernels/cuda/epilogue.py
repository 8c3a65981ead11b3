"""What a kernel does to sums before it writes them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Epilogue:
    """What is done to the sums before they are written: y = relu(sum * scale + shift + residual).

    Attributes
    ----------
    scale, shift : Tensor or None, (C_out,) float32
        None: 1 and 0.
    residual : Tensor or None, (N, C_out, H_out, W_out)
        Of x's type, in x's format if not NCHW; None: 0.
    relu : bool
        Whether negative results become 0.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    relu: bool = False


NO_EPILOGUE = Epilogue()
