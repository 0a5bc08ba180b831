"""What `check` prints of a valid config."""

from __future__ import annotations

from pathlib import Path

from megatron_xy.config import RunConfig
from megatron_xy.described import describe

SHAPE = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "vocab_size": 100}
SIZES = {"micro_batch_tokens": 128, "global_batch_tokens": 1024}


def described(**training: object) -> str:
    config = RunConfig.model_validate({"model": SHAPE, "training": {**SIZES, **training}})
    return describe(config, path=Path("run.yaml"), world_size=4)


def test_sizes_of_steps_follow_the_phases() -> None:
    phases = [{"from_iter": 3, "weights": {"code": 1}}, {"from_iter": 6, "global_batch_tokens": 2048}]
    text = described(train_iters=10, phases=phases)
    assert "tp 1 x pp 1 x cp 1 x dp 4 on 4 ranks, 2 micro-batches a step" in text
    assert "training: 10 steps of 1024, 2048 from step 6 on tokens (0.0 M in all)" in text
    assert "never reached" not in text


def test_a_phase_behind_the_last_step_is_told() -> None:
    text = described(train_iters=5, phases=[{"from_iter": 6, "global_batch_tokens": 2048}])
    assert "training: 5 steps of 1024 tokens" in text
    assert "training.phases from step 6 on are never reached: train_iters is 5" in text
