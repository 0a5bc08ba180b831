"""The parts of both suites: each runs its measurements in processes of their own and compares what came back."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from megatron_xy.bench.baseline import MeasurementFailed, answer_of, train_plainly
from megatron_xy.bench.cases import CPU, CPU_TINY, GPU_ONE_B, GPU_SEVEN_B, SMALL, TINY, Case
from megatron_xy.config import ModelConfig, OptimizerConfig
from megatron_xy.data.building.build import build_dataset
from megatron_xy.data.building.options import BuildOptions
from megatron_xy.hf.config import hf_config
from megatron_xy.run_folder import read_heartbeats

PART_SECONDS = 240  # the longest that one measurement may take: one that hangs must not cost the others their time
Part = Callable[[], dict[str, Any]]


def parts_of(suite: str, *, tiny: bool) -> dict[str, Part]:
    """{name: what runs it} of a suite, in the order in which they run."""
    if suite == "cpu":
        case = CPU_TINY if tiny else CPU
        return {
            "speed": lambda: speed(case),
            "baseline": lambda: against_plain(case),
            "recompute": lambda: recompute(case.at(case.buckets[-1])),
            "attention": lambda: attention(tokens=256 if tiny else 2048, dtype="fp32", heads=8, groups=4, head_dim=32),
            "resume": lambda: kill_and_resume(steps=6 if tiny else 20),
        }
    one_b = CPU_TINY if tiny else GPU_ONE_B
    seven_b = one_b if tiny else GPU_SEVEN_B
    middle = one_b.at(one_b.buckets[1])
    brief = dataclasses.replace(middle, num_micro_batches=2, steps=min(3, middle.steps))
    return {
        "parity": lambda: parity(TINY if tiny else SMALL, steps=3 if tiny else 20),
        "resume": lambda: kill_and_resume(steps=6 if tiny else 20),
        "speed_1b": lambda: speed(one_b),
        "speed_7b_shape": lambda: speed(seven_b),
        "attention": lambda: attention(
            tokens=256 if tiny else 16384, dtype="bf16", heads=32, groups=8, head_dim=32 if tiny else 128
        ),
        "recompute": lambda: recompute(brief),
        "layer_specs": lambda: layer_specs(brief),
        "baseline": lambda: against_plain(middle),
    }


def has_gpu() -> bool:
    """Whether the parts would find one; asked in a process of its own, as this one has no torch."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "True"


def speed(case: Case) -> dict[str, Any]:
    """Every bucket's speed; the bucketed mix against the largest bucket alone, beside what FLOPs alone give."""
    result = measure("speed", dataclasses.asdict(case))
    rows = result["buckets"]
    smallest = rows[0]
    for row in rows:
        by_flops = smallest["flops_per_token"] / row["flops_per_token"]
        row["speed_against_flops"] = row["tokens_per_second"] / smallest["tokens_per_second"] / by_flops
    flops_per_token = sum(row["flops_per_token"] for row in rows) / len(rows)
    result["mix"] = {"by_flops_alone": rows[-1]["flops_per_token"] / flops_per_token}
    # CPU seconds too: where others compute at the same time, they alone tell. On a GPU they say nothing.
    for measured in ("tokens_per_second", "tokens_per_cpu_second")[: 2 if result["device"] == "CPU" else 1]:
        # As many tokens from every bucket: the time of a mix is the sum of the times.
        mixed = len(rows) / sum(1 / row[measured] for row in rows)
        result["mix"][measured] = mixed
        result["mix"][f"{measured}_against_largest_bucket"] = mixed / rows[-1][measured]
    return result


