"""How long does a checkpoint hold up training, and how fast is it written? Against dd with fsync on the same disk.

One process; weights and AdamW moments of a state of --gigabytes. In turn, --rounds times: dd of the same bytes, a save
that the caller waits for, and a save in the background while a forward and backward pass runs, whose update then waits
for the copy. Medians and spread.

    python tools/bench_checkpoint.py [--gigabytes 1] [--rounds 5] [--folder DIR] [--json]
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megatron_xy import device

device.start(num_threads=1)

from megatron_xy import mcore, parallel  # noqa: E402
from megatron_xy.bench.measure import full_samples  # noqa: E402
from megatron_xy.checkpoint.files import TrainingState  # noqa: E402
from megatron_xy.checkpoint.writer import CheckpointWriter  # noqa: E402
from megatron_xy.config import ModelConfig, OptimizerConfig  # noqa: E402
from megatron_xy.data.dataset import MicroBatch  # noqa: E402
from megatron_xy.role import Role, build_role_alone  # noqa: E402
from megatron_xy.training.train_step import train_step  # noqa: E402

BYTES_PER_PARAMETER = 12  # fp32 weights and two moments
HIDDEN_SIZE, VOCAB_SIZE, SEQUENCE, NUM_MICRO_BATCHES = 1024, 8192, 256, 2


def main() -> int:
    """Prints seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk in question; default: a temporary one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    parallel.start_alone()
    role = build(gigabytes=options.gigabytes)
    batches = [
        full_samples(bucket=SEQUENCE, micro_batch_tokens=SEQUENCE, vocab_size=VOCAB_SIZE, seed=seed)
        for seed in range(NUM_MICRO_BATCHES)
    ]
    step(role, batches)  # the moments exist from here on
    num_bytes = BYTES_PER_PARAMETER * sum(named.parameter.numel() for named in role.named_parameters())
    seconds: dict[str, list[float]] = {"dd": [], "blocking_write": [], "stall": [], "step": []}
    folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=options.folder))
    try:
        writers = {kind: writer(folder / str(kind), asynchronous=kind) for kind in (True, False)}
        save(writers[True], role)  # the first one makes the buffers
        writers[True].finish(role.groups)
        for _ in range(options.rounds):
            seconds["dd"].append(dd(folder / "dd", num_bytes))
            seconds["blocking_write"].append(save(writers[False], role))
            held = save(writers[True], role)
            waits: list[float] = []
            seconds["step"].append(
                step(role, batches, before_update=lambda w=waits: w.append(writers[True].before_update()))
            )
            seconds["stall"].append(held + sum(waits))
            writers[True].finish(role.groups)
    finally:
        shutil.rmtree(folder)
    report(seconds, num_bytes=num_bytes, as_json=options.json)
    return 0


def report(seconds: dict[str, list[float]], *, num_bytes: int, as_json: bool) -> None:
    """Medians, spread and the two ratios that count."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    result: dict[str, Any] = {
        "bytes": num_bytes,
        "seconds": {name: {"median": median[name], "all": values} for name, values in seconds.items()},
        "stall_of_blocking_write": median["stall"] / median["blocking_write"],
        "speed_of_dd": median["dd"] / median["blocking_write"],
        "torch": torch.__version__,
        "megatron_core": mcore.VERSION,
        "python": platform.python_version(),
        "device": device.name(),
    }
    if as_json:
        print(json.dumps(result))
        return
    print(f"state of {num_bytes / 1e9:.2f} GB on {device.name()}, torch {torch.__version__}")
    for name, values in seconds.items():
        print(f"  {name.replace('_', ' '):<16} {median[name]:8.3f} s   ({min(values):.3f} to {max(values):.3f})")
    print(f"training is held up for {result['stall_of_blocking_write']:.1%} of a blocking write")
    print(f"a blocking write reaches {result['speed_of_dd']:.1%} of dd's speed")


def build(*, gigabytes: float) -> Role:
    """A role whose weights and moments come to about `gigabytes`."""
    per_layer = 12 * HIDDEN_SIZE**2
    embeddings = 2 * VOCAB_SIZE * HIDDEN_SIZE
    layers = max(1, round((gigabytes * 1e9 / BYTES_PER_PARAMETER - embeddings) / per_layer))
    model = ModelConfig(
        num_layers=layers,
        hidden_size=HIDDEN_SIZE,
        ffn_hidden_size=HIDDEN_SIZE * 8 // 3,
        num_attention_heads=8,
        vocab_size=VOCAB_SIZE,
    )
    return build_role_alone(model, optimizer=OptimizerConfig(), seed=1)


def writer(folder: Path, *, asynchronous: bool) -> CheckpointWriter:
    """One that keeps a single checkpoint."""
    return CheckpointWriter(folder, keep_latest=1, asynchronous=asynchronous, timeout_seconds=600)


def save(saver: CheckpointWriter, role: Role) -> float:
    """Seconds for which a save holds its caller."""
    state = TrainingState(iteration=1, optimizer_steps=1)
    return saver.save(role, state, facts={"model": role.model.model_dump(mode="json")})


def step(role: Role, batches: list[MicroBatch], before_update: Any = lambda: None) -> float:
    """Seconds of a training step."""
    began = time.perf_counter()
    train_step(role, batches, num_sources=1, lr=1e-4, clip_grad=1.0, before_update=before_update)
    device.synchronize()
    return time.perf_counter() - began


def dd(path: Path, num_bytes: int) -> float:
    """Seconds of dd from zeros to `path`, fsync included."""
    blocks = num_bytes >> 24
    command = ["dd", "if=/dev/zero", f"of={path}", "bs=16M", f"count={blocks}", "conv=fsync", "status=none"]
    began = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds * num_bytes / (blocks << 24)


if __name__ == "__main__":
    sys.exit(main())
