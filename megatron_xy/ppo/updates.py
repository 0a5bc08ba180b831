"""The updates of a trained role: one a mini-batch, from what its losses give for every response token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from megatron_xy import device
from megatron_xy.config import PPOConfig
from megatron_xy.optimizer import apply_gradients
from megatron_xy.parallel import from_last_stage, max_over, sum_over
from megatron_xy.ppo import functional
from megatron_xy.ppo.experience import Experience
from megatron_xy.ppo.transport import Shipment
from megatron_xy.ppo.worker import PackedBatch, RoleWorker
from megatron_xy.role import Role
from megatron_xy.training.train_step import LossFunction, forward, forward_backward


@dataclass(frozen=True)
class Losses:
    """Of one micro-batch: the weighted sum to learn from, weighted sums to tell by their metrics' names, the largest
    |log ratio|."""

    loss: torch.Tensor
    told: dict[str, torch.Tensor]
    largest: torch.Tensor


def weighted(weights: torch.Tensor, **parts: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weighted sum of each part over a micro-batch's tokens, in fp64 and without gradients."""
    return {name: (weights * part).sum().detach().double() for name, part in parts.items()}


# Of a role, a micro-batch, what each of its response tokens weighs, and the last stage's output.
LossesOf = Callable[[Role, PackedBatch, torch.Tensor, torch.Tensor], Losses]


def learn(
    worker: RoleWorker,
    names: Sequence[str],
    experience: Experience,
    mini_batches: Sequence[Sequence[int]],
    *,
    mask: torch.Tensor,
    ppo: PPOConfig,
    lr: float,
    losses_of: LossesOf,
) -> Shipment:
    """One update of the role a mini-batch (indices of answers); ships its metrics. mask: of the tokens to learn from.

    names: of the metrics; of those that the losses tell, and of the gradient norm, means over the updates.
    """
    if worker.role is None or not mini_batches:
        return _shipped(names, {})
    assert worker.placed.optimizer is not None, "a trained role has one"
    clip_grad = worker.placed.optimizer.clip_grad
    sums = torch.zeros(len(names), dtype=torch.float64, device=device.current())
    norms: list[float] = []
    num_updates, first_max = 0, 0.0
    with worker.working("update") as role:
        groups = role.groups
        for answers in mini_batches:
            chosen = torch.zeros_like(mask)
            chosen[list(answers)] = mask[list(answers)]
            num_tokens = max(1, int(chosen.sum()))
            # Times the number of tokens, by which megatron-core divides the gradients.
            weights = num_tokens * functional.token_weights(chosen, aggregation=ppo.loss_aggregation)
            role.zero_gradients()
            batches = worker.packed(role, experience.rollout, answers)
            outputs = forward_backward(
                role,
                batches,
                forward_step=partial(_update_step, role, weights, mask, losses_of),
            )
            largest = torch.zeros(1, device=device.current())
            for output in outputs:  # none but on the last stage
                for index, name in enumerate(names):
                    sums[index] += output[name] / num_tokens if name in output else 0.0
                largest = torch.maximum(largest, output["largest"].reshape(1))
            if not norms:
                largest = from_last_stage(max_over(largest, groups.collection.dp), groups)
                first_max = float(largest.exp().item())
            has_tokens = bool(chosen.any())
            grad_norm, updated = apply_gradients(
                role.optimizer,
                lr=lr,
                clip_grad=clip_grad,
                accepts=lambda norm: has_tokens and math.isfinite(norm),  # noqa: B023  asked within the call
                before_update=worker.before_update,
            )
            norms.append(grad_norm)
            num_updates += int(updated)
        means = (sum_over(sums, groups.collection.dp) / len(norms)).tolist()  # the last stage's, where the leader is
    if not groups.is_leader:
        return _shipped(names, {})
    told = {
        **dict(zip(names, means, strict=True)),
        f"{worker.name}_grad_norm": sum(norms) / len(norms),
        f"{worker.name}_updates": float(num_updates),
        "ratio_first_max": first_max,
    }
    return _shipped(names, told)


def _shipped(names: Sequence[str], metrics: dict[str, float]) -> Shipment:
    """Metrics, from the role's leader, which alone has some."""
    where = device.current()
    return Shipment({name: torch.tensor([metrics.get(name, 0.0)], dtype=torch.float64, device=where) for name in names})


def _update_step(
    role: Role,
    weights: torch.Tensor,
    mask: torch.Tensor,
    losses_of: LossesOf,
    batches: Iterator[PackedBatch],
    module: torch.nn.Module,
) -> tuple[torch.Tensor, LossFunction]:
    packed = next(batches)
    output = forward(module, packed)

    def learn(last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        place = packed.rows, packed.columns
        losses = losses_of(role, packed, weights[place], last)
        return losses.loss, mask[place].sum().to(torch.int), {**losses.told, "largest": losses.largest}

    return output, learn
