"""The planner beside runs: Megatron-LM's table on H100, XuanYuan2's speeds by bucket on A800, others', and our own.

Rows of docs/plan.md's tables; the first fits the efficiency of matrix products. The runs are in published_runs.yaml.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_xy.config import ModelConfig, ParallelConfig
from megatron_xy.flops import flops_per_token
from megatron_xy.plan.assumptions import Cluster, Efficiencies, device, efficiencies
from megatron_xy.plan.job import Job
from megatron_xy.plan.speed import step_time

RUNS: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SEQUENCE, VOCABULARY = 4096, 131_072  # of Megatron-LM's table
FITTED_ROW = "70B"
SEQUENCES_A_MICRO_BATCH = {1: 2}  # by pipeline size; not published: 1 where there is a pipeline to fill


@dataclass(frozen=True)
class Comparison:
    """One published row; tokens/s a GPU."""

    name: str
    layout: str
    published: float
    predicted: float
    why: str = ""  # they differ

    @property
    def deviation(self) -> float:
        """0.1: predicted a tenth too high."""
        return self.predicted / self.published - 1


def megatron_lm(rates: Efficiencies | None = None) -> list[Comparison]:
    """Each row of Megatron-LM's table. Its FLOPs count attention over the full square: so do the tokens/s from them."""
    table = RUNS["published"]["megatron_lm"]
    rates = replace(rates or efficiencies(), exposed_tensor_parallel=table["exposed_tensor_parallel"])
    comparisons = []
    for name, heads, hidden, layers, tp, pp, batch, teraflops in table["rows"]:
        model = ModelConfig(
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=round(8 * hidden / 3 / tp) * tp,  # the gated MLP with as many weights as theirs of 4 hidden
            num_attention_heads=heads,
            vocab_size=VOCABULARY,
            params_dtype="bf16",
        )
        parallel = ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            sequence_parallel=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        )
        dp_size, sequences = table["data_parallel_size"], SEQUENCES_A_MICRO_BATCH.get(pp, 1)
        job = Job("model", model, parallel, dp_size, SEQUENCE * sequences, batch // dp_size // sequences)
        predicted = step_time(job, Cluster(device("h100"), rates), bucket=SEQUENCE).tokens_per_second
        reached = teraflops * 1e12 / flops_per_token(model, attention_length=2 * SEQUENCE)
        comparisons.append(Comparison(name, f"tp {tp} x pp {pp} x dp {dp_size}", reached, predicted))
    return comparisons


def fitted_matmul() -> float:
    """The efficiency of matrix products with which Megatron-LM's 70B row comes out, by bisection."""
    low, high = 0.1, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        (row,) = (row for row in megatron_lm(replace(efficiencies(), matmul=middle)) if row.name == FITTED_ROW)
        low, high = (middle, high) if row.deviation < 0 else (low, middle)
    return low


def xuanyuan2() -> list[Comparison]:
    """Speed of each bucket relative to the shortest one's, of 70B on A800 in a layout of our choice."""
    model = ModelConfig(
        num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64, num_query_groups=8,
        vocab_size=39438, max_position_embeddings=16384, params_dtype="bf16",
    )  # fmt: skip
    parallel = ParallelConfig(
        tensor_model_parallel_size=8,
        pipeline_model_parallel_size=4,
        sequence_parallel=True,
        use_distributed_optimizer=True,
    )
    job = Job("model", model, parallel, 16, 16384, 16)
    speeds = {
        bucket: step_time(job, Cluster(device("a800")), bucket=bucket).tokens_per_second
        for bucket in RUNS["published"]["xuanyuan2"]
    }
    reached = {bucket: float(value) for bucket, value in RUNS["published"]["xuanyuan2"].items()}
    first = min(reached)
    return [
        Comparison(f"{bucket}", "tp 8 x pp 4", reached[bucket] / reached[first], speeds[bucket] / speeds[first])
        for bucket in reached
    ]


def others() -> list[Comparison]:
    """Runs of other code, as this code would run their model in their layout, in bf16."""
    tables = RUNS["published"]
    comparisons = []
    for run in tables["runs"]:
        tp, pp, vp, dp_size, micro = run["tp"], run["pp"], run.get("vp"), run["dp"], run.get("micro", 1)
        model = _model(tables["shapes"][run["shape"]], recompute_granularity=run.get("recompute", "none"))
        parallel = ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vp,
            sequence_parallel=tp > 1,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        )
        sequence, gpu = run["sequence"], device(run["gpu"])
        job = Job("model", model, parallel, dp_size, sequence * micro, run["batch"] // dp_size // micro)
        per_second = run.get("teraflops", 0) * 1e12 or run.get("mfu", 0) * gpu.peak_flops
        reached = run.get("tokens") or per_second / flops_per_token(model, attention_length=sequence)
        predicted = step_time(job, Cluster(gpu), bucket=sequence).tokens_per_second
        layout = f"tp {tp} x pp {pp}{f' (vp {vp})' if vp else ''} x dp {dp_size}"
        comparisons.append(Comparison(run["name"], f"{gpu.name}, {layout}", reached, predicted, run["why"]))
    return comparisons


def ours() -> list[Comparison]:
    """What `bench gpu` has measured of this code, by model and bucket."""
    jobs = our_jobs()
    return [
        Comparison(
            f"{entry['name']}, {bucket}",
            "H200",
            tokens,
            step_time(jobs[entry["name"]], Cluster(device("h200")), bucket=bucket).tokens_per_second,
        )
        for entry in RUNS["measured"]["models"]
        for bucket, tokens in entry["tokens"].items()
    ]


def our_jobs() -> dict[str, Job]:
    """{name: what `bench gpu` trains}."""
    table = RUNS["measured"]
    sizes = table["micro_batch_tokens"], table["num_micro_batches"]
    return {
        entry["name"]: Job("model", _model(entry["shape"]), ParallelConfig(), 1, *sizes) for entry in table["models"]
    }


def _model(shape: Sequence[int], **changes: Any) -> ModelConfig:
    """From layers, hidden, ffn, heads, key and value heads, vocabulary."""
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")
    return ModelConfig(**dict(zip(names, shape, strict=True)), params_dtype="bf16", **changes)
