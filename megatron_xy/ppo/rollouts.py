"""Where a step's answers come from: a small interface with two users, and room for an outside engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_xy import device
from megatron_xy.model import generate
from megatron_xy.model.sampling import SamplingOptions
from megatron_xy.ppo.experience import Rollout
from megatron_xy.ppo.prompts import DrawnPrompt, GivenResponses
from megatron_xy.ppo.transport import Shipment, exchange
from megatron_xy.ppo.worker import RoleWorker


@dataclass(frozen=True)
class Answer:
    """Token ids of one answer, the end token included where it ended by one."""

    tokens: list[int]
    has_ended: bool


class AnswerSource(Protocol):
    """Answers to a step's prompts, the same on every rank. Collective over the world."""

    def answers(self, drawn: Sequence[DrawnPrompt], prompts: Sequence[Sequence[int]], *, first: int) -> list[Answer]:
        """One answer a prompt; `first` is the place of the first prompt in the run."""


class AnswersFromFile:
    """Given answers, in the order in which prompts are drawn."""

    def __init__(self, responses: GivenResponses, *, stop_tokens: Sequence[int]) -> None:
        self._responses, self._stop_tokens = responses, frozenset(stop_tokens)

    def answers(self, drawn: Sequence[DrawnPrompt], prompts: Sequence[Sequence[int]], *, first: int) -> list[Answer]:
        """As AnswerSource. Raises DataError where the file has too few."""
        return [self._answer(row) for row in self._responses.of(first, len(prompts))]

    def _answer(self, row: list[int]) -> Answer:
        """As the actor would have given it: up to its first end token."""
        length = next((place + 1 for place, token in enumerate(row) if token in self._stop_tokens), None)
        return Answer(row[:length], length is not None)


class GeneratedAnswers:
    """Answers of the actor, drawn by its own weights."""

    def __init__(self, actor: RoleWorker, options: SamplingOptions) -> None:
        self._actor, self._options = actor, options

    def answers(self, drawn: Sequence[DrawnPrompt], prompts: Sequence[Sequence[int]], *, first: int) -> list[Answer]:
        """As AnswerSource."""
        where = device.current()
        table = torch.zeros(len(prompts), self._options.max_response_length, dtype=torch.int64, device=where)
        sizes = torch.zeros(len(prompts), 2, dtype=torch.int64, device=where)  # length, whether it has ended
        if self._actor.role is not None:
            requests = [
                generate.Request(prompt, row=draw.row, epoch=draw.epoch)
                for draw, prompt in zip(drawn, prompts, strict=True)
            ]
            told: dict[int, generate.Answer] = {}
            with self._actor.working("generate") as role:
                generate.generate_share(role, requests, self._options, on_answer=told.__setitem__)
            if role.groups.is_last_stage and role.groups.tp_rank == 0:  # the one of its replica that tells
                for index, answer in told.items():
                    table[index, : len(answer.tokens)] = torch.tensor(answer.tokens, device=where)
                    has_ended = int(answer.finish_reason == "stop")
                    sizes[index] = torch.tensor([len(answer.tokens), has_ended], device=where)
        (whole,) = exchange(Shipment({"tokens": table, "sizes": sizes}))
        rows, lengths = whole["tokens"].tolist(), whole["sizes"].tolist()
        return [Answer(row[:length], bool(ended)) for row, (length, ended) in zip(rows, lengths, strict=True)]


def as_rollout(drawn: Sequence[DrawnPrompt], prompts: dict[str, list[list[int]]], answers: Sequence[Answer]) -> Rollout:
    """Prompts, as each role renders them, with their answers."""
    lengths = torch.tensor([len(answer.tokens) for answer in answers], device=device.current())
    columns = torch.arange(int(lengths.max()), device=device.current())
    return Rollout(
        drawn=drawn,
        prompts=prompts,
        responses=[answer.tokens for answer in answers],
        has_ended=torch.tensor([answer.has_ended for answer in answers], device=device.current()),
        mask=(columns.unsqueeze(0) < lengths.unsqueeze(1)).float(),
    )
