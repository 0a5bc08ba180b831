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

    world = dist.group.WORLD
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
            with role.active():
                result = train_step(role, batches, num_sources=2, lr=OPTIMIZER.lr, clip_grad=1.0)
            curves[name].append((result.loss, result.grad_norm))
    assert dist.group.WORLD is world, "the default group is the world again"
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


def draw(placements: list[Placement], rounds: int) -> dict[str, list[list[float]]]:
    """What each role's generators give, round by round: torch's own and the tracked one of tensor parallel ranks."""
    from megatron_xy import mcore

    roles = {
        place.name: models.make_role(
            place.layout, model=place.model, ranks=list(place.ranks), name=place.name, seed=place.seed
        )
        for place in placements
    }
    tracker = mcore.tensor_parallel_random.get_cuda_rng_tracker()
    torch.manual_seed(1234)
    outside = torch.get_rng_state()
    found: dict[str, list[list[float]]] = {name: [] for name, role in roles.items() if role is not None}
    for _ in range(rounds):
        for name, role in roles.items():
            if role is not None:
                with role.active():
                    common = torch.rand(2).tolist()
                    with tracker.fork():
                        found[name].append(common + torch.rand(2).tolist())
        assert torch.equal(torch.get_rng_state(), outside), "a role's draws leave the process's generator alone"
    return found


def test_every_role_draws_from_its_own_generators() -> None:
    together = run_ranks(draw, WORLDS["one over the middle of the other"], 3, world_size=WORLD_SIZE)
    apart = [run_ranks(draw, [place], 3, world_size=WORLD_SIZE) for place in WORLDS["one over the middle of the other"]]
    for rank in range(WORLD_SIZE):
        assert together[rank] == {**apart[0][rank], **apart[1][rank]}
    actors = [rank["actor"] for rank in together]
    for number in range(3):
        common = {tuple(draws[number][:2]) for draws in actors}
        by_tp_rank = [draws[number][2:] for draws in actors]
        assert len(common) == 1, "what is not split draws alike on all ranks"
        assert by_tp_rank[0] == by_tp_rank[2] != by_tp_rank[1] == by_tp_rank[3]
    assert together[1]["actor"][0][:2] != together[1]["critic"][0][:2]
    assert together[1]["actor"][0] != together[1]["actor"][1]


def fail_inside(layout: Layout) -> bool:
    """An error inside `active` still puts the process's generator back and keeps the role's."""
    role = models.make_role(layout)
    assert role is not None
    before = torch.get_rng_state()
    with pytest.raises(KeyError), role.active():
        first = torch.rand(1)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
    with role.active():
        second = torch.rand(1)
    return not torch.equal(first, second)


def test_an_error_inside_leaves_the_generators_in_order() -> None:
    assert run_ranks(fail_inside, Layout(), world_size=1) == [True]
