"""The work of a PPO step against a sum written from the definition."""

from __future__ import annotations

import torch

from megatron_xy.config import ModelConfig
from megatron_xy.ppo.experience import Rollout
from megatron_xy.ppo.record import step_work

ACTOR = ModelConfig(
    num_layers=3, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, vocab_size=500,
    recompute_granularity="full",
)  # fmt: skip
JUDGE = ACTOR.model_copy(update={"num_layers": 2, "head": "value", "recompute_granularity": "none"})
LENGTHS = ((5, 3), (2, 9))  # of prompts and responses


def forward(model: ModelConfig, extra: int = 0) -> tuple[float, float]:
    """FLOPs of a pass, layers and head: two a weight and token, and the causal half of scores and values."""
    hidden, ffn, heads, groups, width = 64, 96, 4, 2, 16
    weights = hidden * heads * width + 2 * hidden * groups * width + heads * width * hidden + 3 * hidden * ffn
    layers, head = 0.0, 0.0
    assert model.num_layers
    for prompt, response in LENGTHS:
        number = prompt + extra + response
        layers += model.num_layers * (2 * weights * number + 2 * heads * width * number**2)
        head += 2 * hidden * (1 if model.head == "value" else 500) * number
    return layers, head


def test_generation_and_passes_are_forward_passes_and_updates_three_of_them() -> None:
    prompts = {name: [[7] * prompt for prompt, _ in LENGTHS] for name in ("actor", "critic", "reference")}
    prompts["reward"] = [[7] * (prompt + 4) for prompt, _ in LENGTHS]  # rendered by a template of its own
    rollout = Rollout(
        drawn=[],
        prompts=prompts,
        responses=[[8] * response for _, response in LENGTHS],
        has_ended=torch.ones(2, dtype=torch.bool),
        mask=torch.ones(2, 9),
    )
    models = {"actor": ACTOR, "critic": JUDGE, "reference": ACTOR, "reward": JUDGE}
    actor, critic, reward = sum(forward(ACTOR)), sum(forward(JUDGE)), sum(forward(JUDGE, extra=4))
    useful, again = step_work(models, rollout, is_generated=True, epochs={"actor": 2, "critic": 2})
    assert useful == (2 + 6) * actor + actor + (1 + 6) * critic + reward
    assert again == 2 * forward(ACTOR)[0], "every layer of the actor once more an epoch; the critic recomputes nothing"
    useful, again = step_work(models, rollout, is_generated=False, epochs={"critic": 1})
    assert (useful, again) == (2 * actor + (1 + 3) * critic + reward, 0)
