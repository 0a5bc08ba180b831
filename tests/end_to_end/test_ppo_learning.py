"""PPO visibly learns on a CPU: "echo the key" over four ranks, by its rule and by a reward model of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.end_to_end.tiny_run import metrics_of, run_command, started, wait_for_end

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from make_echo_task import KEYS, WORDS, make, score

EXAMPLES = Path(__file__).parents[2] / "examples" / "echo"
WINDOW = 10
SEEDS = [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))]


def run_example(name: str, folder: Path, *overrides: str, seed: int) -> None:
    """The example as it stands, but for its folder and seed."""
    text = (EXAMPLES / f"{name}.yaml").read_text().replace("runs/echo", str(folder))
    (folder / f"{name}.yaml").write_text(text)
    with started(run_command(folder / f"{name}.yaml", f"seed={seed}", *overrides, ranks=4)) as process:
        ended = wait_for_end(process, seconds=300)
    assert ended.code == 0, ended


def best(scores: list[float]) -> float:
    """The highest mean of as many steps in a row."""
    return max(sum(scores[first : first + WINDOW]) / WINDOW for first in range(len(scores) - WINDOW + 1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_score_rises_from_chance_to_near_the_best(seed: int, tmp_path: Path) -> None:
    make(tmp_path, num_prompts=512, num_pairs=0, seed=seed)
    run_example("ppo", tmp_path, seed=seed)
    scores = [record["score_mean"] for record in metrics_of(tmp_path / "ppo")]
    assert 0.1 < scores[0] < 0.4
    assert best(scores) > 1.2


@pytest.mark.parametrize("seed", SEEDS)
def test_the_true_score_rises_though_only_a_reward_model_is_seen(seed: int, tmp_path: Path) -> None:
    """Pairs -> reward model -> critic that begins as it -> PPO."""
    make(tmp_path, num_prompts=512, num_pairs=6000, seed=seed)
    run_example("reward", tmp_path, seed=seed)
    run_example("chain", tmp_path, "ppo.dump_rollouts=true", seed=seed)
    scores = [true_mean(load_file(path)) for path in sorted((tmp_path / "chain" / "rollouts").glob("*"))]
    assert 0.1 < scores[0] < 0.4
    assert best(scores) > 0.85


def true_mean(rollouts: dict[str, Tensor]) -> float:
    """The mean of the rule over a step's answers."""
    mask = rollouts["response_mask"].bool()
    total = 0.0
    for tokens, is_said in zip(rollouts["tokens"], mask, strict=True):
        prompt, said = words(tokens[: -len(is_said)]), words(tokens[-len(is_said) :][is_said])
        assert prompt[0] in KEYS, "a prompt begins with its key"
        total += score(prompt[0], said)
    return total / len(mask)


def words(tokens: Tensor) -> list[str]:
    """What a text of them holds: all but the special ones."""
    return [WORDS[token - 1] for token in tokens.tolist() if 1 <= token <= len(WORDS)]
