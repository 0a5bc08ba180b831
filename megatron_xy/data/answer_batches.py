"""Answers -> micro-batches: prompts with their responses, packed by a token budget, the same plan on every rank.

Every micro-batch of a pass has the same width, as pipeline stages ask for; every data parallel rank has as many of
them. Attention stops at the borders of answers, so neither packing nor padding changes what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_xy.data.dataset import MicroBatch


@dataclass(frozen=True)
class AnswerBatch:
    """One micro-batch, and where the response tokens of its answers are.

    Response token i is number columns[i] of answer rows[i], and stands in the row behind before[i], whose output
    predicts it. All are int64 [response tokens].
    """

    tokens: MicroBatch
    before: NDArray[np.int64]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]


def plan_answers(lengths: Sequence[int], *, budget: int, dp_size: int, multiple: int = 1) -> list[list[list[int]]]:
    """Which answers each micro-batch of each data parallel rank takes: [dp_size][micro-batches][answers].

    Longest first, each into the micro-batch with the least work that has room; work is what attention and the rest
    cost together. A rank may have empty micro-batches; all have the same number, a multiple of `multiple`. Depends on
    the arguments alone.
    Raises ValueError where an answer is longer than the budget.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    if lengths and lengths[order[0]] > budget:
        raise ValueError(f"{lengths[order[0]]} tokens do not fit into {budget}")
    num_bins = max(1, -(-sum(lengths) // budget))
    while True:  # best fit needs a bin or two more than the sum says
        num_bins += -num_bins % (dp_size * multiple)
        bins: list[list[int]] = [[] for _ in range(num_bins)]
        room, work = [budget] * num_bins, [0.0] * num_bins
        for index in order:
            fitting = [number for number in range(num_bins) if room[number] >= lengths[index]]
            if not fitting:
                break
            chosen = min(fitting, key=lambda number: (work[number], number))
            bins[chosen].append(index)
            room[chosen] -= lengths[index]
            work[chosen] += _work(lengths[index])
        else:
            break
        num_bins += 1
    # Micro-batches of much work go to ranks with little so far.
    ranks: list[list[list[int]]] = [[] for _ in range(dp_size)]
    load = [0.0] * dp_size
    share = num_bins // dp_size
    for number in sorted(range(num_bins), key=lambda number: (-work[number], number)):
        rank = min((r for r in range(dp_size) if len(ranks[r]) < share), key=lambda r: (load[r], r))
        ranks[rank].append(sorted(bins[number]))
        load[rank] += work[number]
    return ranks


def equal_answers(number: int, *, length: int, budget: int, dp_size: int, multiple: int = 1) -> tuple[int, int]:
    """Micro-batches of a rank, and answers in the fullest one, where `plan_answers` has `number` of one length."""
    a_micro_batch = budget // length
    num_bins = -(-number * length // budget)
    num_bins = max(num_bins, -(-number // a_micro_batch))
    num_bins += -num_bins % (dp_size * multiple)
    return num_bins // dp_size, -(-number // num_bins)


def _work(length: int) -> float:
    """Relative cost of a document of `length` tokens: attention's square beside the rest, for usual widths."""
    return length + length * length / 20_000


def pack_answers(
    plan: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    width: int,
) -> list[AnswerBatch]:
    """The micro-batches of one rank: each answer's prompt and response as a document, padding behind them."""
    return [_pack(answers, prompts, responses, width=width) for answers in plan]


def _pack(
    answers: Sequence[int], prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, width: int
) -> AnswerBatch:
    tokens = np.zeros(width, dtype=np.int64)
    labels = np.zeros(width, dtype=np.int64)
    mask = np.zeros(width, dtype=np.float32)
    positions = np.zeros(width, dtype=np.int64)
    none = np.zeros(0, dtype=np.int64)
    borders, before, rows, columns = [0], [none], [none], [none]
    for answer in answers:
        prompt, response = prompts[answer], responses[answer]
        start, end = borders[-1], borders[-1] + len(prompt) + len(response)
        tokens[start:end] = [*prompt, *response]
        labels[start : end - 1] = tokens[start + 1 : end]
        positions[start:end] = np.arange(end - start)
        first = start + len(prompt) - 1
        before.append(np.arange(first, first + len(response)))
        rows.append(np.full(len(response), answer))
        columns.append(np.arange(len(response)))
        mask[before[-1]] = 1.0
        borders.append(end)
    used = borders[-1]
    if used < width:
        positions[used:] = np.arange(width - used)
        borders.append(width)
    lengths = np.diff(borders)
    micro_batch = MicroBatch(
        tokens=tokens,
        labels=labels,
        loss_mask=mask,
        position_ids=positions,
        cu_seqlens=np.array(borders, dtype=np.int32),
        source_ids=np.zeros(width, dtype=np.int32),
        num_padding_tokens=width - used,
        sum_squared_lengths=int((lengths[: len(answers)].astype(np.int64) ** 2).sum()),
    )
    return AnswerBatch(micro_batch, np.concatenate(before), np.concatenate(rows), np.concatenate(columns))


def width_of(plan: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int], *, multiple: int) -> int:
    """Tokens of the longest micro-batch of any rank, rounded up to what sequence parallelism divides."""
    longest = max(sum(lengths[answer] for answer in answers) for rank in plan for answers in rank)
    return max(multiple, -(-longest // multiple) * multiple)
