"""Every way to attend over packed documents, best first, and the choice among those that work on this device.

All take queries [tokens, heads, head_dim], keys and values [tokens, groups, head_dim] and the borders of the documents
in `PackedDocuments`, and return [tokens, heads, head_dim]: causal within each document. None makes an S x S mask, none
repeats keys and values for grouped queries where its kernel knows groups. On a GPU a backend is chosen only after it
has agreed, forward and backward, with scaled dot product attention on a small case.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from megatron_xy import device
from megatron_xy.model.cudnn_attention import attend_by_torch_cudnn
from megatron_xy.model.rotary import PackedDocuments
from megatron_xy.model.torch_attention import HALF_PRECISION, attend_by_sdpa, attend_by_torch_varlen

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PackedDocuments, float | None], torch.Tensor]
TOLERANCE = 0.05  # of the self-test, relative to the largest value, in bf16
SELF_TEST = (70, 1, 57, 1100, 1100, 1024)  # lengths of its documents
NOT_DETERMINISTIC = {
    "transformer_engine": " unless told by an environment variable at start",
    "torch_cudnn": ": its backward pass adds up in any order",
}


class Backend(NamedTuple):
    """One way to attend; `obstacle(dtype, head_dim)` says what keeps it from being used, None if nothing is known."""

    name: str
    attend: Attend
    obstacle: Callable[[torch.dtype, int], str | None]
    tried: Attend | None = None  # in the self-test, where `attend` would do something else with so little


class Finding(NamedTuple):
    """What was found out about a backend on this device."""

    name: str
    usable: bool
    reason: str


class Choice(NamedTuple):
    """The backend in use, and what was found about it and those before it."""

    name: str
    attend: Attend
    findings: tuple[Finding, ...]


@functools.cache
def choose_backend(dtype: torch.dtype, head_dim: int, *, deterministic: bool) -> Choice:
    """The first backend that works here for heads of this width and dtype. Asked once a process and case."""
    findings: list[Finding] = []
    for backend in BACKENDS:
        finding = examine(backend, dtype, head_dim, deterministic=deterministic)
        findings.append(finding)
        if finding.usable:
            return Choice(backend.name, backend.attend, tuple(findings))
    raise AssertionError("scaled dot product attention has no obstacle")


def examine(backend: Backend, dtype: torch.dtype, head_dim: int, *, deterministic: bool) -> Finding:
    """Whether the backend works on this device, and how that is known."""
    obstacle = backend.obstacle(dtype, head_dim)
    if obstacle is None and deterministic and backend.name in NOT_DETERMINISTIC:
        obstacle = f"not deterministic{NOT_DETERMINISTIC[backend.name]}"
    if obstacle is not None:
        return Finding(backend.name, False, obstacle)
    if backend.name == "sdpa":
        return Finding(backend.name, True, "torch's scaled dot product attention, document by document")
    try:
        difference = _difference_from_sdpa(backend.tried or backend.attend, dtype, head_dim)
    except Exception as error:  # whatever a foreign kernel says when it does not run here: it is reported, not used
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Finding(backend.name, False, f"fails its self-test: {lines[0]}")
    if not difference < TOLERANCE:
        return Finding(backend.name, False, f"differs from scaled dot product attention by {difference:.3g}")
    return Finding(backend.name, True, f"agrees with scaled dot product attention to {difference:.1g}")


def attend_by_flash_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedDocuments,
    scale: float | None,
    *,
    module: str,
) -> torch.Tensor:
    """A kernel for packed sequences: of flash-attn 2 (`flash_attn`), or of 3 for Hopper (`flash_attn_interface`)."""
    result = importlib.import_module(module).flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=packed.cu_seqlens_q,
        cu_seqlens_k=packed.cu_seqlens_kv,
        max_seqlen_q=packed.max_seqlen_q,
        max_seqlen_k=packed.max_seqlen_kv,
        softmax_scale=scale,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    output: torch.Tensor = result[0] if isinstance(result, tuple) else result  # early versions of 3 add the lse
    return output


def attend_by_transformer_engine(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedDocuments, scale: float | None
) -> torch.Tensor:
    """Transformer Engine's attention, which is cuDNN's on Hopper."""
    module = _transformer_engine_attention(query.size(1), key.size(1), query.size(2), scale)
    output: torch.Tensor = module(
        query,
        key.contiguous(),
        value.contiguous(),
        qkv_format="thd",
        attn_mask_type="padding_causal",
        cu_seqlens_q=packed.cu_seqlens_q,
        cu_seqlens_kv=packed.cu_seqlens_kv,
        max_seqlen_q=packed.max_seqlen_q,
        max_seqlen_kv=packed.max_seqlen_kv,
    )
    return output.view(query.shape)


@functools.cache
def _transformer_engine_attention(heads: int, groups: int, head_dim: int, scale: float | None) -> Any:
    engine: Any = importlib.import_module("transformer_engine.pytorch")
    return engine.DotProductAttention(
        heads,
        head_dim,
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        softmax_scale=scale,
    )


def _difference_from_sdpa(attend: Attend, dtype: torch.dtype, head_dim: int) -> float:
    """Largest difference, relative to the largest value, of output and gradients from those in fp32."""
    target = device.current()
    packed = PackedDocuments.of(SELF_TEST)
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(SELF_TEST), heads, head_dim) for heads in (4, 2, 2, 4)]
    drawn = [torch.randn(shape, generator=generator).to(target, dtype) for shape in shapes]
    results = []
    for way, precision in ((attend, dtype), (attend_by_sdpa, torch.float32)):
        *inputs, grad = (tensor.detach().to(precision) for tensor in drawn)
        inputs = [tensor.requires_grad_() for tensor in inputs]
        with torch.enable_grad():
            output = way(inputs[0], inputs[1], inputs[2], packed, None)
            gradients = torch.autograd.grad(output, inputs, grad)
        results.append([output.detach(), *gradients])
    differences = [
        (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
        for ours, theirs in zip(*results, strict=True)
    ]
    # Not a number where one of them is none, which Python's max may pass over.
    return torch.stack(differences).max().item()


def _obstacle_of_flash(module: str | None) -> Callable[[torch.dtype, int], str | None]:
    """Obstacles that all flash kernels share: the device, the dtype, the width of a head, the package itself."""

    def obstacle(dtype: torch.dtype, head_dim: int) -> str | None:
        if module is not None and importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        if device.is_cpu():
            return "needs a GPU"
        if dtype not in HALF_PRECISION:
            return f"needs bf16; the model is {str(dtype).removeprefix('torch.')}"
        if head_dim % 8 or head_dim > 256:
            return f"heads of {head_dim} are not a multiple of 8 up to 256"
        return None

    return obstacle


def _obstacle_of_flash_attn_3(dtype: torch.dtype, head_dim: int) -> str | None:
    obstacle = _obstacle_of_flash("flash_attn_interface")(dtype, head_dim)
    if obstacle is None and (major := device.compute_capability()[0]) != 9:
        return f"needs Hopper (compute capability 9); this GPU has {major}"
    return obstacle


def _obstacle_of_torch_cudnn(dtype: torch.dtype, head_dim: int) -> str | None:
    obstacle = _obstacle_of_flash(None)(dtype, head_dim)
    if obstacle is not None:
        return obstacle
    if head_dim > 128:
        return f"heads of {head_dim} are wider than 128"
    if (major := device.compute_capability()[0]) < 9:
        return f"no faster than flash kernels before Hopper (compute capability 9); this GPU has {major}"
    return None


BACKENDS = (
    Backend(
        "flash_attn_3",
        functools.partial(attend_by_flash_attn, module="flash_attn_interface"),
        _obstacle_of_flash_attn_3,
    ),
    Backend("transformer_engine", attend_by_transformer_engine, _obstacle_of_flash("transformer_engine")),
    Backend(
        "torch_cudnn",
        attend_by_torch_cudnn,
        _obstacle_of_torch_cudnn,
        tried=functools.partial(attend_by_torch_cudnn, least_work=0),
    ),
    Backend(
        "flash_attn_2",
        functools.partial(attend_by_flash_attn, module="flash_attn"),
        _obstacle_of_flash("flash_attn"),
    ),
    Backend("torch_varlen", attend_by_torch_varlen, _obstacle_of_flash(None)),
    Backend("sdpa", attend_by_sdpa, lambda dtype, head_dim: None),
)
