"""Answers packed into micro-batches: each once, within the budget, every response token at its place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xy.data.answer_batches import equal_answers, pack_answers, plan_answers, width_of


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=30),
    budget=st.integers(21, 60),
    dp_size=st.integers(1, 5),
    multiple=st.integers(1, 4),
    rounds=st.integers(1, 3),
)
def test_every_answer_once_and_every_token_at_its_place(sizes, budget, dp_size, multiple, rounds):
    prompts = [[100 + index] * prompt for index, (prompt, _) in enumerate(sizes)]
    responses = [list(range(1000 * index, 1000 * index + length)) for index, (_, length) in enumerate(sizes)]
    lengths = [sum(pair) for pair in sizes]
    plan = plan_answers(lengths, budget=budget, dp_size=dp_size, multiple=rounds)
    assert len(plan) == dp_size
    assert len({len(rank) for rank in plan}) == 1
    assert len(plan[0]) % rounds == 0
    assert sorted(answer for rank in plan for batch in rank for answer in batch) == list(range(len(sizes)))
    width = width_of(plan, lengths, multiple=multiple)
    assert width % multiple == 0
    assert width <= budget + multiple - 1
    for rank in plan:
        for answers, batch in zip(rank, pack_answers(rank, prompts, responses, width=width), strict=True):
            row = batch.tokens
            assert len(row.tokens) == width
            assert row.cu_seqlens[-1] == width
            assert row.num_padding_tokens == width - sum(lengths[answer] for answer in answers)
            assert row.sum_squared_lengths == sum(lengths[answer] ** 2 for answer in answers)
            assert len(batch.rows) == sum(len(responses[answer]) for answer in answers) == row.loss_mask.sum()
            for before, answer, column in zip(batch.before, batch.rows, batch.columns, strict=True):
                token = responses[answer][column]
                assert row.tokens[before + 1] == row.labels[before] == token
                assert row.tokens[before] == (responses[answer][column - 1] if column else prompts[answer][-1])
                assert row.position_ids[before] == len(prompts[answer]) + column - 1


def test_work_is_spread_evenly():
    lengths = list(np.random.default_rng(0).integers(50, 2000, 400))
    plan = plan_answers(lengths, budget=4096, dp_size=8)
    loads = [sum(lengths[answer] for batch in rank for answer in batch) for rank in plan]
    assert max(loads) < 1.05 * min(loads)
    assert sum(len(rank) for rank in plan) <= sum(lengths) / 4096 * 1.2 + 8


def test_an_answer_beyond_the_budget_is_refused():
    with pytest.raises(ValueError, match="30 tokens do not fit into 20"):
        plan_answers([5, 30], budget=20, dp_size=1)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    number=st.integers(1, 80),
    length=st.integers(1, 30),
    room=st.integers(0, 100),
    dp_size=st.integers(1, 6),
    rounds=st.integers(1, 3),
)
def test_answers_of_one_length_are_shared_out_as_the_planner_says(number, length, room, dp_size, rounds):
    budget = length + room
    plan = plan_answers([length] * number, budget=budget, dp_size=dp_size, multiple=rounds)
    batches, most = equal_answers(number, length=length, budget=budget, dp_size=dp_size, multiple=rounds)
    assert batches == len(plan[0])
    assert most * length == width_of(plan, [length] * number, multiple=1)
