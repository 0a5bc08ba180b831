"""The reward task: losses and gradient norms are those of the formula, under every layout, packing and batch size."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_xy.config import ModelConfig, OptimizerConfig, ParallelConfig, RewardConfig
from megatron_xy.reward.pairs import Pair
from tests.distributed.spawn import run_ranks

MODEL = ModelConfig(
    num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, vocab_size=96,
    max_position_embeddings=64, init_method_std=0.2, head="value",
)  # fmt: skip
OPTIMIZER = OptimizerConfig(lr=1e-3, lr_decay_style="constant", adam_eps=1e-6, weight_decay=0.0)
NUM_SOURCES = 2
REWARDS = {
    "token": RewardConfig(loss="token", margin_scale=0.3),
    "sentence": RewardConfig(loss="sentence", margin_scale=0.1, centering_coef=0.05),
}


@dataclass(frozen=True)
class Case:
    """A layout, and how pairs are packed."""

    world_size: int
    parallel: ParallelConfig
    width: int = 128


def split(tp: int = 1, pp: int = 1, dp: int = 1, width: int = 128, **switches: Any) -> Case:
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return Case(tp * pp * dp, ParallelConfig.model_validate({**sizes, **switches}), width)


CASES = {
    "wide": split(width=1024),
    "narrow": split(width=84),
    "tp2": split(tp=2),
    "tp2 sp, narrow": split(tp=2, width=84, sequence_parallel=True),
    "pp2": split(pp=2),
    "dp2": split(dp=2),
    "dp4, a rank without pairs": split(dp=4, width=512),
    "tp2 pp2 sp": split(tp=2, pp=2, sequence_parallel=True),
    "tp2 dp2, distributed optimizer": split(tp=2, dp=2, width=256, use_distributed_optimizer=True),
    "pp2 dp2": split(pp=2, dp=2, width=96),
    "pp2, interleaved": split(pp=2, virtual_pipeline_model_parallel_size=2),
}


def some_pairs(number: int) -> list[Pair]:
    """Pairs of many lengths: answers that differ from their first token, from a later one, or in how far they go."""
    draw = np.random.default_rng(number)
    pairs = []
    for index in range(number):
        common, chosen, rejected = (
            draw.integers(4, 96, size).astype(np.int32)
            for size in (index % 4, draw.integers(1, 12), draw.integers(1, 12))
        )
        end = np.array([2], dtype=np.int32)
        pairs.append(
            Pair(
                where="",
                text="",
                prompt=draw.integers(4, 96, draw.integers(1, 9)).astype(np.int32),
                chosen=np.concatenate([common, chosen, end]),
                rejected=np.concatenate([common, end if index % 5 == 0 else np.concatenate([rejected, end])]),
                strength=1 + index % 3,
                source=("a", "b")[index % NUM_SOURCES],
                models=("m", "m"),
            )
        )
    return pairs


PAIRS = some_pairs(14)


def three_steps(case: Case, reward: RewardConfig, load: str | None = None) -> dict[str, Any]:
    """What the steps told, and the scores before and after them; from fresh weights, or those that `load` names."""
    import torch.distributed as dist

    from megatron_xy.model.source import resolve_model
    from megatron_xy.model.weights import load_initial_weights
    from megatron_xy.parallel import build_groups
    from megatron_xy.reward.batches import pair_micro_batches
    from megatron_xy.reward.objective import reward_objective
    from megatron_xy.reward.scoring import score_answers
    from megatron_xy.role import build_role
    from megatron_xy.training.train_step import train_step

    parallel = case.parallel
    model = MODEL if load is None else resolve_model(ModelConfig(load=load, head="value"))
    groups = build_groups("model", ranks=range(dist.get_world_size()), parallel=parallel, timeout_seconds=60)
    assert groups is not None
    role = build_role(groups, model=model, parallel=parallel, optimizer=OPTIMIZER, seed=1, draw=False)
    load_initial_weights(role, seed=1)
    micro_batches = pair_micro_batches(
        PAIRS,
        source_ids=[index % NUM_SOURCES for index in range(len(PAIRS))],
        width=case.width,
        reward=reward,
        dp_size=groups.dp_size,
        dp_rank=groups.dp_rank,
        multiple=parallel.micro_batches_a_round,
    )
    told: dict[str, Any] = {"losses": [], "norms": [], "by_source": [], "measures": []}

    def scores() -> Any:
        answers = [answer for pair in PAIRS for answer in (pair.chosen, pair.rejected)]
        prompts = [pair.prompt for pair in PAIRS for _ in range(2)]
        return score_answers(role, prompts, answers, micro_batch_tokens=case.width)

    told["before"] = scores()
    for _ in range(3):
        done = train_step(
            role,
            micro_batches,
            num_sources=NUM_SOURCES,
            lr=OPTIMIZER.lr,
            clip_grad=0.0,
            objective=reward_objective(reward),
        )
        assert done.updated and done.num_loss_tokens == len(PAIRS)
        told["losses"].append(done.loss)
        told["norms"].append(done.grad_norm)
        told["by_source"].append(done.source_losses)
        told["measures"].append(done.measures)
    told["after"] = scores()
    return told


def by_the_formula(reward: RewardConfig) -> tuple[float, float, list[float]]:
    """Loss and gradient norm of all pairs, and the answers' scores: each answer alone, each pair by itself, in fp64."""
    import torch.distributed as dist

    from megatron_xy.data.answer_batches import pack_answers
    from megatron_xy.parallel import build_groups
    from megatron_xy.role import build_role
    from megatron_xy.training.train_step import forward, on_device

    groups = build_groups("model", ranks=range(dist.get_world_size()), parallel=ParallelConfig(), timeout_seconds=60)
    assert groups is not None
    role = build_role(groups, model=MODEL, parallel=ParallelConfig(), optimizer=None, seed=1)
    (model,) = role.chunks
    weights = [named.parameter for named in role.named_parameters()]
    for weight in weights:
        weight.requires_grad_(True)
    for module in model.modules():  # by autograd alone: there are no sums to add gradients to
        if hasattr(module, "gradient_accumulation_fusion"):
            module.gradient_accumulation_fusion = False

    def values(pair: Pair, answer: Any) -> torch.Tensor:
        length = len(pair.prompt) + len(answer)
        (packed,) = pack_answers([[0]], [pair.prompt.tolist()], [answer.tolist()], width=length)
        return forward(model, on_device(packed.tokens))[0, len(pair.prompt) :, 0].double()

    losses, scores = [], []
    for pair in PAIRS:
        chosen, rejected = values(pair, pair.chosen), values(pair, pair.rejected)
        longer = max(len(chosen), len(rejected))
        first = next(
            place
            for place in range(longer)
            if pair.chosen[place : place + 1].tolist() != pair.rejected[place : place + 1].tolist()
        )
        terms = []
        for place in range(first if reward.loss == "token" else longer - 1, longer):
            better = chosen[place] if place < len(chosen) else chosen[-1]
            worse = rejected[place] if place < len(rejected) else rejected[-1]
            terms.append(-torch.log(torch.sigmoid(better - worse - reward.margin_scale * pair.strength)))
        loss = sum(terms) / len(terms) + reward.centering_coef * (chosen[-1] + rejected[-1]) ** 2
        losses.append(loss)
        scores += [float(chosen[-1]), float(rejected[-1])]
    whole = sum(losses) / len(losses)
    gradients = torch.autograd.grad(whole, weights)
    return float(whole), math.sqrt(sum(float(part.double().square().sum()) for part in gradients)), scores


