"""RMSNorm, SwiGLU and RoPE: torch's own results and derivatives, and no more kept for the backward pass than needed."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_xy import device, losses
from megatron_xy.compiling import compiler
from megatron_xy.model import kernels

device.start(num_threads=1)

TOKENS, WIDTH = 7, 16
GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=dtype).requires_grad_()


def plain_swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def plain_heads(projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = projected.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    rotated = projected * torch.cat([cos, cos], dim=-1) + turned * torch.cat([sin, sin], dim=-1)
    return in_one(rotated[:, :, :-2].flatten(1, 2), rotated[:, :, -2], projected[:, :, -1])


def in_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.cat([query, key, value], dim=1).to(query.dtype)


def our_heads(projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    parts = kernels.rotated_heads(projected, cos, sin)
    assert all(part.is_contiguous() for part in parts)
    return in_one(*parts)


def angles(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    turns = torch.randn(TOKENS, 1, 1, WIDTH // 2, generator=GENERATOR, dtype=dtype)
    return turns.cos(), turns.sin()


CASES: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = {
    "rms_norm": (
        lambda values, weight: kernels.rms_norm(values, weight, eps=1e-3),
        lambda values, weight: F.rms_norm(values, weight.shape, weight, 1e-3),
        (drawn(TOKENS, 1, WIDTH), drawn(WIDTH)),
    ),
    "swiglu": (kernels.swiglu, plain_swiglu, (drawn(TOKENS, 1, WIDTH),)),
    "rotated_heads": (our_heads, plain_heads, (drawn(TOKENS, 2, 5, WIDTH), *angles())),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_plain_torch(name: str) -> None:
    ours, plain, inputs = CASES[name]
    assert torch.autograd.gradcheck(ours, inputs)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        results = []
        for function in (ours, plain):
            narrow = [tensor.detach().to(dtype).requires_grad_(tensor.requires_grad) for tensor in inputs]
            output = function(*narrow)
            output.backward(torch.linspace(-1, 1, output.numel(), dtype=dtype).view(output.shape))
            results.append([output.detach(), *(tensor.grad for tensor in narrow if tensor.requires_grad)])
        for mine, theirs in zip(*results, strict=True):
            assert mine.dtype == dtype
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "bytes_kept"),
    [
        ("rms_norm", (TOKENS * WIDTH + WIDTH + TOKENS) * 8),  # input, weight, one number a token
        ("swiglu", TOKENS * WIDTH * 8),  # its input
        ("rotated_heads", 2 * TOKENS * WIDTH // 2 * 8),  # cos and sin, which other layers keep too
    ],
)
def test_the_backward_pass_keeps_no_more_than_it_needs(name: str, bytes_kept: int) -> None:
    ours, plain, inputs = CASES[name]
    kept = {}
    for function in (ours, plain):
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = function(*inputs)
        kept[function] = sum(storages.values())
        assert output.requires_grad
    assert kept[ours] == bytes_kept < kept[plain]


def test_on_a_cpu_nothing_is_compiled() -> None:
    assert not compiler().works and "CPU" in compiler().reason


ROWS, WEIGHT = drawn(TOKENS, WIDTH).detach(), drawn(WIDTH).detach()
HALF_ROWS = ROWS[:, : WIDTH // 2].contiguous()
COLUMNS = torch.randint(WIDTH, (TOKENS,), generator=GENERATOR)
COMPILED: dict[Callable[..., Any], tuple[Any, ...]] = {
    kernels._rms_norm_forward: (ROWS, WEIGHT, 1e-3),
    kernels._rms_norm_backward: (ROWS, ROWS, WEIGHT, ROWS[:, :1]),
    kernels._swiglu_forward: (ROWS,),
    losses._largest: (ROWS,),
    losses._sum_of_exponentials: (ROWS, ROWS[:, 0]),
    losses._softmax_gradient: (ROWS, ROWS[:, 0], ROWS[:, 1], COLUMNS, ROWS[:, 2], WIDTH - 3),
}


def test_what_a_gpu_compiles_is_each_one_graph_with_the_same_result() -> None:
    for compiled, arguments in COMPILED.items():
        function = compiled.__wrapped__  # type: ignore[attr-defined]
        expected = function(*arguments)
        with torch.no_grad():
            torch.testing.assert_close(one_graph(function)(*arguments), expected)


def one_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    optimize = importlib.import_module("torch._dynamo").optimize  # torch.compile, which the stand-in replaces
    graph: Callable[..., Any] = optimize("aot_eager", nopython=True)(function)  # as far as a GPU's kernels
    return graph


def swiglu_gradient(tokens: int, width: int) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    result = torch.zeros(tokens, 2 * width)
    parts = torch.randn(tokens, 2 * width).chunk(2, dim=-1)
    return (torch.randn(tokens, width), *parts, *result.chunk(2, dim=-1)), [result]


def rotation(tokens: int, width: int, *, apart: bool) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    make, zeros = (torch.randn, torch.zeros) if apart else (torch.zeros, torch.randn)
    projected = make(tokens, 2, 5, width)
    heads = [zeros(tokens, number, width) for number in (6, 2, 2)]
    views = (kernels._views_of_projection(projected), kernels._views_of_heads(*heads))
    turns = torch.randn(tokens, 1, 1, width // 2)
    return (*(views if apart else views[::-1]), turns.cos(), turns.sin()), heads if apart else [projected]


@pytest.mark.parametrize(
    ("compiled", "made"),
    [
        (kernels._swiglu_gradient, swiglu_gradient),
        (kernels._rotate_apart, functools.partial(rotation, apart=True)),
        (kernels._rotate_together, functools.partial(rotation, apart=False)),
    ],
)
def test_what_a_gpu_compiles_writes_into_parts_of_tensors_of_any_length(compiled: Any, made: Any) -> None:
    graph = one_graph(compiled.__wrapped__)
    for tokens, width in ((7, 16), (5, 16), (1, 16), (64, 16), (7, 8), (9, 8)):
        written = []
        for function in (compiled.__wrapped__, graph):
            torch.manual_seed(tokens)
            arguments, results = made(tokens, width)
            with torch.no_grad():
                function(*arguments)
            written.append(results)
        assert all(result.count_nonzero() == result.numel() for result in written[0])
        torch.testing.assert_close(written[1], written[0], rtol=1e-6, atol=1e-6)


def test_the_gradient_of_swiglu_that_a_gpu_compiles_is_the_one_in_place() -> None:
    result = torch.empty_like(ROWS)
    kernels._swiglu_gradient(HALF_ROWS, *ROWS.chunk(2, dim=-1), *result.chunk(2, dim=-1))
    torch.testing.assert_close(result, kernels._swiglu_backward(HALF_ROWS, ROWS))
