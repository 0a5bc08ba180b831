"""The four roles of PPO, with the few methods that the engine calls.

Each method computes on the role's ranks alone and returns a shipment, which is empty of this rank's doing elsewhere; so
roles on separate ranks work at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from megatron_xy.config import PlacedRole, PPOConfig
from megatron_xy.losses import token_logprobs_and_entropy
from megatron_xy.model.heads import values_of
from megatron_xy.ppo import functional
from megatron_xy.ppo.experience import Experience, Rollout
from megatron_xy.ppo.transport import Shipment
from megatron_xy.ppo.updates import Losses, learn, weighted
from megatron_xy.ppo.worker import PackedBatch, RoleWorker
from megatron_xy.role import Role

ACTOR_METRICS = ("actor_loss", "actor_grad_norm", "clip_fraction", "kl_loss", "ratio_first_max", "actor_updates")
CRITIC_METRICS = ("critic_loss", "critic_grad_norm", "value_clip_fraction", "critic_updates")


class Policy(RoleWorker):
    """A language model that gives log-probabilities: the reference, and what the actor is built on."""

    def __init__(self, placed: PlacedRole, role: Role | None, *, temperature: float) -> None:
        super().__init__(placed, role)
        self.temperature = temperature

    def logprobs(self, rollout: Rollout) -> Shipment:
        """`logprobs` and `entropy` of every response token under the tempered distribution."""
        return self.fill(rollout, "logprobs", partial(_logprobs, self.temperature), ("logprobs", "entropy"))


class Actor(Policy):
    """The policy that is trained."""

    def update(
        self,
        experience: Experience,
        mini_batches: Sequence[Sequence[int]],
        *,
        ppo: PPOConfig,
        lr: float,
    ) -> Shipment:
        """One update a mini-batch (indices of answers); ships ACTOR_METRICS: means over the updates."""

        def losses(role: Role, packed: PackedBatch, weights: torch.Tensor, logits: torch.Tensor) -> Losses:
            outputs = _logprobs(self.temperature, role, packed, logits)
            logprobs, entropy = outputs["logprobs"], outputs["entropy"]
            place = packed.rows, packed.columns
            old, advantages = experience.logprobs[place], experience.advantages[place]
            loss, clipped = functional.policy_loss(
                logprobs,
                old,
                advantages,
                clip_low=ppo.clip_ratio,
                clip_high=ppo.clip_ratio_high or ppo.clip_ratio,
                dual_clip=ppo.dual_clip,
            )
            divergence = functional.kl_k2(logprobs, experience.ref_logprobs[place])
            whole = loss - ppo.entropy_coef * entropy + ppo.kl_loss_coef * divergence
            ratio = functional.log_ratio(logprobs, old).abs().detach()
            return Losses(
                (weights * whole).sum(),
                weighted(weights, actor_loss=loss, clip_fraction=clipped, kl_loss=divergence),
                ratio.max() if len(ratio) else ratio.new_zeros(()),
            )

        mask = experience.actor_mask
        return learn(self, ACTOR_METRICS, experience, mini_batches, mask=mask, ppo=ppo, lr=lr, losses_of=losses)


class Critic(RoleWorker):
    """The value model that is trained. Its output is shifted and scaled as the scores are."""

    def __init__(self, placed: PlacedRole, role: Role | None, *, shift: float = 0.0, scale: float = 1.0) -> None:
        """Values are (output - shift) / scale."""
        super().__init__(placed, role)
        self.shift, self.scale = shift, scale

    def values(self, rollout: Rollout) -> Shipment:
        """`values` at the position before every response token; `value_after` [answers] at each one's last token."""
        shipment = self.fill(rollout, "values", self._values, ("values", "values_at_token"))
        shipment.tensors["value_after"] = functional.at_last(shipment.tensors.pop("values_at_token"), rollout.mask)
        return shipment

    def _values(self, role: Role, packed: PackedBatch, output: torch.Tensor) -> dict[str, torch.Tensor]:
        values = (values_of(output) - self.shift) / self.scale
        return {"values": values[packed.before], "values_at_token": values[packed.before + 1]}

    def update(
        self,
        experience: Experience,
        mini_batches: Sequence[Sequence[int]],
        *,
        ppo: PPOConfig,
        lr: float,
    ) -> Shipment:
        """One update a mini-batch (indices of answers); ships CRITIC_METRICS: means over the updates."""

        def losses(role: Role, packed: PackedBatch, weights: torch.Tensor, output: torch.Tensor) -> Losses:
            values = self._values(role, packed, output)["values"]
            place = packed.rows, packed.columns
            loss, clipped = functional.value_loss(
                values, experience.values[place], experience.returns[place], clip=ppo.value_clip
            )
            told = weighted(weights, critic_loss=loss, value_clip_fraction=clipped)
            return Losses((weights * loss).sum(), told, values.new_zeros(()))

        mask = experience.rollout.mask
        return learn(self, CRITIC_METRICS, experience, mini_batches, mask=mask, ppo=ppo, lr=lr, losses_of=losses)


class RewardModel(RoleWorker):
    """A frozen value model; its output at the last token is the score."""

    def score(self, rollout: Rollout) -> Shipment:
        """`scores` [answers]."""
        shipment = self.fill(rollout, "score", _values_at_tokens, ("at_token",))
        return Shipment({"scores": functional.at_last(shipment.tensors["at_token"], rollout.mask)})


def _logprobs(temperature: float, role: Role, packed: PackedBatch, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    logprobs, entropy = token_logprobs_and_entropy(
        logits[0, packed.before],
        packed.labels[0, packed.before],
        vocab_size=role.vocab_size,
        temperature=temperature,
        tp_group=role.groups.collection.tp,
    )
    return {"logprobs": logprobs, "entropy": entropy}


def _values_at_tokens(role: Role, packed: PackedBatch, output: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"at_token": values_of(output)[packed.before + 1]}