@pytest.mark.parametrize("kind", REWARDS)
def test_loss_and_gradient_are_the_formulas(kind: str) -> None:
    ((loss, norm, scores),) = run_ranks(by_the_formula, REWARDS[kind], world_size=1)
    (told,) = run_ranks(three_steps, split(), REWARDS[kind], world_size=1)
    assert told["losses"][0] == pytest.approx(loss, rel=1e-5)
    assert told["norms"][0] == pytest.approx(norm, rel=1e-5)
    np.testing.assert_allclose(told["before"], scores, rtol=1e-4, atol=1e-5)
    assert told["losses"][2] < 0.9 * told["losses"][0]
    chosen, rejected = np.array(scores[0::2]), np.array(scores[1::2])
    assert told["measures"][0]["accuracy"] == (chosen > rejected).mean()
    assert told["measures"][0]["chosen_mean"] == pytest.approx(chosen.mean(), rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {kind: run_ranks(three_steps, split(), REWARDS[kind], world_size=1)[0] for kind in REWARDS}


@pytest.mark.parametrize("name", CASES)
def test_the_same_under_every_layout_and_packing(name: str, alone: dict[str, Any]) -> None:
    case = CASES[name]
    kind = "sentence" if name in ("tp2", "narrow", "tp2 pp2 sp") else "token"
    wanted = alone[kind]
    for told in run_ranks(three_steps, case, REWARDS[kind], world_size=case.world_size):
        assert told["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert told["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
        for mine, others in zip(told["by_source"], wanted["by_source"], strict=True):
            assert mine == pytest.approx(others, rel=1e-5)
        np.testing.assert_allclose(told["after"], wanted["after"], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(told["before"], wanted["before"], rtol=1e-4, atol=1e-5)


# In a process of its own, as a user's. argv: folder, pairs [[prompt, chosen, rejected, strength], ...], rewards.
TRANSFORMERS_LOOP = """
import json, sys, torch
from transformers import LlamaConfig, LlamaForSequenceClassification
folder, pairs, rewards = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=96, max_position_embeddings=64, initializer_range=0.15, num_labels=1, pad_token_id=0,
)
model = LlamaForSequenceClassification(config)
model.save_pretrained(folder)
told = {}
for name, reward in rewards.items():
    losses = []
    for prompt, chosen, rejected, strength in pairs:
        values = []
        for answer in (chosen, rejected):
            hidden = model.model(torch.tensor([prompt + answer])).last_hidden_state
            values.append(model.score(hidden)[0, len(prompt):, 0])
        longer = max(len(chosen), len(rejected))
        first = next(t for t in range(longer) if chosen[t : t + 1] != rejected[t : t + 1])
        terms = [
            -torch.nn.functional.logsigmoid(
                values[0][min(t, len(chosen) - 1)]
                - values[1][min(t, len(rejected) - 1)]
                - reward["margin_scale"] * strength
            )
            for t in (range(first, longer) if reward["loss"] == "token" else [longer - 1])
        ]
        ends = values[0][-1] + values[1][-1]
        losses.append(sum(terms) / len(terms) + reward["centering_coef"] * ends**2)
    model.zero_grad()
    loss = sum(losses) / len(losses)
    loss.backward()
    squares = [float(parameter.grad.double().square().sum()) for parameter in model.parameters()]
    told[name] = [float(loss), sum(squares) ** 0.5]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def by_transformers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """A LlamaForSequenceClassification's folder, and the loss and gradient norm of its plain loop over the pairs."""
    folder = tmp_path_factory.mktemp("hf")
    pairs = [[pair.prompt.tolist(), pair.chosen.tolist(), pair.rejected.tolist(), pair.strength] for pair in PAIRS]
    rewards = {kind: reward.model_dump() for kind, reward in REWARDS.items()}
    argv = [sys.executable, "-c", TRANSFORMERS_LOOP, str(folder), json.dumps(pairs), json.dumps(rewards)]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", REWARDS)
def test_loss_and_gradient_are_those_of_a_plain_loop_over_transformers(
    kind: str, by_transformers: tuple[Path, dict[str, list[float]]]
) -> None:
    folder, told = by_transformers
    case = split(tp=2, pp=2, sequence_parallel=True) if kind == "token" else split(width=84)
    for mine in run_ranks(three_steps, case, REWARDS[kind], f"hf:{folder}", world_size=case.world_size):
        assert [mine["losses"][0], mine["norms"][0]] == pytest.approx(told[kind], rel=1e-5)
