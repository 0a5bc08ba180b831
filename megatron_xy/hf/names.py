"""The table of names between a checkpoint's global tensors and HF's Llama, and the two layouts that differ.

QKV stands in one tensor here, interleaved by query group (the group's queries, its key, its value); gate and up
projection stand in one tensor, the gate first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch

from megatron_xy.config import ModelConfig

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
PLAIN = {
    EMBEDDING: "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    OUTPUT_LAYER: "lm_head.weight",
}
LAYER = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
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
        yield from (f"decoder.layers.{layer}.{name}" for name in LAYER)
    yield "decoder.final_layernorm.weight"
    if model.untie_embeddings_and_output_weights:
        yield OUTPUT_LAYER


def hf_names(name: str) -> tuple[str, ...]:
    """The HF tensors that make up the global tensor `name`."""
    if name in PLAIN:
        return (PLAIN[name],)
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    assert match and match[2] in LAYER, f"{name} is not a weight of a Llama-shaped model"
    return tuple(f"model.layers.{match[1]}.{part}" for part in LAYER[match[2]])


def hf_shapes(name: str, model: ModelConfig) -> tuple[tuple[int, ...], ...]:
    """Shapes of `hf_names(name)`, the vocabulary unpadded."""
    hidden, ffn, vocab = model.hidden_size, model.ffn_hidden_size, model.vocab_size
    assert hidden and ffn and vocab, "the shape is complete once a run starts"
    heads, groups = _heads(model)
    queries, keys = heads * model.head_dim, groups * model.head_dim
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "word_embeddings": ((vocab, hidden),),
        "linear_qkv": ((queries, hidden), (keys, hidden), (keys, hidden)),
        "linear_proj": ((hidden, queries),),
        "linear_fc1": ((ffn, hidden), (ffn, hidden)),
        "linear_fc2": ((hidden, ffn),),
        "output_layer": ((vocab, hidden),),
    }
    return shapes.get(name.split(".")[-2], ((hidden,),))


def from_hf(name: str, read: Callable[[str], torch.Tensor], *, model: ModelConfig) -> torch.Tensor:
    """The global tensor `name` out of HF's tensors, which `read` gives by their names."""
    parts = [read(part) for part in hf_names(name)]
    if name.endswith("linear_qkv.weight"):
        _, groups = _heads(model)
        grouped = [part.reshape(groups, -1, part.size(-1)) for part in parts]
        return torch.cat(grouped, dim=1).reshape(-1, parts[0].size(-1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def to_hf(name: str, tensor: torch.Tensor, *, model: ModelConfig) -> dict[str, torch.Tensor]:
    """HF's tensors out of the global tensor `name`."""
    parts: tuple[torch.Tensor, ...] = (tensor,)
    if name.endswith("linear_qkv.weight"):
        heads, groups = _heads(model)
        grouped = tensor.reshape(groups, -1, tensor.size(-1))
        rows = [heads // groups * model.head_dim, model.head_dim, model.head_dim]
        parts = tuple(part.reshape(-1, tensor.size(-1)) for part in torch.split(grouped, rows, dim=1))
    elif name.endswith("linear_fc1.weight"):
        parts = tensor.chunk(2)
    return {hf_name: part.contiguous() for hf_name, part in zip(hf_names(name), parts, strict=True)}


def _heads(model: ModelConfig) -> tuple[int, int]:
    """Query heads and query groups."""
    assert model.num_attention_heads, "the shape is complete once a run starts"
    return model.num_attention_heads, model.num_query_groups or model.num_attention_heads
