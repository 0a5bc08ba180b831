"""One measurement in a process of its own: a request as JSON in, its result as JSON out.

    python -m megatron_xy.bench.measure speed|losses|attention REQUEST.json RESULT.json

A process of its own keeps what one measurement leaves behind, memory above all, out of the next one, and lets a GPU be
hidden from it.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_xy import device


def main() -> int:
    """Settles the device, measures, writes the result, or {"error": what went wrong}."""
    name, asked, answered = sys.argv[1:]
    request = json.loads(Path(asked).read_text(encoding="utf-8"))
    measurement = {"speed": measure_speed, "losses": measure_losses, "attention": measure_attention}[name]
    try:
        device.start(num_threads=request["num_threads"])
        answer = {**measurement(request), "device": device.name(), "device_type": device.current().type}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    Path(answered).write_text(json.dumps(answer), encoding="utf-8")
    return 0


def measure_speed(request: dict[str, Any]) -> dict[str, Any]:
    """Whole training steps of a model at each bucket, one document a sample: tokens/s, MFU, memory.

    request: model, buckets, micro_batch_tokens, num_micro_batches, warmup_steps, steps.
    """
    from megatron_xy.flops import flops_per_token, num_parameters
    from megatron_xy.peak import peak_rate
    from megatron_xy.training.train_step import train_step

    role, choice = _role(request, draw=False)
    _fill(role)
    peak = peak_rate()
    rows = []
    for bucket in request["buckets"]:
        batches = [
            full_samples(
                bucket=bucket,
                micro_batch_tokens=request["micro_batch_tokens"],
                vocab_size=role.model.vocab_size,
                seed=seed,
            )
            for seed in range(request["num_micro_batches"])
        ]
        seconds, cpu_seconds = [], []
        for _ in range(request["warmup_steps"] + request["steps"]):
            began, cpu_began = time.perf_counter(), time.process_time()
            result = train_step(role, batches, num_sources=1, lr=1e-4, clip_grad=1.0)
            device.synchronize()
            seconds.append(time.perf_counter() - began)
            cpu_seconds.append(time.process_time() - cpu_began)
        assert math.isfinite(result.loss), "a step of the benchmark ended in a loss that is no number"
        seconds, cpu_seconds = seconds[request["warmup_steps"] :], cpu_seconds[request["warmup_steps"] :]
        tokens = request["micro_batch_tokens"] * request["num_micro_batches"]
        flops = flops_per_token(role.model, attention_length=bucket)
        median = statistics.median(seconds)
        rows.append(
            {
                "bucket": bucket,
                "tokens_per_second": tokens / median,
                "tokens_per_cpu_second": tokens / statistics.median(cpu_seconds),
                "step_seconds": median,
                "step_seconds_spread": [min(seconds), max(seconds)],
                "flops_per_token": flops,
                "mfu": tokens * flops / (median * peak) if peak else None,
                "mfu_by_cpu_seconds": (
                    tokens * flops / (statistics.median(cpu_seconds) * peak) if peak and device.is_cpu() else None
                ),
                "peak_memory_bytes": device.peak_memory_bytes(),
            }
        )
    return {
        "parameters": num_parameters(role.model),
        "peak_flops": peak,
        "layers": str(choice),
        "mfu_convention": "causal attention counted by half its square",
        "buckets": rows,
    }


def measure_losses(request: dict[str, Any]) -> dict[str, Any]:
    """Losses and gradient norms of the first steps on packed documents, from weights drawn by name.

    request: model, optimizer, micro_batch_tokens, steps, lr.
    """
    from megatron_xy.data.dataset import Sample, collate
    from megatron_xy.training.train_step import train_step

    role, choice = _role(request)
    width = request["micro_batch_tokens"]
    losses, norms = [], []
    for step in range(request["steps"]):
        generator = np.random.default_rng(step)
        # Learnable at once: few tokens, each mostly followed by the same other one.
        tokens = (np.cumsum(generator.integers(0, 2, width)) * 7 + generator.integers(0, 2, width)) % 97
        cuts = np.sort(generator.choice(np.arange(1, width), size=3, replace=False))
        lengths = np.diff(np.concatenate([[0], cuts, [width]]))
        batch = collate(
            [Sample(tokens.astype(np.int64), lengths)],
            source_indices=[0],
            bucket=width,
            micro_batch_tokens=width,
            split_documents=True,
        )
        result = train_step(role, [batch], num_sources=1, lr=request["lr"], clip_grad=1.0)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return {"losses": losses, "grad_norms": norms, "layers": str(choice)}


def measure_attention(request: dict[str, Any]) -> dict[str, Any]:
    """Every attention backend on rows of documents, forward and backward, with its TFLOP/s.

    request: heads, groups, head_dim, dtype, rows (each the lengths of its documents, together the same), repeats.
    """
    from megatron_xy.model.attention_backends import BACKENDS, examine
    from megatron_xy.model.layer_spec import DTYPES
    from megatron_xy.model.rotary import PackedDocuments

    dtype, head_dim = DTYPES[request["dtype"]], request["head_dim"]
    generator = torch.Generator().manual_seed(0)
    drawn = [
        torch.randn(sum(request["rows"][0]), heads, head_dim, generator=generator).to(device.current(), dtype)
        for heads in (request["heads"], request["groups"], request["groups"], request["heads"])
    ]
    found = []
    for backend in BACKENDS:
        finding = examine(backend, dtype, head_dim, deterministic=False)
        rows = []
        for lengths in request["rows"] if finding.usable else ():
            packed = PackedDocuments.of(lengths)
            seconds = []
            for _ in range(1 + request["repeats"]):
                inputs = [tensor.detach().requires_grad_() for tensor in drawn[:3]]
                device.synchronize()
                began = time.perf_counter()
                output = backend.attend(inputs[0], inputs[1], inputs[2], packed, None)
                torch.autograd.grad(output, inputs, drawn[3])
                device.synchronize()
                seconds.append(time.perf_counter() - began)
            # Causal, forward and backward.
            flops = 6 * request["heads"] * head_dim * sum(length**2 for length in lengths)
            median = statistics.median(seconds[1:])
            lowest, highest = min(lengths), max(lengths)
            told = f"{len(lengths)} of {lowest}" if lowest == highest else f"{len(lengths)} of {lowest} to {highest}"
            rows.append({"documents": told, "seconds": median, "tflops": flops / median / 1e12})
        found.append({**finding._asdict(), "rows": rows})
    return {"backends": found}


def _role(request: dict[str, Any], *, draw: bool = True) -> tuple[Any, Any]:
    """A role over this one process, and the layers that it is made of; draw: with weights, the same on any device."""
    from megatron_xy import parallel
    from megatron_xy.config import ModelConfig, OptimizerConfig
    from megatron_xy.model.layer_spec import choose_layers
    from megatron_xy.role import build_role_alone

    parallel.start_alone()
    model = ModelConfig(**request["model"])
    optimizer = OptimizerConfig(**request.get("optimizer", {}))
    return build_role_alone(model, optimizer=optimizer, seed=1, draw=draw), choose_layers(model)


@torch.no_grad()
def _fill(role: Any) -> None:
    """Weights of usual size, drawn on the device: of a GPU's model the host would draw for ten seconds."""
    owned = role.owned_parameters()
    for named in role.named_parameters():
        weight = named.parameter
        if weight.dim() > 1:
            weight.normal_(std=0.02)
        else:
            weight.fill_(1.0)
        if owned[weight].has_main_weights:
            owned[weight].main.copy_(owned[weight].part_of(weight))


def full_samples(*, bucket: int, micro_batch_tokens: int, vocab_size: int, seed: int) -> Any:
    """A micro-batch of full samples, each one document of random tokens."""
    from megatron_xy.data.dataset import Sample, collate

    generator = np.random.default_rng(seed)
    count = micro_batch_tokens // bucket
    tokens = generator.integers(0, vocab_size, (count, bucket))
    return collate(
        [Sample(row, np.array([bucket])) for row in tokens],
        source_indices=[0] * count,
        bucket=bucket,
        micro_batch_tokens=micro_batch_tokens,
        split_documents=True,
    )


if __name__ == "__main__":
    sys.exit(main())
