"""What one PPO step holds of its answers, the same on every rank: token rows as lists, numbers a token as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_xy.ppo.prompts import DrawnPrompt


@dataclass(frozen=True)
class Rollout:
    """Prompts and the answers to them, in the order in which prompts were drawn.

    prompts: by role, as each renders them; responses: the same token ids for all. `has_ended`: by an end token, and not
    by the limit; bool [answers]. `mask` is fp32 [answers, longest response].
    """

    drawn: Sequence[DrawnPrompt]
    prompts: dict[str, list[list[int]]]
    responses: list[list[int]]
    has_ended: torch.Tensor
    mask: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens of the actor's prompts and of the responses."""
        return sum(map(len, self.prompts["actor"])) + sum(map(len, self.responses))


@dataclass(frozen=True)
class Experience:
    """A rollout with all that the updates need: fp32 [answers, tokens], scores [answers]; 0 behind an answer's end."""

    rollout: Rollout
    logprobs: torch.Tensor  # of the policy that sampled, by the trainer
    ref_logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor  # at the position before each token
    scores: torch.Tensor  # as given
    rewards: torch.Tensor
    advantages: torch.Tensor  # as they are learned from: whitened where the config says so
    returns: torch.Tensor
    actor_mask: torch.Tensor  # of the tokens that the actor learns from
