"""What is wrong with a PPO step: numbers that are none, updates that were not made, a ratio that is not 1.

Every rank judges the same numbers, so what is raised here is raised on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from megatron_xy.errors import DataError
from megatron_xy.ppo.experience import Rollout
from megatron_xy.ppo.prompts import PromptFile
from megatron_xy.ppo.worker import TRAINED

RATIO_ALARM = {"fp32": 1e-5, "bf16": 5e-2}  # |log ratio| at the first mini-batch beyond which something is wrong


def check_finite(rollout: Rollout, judged: Mapping[str, torch.Tensor], prompts: PromptFile, *, iteration: int) -> None:
    """Raises DataError for scores, values and log-probabilities that are no numbers; judged: [answers, ...] by name."""
    are_finite = [torch.isfinite(tensor).reshape(tensor.size(0), -1).all(dim=1) for tensor in judged.values()]
    for name, of_answers in zip(judged, torch.stack(are_finite).tolist(), strict=True):
        rows = [row for row, is_finite in enumerate(of_answers) if not is_finite]
        if rows:
            lines = [prompts.rows[rollout.drawn[row].row].line for row in rows[:5]]
            raise DataError(
                f"step {iteration}: {name} of {len(rows)} answer(s) are not finite, the prompts stand in "
                f"{prompts.path} on lines {', '.join(map(str, lines))}; look at the role that gives them, or lower "
                f"optimizer.lr and go on from an earlier checkpoint"
            )


def ratio_alarm(largest: float, *, params_dtype: str) -> str | None:
    """What to say of the policy's largest ratio at a step's first mini-batch; None where it is 1, but for rounding."""
    if largest <= math.exp(RATIO_ALARM[params_dtype]):
        return None
    return (
        f"  ALARM: the policy's ratio at the first mini-batch is {largest:.6g} and should be 1: the weights that gave "
        f"the old log-probabilities are not those that are updated"
    )


class SkippedUpdates:
    """The steps in a row of which a role has learned nothing: `in_a_row`, by role, for a checkpoint's manifest, too."""

    def __init__(self, *, limit: int) -> None:
        """limit: `training.max_skipped_in_a_row`."""
        self._limit = limit
        self.in_a_row = dict.fromkeys(TRAINED, 0)

    @property
    def longest(self) -> int:
        """In a row, of the role that has waited longest."""
        return max(self.in_a_row.values())

    def add(
        self,
        skipped: Mapping[str, int],
        *,
        wanted: Mapping[str, int],
        metrics: Mapping[str, float],
        iteration: int,
        say: Callable[[str], None],
    ) -> None:
        """Counts a step and says what was skipped. Raises DataError after too many steps.

        skipped, wanted: updates that were not made, and all that would have been, by role.
        """
        for name, count in skipped.items():
            self.in_a_row[name] = self.in_a_row[name] + 1 if 0 < count == wanted[name] else 0
            is_finite = math.isfinite(metrics.get(f"{name}_grad_norm", math.nan))
            reason = "no answer that ended to learn from" if is_finite else "gradient not finite"
            if count:
                say(f"  SKIPPED {count} of {wanted[name]} updates of the {name}: {reason}")
            if self.in_a_row[name] >= self._limit:
                remedy = (
                    "raise ppo.max_response_length, take another ppo.missing_end than mask"
                    if is_finite
                    else "go on from an earlier checkpoint (checkpoint.resume=ITERATION) with a lower optimizer.lr"
                )
                raise DataError(
                    f"all updates of the {name} were skipped in {self._limit} steps in a row, up to step {iteration}: "
                    f"{reason}; {remedy}, or raise training.max_skipped_in_a_row"
                )
