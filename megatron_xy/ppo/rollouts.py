"""Where a step's answers come from: a small interface with two users, and room for an outside engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_xy import device
from megatron_xy.ppo.experience import Rollout
from megatron_xy.ppo.prompts import DrawnPrompt, GivenResponses, padded
from megatron_xy.ppo.roles import RoleWorker
from megatron_xy.ppo.transport import Shipment, exchange
from megatron_xy.role import Role


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
        rows = self._responses.of(first, len(prompts))
        return [Answer(row, row[-1] in self._stop_tokens) for row in rows]


Generate = Callable[[Role, Sequence[DrawnPrompt], Sequence[Sequence[int]]], dict[int, Answer]]


class GeneratedAnswers:
    """Answers of the actor, by `generate`: on a rank of the actor, the answers that this rank is to tell of, by the
    prompt's index in the step; each from one rank."""

    def __init__(self, actor: RoleWorker, generate: Generate, *, max_response_length: int) -> None:
        self._actor, self._generate, self._most = actor, generate, max_response_length

    def answers(self, drawn: Sequence[DrawnPrompt], prompts: Sequence[Sequence[int]], *, first: int) -> list[Answer]:
        """As AnswerSource."""
        where = device.current()
        table = torch.zeros(len(prompts), self._most, dtype=torch.int64, device=where)
        sizes = torch.zeros(len(prompts), 2, dtype=torch.int64, device=where)  # length, whether it has ended
        if self._actor.role is not None:
            with self._actor.working("generate") as role:
                for index, answer in self._generate(role, drawn, prompts).items():
                    table[index, : len(answer.tokens)] = torch.tensor(answer.tokens, device=where)
                    sizes[index] = torch.tensor([len(answer.tokens), int(answer.has_ended)], device=where)
        (whole,) = exchange(Shipment({"tokens": table, "sizes": sizes}))
        rows, told = whole["tokens"].tolist(), whole["sizes"].tolist()
        return [Answer(row[:length], bool(ended)) for row, (length, ended) in zip(rows, told, strict=True)]


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


def dumped(rollout: Rollout, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `ppo.dump_rollouts` keeps: tokens [answers, prompt + response], response_mask and `tensors`."""
    rows = [[*prompt, *response] for prompt, response in zip(rollout.prompts["actor"], rollout.responses, strict=True)]
    table = torch.from_numpy(padded(rows, width=max(map(len, rows))))
    return {"tokens": table, "response_mask": rollout.mask.cpu(), **{n: t.cpu() for n, t in tensors.items()}}
