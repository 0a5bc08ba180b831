"""Proximal policy optimisation, as it reads: answers, scores, advantages, updates.

Every rank runs this; a role's method computes on that role's ranks alone and hands back a shipment, and `exchange`
makes shipments whole on every rank. So reference, critic and reward model score at the same time, and actor and critic
update at the same time. What is branched on is the same on all ranks: config, step, exchanged values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from megatron_xy.config import PPOConfig
from megatron_xy.ppo import functional
from megatron_xy.ppo.controllers import RunningMoments, adapted_kl_coef
from megatron_xy.ppo.experience import Experience, Rollout
from megatron_xy.ppo.roles import Actor, Critic, Policy
from megatron_xy.ppo.transport import Shipment, exchange


class Scorer(Protocol):
    """What gives an answer its score: a reward model, or a function."""

    def score(self, rollout: Rollout) -> Shipment:
        """`scores` [answers]."""


@dataclass(frozen=True)
class PPOState:
    """What PPO carries from step to step, beside weights and optimizers."""

    kl_coef: float
    moments: RunningMoments = field(default_factory=RunningMoments)


@dataclass
class PPO:
    """The algorithm over its four roles. stored: mean and deviation of the scores that the reward model keeps."""

    config: PPOConfig
    actor: Actor
    critic: Critic
    reference: Policy
    scorer: Scorer
    state: PPOState
    stored: tuple[float, float] = (0.0, 1.0)

    def collect(self, rollout: Rollout, *, check: Callable[[Rollout, dict[str, torch.Tensor]], None]) -> Experience:
        """All roles' judgement of a rollout, and what follows from it. check: raises where the numbers are unusable."""
        policy, reference, critic, scored = exchange(
            self.actor.logprobs(rollout),
            self.reference.logprobs(rollout),
            self.critic.values(rollout),
            self.scorer.score(rollout),
        )
        scores, values = scored["scores"], critic["values"]
        logprobs, ref_logprobs = policy["logprobs"], reference["logprobs"]
        check(rollout, {"scores": scores, "logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values})
        config, mask, has_ended = self.config, rollout.mask, rollout.has_ended
        self.state = replace(self.state, moments=self.state.moments.merged(scores.tolist()))
        rewards = functional.shape_rewards(
            self._judged(scores, has_ended), logprobs, ref_logprobs, mask, kl_coef=self.state.kl_coef
        )
        is_bootstrapped = config.missing_end == "bootstrap"
        advantages, returns = functional.gae(
            rewards,
            values,
            mask,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
            value_after=torch.where(has_ended, 0.0, critic["value_after"]) if is_bootstrapped else None,
        )
        return Experience(
            rollout=rollout,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            entropy=policy["entropy"],
            values=values,
            scores=scores,
            rewards=rewards,
            advantages=functional.whiten(advantages, mask) if config.whiten_advantages else advantages,
            returns=returns,
            actor_mask=mask * has_ended.unsqueeze(1) if config.missing_end == "mask" else mask,
        )

    def learn(
        self,
        experience: Experience,
        mini_batches: Sequence[Sequence[int]],
        rates: Mapping[str, float],
        *,
        is_warmup: bool,
    ) -> dict[str, float]:
        """Updates actor and critic, the critic alone while it warms up, and the KL coefficient; the step's metrics.

        rates: learning rates by role.
        """
        critic = self.critic.update(experience, mini_batches, ppo=self.config, lr=rates["critic"])
        actor = self.actor.update(experience, [] if is_warmup else mini_batches, ppo=self.config, lr=rates["actor"])
        told = {name: value.squeeze() for shipped in exchange(actor, critic) for name, value in shipped.items()}
        metrics = {**read({**told, **measure(experience)}), "kl_coef": self.state.kl_coef}
        if self.config.kl_target is not None:
            adapted = adapted_kl_coef(
                self.state.kl_coef,
                kl=metrics["kl"],
                target=self.config.kl_target,
                num_answers=len(experience.scores),
                horizon=self.config.kl_horizon,
            )
            self.state = replace(self.state, kl_coef=adapted)
        return metrics

    def _judged(self, scores: torch.Tensor, has_ended: torch.Tensor) -> torch.Tensor:
        """The scores as they enter the rewards: normalised, clipped, less the penalty of answers that were cut."""
        config = self.config
        shift, scale = {
            "none": (0.0, 1.0),
            "running": (self.state.moments.mean, self.state.moments.deviation),
            "stored": self.stored,
        }[config.reward_normalization]
        judged = (scores - shift) / scale
        if config.reward_clip is not None:
            judged = judged.clamp(-config.reward_clip, config.reward_clip)
        if config.missing_end == "penalty":
            judged = judged - config.missing_end_penalty * ~has_ended
        return judged


def read(metrics: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Scalars of the device, as one."""
    return dict(zip(metrics, torch.stack([value.double() for value in metrics.values()]).tolist(), strict=True))


def measure(experience: Experience) -> dict[str, torch.Tensor]:
    """The metrics that follow from an experience alone, on the device."""
    rollout, mask = experience.rollout, experience.rollout.mask
    divergence = functional.masked_sum(functional.kl_k1(experience.logprobs, experience.ref_logprobs), mask)
    return {
        "score_mean": experience.scores.mean(),
        "score_std": experience.scores.std(unbiased=False),
        "reward_mean": experience.rewards.sum(dim=1).mean(),
        "kl": divergence.mean(),
        "entropy": functional.masked_mean(experience.entropy, mask),
        "explained_variance": functional.explained_variance(experience.values, experience.returns, mask),
        "value_mean": functional.masked_mean(experience.values, mask),
        "response_length_mean": mask.sum(dim=1).mean(),
        "end_rate": rollout.has_ended.float().mean(),
    }
