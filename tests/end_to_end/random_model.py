"""A small model of random weights as an HF folder, written by transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

SHAPE = {
    "vocab_size": 301, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def write_random_model(folder: Path, *, model: str = "llama", tied: bool = False, **shape: int) -> Path:
    """In bf16; Qwen2's biases are not zero."""
    torch.manual_seed(0)
    config, build = (Qwen2Config, Qwen2ForCausalLM) if model == "qwen2" else (LlamaConfig, LlamaForCausalLM)
    made = build(config(**{**SHAPE, **shape}, tie_word_embeddings=tied)).to(torch.bfloat16)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    made.save_pretrained(folder)
    return folder
