"""Runs the plain transformers loop in a process of its own: a request of plain numbers in, its result out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_xy.config import OptimizerConfig
from megatron_xy.errors import ConfigError

SCRIPT = Path(__file__).with_name("plain_llama.py")


def train_plainly(
    source: dict[str, Any],
    *,
    steps: list[list[list[int]]],
    learning_rates: list[float],
    optimizer: OptimizerConfig,
    micro_batch_tokens: int,
    dtype: str = "fp32",
    device: str = "cpu",
    num_threads: int = 1,
) -> dict[str, Any]:
    """What plain_llama.train returns for these documents [step][document][token].

    source: {"folder": DIR} of HF weights, or {"config": LlamaConfig's fields} for fresh ones. Raises ConfigError where
    transformers is missing or fails, with its last line.
    """
    request = {
        **source,
        "steps": steps,
        "learning_rates": learning_rates,
        "betas": [optimizer.adam_beta1, optimizer.adam_beta2],
        "eps": optimizer.adam_eps,
        "weight_decay": optimizer.weight_decay,
        "clip_grad": optimizer.clip_grad,
        "micro_batch_tokens": micro_batch_tokens,
        "dtype": dtype,
        "device": device,
        "num_threads": num_threads,
    }
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "request.json"), Path(scratch, "result.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-P", str(SCRIPT), str(asked), str(answered)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if ended.returncode:
            lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
            raise ConfigError(
                f"the plain transformers loop failed: {lines[-1]}; pip install transformers if it is missing"
            )
        result: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
        return result
