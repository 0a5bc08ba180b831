"""PPO's maths against the published golden numbers, against loops written from the paper, and with planted mistakes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xy.config import PPOConfig
from megatron_xy.ppo import engine
from megatron_xy.ppo import functional as F
from megatron_xy.ppo.controllers import RunningMoments, adapted_kl_coef
from megatron_xy.ppo.experience import Rollout
from megatron_xy.ppo.transport import Shipment

TOLERANCE = 2e-6
LENGTHS = [6, 4, 2]


@pytest.fixture
def golden() -> dict[str, torch.Tensor]:
    """Three answers of up to six tokens; behind each answer's end stands what must never be looked at."""
    b = torch.arange(3, dtype=torch.float64).unsqueeze(1)
    t = torch.arange(6, dtype=torch.float64).unsqueeze(0)
    mask = (t < torch.tensor(LENGTHS).unsqueeze(1)).double()
    old = -1 - 0.1 * t - 0.05 * b
    tensors = {
        "values": 0.1 * (b + 1) - 0.05 * t,
        "old": old,
        "ref": old - 0.02 * (t - 2),
        "new": old + 0.03 * (t - 1) * (1 - 2 * (b % 2)),
        "values_new": 0.1 * (b + 1) - 0.05 * t + 0.1 * (t - 2),
    }
    spoilt = {name: torch.where(mask.bool(), tensor, 1e6) for name, tensor in tensors.items()}
    return {**spoilt, "mask": mask, "scores": torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)}


def rewards_of(golden: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.shape_rewards(golden["scores"], golden["old"], golden["ref"], golden["mask"], kl_coef=0.1)


def advantages_of(golden: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return F.gae(rewards_of(golden), golden["values"], golden["mask"], gamma=1.0, gae_lambda=0.95)


def rows(tensor: torch.Tensor) -> list[float]:
    return [float(value) for row, length in zip(tensor, LENGTHS, strict=True) for value in row[:length]]


def test_rewards_sum_to_score_minus_the_penalty(golden: dict[str, torch.Tensor]) -> None:
    rewards = rewards_of(golden)
    kl = F.masked_sum(F.kl_k1(golden["old"], golden["ref"]), golden["mask"])
    torch.testing.assert_close(rewards.sum(dim=1), golden["scores"] - 0.1 * kl)
    assert all(not rewards[row, length:].any() for row, length in enumerate(LENGTHS))


def test_golden_advantages_and_returns(golden: dict[str, torch.Tensor]) -> None:
    advantages, returns = advantages_of(golden)
    assert rows(advantages) == pytest.approx(
        [
            *[0.659914, 0.743067, 0.832702, 0.929160, 1.032800, 1.144000],
            *[-0.609996, -0.593680, -0.574400, -0.552000],
            *[1.618400, 1.752000],
        ],
        abs=TOLERANCE,
    )
    assert rows(returns) == pytest.approx(
        [
            *[0.759914, 0.793067, 0.832702, 0.879160, 0.932800, 0.994000],
            *[-0.409996, -0.443680, -0.474400, -0.502000],
            *[1.918400, 2.002000],
        ],
        abs=TOLERANCE,
    )


def test_golden_whitening(golden: dict[str, torch.Tensor]) -> None:
    advantages, _ = advantages_of(golden)
    valid = torch.tensor(rows(advantages), dtype=torch.float64)
    assert float(valid.mean()) == pytest.approx(0.531831, abs=TOLERANCE)
    assert float(valid.var()) == pytest.approx(0.779415, abs=TOLERANCE)
    assert rows(F.whiten(advantages, golden["mask"])) == pytest.approx(
        [
            *[0.145080, 0.239268, 0.340798, 0.450056, 0.567449, 0.693405],
            *[-1.293349, -1.274868, -1.253029, -1.227657],
            *[1.230759, 1.382088],
        ],
        abs=TOLERANCE,
    )


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("token_mean", -0.009524), ("sequence_sum_mean", -0.038096), ("sequence_token_mean", -0.154017)],
)
def test_golden_policy_loss(golden: dict[str, torch.Tensor], aggregation: F.Aggregation, expected: float) -> None:
    mask = golden["mask"]
    whitened = F.whiten(advantages_of(golden)[0], mask)
    loss, clipped = F.policy_loss(golden["new"], golden["old"], whitened, clip_low=0.05, clip_high=0.05, dual_clip=3)
    weights = F.token_weights(mask, aggregation=aggregation)
    assert float((loss * weights).sum()) == pytest.approx(expected, abs=TOLERANCE)
    assert float(F.masked_mean(clipped.double(), mask)) == pytest.approx(0.333333, abs=TOLERANCE)
    assert float(F.masked_mean(golden["old"] - golden["new"], mask)) == pytest.approx(-0.015, abs=TOLERANCE)


def test_golden_value_loss(golden: dict[str, torch.Tensor]) -> None:
    _, returns = advantages_of(golden)
    loss, clipped = F.value_loss(golden["values_new"], golden["values"], returns, clip=0.15)
    assert float(F.masked_mean(loss, golden["mask"])) == pytest.approx(0.522722, abs=TOLERANCE)
    assert float(F.masked_mean(clipped.double(), golden["mask"])) == pytest.approx(0.25, abs=TOLERANCE)


