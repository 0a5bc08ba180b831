"""Answers -> scores: the value at each answer's last token, by a role under any layout, packed by a token budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_xy import device
from megatron_xy.data.answer_batches import AnswerBatch, pack_answers, plan_answers, width_of
from megatron_xy.model.heads import values_of
from megatron_xy.parallel import from_last_stage, sum_over
from megatron_xy.role import Role
from megatron_xy.training.train_step import forward_pass, on_device

MICRO_BATCHES_A_PASS = 8  # of a data parallel rank, about: between two looks at whether to go on
Tokens = Sequence[int] | NDArray[np.int32]


def score_answers(
    role: Role,
    prompts: Sequence[Tokens],
    responses: Sequence[Tokens],
    *,
    micro_batch_tokens: int,
    goes_on: Callable[[], bool] = lambda: True,
) -> NDArray[np.float64] | None:
    """The scores [answers] on every rank; None where `goes_on`, asked before every pass, said no.

    Collective over the role, and the same on all its ranks. Weights and gradients stay as they are.
    """
    scores: list[NDArray[np.float64]] = []
    with role.evaluating():
        for part in passes(prompts, responses, most=MICRO_BATCHES_A_PASS * micro_batch_tokens * role.groups.dp_size):
            if not goes_on():
                return None
            scores.append(score_pass(role, prompts[part], responses[part], micro_batch_tokens=micro_batch_tokens))
    return np.concatenate(scores) if scores else np.zeros(0)


def passes(prompts: Sequence[Tokens], responses: Sequence[Tokens], *, most: int) -> Iterator[slice]:
    """Answers one after another in portions of up to `most` tokens, at least one answer each."""
    first = tokens = 0
    for index in range(len(responses)):
        length = len(prompts[index]) + len(responses[index])
        if index > first and tokens + length > most:
            yield slice(first, index)
            first, tokens = index, 0
        tokens += length
    if first < len(responses):
        yield slice(first, len(responses))


@torch.no_grad()
def score_pass(
    role: Role, prompts: Sequence[Tokens], responses: Sequence[Tokens], *, micro_batch_tokens: int
) -> NDArray[np.float64]:
    """The scores of a few answers: one pass through the pipeline, in evaluation mode. Collective over the role."""
    groups = role.groups
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    plan = plan_answers(lengths, budget=micro_batch_tokens, dp_size=groups.dp_size)
    width = width_of(plan, lengths, multiple=groups.tp_size)
    packed = pack_answers(
        plan[groups.dp_rank],
        [np.asarray(prompt).tolist() for prompt in prompts],
        [np.asarray(response).tolist() for response in responses],
        width=width,
    )
    batches = [on_device(batch.tokens) for batch in packed]
    scores = torch.zeros(len(responses), dtype=torch.float64, device=device.current())
    outputs = forward_pass(role, batches, lambda batch, last: {"values": values_of(last)})
    for batch, output in zip(packed, outputs, strict=False):  # none but on the last stage
        answers, places = _last_tokens(batch, responses)
        scores[torch.from_numpy(answers)] = output["values"][torch.from_numpy(places)].double()
    return from_last_stage(sum_over(scores, groups.collection.dp), groups).cpu().numpy()


def _last_tokens(batch: AnswerBatch, responses: Sequence[Tokens]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The answers of a micro-batch, and the places in its row of their last tokens."""
    lengths = np.array([len(response) for response in responses])
    is_last = batch.columns == lengths[batch.rows] - 1
    return batch.rows[is_last], batch.before[is_last] + 1
