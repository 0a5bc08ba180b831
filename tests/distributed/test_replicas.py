"""A bit that flips in one replica's weights is found, on all ranks, and the rank is named; whole replicas are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_xy.checkpoint.files import TrainingState
from megatron_xy.checkpoint.replicas import check_replicas, odd_ranks
from megatron_xy.config import OptimizerConfig, RunConfig
from megatron_xy.errors import PeerLost
from megatron_xy.log import RunLog
from megatron_xy.training.run_checkpoints import RunCheckpoints, RunState
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
        check_replicas(role, seen="before the update of step 1")

    steps(role, range(2), before_update=compare)

    def flip_and_compare() -> None:
        flip_on_rank_1(role)
        compare()

    try:
        steps(role, range(2, 3), before_update=flip_and_compare)
    except PeerLost as error:
        return str(error)
    return "nothing"


def flip_on_rank_1(role: Any) -> None:
    if role.groups.role_rank == 1:
        weight = next(named.parameter for named in role.named_parameters() if named.name.endswith("fc2.weight"))
        weight.detach().view(torch.int32)[3, 5] ^= 1


def test_a_flipped_bit_is_found_before_a_save_that_nobody_planned(tmp_path: Path) -> None:
    for told in run_ranks(save_on_a_stop, tmp_path, world_size=3):
        assert told.startswith("rank 1 holds other weights") and "seen after step 3: a bit" in told
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iter_0000002"]


def save_on_a_stop(run_dir: Path) -> str:
    """On one rank: what becomes of a save before a bit has flipped, and of one behind it."""
    role: Any = models.make_role(Layout(dp=3), optimizer=OptimizerConfig())
    config = RunConfig.model_validate({"run_dir": str(run_dir), "data": {"path": "data"}})
    with RunLog(run_dir, rank=dist.get_rank(), is_leader=False) as log:
        checkpoints = RunCheckpoints(
            config, role=role, data_fingerprints={}, chat_template=None, ends_epoch=lambda iteration: False,
            keeps_epochs=False, log=log,
        )  # fmt: skip
        checkpoints.save(RunState(TrainingState(iteration=2)))
        checkpoints.finish()
        flip_on_rank_1(role)
        try:
            checkpoints.save(RunState(TrainingState(iteration=3)))
        except PeerLost as error:
            return str(error)
    return "saved"