def test_no_value_counts_as_clipped_that_has_moved_by_rounding_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    old, returns = (torch.randn(10_000, generator=draw) for _ in range(2))
    values = (old * (1 + 1e-7 * torch.randn(10_000, generator=draw))).requires_grad_()
    loss, clipped = F.value_loss(values, old, returns, clip=0.2)
    assert not clipped.any() and bool((values != old).any())
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    torch.testing.assert_close(gradient, (values - returns).detach())


def test_golden_divergences(golden: dict[str, torch.Tensor]) -> None:
    means = [
        float(F.masked_mean(estimate(golden["new"], golden["ref"]), golden["mask"])) for estimate in (F.kl_k1, F.kl_k2)
    ]
    assert means == pytest.approx([0.011667, 0.002925], abs=TOLERANCE)


def test_only_k2_has_the_gradient_of_the_true_divergence() -> None:
    logits = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    reference = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(0)
    logp = logits.log_softmax(0)
    (true,) = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), logits, retain_graph=True)
    under_p = logp.detach().exp()  # the expectation over samples, which carry no gradient
    gradients = {
        name: torch.autograd.grad((under_p * estimate(logp, reference)).sum(), logits, retain_graph=True)[0]
        for name, estimate in {"k1": F.kl_k1, "k2": F.kl_k2}.items()
    }
    torch.testing.assert_close(gradients["k2"], true)
    assert not torch.allclose(gradients["k1"], true, atol=1e-3)