def against_plain(case: Case) -> dict[str, Any]:
    """The same model, batches and update by transformers and torch: tokens a second of both, one after the other."""
    model = ModelConfig(**case.model)
    half = model.params_dtype == "bf16"
    config = hf_config(model, dtype="float32", token_ids={})
    count = case.warmup_steps + case.steps
    generator = random.Random(0)
    assert model.vocab_size, "a case has its whole shape"
    steps, tokens = [], case.micro_batch_tokens * case.num_micro_batches
    for bucket in case.buckets:
        documents = [[generator.randrange(model.vocab_size) for _ in range(bucket)] for _ in range(tokens // bucket)]
        steps += [documents] * count
    ours = measure("speed", dataclasses.asdict(case))
    plain = train_plainly(
        {"config": config},
        steps=steps,
        learning_rates=[1e-4] * len(steps),
        optimizer=OptimizerConfig(),
        micro_batch_tokens=case.micro_batch_tokens,
        dtype="bf16" if half else "fp32",
        device=ours["device_type"],
    )
    rows = []
    for number, (bucket, mine) in enumerate(zip(case.buckets, ours["buckets"], strict=True)):
        measured = slice(number * count + case.warmup_steps, (number + 1) * count)
        row: dict[str, Any] = {"bucket": bucket, "tokens_per_second": mine["tokens_per_second"]}
        row["plain_tokens_per_second"] = tokens / statistics.median(plain["seconds"][measured])
        row["ratio"] = row["tokens_per_second"] / row["plain_tokens_per_second"]
        if ours["device"] == "CPU":  # where others compute too, only this tells the two apart
            plain_speed = tokens / statistics.median(plain["cpu_seconds"][measured])
            row["ratio_by_cpu_seconds"] = mine["tokens_per_cpu_second"] / plain_speed
        rows.append(row)
    precision = "fp32 weights under bf16 autocast" if half else "fp32"
    return {
        "plain": f"transformers, attention {plain['attention']}, {precision}, torch's fused AdamW",
        "peak_memory_bytes": ours["buckets"][-1]["peak_memory_bytes"],
        "plain_peak_memory_bytes": plain["peak_memory_bytes"],
        "buckets": rows,
    }


def recompute(case: Case) -> dict[str, Any]:
    """The three recompute modes at one bucket: seconds and memory."""
    rows = []
    for mode in ("none", "selective", "full"):
        row = measure("speed", dataclasses.asdict(case.with_model(recompute_granularity=mode)))["buckets"][0]
        rows.append({"recompute_granularity": mode, **row})
    return {"modes": rows}


def layer_specs(case: Case) -> dict[str, Any]:
    """Both layer specs at one bucket; without Transformer Engine, why: the other parts have measured torch's."""
    rows: list[dict[str, Any]] = []
    for spec in ("transformer_engine", "torch"):
        try:
            measured = measure("speed", dataclasses.asdict(case.with_model(layer_spec=spec)))
        except MeasurementFailed as error:
            return {"specs": [*rows, {"layer_spec": spec, "error": str(error)}]}
        rows.append({"layer_spec": spec, "layers": measured["layers"], **measured["buckets"][0]})
    return {"specs": rows}


def attention(*, tokens: int, dtype: str, heads: int, groups: int, head_dim: int) -> dict[str, Any]:
    """Every attention backend that is present: documents of an eighth of the row up to all of it, and mixed ones."""
    generator = random.Random(0)
    rows = [[tokens // number] * number for number in (8, 4, 2, 1)]
    for number in (4, 16):
        cuts = [0, *sorted(generator.sample(range(1, tokens), number - 1)), tokens]
        rows.append([after - before for before, after in itertools.pairwise(cuts)])
    request = {"heads": heads, "groups": groups, "head_dim": head_dim, "dtype": dtype, "rows": rows, "repeats": 5}
    return measure("attention", request)


def parity(model: dict[str, Any], *, steps: int) -> dict[str, Any]:
    """Losses and gradient norms of this device in fp32 and bf16 against a CPU's in fp32, from the same weights.

    The first step is that of equal weights; after it the two part by what rounding does to each update. A CPU's own
    bf16 beside its fp32 shows how far that is.
    """
    # AdamW's default eps makes of the smallest gradients a step as large as any: there rounding alone decides its sign.
    request = {"micro_batch_tokens": 256, "steps": steps, "lr": 5e-4, "optimizer": {"adam_eps": 1e-5}}

    def trained(dtype: str, *, hide_gpu: bool) -> dict[str, Any]:
        return measure("losses", {**request, "model": {**model, "params_dtype": dtype}}, hide_gpu=hide_gpu)

    with ThreadPoolExecutor() as pool:  # nothing is timed: all at once
        reference_run = pool.submit(trained, "fp32", hide_gpu=True)
        runs = {
            "fp32": pool.submit(trained, "fp32", hide_gpu=False),
            "bf16": pool.submit(trained, "bf16", hide_gpu=False),
            "CPU in bf16": pool.submit(trained, "bf16", hide_gpu=True),
        }
    reference = reference_run.result()
    rows: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        found = run.result()
        losses = _differences(found["losses"], reference["losses"])
        norms = _differences(found["grad_norms"], reference["grad_norms"])
        rows[name] = {
            "device": found["device"],
            "layers": found["layers"],
            "first_loss_difference": losses[0],
            "first_norm_difference": norms[0],
            "largest_loss_difference": max(losses),
            "largest_norm_difference": max(norms),
        }
    fp32, bf16 = rows["fp32"], rows["bf16"]
    return {
        "cpu_fp32_losses": reference["losses"],
        "loss_fell_by": reference["losses"][0] - reference["losses"][-1],
        **rows,
        "agrees": fp32["largest_loss_difference"] < 1e-4
        and fp32["first_norm_difference"] < 1e-5
        and bf16["first_loss_difference"] < 1e-3
        and bf16["first_norm_difference"] < 1e-2
        and bf16["largest_loss_difference"] < 1e-2,
    }


def kill_and_resume(*, steps: int) -> dict[str, Any]:
    """One run with `deterministic: true` whose rank is killed half-way and resumed, against the unbroken one."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = _small_run(folder, steps=steps)
        with ThreadPoolExecutor() as pool:
            whole = pool.submit(_run, config, run_dir=folder / "unbroken", kill_at=None)
            broken = pool.submit(_run, config, run_dir=folder / "killed", kill_at=steps // 2)
        unbroken, killed = whole.result(), broken.result()
        keys = ("loss", "grad_norm", "lr")
        same = [all(a[key] == b[key] for key in keys) for a, b in zip(unbroken, killed, strict=True)]
        return {
            "steps": steps,
            "killed_at": steps // 2,
            "bit_identical": all(same),
            "first_difference": None if all(same) else same.index(False) + 1,
            "losses": [unbroken[0]["loss"], unbroken[-1]["loss"]],
        }


def measure(name: str, request: dict[str, Any], *, hide_gpu: bool = False) -> dict[str, Any]:
    """What megatron_xy.bench.measure answers, in a process of its own. Raises MeasurementFailed with its error."""
    command = [sys.executable, "-m", "megatron_xy.bench.measure", name]
    return answer_of(command, {"num_threads": 1, **request}, hide_gpu=hide_gpu, seconds=PART_SECONDS)


def _small_run(folder: Path, *, steps: int) -> Path:
    """A RUN.yaml with made-up data of its own, for one rank."""
    import sentencepiece

    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnop", k=generator.randint(2, 7))) for _ in range(300)]
    texts = [" ".join(generator.choices(words, k=generator.choice((6, 20, 60, 100)))) for _ in range(400)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    with (folder / "tokenizer.model").open("wb") as target:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=target, model_type="bpe", vocab_size=400, byte_fallback=True,
            pad_id=-1, num_threads=1, minloglevel=2,
        )  # fmt: skip
    options = BuildOptions(buckets=(64, 128, 256))
    build_dataset([corpus], tokenizer=folder / "tokenizer.model", output=folder / "data", options=options)
    config = {
        "task": "pretrain",
        "model": {**TINY, "max_position_embeddings": 256},
        "data": {"path": str(folder / "data")},
        "training": {"train_iters": steps, "global_batch_tokens": 1024, "micro_batch_tokens": 256},
        "checkpoint": {"save_interval": 2},
        "runtime": {"deterministic": True},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def _run(config: Path, *, run_dir: Path, kill_at: int | None) -> list[dict[str, Any]]:
    """The metrics of a run of one rank; with `kill_at`, killed once in or after that step and restarted."""
    options = ["--nproc-per-node", "1", "--restarts", "1", f"run_dir={run_dir}"]
    command = [sys.executable, "-m", "megatron_xy", "run", str(config), *options]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as words:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=words, text=True) as process:
            deadline = time.monotonic() + PART_SECONDS
            while process.poll() is None and time.monotonic() < deadline:
                beat = read_heartbeats(run_dir).get(0)
                if kill_at is not None and beat is not None and beat.iteration >= kill_at:
                    os.kill(beat.pid, signal.SIGKILL)
                    kill_at = None
                time.sleep(0.01)
            if process.poll() is None:
                process.terminate()
        words.seek(0)
        lines = words.read().strip().splitlines() or ["nothing was said"]
    if process.returncode or kill_at is not None:
        raise MeasurementFailed(f"the run ended with {process.returncode}: {lines[-1]}")
    records = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(record) for record in records]


def _differences(found: list[float], wanted: list[float]) -> list[float]:
    return [abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True)]
