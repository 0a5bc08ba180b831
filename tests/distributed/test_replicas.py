"""A bit that flips in one replica's weights is found, on all ranks, and the rank is named; whole replicas are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_xy.checkpoint.replicas import check_replicas, odd_ranks
from megatron_xy.config import OptimizerConfig
from megatron_xy.errors import PeerLost
from tests.distributed import models
from tests.distributed.models import Layout
from tests.distributed.spawn import run_ranks
from tests.distributed.test_checkpoint import steps


@pytest.mark.parametrize(
    ("sums", "shape", "odd"),
    [
        ([5, 5, 5], (1, 3), []),
        ([5, 4, 5], (1, 3), [1]),
        ([5, 4], (1, 2), [0, 1]),  # one of them: which cannot be told
        ([1, 2, 1, 2, 3, 4, 3, 9], (2, 2), [5, 7]),  # two stages of two replicas of two tensor parallel ranks
        ([1, 2, 1, 8, 1, 2], (1, 3), [3]),
    ],
)
def test_the_one_that_differs_from_most_is_odd(sums: list[int], shape: tuple[int, int], odd: list[int]) -> None:
    assert odd_ranks(sums, shape=shape) == odd


@pytest.mark.parametrize(
    "layout", [Layout(dp=4), Layout(tp=2, dp=2, sp=True, distributed=True, overlap=True)], ids=["dp4", "tp2-dp2"]
)
def test_a_flipped_bit_on_one_rank_is_found_by_all_before_an_update(layout: Layout) -> None:
    for told in run_ranks(train_and_flip, layout, world_size=layout.world_size):
        assert told.startswith("rank 1 holds" if layout.dp == 4 else "ranks 1, 3 hold"), told


def train_and_flip(layout: Layout) -> str:
    """On one rank: what the comparison says in the step after the flip; in those before it is silent."""
    role: Any = models.make_role(layout, optimizer=OptimizerConfig(lr=1e-2, lr_warmup_iters=0))

    def compare() -> None:
        check_replicas(role, iteration=1)

    steps(role, range(2), before_update=compare)

    def flip_and_compare() -> None:
        if role.groups.role_rank == 1:
            weight = next(named.parameter for named in role.named_parameters() if named.name.endswith("fc2.weight"))
            weight.detach().view(torch.int32)[3, 5] ^= 1
        compare()

    try:
        steps(role, range(2, 3), before_update=flip_and_compare)
    except PeerLost as error:
        return str(error)
    return "nothing"
