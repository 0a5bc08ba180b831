"""Task reward in a RUN.yaml: its section, and what it refuses of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_xy.config import InvalidConfig, RewardConfig, dump_config, load_config

REWARD = """\
task: reward
model: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, vocab_size: 100}
data: {path: pairs.jsonl, tokenizer: tokenizer.model}
training: {epochs: 2, global_batch_tokens: 1000, micro_batch_tokens: 256}
"""


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(REWARD)
    return path


def test_a_reward_run(run_yaml: Path) -> None:
    config = load_config(run_yaml, world_size=3)
    assert config.model.head == "value" and config.reward is None and config.reward_section == RewardConfig()
    assert config.reward_section.loss == "token" and config.reward_section.test_fraction == 0.1
    config = load_config(run_yaml, overrides=["reward.score_band=[-5, 5]", "reward.loss=sentence"])
    assert config.reward_section.score_band == (-5.0, 5.0)
    run_yaml.write_text(dump_config(config))
    assert load_config(run_yaml) == config


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("data.path=folder", "data.path (folder): task reward takes jsonl files of rows"),
        ("data.eval_path=folder", "data.eval_path (folder): task reward takes jsonl files"),
        ("data.tokenizer=null", "data.tokenizer is missing; pairs are text, and answers end with its end token"),
        ("data.weights={a: 1}", "data.weights (a section): task reward draws every pair whole; leave it out"),
        ("data.chat_overflow=split", "data.chat_overflow (split): task reward draws every pair whole; leave it out"),
        ("training.phases=[{from_iter: 5, global_batch_tokens: 512}]", "training.phases: task reward has one phase"),
        ("reward.score_band=[]", "reward.score_band ([]): must be two numbers, such as [-1, 1]"),
        ("reward.score_band=[1]", "reward.score_band ([1]): must be two numbers, such as [-1, 1]"),
        ("reward.score_band=[1, 2, 3]", "reward.score_band ([1, 2, 3]): must be two numbers, such as [-1, 1]"),
        ("reward.score_band=[1, -1]", "reward.score_band ([1.0, -1.0]) must rise, such as [-1, 1]"),
        ("reward.test_fraction=1.0", "reward.test_fraction (1.0): must be less than 1"),
        ("reward.loss=word", "reward.loss (word): must be 'token' or 'sentence'"),
        ("model.head=language_model", "model.head (language_model): task reward has value; leave it out"),
        ("parallel.context_parallel_size=2", "context_parallel_size (2): only 1 is supported"),
    ],
)  # fmt: skip
def test_what_it_refuses(run_yaml: Path, override: str, text: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load_config(run_yaml, overrides=[override])
    (problem,) = caught.value.problems
    assert problem.text.startswith(text)


def test_the_section_belongs_to_task_reward(run_yaml: Path) -> None:
    with pytest.raises(InvalidConfig, match="reward: only task reward has this section, and task is sft"):
        load_config(run_yaml, overrides=["task=sft", "reward.loss=token"])
