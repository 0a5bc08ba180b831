"""The maths of PPO on padded batches of answers: pure tensors, no process groups, no model.

Every tensor is [answers, tokens] over response tokens, unless said otherwise; `mask` is 1 up to and including the stop
token, 0 behind it. `values[:, t]` is the critic's output at the position before token t. Masked entries never enter a
result, whatever they hold, and results are 0 there.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Aggregation = Literal["token_mean", "sequence_sum_mean", "sequence_token_mean"]

MOST_LOG_RATIO = 20.0  # beyond it exp() tells nothing but the sign


def shape_rewards(
    scores: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    kl_coef: float,
) -> torch.Tensor:
    """-kl_coef * k1 at every token, and the score [answers] at the last one; the sum is score - kl_coef * KL.

    `logprobs` are those of the policy that sampled. An answer needs one token at least.
    """
    rewards = -kl_coef * _valid(logprobs - ref_logprobs, mask)
    return rewards.scatter_add(1, last_token(mask).unsqueeze(1), scores.to(rewards.dtype).unsqueeze(1))


def last_token(mask: torch.Tensor) -> torch.Tensor:
    """The index of each answer's last token, int64 [answers]."""
    lengths = mask.long().sum(dim=1)
    assert bool((lengths > 0).all()), "an answer without any token was refused where it came in"
    return lengths - 1


def at_last(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The value at each answer's last token, [answers]."""
    return values.gather(1, last_token(mask).unsqueeze(1)).squeeze(1)


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    value_after: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns by generalised advantage estimation (Schulman et al. 2016).

    value_after [answers]: the value of the state behind the last token, for answers that were cut; 0 where left out.
    """
    rewards, values = _valid(rewards, mask), _valid(values, mask)
    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(rewards[:, 0])
    value_next = torch.zeros_like(advantage) if value_after is None else value_after.to(rewards.dtype)
    for t in range(rewards.size(1) - 1, -1, -1):
        valid = mask[:, t].bool()
        delta = rewards[:, t] + gamma * value_next - values[:, t]
        advantage = torch.where(valid, delta + gamma * gae_lambda * advantage, advantage)
        value_next = torch.where(valid, values[:, t], value_next)
        advantages[:, t] = torch.where(valid, advantage, 0.0)
    return advantages, _valid(advantages + values, mask)


def whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over all valid tokens of the batch, with Bessel's correction.

    The batch is the global one: what is whitened part by part depends on the split.
    """
    count = mask.sum()
    mean = _valid(values, mask).sum() / count
    centred = _valid(values - mean, mask)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    return centred * torch.rsqrt(variance + 1e-8)


def token_weights(mask: torch.Tensor, *, aggregation: Aggregation) -> torch.Tensor:
    """What each token of a global mini-batch weighs in its loss: the loss is the sum of weight * loss of the token.

    Weights are taken over the whole mini-batch; micro-batches and data parallel ranks then simply add up.
    """
    mask = mask.float()
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    num_answers = (mask.sum(dim=1) > 0).sum().clamp(min=1)
    if aggregation == "token_mean":
        return mask / mask.sum().clamp(min=1)
    if aggregation == "sequence_sum_mean":
        return mask / num_answers
    return mask / lengths / num_answers


class TokenLoss(NamedTuple):
    """The loss of every token, and where the clip cut its gradient off (bool)."""

    loss: torch.Tensor
    clipped: torch.Tensor


def log_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor) -> torch.Tensor:
    """log(new / old), kept where exp() is finite."""
    return (logprobs - old_logprobs).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> TokenLoss:
    """PPO's clipped surrogate (Schulman et al. 2017), of any shape; dual_clip: an upper bound of -dual_clip * A for
    tokens of negative advantage (Ye et al. 2020), None for none."""
    ratio = log_ratio(logprobs, old_logprobs).exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, bounded)
    clipped = bounded > plain
    if dual_clip is not None:
        highest = -dual_clip * advantages
        loss = torch.where(advantages < 0, torch.minimum(loss, highest), loss)
    return TokenLoss(loss, clipped)


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, clip: float | None
) -> TokenLoss:
    """Half the squared error, the larger one of the value and of the value kept within `clip` of the old one.

    It is the bounded one where that is larger: for moves within the clip both are the same.
    """
    plain = (values - returns).square()
    if clip is None:
        return TokenLoss(0.5 * plain, torch.zeros_like(plain, dtype=torch.bool))
    moved = values - old_values
    bounded = (old_values + moved.clamp(-clip, clip) - returns).square()
    clipped = (moved.abs() > clip) & (bounded > plain)  # within the clip, rounding alone tells the two apart
    return TokenLoss(0.5 * torch.where(clipped, bounded, plain), clipped)


def kl_k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """log p - log q: unbiased, may be negative; its gradient as a loss is wrong."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """(log p - log q)^2 / 2: as a loss it has the gradient of the true divergence."""
    return 0.5 * (logprobs - ref_logprobs).square()


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1 - Var(returns - values) / Var(returns) over the valid tokens; 0 where returns do not vary."""
    valid = mask.bool()
    error, spread = (returns - values)[valid].var(unbiased=False), returns[valid].var(unbiased=False)
    return torch.where(spread > 0, 1 - error / spread.clamp(min=1e-12), torch.zeros_like(spread))


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the valid tokens of the batch."""
    return _valid(values, mask).sum() / mask.sum()


def masked_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over each answer's valid tokens, [answers]."""
    return _valid(values, mask).sum(dim=1)


def _valid(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask.bool(), values, torch.zeros_like(values))
