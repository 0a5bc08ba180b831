"""What a model needs to be quantised by `quantize`, scheme by scheme: from its shape to memory, disk and hours.

One process: int8 and nf4 on one CPU core, GPTQ layer after layer on one GPU, as quantisation/ goes about it.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_xy.config import ModelConfig
from megatron_xy.flops import num_parameters, shape_of
from megatron_xy.plan.assumptions import Cluster, section

BF16 = 2  # bytes
FP32 = 4
WEIGHT_BYTES = {  # with the scales of a block, 64 weights in nf4, 128 by GPTQ; those of a row are next to nothing
    "int8": 1.0,
    "nf4": 0.5 + 4 / 64,
    "gptq-w4a16": 0.5 + 2 / 128,
    "w8a8": 1.0,
    "w8a16": 1.0 + 2 / 128,
}
BITSANDBYTES = ("int8", "nf4")


@dataclass(frozen=True)
class Quantising:
    """One scheme."""

    scheme: str
    result_bytes: float
    disk_bytes: float  # the result and what lies beside it meanwhile, out of a checkpoint
    host_bytes: float
    gpu_bytes: float
    hours: float


def quantising(model: ModelConfig, cluster: Cluster) -> tuple[Quantising, ...]:
    """Every scheme, the output layer left as it is. The model's shape is complete."""
    return tuple(
        _by_bitsandbytes(model, scheme) if scheme in BITSANDBYTES else _by_gptq(model, scheme, cluster)
        for scheme in WEIGHT_BYTES
    )


def _by_bitsandbytes(model: ModelConfig, scheme: str) -> Quantising:
    given = section("quantising")
    largest = max(columns * rows for columns, rows in _linears(model)) * BF16
    result = _result_bytes(model, scheme)
    return Quantising(
        scheme,
        result_bytes=result,
        disk_bytes=result,
        host_bytes=given["process_bytes"] + given["file_bytes"] + given["bitsandbytes_copies"] * largest,
        gpu_bytes=0.0,
        hours=num_parameters(model) * BF16 / given[f"{scheme}_bandwidth"] / 3600,
    )


def _by_gptq(model: ModelConfig, scheme: str, cluster: Cluster) -> Quantising:
    """Of each linear layer: a Hessian of its inputs, its inverse, then column after column of the weight."""
    shape = shape_of(model)
    gpu, rates = cluster.gpu, cluster.rates
    given, linears = section("quantising"), _linears(model)
    layer = sum(columns * rows for columns, rows in linears)
    tokens = given["calibration_samples"] * min(given["calibration_tokens"], model.max_position_embeddings)
    hessians = [FP32 * columns**2 for columns, _ in linears]
    passes = 2 * 2 * layer * tokens / (gpu.peak_flops * rates.matmul)  # before a layer is quantised, and after
    products = sum(2 * tokens * columns**2 + 2 * columns**3 + columns**2 * rows for columns, rows in linears)
    seconds = passes + products / given["gptq_flops"] + sum(columns for columns, _ in linears) * given["column_seconds"]
    total, quantised = num_parameters(model) * BF16, shape.num_layers * layer * BF16
    moved = 2 * total + 2 * quantised  # read, written as a copy in bf16, and as GPTQ has changed it, read to be packed
    result = _result_bytes(model, scheme)
    return Quantising(
        scheme,
        result_bytes=result,
        disk_bytes=total + quantised + result,
        host_bytes=given["process_bytes"]
        + 3 * given["file_bytes"]
        + 2 * tokens * shape.hidden_size * BF16
        + BF16 * layer,
        gpu_bytes=BF16 * layer + sum(hessians) + 3 * max(hessians),
        hours=(shape.num_layers * seconds + moved / section("reliability")["storage_bandwidth"]) / 3600,
    )


def _result_bytes(model: ModelConfig, scheme: str) -> float:
    quantised = shape_of(model).num_layers * sum(columns * rows for columns, rows in _linears(model))
    return quantised * WEIGHT_BYTES[scheme] + (num_parameters(model) - quantised) * BF16


def _linears(model: ModelConfig) -> list[tuple[int, int]]:
    """(columns, rows) of a layer's seven linear layers, as HF's format has them."""
    shape = shape_of(model)
    hidden, ffn, keys = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim * shape.num_query_groups
    return [*((hidden, rows) for rows in (hidden, keys, keys, hidden, ffn, ffn)), (ffn, hidden)]
