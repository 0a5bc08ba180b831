"""The table of names between a checkpoint's global tensors and HF's, and where each HF tensor stands in them.

QKV is one tensor here, interleaved by query group (the group's queries, its key, its value); gate and up projection are
one tensor, the gate first. So an HF tensor is a part of a global one, as a shard of a checkpoint is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_xy.config import ModelConfig
from megatron_xy.tensors.names import EMBEDDING, OUTPUT_LAYER, VALUE_HEAD
from megatron_xy.tensors.shards import Box, ParameterShard

PLAIN = {
    EMBEDDING: "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    OUTPUT_LAYER: "lm_head.weight",
    VALUE_HEAD: "score.weight",  # of LlamaForSequenceClassification
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LAYER = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": tuple(f"{part}.weight" for part in QKV),
    "self_attention.linear_qkv.bias": tuple(f"{part}.bias" for part in QKV),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}


def global_names(model: ModelConfig) -> Iterator[str]:
    """Every weight of the model by its global name, in the model's order."""
    assert model.num_layers, "the shape is complete once a run starts"
    yield EMBEDDING
    for layer in range(model.num_layers):
        for name in LAYER:
            if model.add_qkv_bias or not name.endswith(".bias"):
                yield f"decoder.layers.{layer}.{name}"
    yield "decoder.final_layernorm.weight"
    if model.head == "value":
        yield VALUE_HEAD
    elif model.untie_embeddings_and_output_weights:
        yield OUTPUT_LAYER


def global_shape(name: str, model: ModelConfig) -> tuple[int, ...]:
    """Shape of the global tensor `name`, the vocabulary unpadded."""
    hidden, ffn, vocab = model.hidden_size, model.ffn_hidden_size, model.vocab_size
    assert hidden and ffn and vocab, "the shape is complete once a run starts"
    heads, groups = _heads(model)
    shapes: dict[str, tuple[int, ...]] = {
        "word_embeddings.weight": (vocab, hidden),
        "linear_qkv.weight": ((heads + 2 * groups) * model.head_dim, hidden),
        "linear_qkv.bias": ((heads + 2 * groups) * model.head_dim,),
        "linear_proj.weight": (hidden, heads * model.head_dim),
        "linear_fc1.weight": (2 * ffn, hidden),
        "linear_fc2.weight": (hidden, ffn),
        "output_layer.weight": (vocab, hidden),
        "value_head.weight": (1, hidden),
    }
    return shapes.get(".".join(name.split(".")[-2:]), (hidden,))


def hf_shards(name: str, model: ModelConfig) -> dict[str, ParameterShard]:
    """The HF tensors that make up the global tensor `name`, each with the rows that it is there."""
    shape = global_shape(name, model)
    parts = _hf_names(name)
    if ".linear_qkv." in name:
        heads, groups = _heads(model)
        sizes = [heads // groups * model.head_dim, model.head_dim, model.head_dim]
        num_groups = groups
    else:
        sizes = [shape[0] // len(parts)] * len(parts)
        num_groups = 1
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    step = sum(sizes)
    return {
        part: ParameterShard(shape, tuple(_rows(shape, group * step + start, size) for group in range(num_groups)))
        for part, start, size in zip(parts, starts, sizes, strict=True)
    }


def _rows(shape: tuple[int, ...], start: int, size: int) -> Box:
    return Box((start, *(0 for _ in shape[1:])), (start + size, *shape[1:]))


def _hf_names(name: str) -> tuple[str, ...]:
    if name in PLAIN:
        return (PLAIN[name],)
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    assert match and match[2] in LAYER, f"{name} is not a weight of a Llama-shaped model"
    return tuple(f"model.layers.{match[1]}.{part}" for part in LAYER[match[2]])


def _heads(model: ModelConfig) -> tuple[int, int]:
    """Query heads and query groups."""
    assert model.num_attention_heads, "the shape is complete once a run starts"
    return model.num_attention_heads, model.num_query_groups or model.num_attention_heads
