"""What is wrong with a PPO step is told by name: numbers that are none, updates that were not made, a ratio."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_xy.errors import DataError
from megatron_xy.ppo.alarms import SkippedUpdates, check_finite, ratio_alarm
from megatron_xy.ppo.experience import Rollout
from megatron_xy.ppo.prompts import DrawnPrompt, PromptFile


def rollout() -> Rollout:
    """Two answers of two tokens, to the rows 1 and 0."""
    return Rollout(
        drawn=[DrawnPrompt(1, 0), DrawnPrompt(0, 0)],
        prompts={"actor": [[1], [1]]},
        responses=[[5, 2], [6, 2]],
        has_ended=torch.tensor([True, True]),
        mask=torch.ones(2, 2),
    )


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("scores", torch.tensor([torch.nan, 0.0])), ("values", torch.tensor([[0.0, torch.inf], [0.0, 0.0]]))],
)
def test_numbers_that_are_none_are_told_with_their_prompts(tmp_path: Path, name: str, numbers: torch.Tensor) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    prompts = PromptFile(tmp_path / "prompts.jsonl", seed=1)
    fine = {"scores": torch.zeros(2), "values": torch.zeros(2, 2)}
    check_finite(rollout(), fine, prompts, iteration=3)
    with pytest.raises(DataError, match=rf"step 3: {name} of 1 answer\(s\) are not finite, .* on lines 2; look at"):
        check_finite(rollout(), {**fine, name: numbers}, prompts, iteration=3)


def test_a_ratio_that_is_not_one_is_told_beyond_rounding() -> None:
    assert ratio_alarm(1 + 5e-6, params_dtype="fp32") is None and ratio_alarm(1.04, params_dtype="bf16") is None
    assert "is 1.04 and should be 1" in (ratio_alarm(1.04, params_dtype="fp32") or "")


def test_steps_without_any_update_count_in_a_row() -> None:
    skipped, told = SkippedUpdates(limit=3), list[str]()
    none, some, all_of_them = {"actor": 0, "critic": 0}, {"actor": 1, "critic": 0}, {"actor": 2, "critic": 0}
    wanted, metrics = {"actor": 2, "critic": 2}, {"actor_grad_norm": float("nan"), "critic_grad_norm": 1.0}
    lengths = []
    for iteration, step in enumerate((all_of_them, some, all_of_them, none, all_of_them, all_of_them), 1):
        skipped.add(step, wanted=wanted, metrics=metrics, iteration=iteration, say=told.append)
        lengths.append(skipped.longest)
    assert lengths == [1, 0, 1, 0, 1, 2]
    assert told[1] == "  SKIPPED 1 of 2 updates of the actor: gradient not finite" and len(told) == 5
    with pytest.raises(DataError, match="all updates of the actor were skipped in 3 steps in a row, up to step 7"):
        skipped.add(all_of_them, wanted=wanted, metrics=metrics, iteration=7, say=told.append)
