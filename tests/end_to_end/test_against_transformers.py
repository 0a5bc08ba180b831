"""A run's first 100 losses are those of a plain loop over transformers' Llama with the same weights, data and AdamW."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_xy.bench.baseline import train_plainly
from megatron_xy.config import RunConfig, load_config
from megatron_xy.data.dataset import PackedDataset
from megatron_xy.data.draws.phase_draws import SamplerPhase
from megatron_xy.data.draws.sampler import BucketSampler
from tests.end_to_end import tiny_run

STEPS, WARMUP, LR = 100, 10, 1e-3
SETTINGS = (
    f"training.train_iters={STEPS}",
    "training.global_batch_tokens=1024",
    "model.hidden_size=64",
    "model.ffn_hidden_size=160",
    f"optimizer.lr={LR}",
    "optimizer.lr_decay_style=constant",
    f"optimizer.lr_warmup_iters={WARMUP}",
    "optimizer.adam_eps=1e-6",
    f"checkpoint.save_interval={STEPS}",
)
WRITE_LLAMA = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(3)
LlamaForCausalLM(LlamaConfig(vocab_size=int(sys.argv[2]), hidden_size=64, intermediate_size=160, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5,
    initializer_range=0.05, tie_word_embeddings=False)).save_pretrained(sys.argv[1])
"""


def documents_of_steps(config: RunConfig, *, steps: int) -> list[list[list[int]]]:
    """The documents [step][document][token] that the run draws, from its data folder alone."""
    dataset = PackedDataset(config.data.paths)
    phase = SamplerPhase(0, config.data.weights, config.training.global_batch_tokens)
    sampler = BucketSampler(dataset.streams, seed=config.seed, phases=[phase])
    found = []
    for step in range(steps):
        documents = []
        for sample_id in sampler.batch(step).samples:
            sample, start = dataset.sample(sample_id), 0
            for length in sample.piece_lengths.tolist():
                documents.append(sample.tokens[start : start + length].tolist())
                start += length
        found.append(documents)
    return found


def test_first_100_losses_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    run_yaml, weights = tmp_path / "run.yaml", tmp_path / "llama"
    tiny_run.write_config(run_yaml, data=tiny_run.make_data(tmp_path))
    command = [sys.executable, "-c", WRITE_LLAMA, str(weights), str(tiny_run.VOCAB_SIZE)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    options = [*tiny_run.ONE_RANK, *SETTINGS, f"model.load=hf:{weights}", f"run_dir={tmp_path / 'run'}"]
    ended = tiny_run.run_to_end(tiny_run.run_command(run_yaml, *options, ranks=1))
    assert ended.code == 0, ended.err
    ours = tiny_run.metrics_of(tmp_path / "run")

    config = load_config(run_yaml, overrides=options)
    plain = train_plainly(
        {"folder": str(weights)},
        steps=documents_of_steps(config, steps=STEPS),
        learning_rates=[LR * min(1.0, step / WARMUP) for step in range(1, STEPS + 1)],
        optimizer=config.optimizer,
        micro_batch_tokens=config.training.micro_batch_tokens,
    )
    losses = [record["loss"] for record in ours]
    assert losses == pytest.approx(plain["losses"], rel=1e-4, abs=1e-4)
    assert [record["grad_norm"] for record in ours[:10]] == pytest.approx(plain["grad_norms"][:10], rel=1e-4)
    assert losses[0] - losses[-1] > 1.0
    assert [record["lr"] for record in ours] == pytest.approx([LR * min(1.0, s / WARMUP) for s in range(1, STEPS + 1)])
