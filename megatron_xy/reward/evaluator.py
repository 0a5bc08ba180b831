"""A reward run's evaluations: after each epoch, of held-out pairs and as many of the training's, as one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_xy.config import RunConfig
from megatron_xy.log import RunLog
from megatron_xy.reward.batches import PairOrder
from megatron_xy.reward.pairs import PairData
from megatron_xy.reward.scoring import score_answers
from megatron_xy.reward.table import lines_of, stored_scores, table_of
from megatron_xy.role import Role


class PairEvaluator:
    """Scores pairs as `score` does: by the value at the last token, whatever the loss is."""

    def __init__(self, config: RunConfig, *, data: PairData, order: PairOrder) -> None:
        self._config, self._order = config, order
        self._held_out = data.held_out
        # As many training pairs as held-out ones, spread over all of them; all, where nothing is held out.
        number = min(len(data.training), len(data.held_out) or len(data.training))
        places = np.linspace(0, len(data.training) - 1, num=number).astype(int)
        self._learned = [data.training[place] for place in places]

    def is_due(self, iteration: int) -> bool:
        """After each epoch, after the last iteration, and every `eval_interval` iterations where that is asked for."""
        training = self._config.training
        is_asked_for = training.eval_interval > 0 and iteration % training.eval_interval == 0
        return is_asked_for or iteration == training.train_iters or self._order.step(iteration - 1).ends_epoch

    def evaluate(self, role: Role, *, iteration: int, goes_on: Callable[[], bool]) -> dict[str, Any] | None:
        """The tables, and the scores' mean and deviation, which PPO takes from the checkpoint."""
        pairs = [*self._held_out, *self._learned]
        scores = score_answers(
            role,
            [pair.prompt for pair in pairs for _ in range(2)],
            [answer for pair in pairs for answer in (pair.chosen, pair.rejected)],
            micro_batch_tokens=self._config.training.micro_batch_tokens,
            goes_on=goes_on,
        )
        if scores is None:
            return None
        chosen, rejected = scores[0::2], scores[1::2]
        size = len(self._held_out)
        step = self._order.step(iteration - 1)
        held_out = table_of(self._held_out, chosen[:size], rejected[:size])
        record = {
            "iteration": iteration,
            "epoch": step.epoch + 1,
            "ends_epoch": step.ends_epoch,
            "loss": held_out["loss"] if held_out else None,  # where every task's records have them
            "loss_by_source": held_out["loss_by_source"] if held_out else {},
            "held_out": held_out,
            "training": table_of(self._learned, chosen[size:], rejected[size:]),
        }
        # Held-out answers say more of scale and spread than those it has learned from.
        measured = (self._held_out, chosen[:size], rejected[:size])
        if held_out is None:
            measured = (self._learned, chosen[size:], rejected[size:])
        record["scores"] = stored_scores(*measured, model=self._config.reward_section.stored_scores_of) or None
        return record

    def tell(self, log: RunLog, record: dict[str, Any], *, seconds: float) -> None:
        """Logs a record."""
        log.pair_evaluation(record, lines=lines_of(record, seconds=seconds))
