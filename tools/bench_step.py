"""How much does the training loop cost on top of megatron-core? Our step against a bare loop over the same model.

One process, one thread, data in memory; the two are timed in turn and compared pair by pair, in CPU seconds.

    python tools/bench_step.py [--pairs 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_xy import device

device.start(num_threads=1)

import numpy as np  # noqa: E402

from megatron_xy import mcore, parallel  # noqa: E402
from megatron_xy.config import ModelConfig, OptimizerConfig  # noqa: E402
from megatron_xy.data.dataset import MicroBatch, Sample, collate  # noqa: E402
from megatron_xy.losses import token_cross_entropy  # noqa: E402
from megatron_xy.role import Role, build_role_alone  # noqa: E402
from megatron_xy.training.train_step import forward, on_device, train_step  # noqa: E402

MODEL = ModelConfig(
    num_layers=4, hidden_size=256, ffn_hidden_size=704, num_attention_heads=8, num_query_groups=4, vocab_size=8192
)
SEQUENCE, NUM_MICRO_BATCHES = 1024, 4


def main() -> int:
    """Prints the ratio of CPU seconds and its spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    parallel.start_alone()
    batches = [made_up_batch(seed) for seed in range(NUM_MICRO_BATCHES)]
    # The same model twice: neither step sees what the other left behind.
    ours, bare = (build_role_alone(MODEL, optimizer=OptimizerConfig(), seed=1) for _ in range(2))
    steps: list[tuple[str, Callable[[], None]]] = [
        ("ours", lambda: our_step(ours, batches)),
        ("bare", lambda: bare_step(bare, batches)),
    ]
    for _, step in steps:
        step()
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    for _ in range(options.pairs):
        for name, step in steps:
            began = time.process_time()
            step()
            seconds[name].append(time.process_time() - began)
    ratios = sorted(a / b for a, b in zip(seconds["ours"], seconds["bare"], strict=True))
    result: dict[str, Any] = {
        "ratio_median": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "ours_cpu_seconds_median": statistics.median(seconds["ours"]),
        "bare_cpu_seconds_median": statistics.median(seconds["bare"]),
        "pairs": options.pairs,
        "torch": torch.__version__,
        "megatron_core": mcore.VERSION,
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }
    print(json.dumps(result) if options.json else "\n".join(f"{name}: {value}" for name, value in result.items()))
    return 0


def made_up_batch(seed: int) -> MicroBatch:
    """One full sample of two documents."""
    tokens = np.random.default_rng(seed).integers(0, 8192, SEQUENCE)
    sample = Sample(tokens, np.array([SEQUENCE // 2, SEQUENCE // 2]))
    return collate(
        [sample],
        source_indices=[0],
        bucket=SEQUENCE,
        micro_batch_tokens=SEQUENCE,
        split_documents=True,
    )


def our_step(role: Role, batches: list[MicroBatch]) -> None:
    """What the trainer calls."""
    train_step(role, batches, num_sources=1, lr=1e-4, clip_grad=1.0)


def bare_step(role: Role, batches: list[MicroBatch]) -> None:
    """Forward, backward and update of the same megatron-core model, nothing else."""
    role.chunks[0].zero_grad_buffer()  # type: ignore[operator]
    for batch in batches:
        moved = on_device(batch)
        logits = forward(role.chunks[0], moved)
        losses = token_cross_entropy(logits, moved.labels, vocab_size=8192, tp_group=role.groups.collection.tp)
        (losses * moved.loss_mask).sum().backward()  # type: ignore[no-untyped-call]
    assert role.optimizer is not None, "built with one"
    role.chunks[0].scale_gradients(1 / sum(batch.loss_mask.sum() for batch in batches))  # type: ignore[operator]
    role.optimizer.step()


if __name__ == "__main__":
    sys.exit(main())
