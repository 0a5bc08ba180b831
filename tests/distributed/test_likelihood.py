"""Likelihoods of continuations with shared prefixes computed once: those of the plain forward pass, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import models
from tests.distributed.models import Layout
from tests.distributed.spawn import run_ranks

LAYOUTS = [Layout(), Layout(tp=2, pp=2, sp=True), Layout(pp=2, vp=2), Layout(dp=2)]


def made_up() -> list[tuple[list[int], list[list[int]]]]:
    """Two categories with examples in common, then what is odd: one continuation the beginning of another, a context
    that is a whole question of another's, the same question twice, a context of one token."""
    draw = np.random.default_rng(0)

    def ids(number: int) -> list[int]:
        return [int(token) for token in draw.integers(0, models.VOCAB_SIZE, number)]

    questions = []
    for category in (ids(40), ids(25)):
        for _ in range(6):
            questions.append(([*category, *ids(int(draw.integers(3, 30)))], [[token] for token in ids(4)]))
    context = questions[0][0]
    questions.append((context, [[5], [5, 6, 7], [5, 6, 8, 9]]))
    questions.append(([*context, 5, 6], [[8, 9], [1]]))
    questions.append(questions[3])
    questions.append(([2], [ids(60), ids(2)]))
    return questions


def answered(layout: Layout, pass_tokens: int, folder: Path) -> list[tuple[int, list[tuple[float, bool]]]]:
    from megatron_xy.model import likelihood

    likelihood.plan_passes.__kwdefaults__["pass_tokens"] = pass_tokens
    role = models.make_role(layout)
    assert role is not None
    found: list[tuple[int, list[tuple[float, bool]]]] = []
    likelihood.likelihoods_of_share(
        role,
        [likelihood.Question(context, continuations) for context, continuations in made_up()],
        on_question=lambda place, them: found.append((place, [(it.logprob, it.is_greedy) for it in them])),
    )
    is_told = role.groups.is_last_stage and role.groups.tp_rank == 0
    assert bool(found) == (is_told or role.groups.is_last_stage)
    return found if is_told else []


def plainly() -> list[list[tuple[float, bool]]]:
    """By the trainer's forward pass over each row by itself."""
    import torch

    from megatron_xy.model.logits import logits_of

    role = models.make_role(Layout())
    assert role is not None
    answers = []
    for context, continuations in made_up():
        rows = [[*context, *continuation] for continuation in continuations]
        of_question = []
        for row, continuation, logits in zip(rows, continuations, logits_of(role, rows), strict=True):
            scores = logits[len(context) - 1 : len(row) - 1].double().log_softmax(dim=-1)
            ids = torch.tensor(continuation)
            logprob = float(scores.gather(1, ids[:, None]).sum())
            of_question.append((logprob, bool((scores.argmax(dim=-1) == ids).all())))
        answers.append(of_question)
    return answers


@pytest.fixture(scope="module")
def expected() -> list[list[tuple[float, bool]]]:
    (answers,) = run_ranks(plainly, world_size=1)
    return answers


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_gives_what_the_plain_forward_pass_gives(
    layout: Layout, expected: list[list[tuple[float, bool]]], tmp_path: Path
) -> None:
    ranks: list[Any] = run_ranks(answered, layout, 100, tmp_path, world_size=layout.world_size)
    found = dict(answer for of_rank in ranks for answer in of_rank)
    assert sorted(found) == list(range(len(expected))), "each question is answered by one replica"
    for place, answers in enumerate(expected):
        for (logprob, is_greedy), (wanted, is_wanted) in zip(found[place], answers, strict=True):
            assert logprob == pytest.approx(wanted, abs=1e-4) and is_greedy == is_wanted


def test_what_is_shared_is_computed_once() -> None:
    from megatron_xy.model.likelihood import Question, plan_passes

    questions = [Question(context, continuations) for context, continuations in made_up()]
    passes = plan_passes(questions, pass_tokens=100)
    assert len(passes) >= 3 and all(now.num_tokens <= 100 for now in passes)
    branches = {
        tuple([*context, *them[:-1]][:length])
        for context, of in made_up()
        for them in of
        for length in range(1, len(context) + len(them))
    }
    assert sum(now.num_tokens for now in passes) == len(branches)


def test_a_continuation_is_greedy_where_each_of_its_tokens_is_the_most_likely_one() -> None:
    """Also where its tokens come in several passes."""
    from megatron_xy.model.likelihood import Likelihood, Question, Wanted, _Books

    for best, is_greedy in (([5, 6, 7], True), ([4, 6, 7], False), ([5, 4, 7], False), ([5, 6, 4], False)):
        found: list[Likelihood] = []
        books = _Books([Question([1, 2], [[5, 6, 7]])], lambda place, them, found=found: found.extend(them))
        for depth, token in enumerate([5, 6, 7]):
            books.add([Wanted(1 + depth, token, 0, 0)], [-0.5], [best[depth]])
        assert found == [Likelihood(-1.5, is_greedy)]
