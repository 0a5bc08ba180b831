"""`megatron-xy doctor`: what this machine has and whether it will do, what would be used and why, what is patched.

Under torchrun all ranks look, rank 0 tells of every host, and the links between the ranks are measured.
"""

from __future__ import annotations

import platform
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_xy import device, parallel
from megatron_xy.compiling import compiler
from megatron_xy.config import ModelConfig
from megatron_xy.doctor import links
from megatron_xy.doctor.health import Finding, machine_findings
from megatron_xy.flops import peak_flops
from megatron_xy.model.attention_backends import BACKENDS, examine
from megatron_xy.model.layer_spec import DTYPES, choose_layers
from megatron_xy.packages import PACKAGES, installed_versions, version_of
from megatron_xy.runtime import environment, waits

LINK_SECONDS = 300.0  # of a collective of the links' measurement
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
        "packages": {
            name: {"found": version_of(name), "accepted": "; ".join(filter(None, (accepted.specifier, accepted.note)))}
            for name, accepted in PACKAGES.items()
        },
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
        if not PACKAGES[name].is_needed:  # those are told with the machine
            lines.append(f"{name}: {package['found'] or 'not installed'}; {package['accepted']}")
    lines.append(f"device: {where['name']}, backend {where['backend']}, {where['threads']} thread(s) a process")
    if where["peak_bf16_flops"]:
        lines.append(f"  peak for MFU: {where['peak_bf16_flops'] / 1e12:.0f} TFLOP/s dense bf16")
    lines.append(f"layer_spec auto: {findings['layer_spec']['auto']} ({findings['layer_spec']['reason']})")
    for dtype, attention in findings["attention"].items():
        lines.append(f"attention in {dtype}: {attention['chosen']}")
        lines += [f"  {found['name']}: {found['reason']}" for found in attention["findings"]]
    use = "compiled" if findings["compile"]["works"] else "not compiled"
    lines.append(f"RMSNorm, SwiGLU, RoPE and loss: {use} ({findings['compile']['reason']})")
    lines.append(f"optimizer: {findings['optimizer']}")
    if findings["patched"]:
        lines.append("patched, since no GPU is there and megatron-core calls it:")
        lines += [f"  {name}" for name in findings["patched"]]
    else:
        lines.append("patched: nothing")
    lines.append("wrapped in a training process, to count and time waits (waits.py): torch.distributed's")
    lines.append("  " + ", ".join(findings["wrapped"]))
    return "\n".join(lines)


def examine_hosts(folder: Path) -> list[dict[str, Any]]:
    """The findings of every host, and of the links under torchrun, as plain values; the same on every rank.

    folder: where the disk is tried.
    """
    host, is_first = socket.gethostname(), environment.local_rank() == 0
    mine = [*machine_findings(folder, has_gpu=not device.is_cpu()), _gpu()] if is_first else []
    own = [{"host": host, **asdict(finding)} for finding in mine]
    if not environment.is_set() or environment.world_size() == 1:
        return own
    parallel.start_distributed(timeout_seconds=LINK_SECONDS)
    deciding = {name: found for name, found in installed_versions().items() if PACKAGES[name].lowest is not None}
    shared = [links.same_versions(deciding), *links.bandwidth()]
    found: list[dict[str, Any]] = [entry for entries in parallel.gathered_values(own) for entry in entries]
    first: list[dict[str, Any]] = parallel.gathered_values([{"host": "all", **asdict(finding)} for finding in shared])[
        0
    ]
    parallel.stop_distributed()
    return found + first


def health_told(entries: list[dict[str, Any]]) -> str:
    """The hosts' findings, a line each."""
    lines = []
    for entry in entries:
        finding = Finding(**{name: entry[name] for name in ("verdict", "subject", "found", "remedy")})
        lines.append(f"{entry['host']}: {finding}")
    return "\n".join(lines)


def _gpu() -> Finding:
    if device.is_cpu():
        return Finding("ok", "GPU", "none: computing on the CPU over gloo")
    return Finding("ok", "GPU", f"{device.count()} x {device.name()}")
