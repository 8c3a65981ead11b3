"""What every convolution operator promises; a new one is tested by standing in OPERATORS."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

import baselines
from baselines.operators import FUNCTIONS, OPERATORS, Function, Operator, Problem
from baselines.operators.bsr import sizes
from baselines.operators.operator import Operator as Base
from clicktrain import official_pool
from clicktrain.errors import InvalidArgument
from clicktrain.timing import relative_error

ON_CPU = [name for name, operator in OPERATORS.items() if "cpu" in operator.devices]
MASKS = ("patterns", "stride 2", "kernels", "weights")
COMPILED = ("patterns", "stride 2")
"""Compiling takes seconds, and what is compiled does not depend on the mask."""
CASES = [(name, mask) for name in OPERATORS for mask in (COMPILED if name == "dense compiled" else MASKS)]


def problem(mask: str, function: Function = "forward", device: str = "cpu") -> Problem:
    """Return a convolution with a kind of mask: patterns, whole 1x1 kernels, or single weights."""
    random = torch.Generator().manual_seed(3)
    filters, channels, k = 16, 8, 1 if mask == "kernels" else 3
    if mask == "weights":
        kept = torch.rand(filters, channels, k, k, generator=random) < 0.2
    else:
        index = torch.randint(0, 4, (filters, channels), generator=random)
        kept = official_pool(4).masks()[index] if k == 3 else torch.ones(filters, channels, 1, 1, dtype=torch.bool)
        kept = kept & (torch.rand(filters, channels, 1, 1, generator=random) < 0.4)
    stride, padding, (height, width) = 2 if mask == "stride 2" else 1, k // 2, (9, 7)
    out = [(size - 1) // stride + 1 for size in (height, width)]
    x, dy, weight = (
        torch.randn(*shape, generator=random)
        for shape in ((3, channels, height, width), (3, filters, *out), kept.shape)
    )
    operands = [tensor.to(device) for tensor in (x, dy, weight * kept, kept)]
    return Problem(function, *operands, stride, padding)


@pytest.fixture(params=OPERATORS)
def operator(request: pytest.FixtureRequest) -> Operator:
    return OPERATORS[request.param]


def results(operator: Operator, asked: Problem) -> Iterator[Tensor]:
    with torch.inference_mode():
        contender = operator.prepare(asked)
        assert contender.result is not None
        for _ in range(2):
            yield cast(Tensor, contender.result(contender.run()))


def check(operator: Operator, asked: Problem) -> None:
    """Check that two runs give the reference's result, and leave the operands alone."""
    before = [tensor.clone() for tensor in (asked.x, asked.dy, asked.weight)]
    truth = asked.reference()
    for result in results(operator, asked):
        assert result.shape == truth.shape
        assert relative_error(result, truth) <= operator.tolerance
    assert all(torch.equal(*pair) for pair in zip(before, (asked.x, asked.dy, asked.weight), strict=True))


def test_names_are_those_of_the_registry_and_kinds_are_known(operator: Operator) -> None:
    assert OPERATORS[operator.name] is operator
    assert operator.kind in ("dense", "sparse", "ours")
    assert set(operator.functions) <= set(FUNCTIONS)
    assert 0 < operator.tolerance < 0.02


def test_every_operator_stands_in_the_registry() -> None:
    assert {cls for cls in leaves(Base) if cls.__module__.startswith("baselines.")} == set(
        map(type, OPERATORS.values())
    )


def leaves(cls: type[Base]) -> set[type[Base]]:
    """Return the classes below one that name an operator."""
    found = {leaf for child in cls.__subclasses__() for leaf in leaves(child)}
    return found if cls.__abstractmethods__ else {cls, *found}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("name", "mask"), CASES)
def test_what_is_supported_is_right_and_what_is_not_says_why(name: str, mask: str, function: Function) -> None:
    operator, asked = OPERATORS[name], problem(mask, function)
    supported = operator.supports(asked)
    if supported is True:
        check(operator, asked)
    else:
        assert len(supported) > 10
        assert "\n" not in supported


