"""One PPO step against loops written from the papers; each mistake that other systems have made, planted, shows.

Of the list in docs/ppo.md: those of one step are planted here, those of the bare maths in unit/test_ppo_functional.py
(padding values, a reward one token late), those of resumes and hangs as whole runs in end_to_end/test_ppo.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_xy.config import PPOConfig
from tests.distributed.ppo_case import ANSWERS, STOP_IDS, one_step, placed
from tests.distributed.spawn import run_ranks

PENALTY, KL = 0.7, 0.2
PPO = PPOConfig(
    rollout_batch_size=ANSWERS, mini_batch_size=ANSWERS, missing_end="penalty", missing_end_penalty=PENALTY,
    temperature=0.8, kl_coef=KL, gae_lambda=0.9,
)  # fmt: skip
ALONE = {name: placed(name, [0]) for name in ("actor", "critic", "reference", "reward")}
LAYOUTS: dict[str, dict[str, int]] = {"actor": {"tp": 2}, "critic": {"pp": 2}, "reference": {}, "reward": {"tp": 2}}


def assert_is_the_papers(result: dict[str, Any]) -> None:
    """What follows from log-probabilities, values and scores, by loops over each answer's own tokens."""
    tensors, metrics = result["tensors"], result["metrics"]
    advantages: list[list[float]] = []
    errors: list[float] = []
    entropies: list[float] = []
    divergences: list[float] = []
    for row, response in enumerate(result["responses"]):
        places = range(len(response))
        difference = [float(tensors["logprobs"][row, t] - tensors["ref_logprobs"][row, t]) for t in places]
        judged = float(tensors["scores"][row]) - (0.0 if response[-1] in STOP_IDS else PENALTY)
        rewards = [-KL * value for value in difference]
        rewards[-1] += judged
        assert tensors["rewards"][row, : len(response)] == pytest.approx(rewards, abs=1e-5), row
        assert not tensors["rewards"][row, len(response) :].any(), row
        values = [*(float(tensors["values"][row, t]) for t in places), 0.0]
        advantage, answer = 0.0, []
        for t in reversed(places):
            advantage = rewards[t] + values[t + 1] - values[t] + 0.9 * advantage
            answer.insert(0, advantage)
        returns = [advantage + value for advantage, value in zip(answer, values, strict=False)]
        assert tensors["returns"][row, : len(response)] == pytest.approx(returns, abs=1e-5), row
        advantages.append(answer)
        errors += [0.5 * (answer[t] + values[t] - values[t]) ** 2 for t in places]
        entropies += [float(tensors["entropy"][row, t]) for t in places]
        divergences.append(sum(difference))
    every = np.array([value for answer in advantages for value in answer])
    for row, answer in enumerate(advantages):
        whitened = (np.array(answer) - every.mean()) / every.std(ddof=1)
        assert tensors["advantages"][row, : len(answer)] == pytest.approx(whitened, abs=1e-4), row
    assert metrics["critic_loss"] == pytest.approx(np.mean(errors), rel=1e-4)  # values are still the old ones
    assert metrics["entropy"] == pytest.approx(np.mean(entropies), rel=1e-4)
    assert metrics["kl"] == pytest.approx(np.mean(divergences), rel=1e-3, abs=1e-5)
    assert metrics["actor_loss"] == pytest.approx(0.0, abs=1e-5)  # whitened advantages at ratio 1
    assert metrics["ratio_first_max"] == pytest.approx(1.0, abs=1e-5)


