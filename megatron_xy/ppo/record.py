"""The record of a PPO step: what metrics.jsonl keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_xy.checkpoint.files import TrainingState
from megatron_xy.config import ModelConfig
from megatron_xy.flops import FORWARD_SHARE, recomputed_flops, step_flops
from megatron_xy.ppo.engine import LearningRates
from megatron_xy.ppo.experience import Experience, Rollout

ACTOR_ONLY = ("actor_loss", "actor_grad_norm", "clip_fraction", "kl_loss", "ratio_first_max")


@dataclass(frozen=True)
class Spent:
    """What a step took, over all ranks."""

    seconds: float
    waited: float  # for prompts
    by_phase: dict[str, float]
    by_role: dict[str, float]  # of work, mean of the role's ranks
    padding: int  # tokens of padding in all roles' micro-batches
    room: int  # all tokens of these
    flops: float
    recomputed_flops: float
    available_flops: float | None  # in that time, at the devices' peak; None where that is not known
    peak_memory_bytes: int  # of the device that holds most


def step_record(
    state: TrainingState,
    experience: Experience,
    metrics: Mapping[str, float],
    rates: LearningRates,
    spent: Spent,
    *,
    is_warmup: bool,
    ppo_epochs: int,
    micro_batch_tokens: int,
) -> dict[str, Any]:
    """The keys that every task has, then PPO's own. `loss` and `grad_norm` are the actor's, which learns nothing while
    the critic warms up (null); `bucket` is the width of the rows into which its answers are packed."""
    rollout = experience.rollout
    told: dict[str, Any] = {name: value for name, value in metrics.items() if not name.endswith("_updates")}
    if is_warmup:
        told |= dict.fromkeys(ACTOR_ONLY)
    responses = sum(map(len, rollout.responses))
    available = spent.available_flops
    return {
        "iteration": state.iteration,
        "data_step": state.data_step - 1,
        "bucket": micro_batch_tokens,
        "loss": told["actor_loss"],
        "loss_by_source": {},
        "num_loss_tokens": 0 if is_warmup else int(experience.actor_mask.sum().item()),
        "grad_norm": told["actor_grad_norm"],
        **told,
        "lr": rates.actor,
        "critic_lr": rates.critic,
        "consumed_samples": state.consumed_samples,
        "consumed_tokens": state.consumed_tokens,
        "epoch": rollout.drawn[-1].epoch,
        "padding_ratio": spent.padding / spent.room,
        "peak_memory_bytes": spent.peak_memory_bytes,
        "step_seconds": spent.seconds,
        "data_wait_seconds": spent.waited,
        "seconds_by_phase": spent.by_phase,
        "seconds_by_role": spent.by_role,
        "idle_share_by_role": {name: max(0.0, 1 - worked / spent.seconds) for name, worked in spent.by_role.items()},
        "tokens_per_second": rollout.num_tokens / spent.seconds,
        "tokens_per_second_by_phase": {
            "generate": responses / spent.by_phase["generate"],
            "score": rollout.num_tokens / spent.by_phase["score"],
            "update": ppo_epochs * rollout.num_tokens / spent.by_phase["update"],
        },
        "mfu": spent.flops / available if available else None,
        "hfu": (spent.flops + spent.recomputed_flops) / available if available else None,
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
