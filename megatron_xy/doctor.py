"""`megatron-xy doctor`: what this machine has, what would be used and why, what is patched, with accepted versions."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from megatron_xy import device, waits
from megatron_xy.config import ModelConfig
from megatron_xy.flops import peak_flops
from megatron_xy.model.attention_backends import BACKENDS, examine
from megatron_xy.model.kernels import compiler
from megatron_xy.model.layer_spec import DTYPES, choose_layers

ACCEPTED = {
    "torch": ">= 2.6 (tested: 2.13)",
    "megatron-core": ">= 0.16.1, < 0.20 (0.19 wants Python 3.12)",
    "transformers": ">= 4.50, for exports and their check",
    "transformer-engine": ">= 1.13, optional: layer_spec transformer_engine, and its attention",
    "flash-attn": ">= 2.5, optional: attention",
    "flash-attn-3": ">= 3.0 (flash_attn_interface), optional: attention on Hopper",
    "apex": "any, optional and not used: AdamW is torch's fused one",
}
# Any model of usual width: what is chosen depends on the dtype and the width of a head alone.
SHAPE = ModelConfig(num_layers=1, hidden_size=128, ffn_hidden_size=128, num_attention_heads=1, vocab_size=128)


def diagnose() -> dict[str, Any]:
    """The findings as plain values."""
    dtypes = ("fp32",) if device.is_cpu() else ("bf16", "fp32")
    deterministic = torch.are_deterministic_algorithms_enabled()
    attention = {
        dtype: [
            examine(backend, DTYPES[dtype], SHAPE.head_dim, deterministic=deterministic)._asdict()
            for backend in BACKENDS
        ]
        for dtype in dtypes
    }
    layers = choose_layers(SHAPE.model_copy(update={"params_dtype": dtypes[0]}))
    peak = None if device.is_cpu() else peak_flops(device.name())
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: {"found": _version(name), "accepted": accepted} for name, accepted in ACCEPTED.items()},
        "device": {
            "name": device.name(),
            "backend": device.backend(),
            "compute_capability": list(device.compute_capability()),
            "peak_bf16_flops": peak,
            "threads": torch.get_num_threads(),
        },
        "layer_spec": {"auto": layers.layer_spec, "reason": layers.reason},
        "attention": {
            dtype: {"chosen": next(found["name"] for found in findings if found["usable"]), "findings": findings}
            for dtype, findings in attention.items()
        },
        "compile": compiler()._asdict(),
        "optimizer": "torch's AdamW, fused",
        "patched": device.patched(),
        "wrapped": waits.wrapped(),
    }


def told(findings: dict[str, Any]) -> str:
    """The findings as lines to read."""
    where = findings["device"]
    lines = [f"python {findings['python']} on {findings['system']}"]
    for name, package in findings["packages"].items():
        lines.append(f"{name}: {package['found'] or 'not installed'}; accepted: {package['accepted']}")
    lines.append(f"device: {where['name']}, backend {where['backend']}, {where['threads']} thread(s) a process")
    if where["peak_bf16_flops"]:
        lines.append(f"  peak for MFU: {where['peak_bf16_flops'] / 1e12:.0f} TFLOP/s dense bf16")
    lines.append(f"layer_spec auto: {findings['layer_spec']['auto']} ({findings['layer_spec']['reason']})")
    for dtype, attention in findings["attention"].items():
        lines.append(f"attention in {dtype}: {attention['chosen']}")
        lines += [f"  {found['name']}: {found['reason']}" for found in attention["findings"]]
    use = "compiled" if findings["compile"]["works"] else "not compiled"
    lines.append(f"RMSNorm, SwiGLU and RoPE: {use} ({findings['compile']['reason']})")
    lines.append(f"optimizer: {findings['optimizer']}")
    if findings["patched"]:
        lines.append("patched, since no GPU is there and megatron-core calls it:")
        lines += [f"  {name}" for name in findings["patched"]]
    else:
        lines.append("patched: nothing")
    lines.append("wrapped in a training process, to count and time waits (waits.py): torch.distributed's")
    lines.append("  " + ", ".join(findings["wrapped"]))
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
