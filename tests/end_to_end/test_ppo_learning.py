"""PPO visibly learns on a CPU: "echo the key" over four ranks, by its rule and by a reward model of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.end_to_end.tiny_run import metrics_of, started, wait_for_end

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from echo_curves import best, command, true_scores
from make_echo_task import make


def run_example(name: str, folder: Path, *, seed: int) -> None:
    """The example as it stands, but for its folder and seed."""
    with started(command(name, folder, seed=seed)) as process:
        ended = wait_for_end(process, seconds=300)
    assert ended.code == 0, ended


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_score_rises_from_chance_to_near_the_best(seed: int, tmp_path: Path) -> None:
    make(tmp_path, num_prompts=512, num_pairs=0, seed=seed)
    run_example("ppo", tmp_path, seed=seed)
    scores = [record["score_mean"] for record in metrics_of(tmp_path / "ppo")]
    assert 0.1 < scores[0] < 0.5
    assert best(scores) > 1.2


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
def test_the_true_score_rises_though_only_a_reward_model_is_seen(seed: int, tmp_path: Path) -> None:
    """Pairs -> reward model -> critic that begins as it -> PPO."""
    make(tmp_path, num_prompts=512, num_pairs=6000, seed=seed)
    run_example("reward", tmp_path, seed=seed)
    run_example("chain", tmp_path, seed=seed)
    scores = true_scores(tmp_path / "chain")
    assert 0.1 < scores[0] < 0.5
    assert best(scores) > 0.85
