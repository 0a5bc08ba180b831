"""What benchmarks are tried on: a small model with its tokenizer as an HF folder, questions, and the verb itself."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_xy.config import ModelConfig
from megatron_xy.data.chat.template import load_chat_template
from megatron_xy.data.encoding.tokenizer import load_tokenizer
from megatron_xy.hf.config import hf_config
from megatron_xy.hf.names import global_names, hf_shards
from megatron_xy.hf.tokenizer import write_hf_tokenizer
from tests.unit.small_corpus import WORDS, train_tokenizer

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: the extra evaluate")
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, vocab_size=320,
    max_position_embeddings=512,
)  # fmt: skip


def write_model(folder: Path) -> None:
    """FOLDER/hf, of random weights, with a chat template, and FOLDER/tokenizer.model, its tokenizer."""
    (folder / "hf").mkdir()
    tokenizer = train_tokenizer(folder / "tokenizer.model")
    write_hf_tokenizer(tokenizer, folder / "hf", model_max_length=512)
    template = load_chat_template("xuanyuan", load_tokenizer(tokenizer))
    (folder / "hf" / "chat_template.jinja").write_text(template.source)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        part: torch.randn(shard.local_shape, generator=generator) * 0.3
        for name in global_names(MODEL)
        for part, shard in hf_shards(name, MODEL).items()
    }
    # No bytes, which transformers decodes otherwise where they are no text, and no ids beyond the tokenizer's.
    tensors["lm_head.weight"][:259] = tensors["lm_head.weight"][300:] = 0
    save_file(tensors, folder / "hf" / "model.safetensors", metadata={"format": "pt"})
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    (folder / "hf" / "config.json").write_text(json.dumps(hf_config(MODEL, dtype="float32", token_ids=ids)))


def write_financeiq(folder: Path) -> Path:
    """FOLDER/dev and FOLDER/test of two categories."""
    for split, number in (("dev", 5), ("test", 8)):
        for seed, category in enumerate(("税务师", "FRM (one)")):
            write_questions(folder / split / f"{category}.csv", number=number, seed=seed + number)
    return folder


def write_questions(path: Path, *, number: int, seed: int) -> None:
    """A category's CSV file as FinanceIQ has them."""
    draw = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["", "Question", "A", "B", "C", "D", "Answer"])
        for place in range(number):
            question = " ".join(draw.choices(WORDS, k=5))
            writer.writerow([place, question, *draw.sample(WORDS, 4), draw.choice("ABCD")])


def evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`megatron-xy evaluate`, to its end."""
    command = [sys.executable, "-m", "megatron_xy", "evaluate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