@pytest.mark.parametrize("name", ON_CPU)
def test_an_operator_of_the_cpu_computes_forward_here(name: str) -> None:
    supported = OPERATORS[name].supports(problem("patterns"))
    assert supported is True or "this CPU has no" in supported or "compiler" in supported


@pytest.mark.gpu
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_on_a_gpu_too(operator: Operator, mask: str, function: Function) -> None:
    asked = problem(mask, function, "cuda")
    if operator.supports(asked) is True:
        check(operator, asked)


@pytest.mark.gpu
def test_two_of_four_computes_a_mask_of_its_kind() -> None:
    asked = two_of_four_problem("cuda")
    assert OPERATORS["2:4 bf16 product"].supports(asked) is True
    check(OPERATORS["2:4 bf16 product"], asked)


def two_of_four_problem(device: str = "cpu") -> Problem:
    weight = torch.randn(32, 64, 1, 1, device=device)
    mask = torch.tensor([True, False, True, False], device=device).repeat(32 * 16).view(32, 64, 1, 1)
    x, dy = torch.randn(2, 64, 4, 4, device=device), torch.randn(2, 32, 4, 4, device=device)
    return Problem("forward", x, dy, weight * mask, mask)


def test_cuda_operators_say_that_they_need_cuda() -> None:
    only = [operator for operator in OPERATORS.values() if operator.devices == ("cuda",)]
    assert {"dense TF32", "cupyx CSR im2col", "2:4 bf16 im2col"} <= {operator.name for operator in only}
    for operator in only:
        assert operator.supports(problem("patterns")) == "computes on cuda, the operands are on cpu"


def test_two_of_four_wants_its_mask_its_shape_and_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, asked = OPERATORS["2:4 bf16 product"], two_of_four_problem()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert operator.obstacle(asked) is None
    dense = torch.ones_like(asked.mask)
    assert operator.obstacle(replace(asked, mask=dense)) == "the mask keeps more than two of four neighbours"
    assert "needs multiples of 32, 64 and 8" in str(operator.obstacle(problem("patterns")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "needs compute capability 8.0" in str(operator.obstacle(asked))
    assert "needs compute capability 8.0" in str(OPERATORS["dense TF32"].obstacle(asked))


def test_bfloat16_is_not_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert OPERATORS["dense bf16"].supports(problem("weights")) == "this CPU has no instructions for bfloat16"


def test_blocks_divide_the_matrix() -> None:
    assert sizes(torch.zeros(16, 72), "cpu") == [2, 4, 8]
    assert sizes(torch.zeros(16, 64), "cuda") == [16]
    asked = problem("weights")
    odd = Problem("forward", asked.x, asked.dy[:, :15], asked.weight[:15], asked.mask[:15], 1, 1)
    assert "divides the matrix (15, 72)" in str(OPERATORS["BSR product"].supports(odd))


@pytest.mark.parametrize("mask", MASKS[:-1])
def test_a_mask_of_patterns_is_told_apart(mask: str) -> None:
    asked = problem(mask)
    assert torch.equal(asked.assignment.mask(), asked.mask)
    assert torch.equal(asked.assignment.scatter(asked.values), asked.weight)


def test_other_masks_are_none_of_patterns() -> None:
    asked = problem("weights")
    with pytest.raises(InvalidArgument, match=r"kernels keep .* weights, expected the same number"):
        asked.assignment  # noqa: B018
    assert "expected the same number" in str(OPERATORS["pattern NCHW"].supports(asked))


def test_a_weight_that_is_not_masked_is_refused() -> None:
    asked = problem("weights")
    with pytest.raises(InvalidArgument, match="weight: expected zeros wherever the mask is false"):
        Problem("forward", asked.x, asked.dy, torch.ones_like(asked.weight), asked.mask)


def test_multiply_accumulates_are_those_of_kept_weights() -> None:
    asked = problem("stride 2")
    assert asked.macs == int(asked.mask.sum()) * 3 * 5 * 4


def test_the_readme_lists_every_operator() -> None:
    text = (Path(baselines.__file__).parent / "README.md").read_text()
    names = {name.removesuffix(" im2col").removesuffix(" product") for name in OPERATORS}
    assert [name for name in names if f"`{name}`" not in text] == []
