"""What the sparse kernels are compared with: cuDNN in three precisions, cuBLAS, cuSPARSE, 2:4 sparsity.

cuDNN computes in the layout, NCHW or channels_last, that is faster (bfloat16: channels_last); operands are
in it already. Products of matrices (cuBLAS, cuSPARSE) are timed twice: as convolutions, from images to images, with
im2col or col2im, and bare, of columns that are there already, which no network has. The 2:4 product is bare.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.suite.workloads import Workload
from clicktrain import Assignment, kernels
from clicktrain.kernels import reference
from clicktrain.kernels.backends import Kernels
from clicktrain.kernels.cuda import backend
from clicktrain.kernels.cuda.tuning import fastest
from clicktrain.timing import Contender, WrongResult, relative_error

aten = torch.ops.aten
Product = Callable[..., Tensor]
FUNCTIONS = ("forward", "grad_input", "grad_values")
DENSE = ("cuDNN fp32", "cuDNN tf32", "cuDNN bf16")
SPARSE = "sparse fp32"
SHARED = "shared bf16"
"""The project's kernels where blocks of 16 filters keep the same kernels: another layer, of the same compression."""
SHARED_BATCH_LAST = "shared bf16, batch last"
"""The same on images batch last: operands are in that format, as cuDNN's are in channels_last, not timed."""
SHARED_FILTERS = 16
SHARED_TOLERANCE = 1.6e-2


def call(module: Kernels, function: str, x: Tensor, values: Tensor, dy: Tensor, plan: kernels.Plan) -> Tensor:
    """Call a function of a backend with those of the operands that it takes."""
    if function == "forward":
        return module.forward(x, values, plan)
    if function == "grad_input":
        return module.grad_input(dy, values, plan)
    return module.grad_values(x, dy, plan)


