"""`megatron-xy doctor`: what this machine has, what would be used and why, what is patched, with accepted versions."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

import torch

from megatron_xy import device

ACCEPTED = {
    "torch": ">= 2.6 (tested: 2.13)",
    "megatron-core": ">= 0.16.1, < 0.20 (0.19 wants Python 3.12)",
    "transformers": ">= 4.50, for exports and their check",
}
OPTIONAL = {
    "transformer-engine": "not used yet; layer_spec auto takes `torch`",
    "flash-attn": "not used yet; attention is torch's scaled dot product attention",
    "apex": "not needed: AdamW is torch's fused one",
}


def diagnose() -> Iterator[str]:
    """The findings, line by line."""
    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()}"
    for package, accepted in ACCEPTED.items():
        yield f"{package}: {_version(package)}; accepted: {accepted}"
    for package, use in OPTIONAL.items():
        yield f"{package} (optional): {_version(package)}; {use}"
    yield f"device: {device.name()}, backend {device.backend()}, {torch.get_num_threads()} thread(s) a process"
    if device.is_cpu():
        yield "patched: torch.cuda, the device argument of torch's factory functions, Tensor.cuda and Tensor.type,"
        yield "  because no GPU is there and megatron-core calls them"
    else:
        yield "patched: nothing in torch.cuda"
    yield "in training also: torch.distributed's Work.wait and its groups' methods, so that the watchdog sees waits"
    yield "layer_spec auto: torch (RMSNorm and scaled dot product attention of torch)"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
