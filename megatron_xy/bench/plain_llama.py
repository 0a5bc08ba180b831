"""The plain loop that this framework is compared with: transformers' LlamaForCausalLM and torch's AdamW, one process.

Started by its path in a process of its own, without this package and without the stand-in for CUDA (transformers'
RoPE does not survive it): a request as JSON comes in, losses, gradient norms and seconds of every step go out as JSON.

    python plain_llama.py REQUEST.json RESULT.json
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> int:
    """Trains as the request says and writes the result."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(train(request)), encoding="utf-8")
    return 0


def train(request: dict[str, Any]) -> dict[str, Any]:
    """One update a step: mean loss over the labels of all its documents, gradient norm before clipping, seconds.

    request: folder (HF weights, fp32) or config (LlamaConfig's fields, fresh weights); device; num_threads; dtype fp32
    or bf16 (fp32 weights under autocast); steps [step][document][token]; micro_batch_tokens (documents of one length
    are batched up to it); learning_rates [step]; optimizer (a RUN.yaml's section; its weight_decay not on norms).
    """
    device = torch.device(request["device"])
    torch.set_num_threads(request["num_threads"])
    model = _model(request).to(device).train()
    optimizer = _optimizer(model, request)
    result: dict[str, Any] = {
        "losses": [],
        "grad_norms": [],
        "seconds": [],
        "cpu_seconds": [],
        "torch": torch.__version__,
        "attention": model.config._attn_implementation,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    for documents, learning_rate in zip(request["steps"], request["learning_rates"], strict=True):
        began, cpu_began = time.perf_counter(), time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        loss, grad_norm = _step(model, optimizer, documents, device=device, request=request)
        result["losses"].append(loss)
        result["grad_norms"].append(grad_norm)
        result["seconds"].append(time.perf_counter() - began)
        result["cpu_seconds"].append(time.process_time() - cpu_began)
    result["peak_memory_bytes"] = _peak_memory_bytes(device)
    return result


def _model(request: dict[str, Any]) -> Any:
    if request.get("folder"):
        return LlamaForCausalLM.from_pretrained(request["folder"], dtype=torch.float32)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**request["config"]))


def _optimizer(model: torch.nn.Module, request: dict[str, Any]) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    settings = request["optimizer"]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings["weight_decay"]}, {"params": norms, "weight_decay": 0.0}],
        lr=0.0,
        betas=(settings["adam_beta1"], settings["adam_beta2"]),
        eps=settings["adam_eps"],
        fused=True,
    )


def _step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    documents: list[list[int]],
    *,
    device: torch.device,
    request: dict[str, Any],
) -> tuple[float, float]:
    num_labels = sum(len(document) - 1 for document in documents)
    total = torch.zeros((), device=device)
    for rows in _batches(documents, micro_batch_tokens=request["micro_batch_tokens"], device=device):
        with torch.autocast(device.type, torch.bfloat16, enabled=request["dtype"] == "bf16"):
            logits = model(rows, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
        )
        (losses / num_labels).backward()  # type: ignore[no-untyped-call]
        total += losses.detach()
    limit = request["optimizer"]["clip_grad"] or float("inf")
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    optimizer.step()
    optimizer.zero_grad()
    return total.item() / num_labels, grad_norm.item()


def _batches(documents: list[list[int]], *, micro_batch_tokens: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Rows [documents, length] of one length; a document of one token has no label and is left out."""
    by_length = itertools.groupby(sorted(documents, key=len), key=len)
    for length, group in by_length:
        rows = list(group) if length > 1 else []
        per_batch = max(1, micro_batch_tokens // length)
        for first in range(0, len(rows), per_batch):
            yield torch.tensor(rows[first : first + per_batch], device=device)


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak: int = torch.get_device_module(device).max_memory_allocated()
    return peak


if __name__ == "__main__":
    sys.exit(main())
