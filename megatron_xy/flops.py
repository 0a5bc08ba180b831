"""What one Llama-shaped model costs by arithmetic alone: parameters, training FLOPs, and devices' peak rates.

From a complete `ModelConfig` and token counts to plain numbers, without torch. A multiplication and an addition count
as two FLOPs, the backward pass as twice the forward pass. Embedding look-ups, norms, softmax and activations are left
out, and padding too: `step_flops` gives MFU; with `recomputed_flops` added, HFU. The vocabulary is the true one.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from megatron_xy.config import ModelConfig
from megatron_xy.errors import ConfigError

FORWARD_SHARE = 1 / 3  # of a training step's arithmetic
DTYPE_BYTES = {"fp32": 4, "bf16": 2}

# Dense bf16 FLOP/s of one whole device, from the makers' data sheets. Keys are the words that the device's name must
# hold; an entry with more words is the more special one and wins.
PEAK_BF16_FLOPS: dict[str, float] = {
    "A100": 312e12,
    "A800": 312e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H800": 989e12,
    "H800 PCIe": 756e12,
    "H20": 148e12,
}


class Shape(NamedTuple):
    """A model's sizes, all of them known."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int  # the true one
    outputs: int  # numbers that the head gives a token


def shape_of(model: ModelConfig) -> Shape:
    """Its sizes. Raises ConfigError where one is not given."""
    if not (
        model.num_layers
        and model.hidden_size
        and model.ffn_hidden_size
        and model.num_attention_heads
        and model.vocab_size
    ):
        missing = ", ".join(f"model.{key}" for key in model.missing_shape)
        raise ConfigError(f"{missing} missing: a model's cost needs its whole shape; give these keys")
    return Shape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        outputs=1 if model.head == "value" else model.vocab_size,
    )


def num_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model, embeddings and norms included, without the vocabulary's padding."""
    shape = shape_of(model)
    head = 0 if model.has_tied_output_layer else shape.hidden_size * shape.outputs
    norms = (2 * shape.num_layers + 1) * shape.hidden_size
    biases = shape.num_layers * shape.head_dim * (shape.num_attention_heads + 2 * shape.num_query_groups)
    weights = shape.num_layers * _layer_weights(shape) + shape.vocab_size * shape.hidden_size + head
    return weights + norms + (biases if model.add_qkv_bias else 0)


def checkpoint_bytes(model: ModelConfig) -> int:
    """Of a whole checkpoint: weights, main weights in fp32 where they are bf16, both moments."""
    width = DTYPE_BYTES[model.params_dtype]
    return num_parameters(model) * (width + (12 if width < 4 else 8))


def flops_per_token(model: ModelConfig, *, attention_length: float) -> float:
    """Forward and backward FLOPs of one token under causal attention.

    `attention_length` is the document's length in tokens; over several documents of n tokens that attend only to
    themselves, sum(n^2) / sum(n).
    """
    return _dense_flops_per_token(model) + _attention_flops_per_token(model) * attention_length


def step_flops(model: ModelConfig, *, num_tokens: int, sum_squared_lengths: int) -> float:
    """Forward and backward FLOPs of a step over all ranks.

    `num_tokens` counts no padding; `sum_squared_lengths` is the sum of n^2 over the step's documents of n tokens (over
    its samples, where attention crosses document borders).
    """
    return _dense_flops_per_token(model) * num_tokens + _attention_flops_per_token(model) * sum_squared_lengths


def recomputed_flops(model: ModelConfig, *, num_tokens: int, sum_squared_lengths: int) -> float:
    """What `recompute_granularity` adds to `step_flops`: full, every layer's forward pass; selective, its MLP's.

    The output layer is never recomputed; what attention kernels recompute by themselves is not counted.
    """
    shape = shape_of(model)
    if model.recompute_granularity == "none":
        return 0.0
    if model.recompute_granularity == "selective":
        return 2.0 * shape.num_layers * 3 * shape.hidden_size * shape.ffn_hidden_size * num_tokens
    layers = 2.0 * shape.num_layers * _layer_weights(shape) * num_tokens
    return layers + _attention_flops_per_token(model) / 3 * sum_squared_lengths


def stage_share(model: ModelConfig, *, num_layers: int, has_head: bool) -> float:
    """The part of a token's dense FLOPs in `num_layers` of the model's layers, with the output layer or without."""
    shape = shape_of(model)
    head = shape.hidden_size * shape.outputs
    mine = num_layers * _layer_weights(shape) + (head if has_head else 0)
    return mine / (shape.num_layers * _layer_weights(shape) + head)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of the device that the driver calls `device_name`; None where the table has no such device.

    A slice of a device (MIG) has a peak of its own, which its name does not give: None.
    """
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    if "mig" in words:
        return None
    matching = [name for name in PEAK_BF16_FLOPS if words.issuperset(name.lower().split())]
    return PEAK_BF16_FLOPS[max(matching, key=lambda name: len(name.split()))] if matching else None


def _layer_weights(shape: Shape) -> int:
    """Weights of one layer's matrices: query and output projection, keys and values, the gated MLP."""
    attention = 2 * shape.hidden_size * shape.head_dim * (shape.num_attention_heads + shape.num_query_groups)
    return attention + 3 * shape.hidden_size * shape.ffn_hidden_size


def _dense_flops_per_token(model: ModelConfig) -> int:
    """Six FLOPs a weight: two forward, four backward. The input embedding is a look-up and counts nothing."""
    shape = shape_of(model)
    return 6 * (shape.num_layers * _layer_weights(shape) + shape.hidden_size * shape.outputs)


def _attention_flops_per_token(model: ModelConfig) -> int:
    """FLOPs a token and a token of attention length: scores and values, 12 over the square, 6 over its causal half."""
    shape = shape_of(model)
    return 6 * shape.num_layers * shape.num_attention_heads * shape.head_dim
