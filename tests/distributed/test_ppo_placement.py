"""One PPO step is the same for every placement and layout of the roles, and a planted fault shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from megatron_xy.config import PPOConfig
from tests.distributed.ppo_case import ANSWERS, one_step, placed
from tests.distributed.spawn import run_ranks

PPO = PPOConfig(
    rollout_batch_size=ANSWERS, mini_batch_size=ANSWERS, missing_end="bootstrap", entropy_coef=0.01, temperature=0.9,
    reward_normalization="running", kl_coef=0.2,
)  # fmt: skip


def everyone(*, ranks: list[int] | None = None, tokens: int = 64) -> dict[Any, Any]:
    return {name: placed(name, ranks or [0], tokens=tokens) for name in ("actor", "critic", "reference", "reward")}


PLACEMENTS: dict[str, tuple[int, dict[Any, Any]]] = {
    "small micro-batches": (1, everyone(tokens=20)),
    "actor tp 2, critic pp 2, reference and reward beside them": (
        4,
        {
            "actor": placed("actor", [0, 1], tp=2, tokens=40),
            "critic": placed("critic", [2, 3], pp=2, tokens=32),
            "reference": placed("reference", [2], tokens=50),
            "reward": placed("reward", [1, 3], tokens=24),
        },
    ),
    "each on its own rank": (
        4,
        {
            "actor": placed("actor", [0]),
            "critic": placed("critic", [1]),
            "reference": placed("reference", [2]),
            "reward": placed("reward", [3]),
        },
    ),
    "all on all four ranks, four layouts": (
        4,
        {
            "actor": placed("actor", [0, 1, 2, 3], tp=2, pp=2, sp=True, tokens=30),
            "critic": placed("critic", [0, 1, 2, 3], tokens=22),
            "reference": placed("reference", [0, 1, 2, 3], tp=2, tokens=36),
            "reward": placed("reward", [0, 1, 2, 3], pp=2, tokens=28),
        },
    ),
    "interleaved stages": (
        4,
        {
            "actor": placed("actor", [0, 1], pp=2, vp=2, tokens=40),
            "critic": placed("critic", [0, 1, 2, 3], pp=2, vp=2, tokens=24),
            "reference": placed("reference", [2], tokens=50),
            "reward": placed("reward", [2, 3], pp=2, vp=2, tokens=24),
        },
    ),
}


@pytest.fixture(scope="module")
def alone() -> Any:
    """All roles on one rank."""
    (result,) = run_ranks(one_step, everyone(), PPO, world_size=1)
    return result


def close(found: Any, wanted: Any, *, rel: float) -> bool:
    return bool(np.abs(found - wanted).max() <= rel * np.abs(wanted).max())


def assert_same_step(result: Any, alone: Any) -> None:
    for name, wanted in alone["tensors"].items():
        assert close(result["tensors"][name], wanted, rel=1e-5), name
    found, wanted = result["metrics"], alone["metrics"]
    assert set(found) == set(wanted)
    for name in ("critic_loss", "critic_grad_norm", "actor_grad_norm", "score_mean", "kl", "entropy", "value_mean"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-5), name
    assert found["actor_loss"] == pytest.approx(wanted["actor_loss"], abs=1e-6)
    assert found["ratio_first_max"] == pytest.approx(1.0, abs=1e-5)
    for role in ("actor", "critic"):
        updates = [shard[1:] for shard in shards(result["updates"], alone["updates"]) if shard[0].startswith(role)]
        difference = sum(np.square(values - part).sum() for values, part in updates)
        assert difference <= 1e-4**2 * sum(np.square(part).sum() for _, part in updates), role
    for name, values, part in shards(result["gradients"], alone["gradients"]):
        assert np.abs(values - part).max() <= 1e-5 * np.abs(alone["gradients"][name][1]).max(), name


def shards(found: Any, alone: Any) -> Iterator[tuple[str, Any, Any]]:
    """Each shard of one box beside its part of the whole."""
    for name, (start, values, boxes) in found.items():
        if boxes == 1 and values.size:
            yield name, values, alone[name][1][tuple(slice(a, a + n) for a, n in zip(start, values.shape, strict=True))]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_same_step_in_every_placement(placement: str, alone: Any) -> None:
    world_size, roles = PLACEMENTS[placement]
    for result in run_ranks(one_step, roles, PPO, world_size=world_size):
        assert_same_step(result, alone)


@pytest.fixture(scope="module")
def alone_generating() -> Any:
    """All roles on one rank, the actor answering."""
    (result,) = run_ranks(one_step, everyone(), PPO, None, True, world_size=1)
    return result


@pytest.mark.parametrize(
    "placement",
    [pytest.param(p, marks=[] if n in (2, 3) else [pytest.mark.slow]) for n, p in enumerate(PLACEMENTS) if n],
)
def test_the_same_answers_and_the_same_step_in_every_placement(placement: str, alone_generating: Any) -> None:
    world_size, roles = PLACEMENTS[placement]
    for result in run_ranks(one_step, roles, PPO, None, True, world_size=world_size):
        assert result["responses"] == alone_generating["responses"]
        assert_same_step(result, alone_generating)
    lengths = set(map(len, alone_generating["responses"]))
    assert len(lengths) > 2, "answers of several lengths, some of them cut"


def test_the_step_does_something(alone: Any) -> None:
    metrics = alone["metrics"]
    assert metrics["actor_updates"] == metrics["critic_updates"] == 1
    assert metrics["actor_grad_norm"] > 0.01
    assert metrics["critic_loss"] > 0.01
    assert abs(metrics["kl"]) > 0.1
    assert alone["tensors"]["advantages"].std() > 0.1


def whiten_each_rank_by_itself() -> None:
    import torch
    import torch.distributed as dist

    from megatron_xy.ppo import functional

    right = functional.whiten

    def wrong(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mine = torch.zeros_like(mask)
        mine[dist.get_rank() :: dist.get_world_size()] = mask[dist.get_rank() :: dist.get_world_size()]
        return right(values, mine if dist.get_world_size() > 1 else mask)

    functional.whiten = wrong


def weigh_micro_batches_alike() -> None:
    import torch

    from megatron_xy.ppo import updates

    right = updates.forward_backward

    def wrong(role: Any, batches: Any, *, loss_of: Any) -> Any:
        def averaged(packed: Any, output: torch.Tensor) -> Any:
            loss, num_tokens, told = loss_of(packed, output)
            return loss / num_tokens.clamp(min=1), torch.ones_like(num_tokens), told

        return right(role, batches, loss_of=averaged)

    updates.forward_backward = wrong


def values_one_position_late() -> None:
    from megatron_xy.ppo.roles import Critic

    right = Critic._values

    def wrong(self: Any, role: Any, packed: Any, output: Any) -> Any:
        told = right(self, role, packed, output)
        return {**told, "values": told["values_at_token"]}

    Critic._values = wrong  # type: ignore[method-assign]


@pytest.mark.parametrize("plant", [whiten_each_rank_by_itself, weigh_micro_batches_alike, values_one_position_late])
def test_a_planted_fault_shows(plant: Any, alone: Any) -> None:
    world_size, roles = PLACEMENTS["actor tp 2, critic pp 2, reference and reward beside them"]
    results = run_ranks(one_step, roles, PPO, plant, world_size=world_size)
    with pytest.raises(AssertionError):
        for result in results:
            assert_same_step(result, alone)
