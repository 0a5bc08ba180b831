"""What a PPO run's report says of answers that score well for a wrong reason."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_xy.config import RunConfig
from megatron_xy.report.ppo import summarise_ppo
from megatron_xy.report.records import Metrics

STEP = {
    "score_mean": 0.0, "score_std": 0.5, "kl": 1.0, "entropy": 2.0, "response_length_mean": 20.0, "end_rate": 0.9,
    "critic_loss": 0.1, "step_seconds": 1.0, "consumed_samples": 8, "consumed_tokens": 800,
}  # fmt: skip


@pytest.mark.parametrize(
    ("end", "sign"),
    [
        ({"score_mean": 2.9}, None),
        ({"score_mean": 3.2}, "the score rose by 6.4 deviations of the first answers' scores"),
        ({"response_length_mean": 31.0}, "answers grew from 20.0 to 31.0 tokens"),
        ({"kl": 21.0}, "the policy is 21.0 nats an answer away from the reference"),
        ({"end_rate": 0.4}, "answers that end by themselves fell from 90% to 40%"),
    ],
)
def test_signs_of_reward_hacking(end: dict[str, float], sign: str | None) -> None:
    steps: list[dict[str, Any]] = [{**STEP, **(end if iteration > 20 else {})} for iteration in range(1, 31)]
    records = [{**step, "iteration": iteration} for iteration, step in enumerate(steps, start=1)]
    told = summarise_ppo(Metrics(records), config=RunConfig(task="ppo"), environment={})
    signs = told["signs_of_reward_hacking"]
    assert len(signs) == (sign is not None)
    assert all(text.startswith(sign or "") for text in signs)
