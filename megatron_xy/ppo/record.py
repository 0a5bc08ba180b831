"""The record of a PPO step: what metrics.jsonl keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_xy.checkpoint.files import TrainingState
from megatron_xy.config import ModelConfig
from megatron_xy.flops import FORWARD_SHARE, recomputed_flops, step_flops
from megatron_xy.ppo.experience import Experience, Rollout
from megatron_xy.training.step_record import Spent, common_record

ACTOR_ONLY = ("actor_loss", "actor_grad_norm", "clip_fraction", "kl_loss", "ratio_first_max")


def step_record(
    state: TrainingState,
    experience: Experience,
    metrics: Mapping[str, float],
    rates: Mapping[str, float],
    spent: Spent,
    *,
    by_phase: Mapping[str, float],
    by_role: Mapping[str, float],
    is_warmup: bool,
    ppo_epochs: int,
    micro_batch_tokens: int,
) -> dict[str, Any]:
    """The keys that every task has, then PPO's own. `loss` and `grad_norm` are the actor's, which learns nothing while
    the critic warms up (null); `bucket` is the width of the rows into which its answers are packed.

    rates: by role; by_phase, by_role: seconds, of a role those of work, mean of its ranks.
    """
    rollout = experience.rollout
    told: dict[str, Any] = {name: value for name, value in metrics.items() if not name.endswith("_updates")}
    if is_warmup:
        told |= dict.fromkeys(ACTOR_ONLY)
    responses = sum(map(len, rollout.responses))
    return {
        **common_record(state, spent, num_tokens=rollout.num_tokens),
        "bucket": micro_batch_tokens,
        "loss": told["actor_loss"],
        "loss_by_source": {},
        "num_loss_tokens": 0 if is_warmup else int(experience.actor_mask.sum().item()),
        "grad_norm": told["actor_grad_norm"],
        **told,
        "lr": rates["actor"],
        "critic_lr": rates["critic"],
        "epoch": rollout.drawn[-1].epoch,
        "seconds_by_phase": dict(by_phase),
        "seconds_by_role": dict(by_role),
        "idle_share_by_role": {name: max(0.0, 1 - worked / spent.seconds) for name, worked in by_role.items()},
        "tokens_per_second_by_phase": {
            "generate": responses / by_phase["generate"],
            "score": rollout.num_tokens / by_phase["score"],
            "update": ppo_epochs * rollout.num_tokens / by_phase["update"],
        },
    }


def step_work(
    models: Mapping[str, ModelConfig], rollout: Rollout, *, is_generated: bool, epochs: Mapping[str, int]
) -> tuple[float, float]:
    """(FLOPs of a step, those of what is recomputed beside them).

    Each role passes over every answer once; drawing the answers is one more pass of the actor, token by token.
    epochs: of updates, by role.
    """
    useful = recomputed = 0.0
    for name, model in models.items():
        lengths = [
            len(prompt) + len(response)
            for prompt, response in zip(rollout.prompts[name], rollout.responses, strict=True)
        ]
        squares = sum(length**2 for length in lengths)
        passes = 2 if name == "actor" and is_generated else 1
        number = epochs.get(name, 0)
        one = step_flops(model, num_tokens=sum(lengths), sum_squared_lengths=squares)
        useful += one * (number + passes * FORWARD_SHARE)
        recomputed += number * recomputed_flops(model, num_tokens=sum(lengths), sum_squared_lengths=squares)
    return useful, recomputed
