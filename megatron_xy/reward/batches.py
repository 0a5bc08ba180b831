"""Pairs -> the micro-batches of a data step: which pairs it takes, how they are packed, and where they are compared.

An epoch goes through all pairs in an order that follows from (seed, epoch); a step takes the next ones as long as their
tokens stay within its budget. Both answers of a pair lie in one micro-batch; all micro-batches have one width.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_xy.config import RewardConfig
from megatron_xy.data.answer_batches import AnswerBatch, pack_answers, plan_answers
from megatron_xy.data.dataset import MicroBatch, PairIndex
from megatron_xy.data.draws.permutation import shuffled
from megatron_xy.reward.pairs import Pair, first_difference

PairLoss = Literal["token", "sentence"]


@dataclass(frozen=True)
class PairStep:
    """The pairs of one data step, by number, and the epoch that they belong to."""

    epoch: int
    pairs: tuple[int, ...]
    ends_epoch: bool


class PairOrder:
    """Which pairs each data step takes."""

    def __init__(self, num_tokens: Sequence[int], *, seed: int, global_batch_tokens: int) -> None:
        """num_tokens: of each pair."""
        self._num_tokens, self._seed = num_tokens, seed
        self._budget = global_batch_tokens
        self._first_steps = [0]  # of each epoch, as far as any were asked for
        self._lock = threading.Lock()  # a step is asked for while another is prepared
        self._steps_of = lru_cache(maxsize=4)(self._plan)

    def step(self, data_step: int) -> PairStep:
        """What a data step takes, from 0 on."""
        with self._lock:
            while self._first_steps[-1] <= data_step:
                self._add_epoch()
            epoch = bisect.bisect_right(self._first_steps, data_step) - 1
            steps = self._steps_of(epoch)
        place = data_step - self._first_steps[epoch]
        return PairStep(epoch, steps[place], ends_epoch=place == len(steps) - 1)

    def num_steps(self, epochs: int) -> int:
        """How many steps the first epochs have."""
        with self._lock:
            while len(self._first_steps) <= epochs:
                self._add_epoch()
        return self._first_steps[epochs]

    def _add_epoch(self) -> None:
        steps = self._steps_of(len(self._first_steps) - 1)
        self._first_steps.append(self._first_steps[-1] + len(steps))

    def _plan(self, epoch: int) -> list[tuple[int, ...]]:
        """The steps of an epoch: at least one pair each, then as many as fit."""
        size = len(self._num_tokens)
        order = shuffled(range(size), size=size, key=f"pairs/{self._seed}/{epoch}")
        steps: list[tuple[int, ...]] = []
        taken: list[int] = []
        tokens = 0
        for pair in order:
            if taken and tokens + self._num_tokens[pair] > self._budget:
                steps.append(tuple(taken))
                taken, tokens = [], 0
            taken.append(pair)
            tokens += self._num_tokens[pair]
        return [*steps, tuple(taken)]


def pair_micro_batches(
    pairs: Sequence[Pair],
    *,
    source_ids: Sequence[int],
    width: int,
    reward: RewardConfig,
    dp_size: int,
    dp_rank: int,
    multiple: int = 1,
) -> list[MicroBatch]:
    """This data parallel rank's micro-batches of a step's pairs: as many on every rank, some perhaps without pairs.

    source_ids: of each pair. Their number is a multiple of `multiple`.
    """
    lengths = [pair.num_tokens for pair in pairs]
    mine = plan_answers(lengths, budget=width, dp_size=dp_size, multiple=multiple)[dp_rank]
    prompts = [pair.prompt.tolist() for pair in pairs for _ in range(2)]
    responses = [answer.tolist() for pair in pairs for answer in (pair.chosen, pair.rejected)]
    answers = [[answer for pair in numbers for answer in (2 * pair, 2 * pair + 1)] for numbers in mine]
    return [
        replace(batch.tokens, pairs=_index(batch, numbers, pairs, source_ids, reward))
        for batch, numbers in zip(pack_answers(answers, prompts, responses, width=width), mine, strict=True)
    ]


def _index(
    batch: AnswerBatch,
    numbers: Sequence[int],
    pairs: Sequence[Pair],
    source_ids: Sequence[int],
    reward: RewardConfig,
) -> PairIndex[NDArray[Any]]:
    is_first = batch.columns == 0
    begins = dict(zip(batch.rows[is_first].tolist(), (batch.before[is_first] + 1).tolist(), strict=True))
    chosen, rejected, owners, weights = [], [], [], []
    for place, number in enumerate(numbers):
        pair = pairs[number]
        columns = compared_columns(pair, loss=reward.loss)
        chosen.append(begins[2 * number] + np.minimum(columns, len(pair.chosen) - 1))
        rejected.append(begins[2 * number + 1] + np.minimum(columns, len(pair.rejected) - 1))
        owners.append(np.full(len(columns), place))
        weights.append(np.full(len(columns), 1.0 / len(columns)))
    return PairIndex(
        chosen=_joined(chosen).astype(np.int64),
        rejected=_joined(rejected).astype(np.int64),
        owners=_joined(owners).astype(np.int64),
        weights=_joined(weights).astype(np.float32),
        chosen_ends=np.array([part[-1] for part in chosen], dtype=np.int64),
        rejected_ends=np.array([part[-1] for part in rejected], dtype=np.int64),
        margins=np.array([reward.margin_scale * pairs[number].strength for number in numbers], dtype=np.float32),
        source_ids=np.array([source_ids[number] for number in numbers], dtype=np.int64),
    )


def compared_columns(pair: Pair, *, loss: PairLoss) -> NDArray[np.int64]:
    """The answer tokens at which a pair is compared, from 0; behind its end the shorter one keeps its end value.

    token: from the first that differs to the end of the longer answer; sentence: the last one alone.
    """
    length = max(len(pair.chosen), len(pair.rejected))
    return np.arange(first_difference(pair.chosen, pair.rejected) if loss == "token" else length - 1, length)


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0)
