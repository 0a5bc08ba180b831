"""Several roles with layouts of their own in one world: each trains as if alone, nothing global between them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_xy.config import ModelConfig, OptimizerConfig
from megatron_xy.config.roles import parsed_ranks
from tests.distributed import models
from tests.distributed.models import Layout
from tests.distributed.spawn import run_ranks

STEPS = 5
WORLD_SIZE = 4
OPTIMIZER = OptimizerConfig(lr=1e-3, lr_warmup_iters=0, adam_eps=1e-6)
ACTOR = models.MODEL
# Another shape, so that whatever two roles shared by accident would not fit; fewer layers, one query group a rank.
CRITIC = models.MODEL.model_copy(
    update={"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 2}
)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A role on some ranks of the world."""

    name: str
    layout: Layout
    ranks: tuple[int, ...]
    model: ModelConfig
    seed: int


def actor(layout: Layout, *ranks: int) -> Placement:
    return Placement("actor", layout, ranks, ACTOR, seed=7)


def critic(layout: Layout, *ranks: int) -> Placement:
    return Placement("critic", layout, ranks, CRITIC, seed=8)


WORLDS = {
    "side by side": [actor(Layout(tp=2, sp=True), 0, 1), critic(Layout(pp=2), 2, 3)],
    "one over the middle of the other": [actor(Layout(tp=2, pp=2, sp=True), 0, 1, 2, 3), critic(Layout(pp=2), 1, 2)],
    "alternating ranks": [actor(Layout(tp=2, sp=True), 0, 2), critic(Layout(tp=2, sp=True), 1, 3)],
    "ranks named in another order": [
        actor(Layout(tp=2, pp=2, sp=True), *parsed_ranks("0,3,1,2", key="ranks")),
        critic(Layout(pp=2), *parsed_ranks("3,0", key="ranks")),
    ],
    "both on all ranks": [actor(Layout(tp=2, dp=2), 0, 1, 2, 3), critic(Layout(pp=2, dp=2), 0, 1, 2, 3)],
}


def train(placements: list[Placement]) -> dict[str, Any]:
    """{role: curve of (loss, gradient norm)} of this rank's roles, trained in turn step by step."""
    from megatron.core import parallel_state

    from megatron_xy.training.train_step import train_step

    world, drawn = dist.group.WORLD, torch.get_rng_state()
    roles = {
        place.name: models.make_role(
            place.layout,
            model=place.model,
            optimizer=OPTIMIZER,
            ranks=list(place.ranks),
            name=place.name,
            seed=place.seed,
        )
        for place in placements
    }
    curves: dict[str, Any] = {name: [] for name, role in roles.items() if role is not None}
    assert set(curves) == {place.name for place in placements if dist.get_rank() in place.ranks}
    for step in range(STEPS):
        for name, role in roles.items():
            if role is None:
                continue
            batches = models.micro_batches(step, dp_size=role.groups.dp_size, dp_rank=role.groups.dp_rank)
            result = train_step(role, batches, num_sources=2, lr=OPTIMIZER.lr, clip_grad=1.0)
            curves[name].append((result.loss, result.grad_norm))
    assert dist.group.WORLD is world, "the default group is the world again"
    assert torch.equal(torch.get_rng_state(), drawn), "a reward function's own draws are no role's"
    assert not parallel_state.is_initialized(), "no role may lean on megatron-core's global groups"
    return curves


@pytest.fixture(scope="module")
def alone() -> dict[str, list[tuple[float, float]]]:
    """The curves of single-rank runs."""
    places = [actor(Layout(), 0), critic(Layout(), 0)]
    return {place.name: run_ranks(train, [place], world_size=1)[0][place.name] for place in places}


@pytest.mark.parametrize("placements", WORLDS.values(), ids=WORLDS.keys())
def test_roles_train_as_if_they_were_alone(
    placements: list[Placement], alone: dict[str, list[tuple[float, float]]]
) -> None:
    results = run_ranks(train, placements, world_size=WORLD_SIZE)
    for place in placements:
        for rank in place.ranks:
            for got, want in zip(results[rank][place.name], alone[place.name], strict=True):
                assert got == pytest.approx(want, rel=1e-5)
    assert alone["actor"] != alone["critic"]