def gae_that_looks_at_padding(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The value behind the last token is what happens to stand there."""
    advantage, advantages = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards)
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    for t in range(rewards.size(1) - 1, -1, -1):
        delta = rewards[:, t] + gamma * after[:, t] - values[:, t]
        advantage = (delta + gamma * gae_lambda * advantage) * mask[:, t]
        advantages[:, t] = advantage
    return advantages, (advantages + values) * mask


def rewards_one_token_late(
    scores: torch.Tensor, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor, *, kl_coef: float
) -> torch.Tensor:
    """The score stands on the first pad."""
    rewards = -kl_coef * torch.where(mask.bool(), logprobs - ref_logprobs, 0.0)
    late = mask.long().sum(dim=1).clamp(max=mask.size(1) - 1)
    return rewards.scatter_add(1, late.unsqueeze(1), scores.unsqueeze(1))


@pytest.mark.parametrize(
    ("name", "mistake", "test"),
    [
        ("gae", gae_that_looks_at_padding, test_golden_advantages_and_returns),
        ("shape_rewards", rewards_one_token_late, test_rewards_sum_to_score_minus_the_penalty),
        ("shape_rewards", rewards_one_token_late, test_golden_advantages_and_returns),
    ],
)
def test_a_planted_mistake_shows(
    golden: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    mistake: Callable[..., torch.Tensor],
    test: Callable[[dict[str, torch.Tensor]], None],
) -> None:
    monkeypatch.setattr(F, name, mistake)
    with pytest.raises(AssertionError):
        test(golden)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    gamma=st.floats(0, 1),
    gae_lambda=st.floats(0, 1),
    bootstrap=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_gae_is_the_sum_of_the_paper(
    lengths: list[int], gamma: float, gae_lambda: float, bootstrap: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + 1
    rewards, values = (torch.randn(len(lengths), width, generator=generator).double() for _ in range(2))
    after = torch.randn(len(lengths), generator=generator).double() if bootstrap else None
    mask = torch.arange(width).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
    rewards, values = (torch.where(mask, tensor, torch.nan) for tensor in (rewards, values))
    advantages, returns = F.gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda, value_after=after)
    for row, length in enumerate(lengths):
        v = [*values[row, :length].tolist(), float(after[row]) if after is not None else 0.0]
        deltas = [float(rewards[row, t]) + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, length))
            assert float(advantages[row, t]) == pytest.approx(expected, abs=1e-9)
            assert float(returns[row, t]) == pytest.approx(expected + v[t], abs=1e-9)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_sum_mean", "sequence_token_mean"])
def test_weights_of_parts_add_up_to_the_whole(aggregation: F.Aggregation) -> None:
    mask = torch.arange(9).unsqueeze(0) < torch.tensor([9, 1, 4, 6]).unsqueeze(1)
    losses = torch.randn(4, 9, generator=torch.Generator().manual_seed(3))
    per_answer = [losses[row, : int(mask[row].sum())] for row in range(4)]
    expected = {
        "token_mean": torch.cat(per_answer).mean(),
        "sequence_sum_mean": torch.stack([part.sum() for part in per_answer]).mean(),
        "sequence_token_mean": torch.stack([part.mean() for part in per_answer]).mean(),
    }[aggregation]
    weights = F.token_weights(mask, aggregation=aggregation)
    parts = [(weights[part] * losses[part]).sum() for part in ([0], [1, 2], [3])]
    torch.testing.assert_close(torch.stack(parts).sum(), expected)


def test_dual_clip_bounds_only_negative_advantages() -> None:
    old, advantages = torch.zeros(4), torch.tensor([-1.0, -1.0, 1.0, 1.0])
    new = torch.tensor([math.log(10.0), math.log(1.1), math.log(10.0), math.log(0.1)])
    bounded = F.policy_loss(new, old, advantages, clip_low=0.2, clip_high=0.2, dual_clip=3.0).loss
    assert bounded.tolist() == pytest.approx([3.0, 1.1, -1.2, -0.1])
    plain = F.policy_loss(new, old, advantages, clip_low=0.2, clip_high=0.2).loss
    assert plain.tolist() == pytest.approx([10.0, 1.1, -1.2, -0.1])


def test_a_ratio_beyond_all_bounds_stays_finite() -> None:
    loss = F.policy_loss(torch.tensor([0.0]), torch.tensor([-1e4]), torch.tensor([-1.0]), clip_low=0.2, clip_high=0.2)
    assert torch.isfinite(loss.loss).all()


def test_explained_variance() -> None:
    returns = torch.tensor([[1.0, 2.0, 3.0, 99.0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    assert float(F.explained_variance(returns, returns, mask)) == 1.0
    assert float(F.explained_variance(torch.full_like(returns, 2.0), returns, mask)) == 0.0
    assert float(F.explained_variance(returns, torch.ones_like(returns), mask)) == 0.0


def test_adaptive_kl_moves_towards_its_target_and_never_by_more_than_a_fifth() -> None:
    given = {"target": 6.0, "num_answers": 500, "horizon": 1000}
    assert adapted_kl_coef(0.1, kl=6.0, **given) == 0.1
    assert adapted_kl_coef(0.1, kl=600.0, **given) == pytest.approx(0.1 * (1 + 0.2 * 0.5))
    assert adapted_kl_coef(0.1, kl=0.0, **given) == pytest.approx(0.1 * (1 - 0.2 * 0.5))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(batches=st.lists(st.lists(st.floats(-1e3, 1e3), max_size=6), max_size=6))
def test_running_moments_are_those_of_all_values(batches: list[list[float]]) -> None:
    moments = RunningMoments()
    for batch in batches:
        moments = moments.merged(batch)
    values = [value for batch in batches for value in batch]
    assert moments.count == len(values)
    if values:
        assert moments.mean == pytest.approx(statistics.fmean(values), abs=1e-6)
    if len(set(values)) > 1:
        assert moments.deviation == pytest.approx(statistics.stdev(values), rel=1e-6, abs=1e-6)
    else:
        assert moments.deviation == 1.0


@pytest.mark.parametrize(
    ("options", "returns", "learned"),
    [
        ({"missing_end": "bootstrap"}, [5.0, -7.0 + 20.0], [1, 1]),
        ({"missing_end": "penalty", "missing_end_penalty": 2.0}, [5.0, -9.0], [1, 1]),
        ({"missing_end": "mask"}, [5.0, -7.0], [1, 0]),
        ({"reward_clip": 4.0}, [4.0, -4.0], [1, 1]),
        ({"reward_normalization": "stored"}, [1.0, -3.0], [1, 1]),
        ({"reward_normalization": "running"}, [6 / 72**0.5, -6 / 72**0.5], [1, 1]),
    ],
)
def test_scores_of_answers_that_ended_and_that_were_cut_become_returns(
    options: dict[str, Any], returns: list[float], learned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two answers of two tokens, the second one cut, without values, divergence and discount."""
    monkeypatch.setattr(engine, "exchange", lambda *shipments: [shipment.tensors for shipment in shipments])
    zeros = torch.zeros(2, 2)
    policy = {"logprobs": zeros, "entropy": zeros}
    values = {"values": zeros, "value_after": torch.tensor([10.0, 20.0])}
    ppo: Any = engine.PPO(
        config=PPOConfig(gamma=1.0, gae_lambda=1.0, whiten_advantages=False, **options),
        actor=SimpleNamespace(logprobs=lambda rollout: Shipment(policy)),  # type: ignore[arg-type]
        critic=SimpleNamespace(values=lambda rollout: Shipment(values)),  # type: ignore[arg-type]
        reference=SimpleNamespace(logprobs=lambda rollout: Shipment(policy)),  # type: ignore[arg-type]
        scorer=SimpleNamespace(score=lambda rollout: Shipment({"scores": torch.tensor([5.0, -7.0])})),
        state=engine.PPOState(kl_coef=0.1),
        stored=(2.0, 3.0),
    )
    rollout = Rollout([], {}, [[1, 2], [3, 4]], has_ended=torch.tensor([True, False]), mask=torch.ones(2, 2))
    experience = ppo.collect(rollout, check=lambda *_: None)
    assert experience.returns.tolist() == [pytest.approx([value] * 2) for value in returns]
    assert experience.actor_mask.tolist() == [[place] * 2 for place in learned]
    assert experience.scores.tolist() == [5.0, -7.0] and ppo.state.moments.count == 2
