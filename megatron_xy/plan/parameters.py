"""A pipeline stage's parameters one by one, and the buffers that megatron-core lays them into.

From a complete model and its layout to counts, in the order in which GPTModel registers them: order and paddings (those
of megatron-core's distributed/param_and_grad_buffer.py) settle which part of a buffer a replica's optimizer owns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_xy.config import ModelConfig, ParallelConfig
from megatron_xy.flops import DTYPE_BYTES, Shape, shape_of
from megatron_xy.stages import layers_per_chunk, padded_vocab_size

PARAMETER_ALIGNMENT = 64  # elements; under the distributed optimizer each parameter begins at a multiple
BUCKET_ALIGNMENT = 128  # elements; likewise each bucket, which replicas must divide as well
SMALLEST_BUCKET = 40_000_000  # elements of a bucket of overlapped gradients; with more than 40 replicas more
BUCKET_A_REPLICA = 1_000_000


class Parameter(NamedTuple):
    """One parameter of one rank."""

    name: str
    num_elements: int
    num_bytes: int  # of an element
    has_own_bucket: bool = False  # a tied embedding's, of which first and last stage hold one each


@dataclass(frozen=True)
class Buffer:
    """The parameters of one dtype of a chunk, one after the other, the last one first."""

    num_bytes: int  # of an element
    num_elements: int  # padding included
    owned_by_replica: tuple[int, ...]  # elements of parameters that each replica's optimizer owns


def stage_layers(model: ModelConfig, parallel: ParallelConfig, *, stage: int) -> list[int]:
    """Layers of each chunk of a pipeline stage."""
    stages = parallel.pipeline_model_parallel_size
    return layers_per_chunk(shape_of(model).num_layers, num_chunks=stages * parallel.num_chunks)[stage::stages]


def telling_stages(model: ModelConfig, parallel: ParallelConfig) -> list[int]:
    """The first pipeline stage and the last one, and where the layers do not divide the second, which has as many as
    any between."""
    last = parallel.pipeline_model_parallel_size - 1
    is_even = shape_of(model).num_layers % ((last + 1) * parallel.num_chunks) == 0
    return sorted({0, last} if is_even else {0, min(1, last), last})


def chunk_parameters(model: ModelConfig, parallel: ParallelConfig, *, stage: int, chunk: int) -> list[Parameter]:
    """One rank's parameters of a chunk of layers, in their order; with embedding and head where they belong."""
    shape = shape_of(model)
    tp, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    width, hidden = DTYPE_BYTES[model.params_dtype], shape.hidden_size
    is_first = stage == 0 and chunk == 0
    is_last = stage == stages - 1 and chunk == parallel.num_chunks - 1
    table = padded_vocab_size(shape.vocab_size, tensor_model_parallel_size=tp) * hidden // tp
    is_shared = model.has_tied_output_layer and stages > 1
    parameters = [Parameter("embedding", table, width, has_own_bucket=is_shared)] if is_first else []
    for layer in range(stage_layers(model, parallel, stage=stage)[chunk]):
        parameters += [
            Parameter(f"layers.{layer}.{name}", size, width)
            for name, size in _layer_parameters(shape, tp=tp, has_qkv_bias=model.add_qkv_bias)
        ]
    if is_last:
        parameters.append(Parameter("final_layernorm", hidden, width))
        if model.head == "value":
            parameters.append(Parameter("value_head", hidden, DTYPE_BYTES["fp32"]))
        elif not model.has_tied_output_layer or not is_first:
            parameters.append(Parameter("output_layer", table, width, has_own_bucket=is_shared))
    return parameters


def chunk_buffers(
    parameters: Sequence[Parameter], *, parallel: ParallelConfig, stage: int, chunk: int, dp_size: int
) -> list[Buffer]:
    """The gradient buffers of a chunk, one a dtype; those of the distributed optimizer's weights are alike."""
    has_small_buckets = parallel.overlap_grad_reduce and stage == 0 and chunk == 0
    bucket_size = max(SMALLEST_BUCKET, BUCKET_A_REPLICA * dp_size) if has_small_buckets else None
    by_width: dict[int, list[Parameter]] = {}
    for parameter in parameters:
        by_width.setdefault(parameter.num_bytes, []).append(parameter)
    if not parallel.use_distributed_optimizer:
        totals = {width: sum(parameter.num_elements for parameter in group) for width, group in by_width.items()}
        return [Buffer(width, total, (total,) * dp_size) for width, total in totals.items()]
    return [_shared_buffer(width, group, bucket_size, dp_size) for width, group in by_width.items()]


def _layer_parameters(shape: Shape, *, tp: int, has_qkv_bias: bool) -> Iterator[tuple[str, int]]:
    hidden, width = shape.hidden_size, shape.head_dim
    heads_and_groups = (shape.num_attention_heads + 2 * shape.num_query_groups) * width // tp
    yield "input_layernorm", hidden
    yield "linear_proj", shape.num_attention_heads * width // tp * hidden
    yield "linear_qkv", heads_and_groups * hidden
    if has_qkv_bias:
        yield "linear_qkv.bias", heads_and_groups
    yield "pre_mlp_layernorm", hidden
    yield "linear_fc1", 2 * shape.ffn_hidden_size // tp * hidden
    yield "linear_fc2", shape.ffn_hidden_size // tp * hidden


def _shared_buffer(width: int, parameters: Sequence[Parameter], bucket_size: int | None, dp_size: int) -> Buffer:
    """Parameters laid into buckets from the last one on; each replica owns an equal part of every bucket."""
    places: list[tuple[int, int]] = []
    owned = [0] * dp_size
    bucket_start = position = 0

    def close() -> int:
        end = _up(position, math.lcm(dp_size, BUCKET_ALIGNMENT))
        part = (end - bucket_start) // dp_size
        for first, last in places:
            for replica in range((first - bucket_start) // part, -(-(last - bucket_start) // part)):
                start = bucket_start + replica * part
                owned[replica] += min(start + part, last) - max(start, first)
        places.clear()
        return end

    for parameter in reversed(parameters):
        position = _up(position, PARAMETER_ALIGNMENT)
        if parameter.has_own_bucket and places:
            bucket_start = position = close()
        places.append((position, position + parameter.num_elements))
        position += parameter.num_elements
        if parameter.has_own_bucket or (bucket_size is not None and position - bucket_start >= bucket_size):
            bucket_start = position = close()
    if places:
        position = close()
    return Buffer(width, position, tuple(owned))


def _up(value: int, unit: int) -> int:
    return math.ceil(value / unit) * unit
