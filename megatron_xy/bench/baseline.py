"""Measurements in processes of their own, the plain transformers loop among them: a request in, its result out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_xy.config import OptimizerConfig
from megatron_xy.errors import ConfigError, MegatronXYError

SCRIPT = Path(__file__).with_name("plain_llama.py")


class MeasurementFailed(MegatronXYError):
    """A measurement's process ended without a result."""

    exit_code = 1


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
        "optimizer": optimizer.model_dump(mode="json"),
        "micro_batch_tokens": micro_batch_tokens,
        "dtype": dtype,
        "device": device,
        "num_threads": num_threads,
    }
    try:
        return answer_of([sys.executable, "-P", str(SCRIPT)], request)
    except MeasurementFailed as error:
        raise ConfigError(
            f"the plain transformers loop failed: {error}; pip install transformers if it is missing"
        ) from error


def answer_of(
    command: list[str], request: dict[str, Any], *, hide_gpu: bool = False, seconds: float | None = None
) -> dict[str, Any]:
    """What a process answers: behind `command` come the files of request and result, both JSON; {"error"} is a failure.

    request: num_threads, and what else the process asks for. seconds: the longest that it may take. Raises
    MeasurementFailed with what it tells of its failure, else its last words.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(request["num_threads"])}
    if hide_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "request.json"), Path(scratch, "result.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [*command, str(asked), str(answered)]
        try:
            ended = subprocess.run(
                command, capture_output=True, text=True, check=False, env=environment, timeout=seconds
            )
        except subprocess.TimeoutExpired as error:
            raise MeasurementFailed(f"no result within {seconds} s") from error
        if ended.returncode or not answered.is_file():
            lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
            raise MeasurementFailed(lines[-1])
        result: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
        if "error" in result:
            raise MeasurementFailed(result["error"])
        return result
