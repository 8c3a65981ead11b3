"""The passes of a plan, each laid out on its first use."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from clicktrain.kernels.cpu.layer import Layer
from clicktrain.kernels.cuda import gradient as gradients
from clicktrain.kernels.cuda import tensor as tensor_cores
from clicktrain.kernels.cuda.codegen import Dtype
from clicktrain.kernels.cuda.convolution import Convolution
from clicktrain.kernels.cuda.gradient import Gradient
from clicktrain.kernels.cuda.launch import Launcher
from clicktrain.kernels.cuda.tensor_text import IMAGES
from clicktrain.kernels.cuda.window import WindowGradient
from clicktrain.kernels.plan import Plan


class Runtime:
    """The passes of a plan for one type and format on one device, each laid out on its first use."""

    def __init__(
        self, plan: Plan, dtype: Dtype, device: torch.device, launcher: Launcher, batch_last: bool = False
    ) -> None:
        self._layers = Layer.forward(plan), Layer.transposed(plan)
        self._rest = plan.input_shape[0], dtype, device, launcher
        served = tensor_cores.applies(plan, dtype, device)
        self.batch_last = batch_last and served and plan.input_shape[0] % IMAGES == 0
        self._for_tensor_cores = (plan, dtype, device, launcher, self.batch_last) if served else None

    @property
    def on_tensor_cores(self) -> bool:
        """Whether tensor cores serve."""
        return self._for_tensor_cores is not None

    def arranged(self, images: Tensor) -> Tensor:
        """Return images in the format that the passes take."""
        return images if self.batch_last else images.contiguous()

    @cached_property
    def forward(self) -> Convolution | tensor_cores.Forward:
        """The forward pass."""
        if self._for_tensor_cores:
            return tensor_cores.Forward(*self._for_tensor_cores)
        return Convolution(self._layers[0], *self._rest)

    @cached_property
    def grad_input(self) -> Convolution | tensor_cores.InputGradient:
        """The input gradient."""
        if self._for_tensor_cores:
            return tensor_cores.InputGradient(*self._for_tensor_cores)
        return Convolution(self._layers[1], *self._rest)

    @cached_property
    def gradient(self) -> Gradient | WindowGradient | tensor_cores.ValuesGradient:
        """The gradient of the values."""
        if self._for_tensor_cores:
            return tensor_cores.ValuesGradient(*self._for_tensor_cores)
        return gradients.lay_out(self._layers[0], *self._rest)
