"""RMSNorm, SwiGLU and the rotation of RoPE as functions that keep no more for the backward pass than it needs.

Each is plain tensor arithmetic, forward and backward. On a GPU torch.compile makes one kernel of each, if a compiler
works there; on a CPU they run as they stand, since a bare machine has no C++ compiler.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megatron_xy import device
from megatron_xy.compiling import compiled, compiler


def rms_norm(values: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """values / rms(values) * weight over the last dimension; [..., hidden], weight [hidden]."""
    if not device.is_cpu() and not compiler().works:
        return F.rms_norm(values, weight.shape, weight, eps)  # one kernel from torch 2.9 on
    rows, learns = values.flatten(0, -2), torch.is_grad_enabled()
    normed: torch.Tensor = (
        _RMSNorm.apply(rows, weight, eps) if learns else _rms_norm_forward(rows, weight, eps)[0]  # type: ignore[no-untyped-call]
    )
    return normed.view(values.shape)


def swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up; [..., 2 x ffn], the gate's half first -> [..., ffn]. Keeps its input alone."""
    rows, learns = gate_and_up.flatten(0, -2), torch.is_grad_enabled()
    activated: torch.Tensor = _SwiGLU.apply(rows) if learns else _swiglu_forward(rows)  # type: ignore[no-untyped-call]
    return activated.view(*gate_and_up.shape[:-1], activated.size(-1))


def rotated_heads(
    projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of a projection, the first two rotated by RoPE in the halves convention of HF and
    Megatron.

    projected [tokens, groups, queries a group + 2, head_dim], megatron-core's layout; cos, sin [tokens, 1, 1,
    head_dim / 2] fp32. Returns [tokens, heads, head_dim] and twice [tokens, groups, head_dim], each contiguous: the
    projection is free to go. Keeps cos and sin, which all layers of a micro-batch share.
    """
    return _RotatedHeads.apply(projected, cos, sin)  # type: ignore[no-untyped-call, no-any-return]


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


class _RMSNorm(torch.autograd.Function):
    """Keeps input, weight and one number a token."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normed, scale = _rms_norm_forward(values, weight, eps)
        ctx.save_for_backward(values, weight, scale)
        return normed  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        values, weight, scale = ctx.saved_tensors
        return *_rms_norm_backward(grad, values, weight, scale), None


@compiled
def _rms_norm_forward(values: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = _wide(values)
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * _wide(weight)).to(values.dtype), scale


@compiled
def _rms_norm_backward(
    grad: torch.Tensor, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    normed, wide_grad = _wide(values) * scale, _wide(grad)
    weight_grad = (wide_grad * normed).sum(dim=0)
    scaled_grad = wide_grad * _wide(weight)
    mean = (scaled_grad * normed).mean(dim=-1, keepdim=True)
    return ((scaled_grad - normed * mean) * scale).to(values.dtype), weight_grad.to(weight.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_and_up)
        return _swiglu_forward(gate_and_up)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return _swiglu_backward(grad, *ctx.saved_tensors)


@compiled
def _swiglu_forward(gate_and_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _swiglu_backward(grad: torch.Tensor, gate_and_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    result = torch.empty_like(gate_and_up)
    gate_grad, up_grad = result.chunk(2, dim=-1)  # written in place: on a CPU half the time of joining two parts
    if compiler().works:
        _swiglu_gradient(grad, gate, up, gate_grad, up_grad)
        return result
    torch.mul(grad, up, out=gate_grad)
    torch.ops.aten.silu_backward.grad_input(gate_grad, gate, grad_input=gate_grad)
    torch.ops.aten.silu.out(gate, out=up_grad)
    up_grad.mul_(grad)
    return result


@compiled
def _swiglu_gradient(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, gate_grad: torch.Tensor, up_grad: torch.Tensor
) -> None:
    """The same as torch.compile makes one kernel of, which reads everything once: each part is given as it lies."""
    gate_grad.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    up_grad.copy_(grad * F.silu(gate))


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        tokens, groups, heads_a_group, head_dim = projected.shape
        query = projected.new_empty(tokens, groups * (heads_a_group - 2), head_dim)
        key, value = (projected.new_empty(tokens, groups, head_dim) for _ in range(2))
        _rotate_apart(_views_of_projection(projected), _views_of_heads(query, key, value), cos, sin)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        query_grad, key_grad, _ = grads
        tokens, groups, head_dim = key_grad.shape
        projected_grad = key_grad.new_empty(tokens, groups, query_grad.size(1) // groups + 2, head_dim)
        # A rotation's transpose turns the other way.
        _rotate_together(_views_of_heads(*grads), _views_of_projection(projected_grad), cos, -sin)
        return projected_grad, None, None


# The first and second halves of queries and of keys, and the values: five views [tokens, groups, heads, width].
Views = tuple[torch.Tensor, ...]


def _views_of_projection(projected: torch.Tensor) -> Views:
    queries, keys, values = projected[:, :, :-2], projected[:, :, -2:-1], projected[:, :, -1:]
    return *queries.chunk(2, dim=-1), *keys.chunk(2, dim=-1), values


def _views_of_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Views:
    queries = query.view(query.size(0), key.size(1), -1, query.size(-1))
    return *queries.chunk(2, dim=-1), *key[:, :, None].chunk(2, dim=-1), value[:, :, None]


def _rotate(source: Views, target: Views, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Into halves as they lie: of torch.cat, torch.compile makes a kernel that reads its operands twice."""
    for half in (0, 2):  # of queries, of keys
        first, second = source[half : half + 2]
        target[half].copy_(first * cos - second * sin)
        target[half + 1].copy_(second * cos + first * sin)
    target[-1].copy_(source[-1])


# Two functions: torch.compile would make of one that meets both layouts a slower kernel, for any.
@compiled
def _rotate_apart(projection: Views, heads: Views, cos: torch.Tensor, sin: torch.Tensor) -> None:
    _rotate(projection, heads, cos, sin)


@compiled
def _rotate_together(heads: Views, projection: Views, cos: torch.Tensor, sin: torch.Tensor) -> None:
    _rotate(heads, projection, cos, sin)
