"""Every way to compute a pruned convolution: dense and sparse libraries, and ClickTrain's own kernels."""

from baselines.operators.bsr import BSR
from baselines.operators.compiled import CompiledDense
from baselines.operators.csr import CSR
from baselines.operators.cupyx_csr import CupyxCSR
from baselines.operators.dense import Dense
from baselines.operators.gemm import GEMM
from baselines.operators.operator import Function, Operator
from baselines.operators.pattern import BlockedPattern, Pattern
from baselines.operators.problem import FUNCTIONS, Problem
from baselines.operators.scipy_csr import ScipyCSR
from baselines.operators.tf32 import TF32
from baselines.operators.two_of_four import TwoOfFour

__all__ = ["FUNCTIONS", "OPERATORS", "Function", "Operator", "Problem"]

_ALL: tuple[Operator, ...] = (
    Dense("NCHW"),
    Dense("channels_last"),
    Dense("bf16"),
    TF32(),
    CompiledDense(),
    *(matrix(timed) for matrix in (GEMM, CSR, BSR, ScipyCSR, CupyxCSR, TwoOfFour) for timed in ("all", "product")),
    BlockedPattern(),
    Pattern(),
)

OPERATORS: dict[str, Operator] = {operator.name: operator for operator in _ALL}
"""Every operator by name."""
