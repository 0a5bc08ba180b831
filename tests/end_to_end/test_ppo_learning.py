"""PPO visibly learns on a CPU: "echo the key" over four ranks, each trained role on ranks of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.tiny_run import metrics_of, run_command, started, wait_for_end

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from make_echo_task import make

STEPS, WINDOW = 120, 10


def write_config(folder: Path, *, seed: int) -> Path:
    """The rule as reward; the sizes at which the task is stated."""
    make(folder, num_prompts=512, num_pairs=0, seed=seed)
    config = {
        "task": "ppo",
        "seed": seed,
        "run_dir": str(folder / "run"),
        "model": {
            "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "vocab_size": 19,
            "max_position_embeddings": 64,
        },
        "data": {"tokenizer": str(folder / "tokenizer.json")},
        "training": {"train_iters": STEPS, "micro_batch_tokens": 1024},
        "optimizer": {"lr": 1.0e-3, "lr_decay_style": "constant", "lr_warmup_iters": 0, "weight_decay": 0.0},
        "checkpoint": {"save_interval": STEPS},
        "roles": {
            "actor": {"ranks": "0-1"},
            "critic": {"ranks": "2-3", "optimizer": {"lr": 2.0e-3}},
            "reference": {"ranks": 2},
        },
        "ppo": {
            "prompts": str(folder / "prompts.jsonl"), "reward_function": f"{folder / 'score.py'}:true_score",
            "rollout_batch_size": 64, "mini_batch_size": 32, "ppo_epochs": 2, "max_response_length": 12,
            "kl_coef": 0.02,
        },
    }  # fmt: skip
    path = folder / "ppo.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_the_score_rises_from_chance_to_near_the_best(seed: int, tmp_path: Path) -> None:
    with started(run_command(write_config(tmp_path, seed=seed), ranks=4)) as process:
        ended = wait_for_end(process, seconds=300)
    assert ended.code == 0, ended
    scores = [record["score_mean"] for record in metrics_of(tmp_path / "run")]
    assert 0.1 < scores[0] < 0.4
    assert max(sum(scores[first : first + WINDOW]) / WINDOW for first in range(STEPS - WINDOW)) > 1.2
