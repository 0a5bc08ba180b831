"""What a reward model learns: the value of the better answer above that of the worse one, place by place, in fp32."""

from __future__ import annotations

import torch

from megatron_xy.config import RewardConfig
from megatron_xy.data.dataset import PairIndex
from megatron_xy.model.heads import values_of
from megatron_xy.role import Role
from megatron_xy.training.train_step import BatchLoss, DeviceBatch, Objective

MEASURES = ("accuracy", "chosen_mean", "rejected_mean")  # of the scores: the values at the last tokens


def reward_objective(reward: RewardConfig) -> Objective:
    """The pairwise loss of a run's section `reward`; it counts pairs."""

    def loss(role: Role, num_sources: int, batch: DeviceBatch, output: torch.Tensor) -> BatchLoss:
        pairs, values = batch.pairs, values_of(output)
        assert pairs is not None, "the reward task's batches have pairs"
        losses = pair_losses(values, pairs, centering_coef=reward.centering_coef)
        chosen, rejected = (values.detach()[ends].double() for ends in (pairs.chosen_ends, pairs.rejected_ends))
        told = torch.stack(  # the loss, their number, MEASURES
            [losses.detach().double(), torch.ones_like(chosen), (chosen > rejected).double(), chosen, rejected], dim=1
        )
        by_source = torch.nn.functional.one_hot(pairs.source_ids, num_sources).double().T @ told
        num_pairs = torch.tensor(len(losses), dtype=torch.int, device=values.device)
        return losses.sum(), num_pairs, {"totals": by_source}

    return Objective(loss, measures=MEASURES)


def pair_losses(values: torch.Tensor, pairs: PairIndex[torch.Tensor], *, centering_coef: float = 0.0) -> torch.Tensor:
    """The loss of each pair, fp32 [pairs]: the mean over its places of -log sigmoid(chosen - rejected - margin).

    values [tokens] fp32. centering_coef: of (chosen + rejected)^2 of the scores, which holds them around 0.
    """
    ahead = values[pairs.chosen] - values[pairs.rejected] - pairs.margins[pairs.owners]
    terms = torch.nn.functional.softplus(-ahead) * pairs.weights
    losses = torch.zeros_like(pairs.margins).index_add(0, pairs.owners, terms)
    if centering_coef:
        losses = losses + centering_coef * (values[pairs.chosen_ends] + values[pairs.rejected_ends]).square()
    return losses
