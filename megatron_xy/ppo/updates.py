"""The updates of a trained role: one a mini-batch, from what its losses give for every response token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_xy import device
from megatron_xy.config import PPOConfig
from megatron_xy.optimizer import apply_gradients, finish_gradients
from megatron_xy.parallel import from_last_stage, max_over, sum_over
from megatron_xy.ppo import functional
from megatron_xy.ppo.experience import Experience
from megatron_xy.ppo.transport import Shipment
from megatron_xy.ppo.worker import PackedBatch, RoleWorker
from megatron_xy.role import Role
from megatron_xy.training.train_step import BatchLoss, forward_backward


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
    with worker.working("update") as role:
        updates = []
        for answers in mini_batches:
            chosen = torch.zeros_like(mask)
            chosen[list(answers)] = mask[list(answers)]
            weights = functional.token_weights(chosen, aggregation=ppo.loss_aggregation)
            batches = worker.packed(role, experience.rollout, answers)
            updates.append(
                _update(worker, role, batches, names, weights=weights, mask=chosen, lr=lr, losses_of=losses_of)
            )
        groups = role.groups
        sums = sum_over(torch.stack([update.told for update in updates]).sum(dim=0), groups.collection.dp)
        first_max = from_last_stage(max_over(updates[0].largest, groups.collection.dp), groups).exp().item()
    if not groups.is_leader:  # the last stage's, where the losses are
        return _shipped(names, {})
    told = {
        **dict(zip(names, (sums / len(updates)).tolist(), strict=True)),
        f"{worker.name}_grad_norm": sum(update.grad_norm for update in updates) / len(updates),
        f"{worker.name}_updates": float(sum(update.is_made for update in updates)),
        "ratio_first_max": first_max,
    }
    return _shipped(names, told)


@dataclass(frozen=True)
class _Update:
    """What one update told on this rank."""

    told: torch.Tensor  # what the losses tell, by `names`; 0 but on the last stage, and of other names
    largest: torch.Tensor  # |log ratio|, likewise
    grad_norm: float
    is_made: bool


def _update(
    worker: RoleWorker,
    role: Role,
    batches: Sequence[PackedBatch],
    names: Sequence[str],
    *,
    weights: torch.Tensor,
    mask: torch.Tensor,
    lr: float,
    losses_of: LossesOf,
) -> _Update:
    """mask, weights: of the mini-batch's tokens, 0 elsewhere."""
    assert worker.placed.optimizer is not None, "a trained role has one"
    num_tokens = int(mask.count_nonzero())
    divisor = max(1, num_tokens)

    def loss_of(packed: PackedBatch, output: torch.Tensor) -> BatchLoss:
        place = packed.rows, packed.columns
        # Times the number of tokens, by which megatron-core divides the gradients.
        losses = losses_of(role, packed, divisor * weights[place], output)
        return losses.loss, mask[place].sum().to(torch.int), {**losses.told, "largest": losses.largest}

    role.zero_gradients()
    outputs = forward_backward(role, batches, loss_of=loss_of)
    told = torch.zeros(len(names), dtype=torch.float64, device=device.current())
    largest = torch.zeros((), device=device.current())
    for output in outputs:  # none but on the last stage
        told += torch.stack([output.get(name, told.new_zeros(())) for name in names]) / divisor
        largest = torch.maximum(largest, output["largest"])
    grad_norm = finish_gradients(role.optimizer)
    is_made = num_tokens > 0 and math.isfinite(grad_norm)
    if is_made:
        worker.before_update()
        clip_grad = worker.placed.optimizer.clip_grad
        apply_gradients(role.optimizer, lr=lr, clip_grad=clip_grad, grad_norm=grad_norm)
    return _Update(told, largest, grad_norm, is_made)


def _shipped(names: Sequence[str], metrics: dict[str, float]) -> Shipment:
    """Metrics, from the role's leader, which alone has some."""
    where = device.current()
    return Shipment({name: torch.tensor([metrics.get(name, 0.0)], dtype=torch.float64, device=where) for name in names})
