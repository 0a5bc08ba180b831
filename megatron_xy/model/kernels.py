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


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE in the halves convention of HF and Megatron.

    heads [tokens, 1, heads, head_dim]; cos, sin [tokens, 1, 1, head_dim / 2] fp32. Keeps cos and sin, which all layers
    of a micro-batch share.
    """
    rotated: torch.Tensor = _Rotate.apply(heads, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


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
    if compiler().works:
        return _swiglu_gradient(grad, gate_and_up)  # type: ignore[no-any-return]
    gate, up = gate_and_up.chunk(2, dim=-1)
    result = torch.empty_like(gate_and_up)
    gate_grad, up_grad = result.chunk(2, dim=-1)  # written in place: on a CPU half the time of joining two parts
    torch.mul(grad, up, out=gate_grad)
    torch.ops.aten.silu_backward.grad_input(gate_grad, gate, grad_input=gate_grad)
    torch.ops.aten.silu.out(gate, out=up_grad)
    up_grad.mul_(grad)
    return result


@compiled
def _swiglu_gradient(grad: torch.Tensor, gate_and_up: torch.Tensor) -> torch.Tensor:
    """The same without writing in place, which torch.compile does not make one kernel of."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)], dim=-1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(heads, cos, sin)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None  # a rotation's transpose turns the other way


@compiled
def _rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(heads.dtype)