def assert_stand_as_asked(result: dict[str, Any]) -> None:
    for name, sizes in LAYOUTS.items():
        asked = (sizes.get("tp", 1), sizes.get("pp", 1))
        assert result["layouts"][name] == (*asked, 2 // (asked[0] * asked[1])), name


def the_critic_never_sees_the_penalty() -> None:
    from dataclasses import replace

    from megatron_xy.ppo import functional
    from megatron_xy.ppo.roles import Critic

    right = Critic.update

    def wrong(self: Critic, experience: Any, *arguments: Any, **options: Any) -> Any:
        plain = experience.rewards + KL * (experience.logprobs - experience.ref_logprobs)
        mask = experience.rollout.mask
        _, returns = functional.gae(plain, experience.values, mask, gamma=1.0, gae_lambda=0.9)
        return right(self, replace(experience, returns=returns), *arguments, **options)

    Critic.update = wrong  # type: ignore[method-assign, assignment]


def means_over_padding() -> None:
    from megatron_xy.ppo import functional

    functional.masked_mean = lambda values, mask: values.mean()


def old_logprobs_of_another_distribution() -> None:
    """As where a generator's are taken for the trainer's."""
    from functools import partial

    from megatron_xy.ppo import roles
    from megatron_xy.ppo.roles import Actor

    def wrong(self: Actor, rollout: Any) -> Any:
        return self.fill(rollout, "logprobs", partial(roles._logprobs, 1.0), ("logprobs", "entropy"))

    Actor.logprobs = wrong  # type: ignore[method-assign]


def only_the_tokenizers_end_is_one() -> None:
    from dataclasses import replace

    import torch

    from megatron_xy.ppo import rollouts

    right = rollouts.as_rollout

    def wrong(*arguments: Any) -> Any:
        rollout = right(*arguments)
        return replace(rollout, has_ended=torch.tensor([row[-1] == 2 for row in rollout.responses]))

    rollouts.as_rollout = wrong


def a_missing_end_costs_nothing() -> None:
    from dataclasses import replace

    import torch

    from megatron_xy.ppo import rollouts

    right = rollouts.as_rollout

    def wrong(*arguments: Any) -> Any:
        rollout = right(*arguments)
        return replace(rollout, has_ended=torch.ones_like(rollout.has_ended))

    rollouts.as_rollout = wrong


def a_reward_on_the_first_pad() -> None:
    import torch

    from megatron_xy.ppo import functional

    right = functional.shape_rewards

    def wrong(scores: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        rewards = right(torch.zeros_like(scores), *arguments, **options)
        late = (arguments[2].long().sum(dim=1)).clamp(max=rewards.size(1) - 1)
        return rewards.scatter_add(1, late.unsqueeze(1), scores.to(rewards.dtype).unsqueeze(1))

    functional.shape_rewards = wrong


def the_divergence_counts_twice() -> None:
    """In the rewards and, as k1, once more in what the critic is to learn."""
    from megatron_xy.ppo import functional

    right = functional.gae

    def wrong(rewards: Any, *arguments: Any, **options: Any) -> Any:
        twice = rewards.clone()
        twice[:, :-1] *= 2
        return right(twice, *arguments, **options)

    functional.gae = wrong


def critic_loss_by_micro_batch() -> None:
    """Each micro-batch's mean, added up."""
    import torch

    from megatron_xy.ppo import roles

    right = roles.weighted

    def wrong(weights: torch.Tensor, **parts: torch.Tensor) -> dict[str, torch.Tensor]:
        return right(weights * (ANSWERS * 4 / max(len(weights), 1)), **parts)

    roles.weighted = wrong


def whiten_a_half_by_itself() -> None:
    import torch

    from megatron_xy.ppo import functional

    right = functional.whiten

    def wrong(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        half = len(values) // 2
        return torch.cat([right(values[:half], mask[:half]), right(values[half:], mask[half:])])

    functional.whiten = wrong


MISTAKES: list[Callable[[], None]] = [
    the_critic_never_sees_the_penalty, means_over_padding, old_logprobs_of_another_distribution,
    only_the_tokenizers_end_is_one, a_missing_end_costs_nothing, a_reward_on_the_first_pad,
    the_divergence_counts_twice, critic_loss_by_micro_batch, whiten_a_half_by_itself,
]  # fmt: skip


def test_a_step_is_the_papers() -> None:
    (result,) = run_ranks(one_step, ALONE, PPO, None, True, world_size=1)
    ended = [row[-1] in STOP_IDS for row in result["responses"]]
    assert any(ended) and not all(ended), "the case has answers of both kinds"
    assert len(set(map(len, result["responses"]))) > 2, "and padding"
    assert_is_the_papers(result)


@pytest.mark.parametrize(
    "mistake", [pytest.param(m, marks=pytest.mark.slow) if n % 2 else m for n, m in enumerate(MISTAKES)]
)
def test_a_planted_mistake_shows(mistake: Callable[[], None]) -> None:
    (result,) = run_ranks(one_step, ALONE, PPO, mistake, True, world_size=1)
    with pytest.raises(AssertionError):
        assert_is_the_papers(result)


def cut_answers_are_in_no_mini_batch() -> None:
    from megatron_xy.ppo.engine import PPO

    right = PPO.learn

    def other(self: PPO, experience: Any, mini_batches: Any, *arguments: Any, **options: Any) -> Any:
        ended = experience.rollout.has_ended.tolist()
        kept = [[answer for answer in answers if ended[answer]] for answers in mini_batches]
        return right(self, experience, kept, *arguments, **options)

    PPO.learn = other  # type: ignore[method-assign]


def test_the_actor_learns_from_a_batch_with_masked_answers_as_from_one_without_them() -> None:
    masked = PPO.model_copy(update={"missing_end": "mask", "missing_end_penalty": 0.0})
    gradients = [
        run_ranks(one_step, ALONE, masked, plant, world_size=1)[0]["gradients"]
        for plant in (None, cut_answers_are_in_no_mini_batch)
    ]
    for name in (name for name in gradients[0] if name.startswith("actor.")):
        one, other = (found[name][1] for found in gradients)
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * np.abs(other).max())


def test_the_ratio_that_is_told_is_that_of_the_first_mini_batch() -> None:
    halves = PPO.model_copy(update={"mini_batch_size": ANSWERS // 2})
    (result,) = run_ranks(one_step, ALONE, halves, None, True, world_size=1)
    assert result["metrics"]["ratio_first_max"] == pytest.approx(1.0, abs=1e-5)


def scores_of_all_kinds_of_infinity() -> None:
    from megatron_xy.ppo.roles import RewardModel

    right = RewardModel.score

    def wrong(self: RewardModel, rollout: Any) -> Any:
        shipment = right(self, rollout)
        shipment.tensors["scores"][:2] = shipment.tensors["scores"].new_tensor([float("inf"), float("-inf")])
        return shipment

    RewardModel.score = wrong  # type: ignore[method-assign]


def test_scores_that_are_no_numbers_are_found_before_anything_is_made_of_them() -> None:
    with pytest.raises(pytest.fail.Exception, match="scores are not finite"):
        run_ranks(one_step, ALONE, PPO, scores_of_all_kinds_of_infinity, world_size=1)


def one_layout_for_all_on_the_same_ranks() -> None:
    from megatron_xy import parallel

    right = parallel.build_groups
    first: dict[tuple[int, ...], Any] = {}

    def wrong(name: str, *, ranks: Any, parallel: Any, timeout_seconds: float) -> Any:
        same = first.setdefault(tuple(ranks), parallel)
        return right(name, ranks=ranks, parallel=same, timeout_seconds=timeout_seconds)

    parallel.build_groups = wrong


@pytest.mark.parametrize("is_planted", [False, True])
def test_roles_on_the_same_ranks_keep_their_own_layouts(is_planted: bool) -> None:
    roles = {name: placed(name, [0, 1], **sizes) for name, sizes in LAYOUTS.items()}  # type: ignore[arg-type]
    results = run_ranks(layouts_of, roles, one_layout_for_all_on_the_same_ranks if is_planted else None, world_size=2)
    for layouts in results:
        if is_planted:
            with pytest.raises(AssertionError):
                assert_stand_as_asked({"layouts": layouts})
        else:
            assert_stand_as_asked({"layouts": layouts})


def layouts_of(roles: Any, plant: Callable[[], None] | None) -> dict[str, tuple[int, int, int]]:
    """On one rank: the tensor, pipeline and data parallel sizes that each role's groups have."""
    if plant is not None:
        plant()
    from megatron_xy import parallel

    told = {}
    for name, role in roles.items():
        groups = parallel.build_groups(name, ranks=role.ranks, parallel=role.parallel, timeout_seconds=60)
        assert groups is not None, "every role stands on every rank"
        told[name] = (groups.tp_size, groups.pp_size, groups.dp_size)
    return told