class Case:
    """Operands of a workload on a device, and contenders for a function on them."""

    def __init__(self, workload: Workload, device: str = "cuda") -> None:
        self.workload, self.shape = workload, workload.shape
        self.assignment = workload.assignment()
        x, dy, weight = workload.operands()
        self.x, self.dy, self._unmasked = x.to(device), dy.to(device), weight
        self.weight = (weight * self.assignment.mask()).to(device)
        self.values = self.assignment.gather(self.weight.cpu()).contiguous().to(device)
        self.plan = self._planned(self.assignment)

    @property
    def flops(self) -> int:
        """Floating-point operations of each function, kept weights only."""
        return 2 * self.plan.macs

    @property
    def bytes(self) -> int:
        """What each function must read and write at least, in float32."""
        return 4 * (self.x.numel() + self.dy.numel() + self.values.numel())

    def im2col(self) -> Tensor:
        """Return the matrix (C_in * k * k, N * H_out * W_out) of x, in one copy."""
        k, stride, padding = self.shape.kernel_size, self.shape.stride, self.shape.padding
        x = F.pad(self.x, (padding,) * 4) if padding else self.x
        windows = x.unfold(2, k, stride).unfold(3, k, stride)  # (N, C_in, H_out, W_out, k, k), a view
        return windows.permute(1, 4, 5, 0, 2, 3).reshape(x.shape[1] * k * k, -1)

    def as_rows(self) -> Tensor:
        """Return the output gradient as a matrix (C_out, N * H_out * W_out)."""
        return self.dy.transpose(0, 1).flatten(1).contiguous()

    @cached_property
    def columns(self) -> Tensor:
        """What `im2col` returns, made once."""
        return self.im2col()

    @cached_property
    def rows(self) -> Tensor:
        """What `as_rows` returns, made once."""
        return self.as_rows()

    def contenders(self, function: str) -> dict[str, Contender]:
        """Return all contenders of a function by name."""
        return {
            **{name: self._cudnn(function, name) for name in DENSE},
            **self._products("cuBLAS", function, self._dense_product(function)),
            **self._products("cuSPARSE", function, self._sparse_product(function)),
            **self._two_of_four(function),
            SPARSE: self.sparse(function, torch.float32),
            "sparse bf16": self.sparse(function, torch.bfloat16),
            **self._shared(function),
        }

    def sparse(self, function: str, dtype: torch.dtype) -> Contender:
        """Return the project's kernel, NCHW to NCHW."""
        x, dy, values = self.x.to(dtype), self.dy.to(dtype), self.values.to(dtype)
        return Contender(lambda: call(backend, function, x, values, dy, self.plan))

    def _shared(self, function: str) -> dict[str, Contender]:
        """Return the project's kernel in both formats on a layer with shared filters, if they make whole blocks.

        Raises
        ------
        WrongResult
            If it does not compute what the reference does: its result is not the other contenders'.
        """
        if self.shared_plan is None:
            return {}
        values = self._shared_assignment.gather(self._unmasked).contiguous().to(self.x).bfloat16()
        x, dy, made = self.x.bfloat16(), self.dy.bfloat16(), self.shared_plan
        want = call(reference, function, x.float(), values.float(), dy.float(), made)
        formats = {SHARED: (x, dy), SHARED_BATCH_LAST: (backend.as_batch_last(x), backend.as_batch_last(dy))}
        found = {}
        for name, (images, gradients) in formats.items():
            error = relative_error(call(backend, function, images, values, gradients, made), want)
            if not error <= SHARED_TOLERANCE:
                raise WrongResult(f"{name}: relative error {error:.3g} of {function}, {self.workload.name}")
            found[name] = Contender(partial(call, backend, function, images, values, gradients, made), None)
        return found

    @cached_property
    def _shared_assignment(self) -> Assignment:
        return self.workload.assignment(share_filters=SHARED_FILTERS)

    @cached_property
    def shared_plan(self) -> kernels.Plan | None:
        """The plan of the layer with shared filters; None where filters do not make whole blocks."""
        if self.shape.out_channels % SHARED_FILTERS:
            return None
        return self._planned(self._shared_assignment)

    def _planned(self, assignment: Assignment) -> kernels.Plan:
        return kernels.plan(assignment, None, self.workload.input_shape, self.shape.stride, self.shape.padding)

    def _cudnn(self, function: str, name: str) -> Contender:
        layouts = (torch.channels_last,) if name.endswith("bf16") else (torch.channels_last, torch.contiguous_format)
        runs = [self._cudnn_in(layout, function, name) for layout in layouts]
        best = fastest(runs, lambda run: run) if self.x.is_cuda else runs[0]
        if function != "grad_values":
            return Contender(best)
        return Contender(best, lambda dw: self.assignment.gather(cast(Tensor, dw).contiguous().cpu()))

    def _cudnn_in(self, layout: torch.memory_format, function: str, name: str) -> Callable[[], object]:
        dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
        x, dy, w = (t.to(dtype).contiguous(memory_format=layout) for t in (self.x, self.dy, self.weight))
        geometry = ([self.shape.stride] * 2, [self.shape.padding] * 2)
        wanted = FUNCTIONS.index(function) - 1

        def run() -> object:
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=name.endswith("tf32")):
                if wanted < 0:
                    return F.conv2d(x, w, None, *geometry)
                mask = [wanted == 0, wanted == 1, False]
                return aten.convolution_backward(dy, x, w, None, *geometry, [1, 1], False, [0, 0], 1, mask)[wanted]

        return run

    def _products(self, name: str, function: str, product: Product) -> dict[str, Contender]:
        """Return a product of matrices twice: as a convolution, and by itself."""

        def dense(dw: object) -> Tensor:
            full = cast(Tensor, dw).to_dense().cpu().view(self.assignment.dense_shape)
            return self.assignment.gather(full)

        if function == "forward":
            whole = Contender(lambda: self._as_images(product(self.im2col())))
            bare = Contender(lambda: product(self.columns), lambda y: self._as_images(cast(Tensor, y)))
        elif function == "grad_input":
            whole = Contender(lambda: self._folded(product(self.as_rows())))
            bare = Contender(lambda: product(self.rows), lambda dx: self._folded(cast(Tensor, dx)))
        else:
            whole = Contender(lambda: product(self.im2col(), self.as_rows()), dense)
            bare = Contender(lambda: product(self.columns, self.rows), dense)
        return {f"{name} im2col": whole, f"{name} product": bare}

    def _dense_product(self, function: str) -> Product:
        weight = self.weight.flatten(1)
        if function == "grad_values":
            return lambda columns, rows: rows @ columns.t()
        return partial(torch.matmul, weight if function == "forward" else weight.t())

    def _sparse_product(self, function: str) -> Product:
        weight = self.weight.flatten(1)
        if function == "grad_values":
            csr = weight.to_sparse_csr()
            return lambda columns, rows: torch.sparse.sampled_addmm(csr, rows, columns.t(), beta=0.0)
        return partial(torch.matmul, (weight if function == "forward" else weight.t().contiguous()).to_sparse_csr())

    def _two_of_four(self, function: str) -> dict[str, Contender]:
        """Return the 2:4 product in bfloat16, forward only, where the shape and the GPU allow it."""
        weight = self.weight.flatten(1)
        if function != "forward" or weight.shape[1] % 64 or weight.shape[0] % 32 or self.columns.shape[1] % 8:
            return {}
        if not self.x.is_cuda or torch.cuda.get_device_capability() < (8, 0):
            return {}
        groups = weight.view(-1, 4)
        keep = torch.zeros_like(groups).scatter_(1, groups.abs().topk(2, 1).indices, 1.0)
        half = (groups * keep).view_as(weight).bfloat16()
        compressed = torch.sparse.to_sparse_semi_structured(half)
        columns = self.columns.bfloat16()
        # Other weights than ours, at half of the dense work: a yardstick without a result to compare.
        return {"2:4 bf16": Contender(lambda: torch.mm(compressed, columns), None)}

    def _as_images(self, product: Tensor) -> Tensor:
        n, c, h, w = self.workload.output_shape
        return product.view(c, n, h, w).transpose(0, 1)

    def _folded(self, product: Tensor) -> Tensor:
        """Return the input gradient that a product leaves in columns (col2im)."""
        shape, (n, _, h, w) = self.shape, self.workload.output_shape
        columns = product.view(-1, n, h * w).transpose(0, 1)
        return F.fold(columns, shape.size, shape.kernel_size, padding=shape.padding, stride=shape.stride)
