"""Answers of a language model to token rows, under any layout: continuous batching over a key/value cache of our own.

    requests -> replicas -> groups of sequences -> passes through the pipeline -> tokens, log-probabilities

Every rank of a replica keeps the same books: who is in which row of the cache follows from the tokens drawn, which the
last stage sends to all. A finished sequence's place is taken by one that waits, in the very next pass.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from megatron_xy import device
from megatron_xy.errors import DataError
from megatron_xy.model.cached_attention import KeyValueCache, Pass, attend_with_cache, rotation
from megatron_xy.model.inference import ReplicaForward, Sent, on_device, wait_until_sent
from megatron_xy.model.noise import position_keys, sequence_key
from megatron_xy.model.rotary import PackedDocuments
from megatron_xy.model.sampling import SamplingOptions
from megatron_xy.parallel import broadcast_from_last_stage
from megatron_xy.role import Role

MAX_SEQUENCES = 64  # of a replica at a time
MAX_PROMPT_TOKENS = 4096  # that begin in one pass, beside the sequences that go on

OnAnswer = Callable[[int, "Answer"], None]
EndsAt = Callable[[int, Sequence[int]], bool]  # a request's place, its tokens so far: whether they end the answer


@dataclass(frozen=True)
class Request:
    """One answer that is wanted. row, index, epoch: what its noise is drawn by, besides the seed."""

    prompt: Sequence[int]
    row: int
    index: int = 0
    epoch: int = 0


@dataclass(frozen=True)
class Answer:
    """Token ids, the stop token included, their log-probabilities, and why it ended: "stop" or "length"."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str


def generate_share(
    role: Role,
    requests: Sequence[Request],
    options: SamplingOptions,
    *,
    on_answer: OnAnswer,
    ends_at: EndsAt | None = None,
    max_sequences: int = MAX_SEQUENCES,
) -> None:
    """Generates this replica's share of the answers and hands each, as it ends, to `on_answer` with its place.

    Collective over the role, whose weights are gathered first where the last update left that to be done; from then on
    replicas do not wait for each other. All ranks of one are told the same, in the same order. An answer ends with a
    stop token, or where `ends_at` says so ("stop"), or at max_response_length or the model's longest sequence
    ("length"). max_sequences: of this replica at a time. Raises DataError where a prompt has no room, or a token that
    the model does not know.
    """
    assert role.model.head == "language_model", "a value model says nothing"
    check_requests(requests, longest=role.model.max_position_embeddings, vocab_size=role.model.vocab_size or 0)
    groups = role.groups
    mine = share_of(requests, dp_size=groups.dp_size, dp_rank=groups.dp_rank)
    with torch.inference_mode():  # also of a share that is empty: the weights may have to be gathered
        replica = _Replica(
            role, requests, mine, options, on_answer=on_answer, ends_at=ends_at, max_sequences=max_sequences
        )
        replica.run()


def check_requests(requests: Iterable[Request], *, longest: int, vocab_size: int) -> None:
    """Raises DataError for the first request that cannot be answered: of a prompt that leaves no room, or is empty."""
    for place, request in enumerate(requests):
        if not 0 < len(request.prompt) < longest:
            raise DataError(
                f"prompt {place} has {len(request.prompt)} tokens, must have 1 to {longest - 1} "
                f"(max_position_embeddings - 1); shorten it"
            )
        if not 0 <= min(request.prompt) <= max(request.prompt) < vocab_size:
            raise DataError(f"prompt {place} holds token ids outside 0..{vocab_size - 1}, the model's vocabulary")


def share_of(requests: Sequence[Request], *, dp_size: int, dp_rank: int) -> list[int]:
    """The places of the requests that a replica answers, in the order in which it begins them.

    Long prompts first, dealt out back and forth; answers to the same prompt one after another, to be begun together.
    """
    ordered = sorted(range(len(requests)), key=lambda place: (-len(requests[place].prompt), requests[place].row, place))
    return [
        place
        for number, place in enumerate(ordered)
        if (number % dp_size if number // dp_size % 2 == 0 else dp_size - 1 - number % dp_size) == dp_rank
    ]


@dataclass
class _Sequence:
    """An answer on its way."""

    place: int
    prompt: Sequence[int]
    limit: int  # tokens that it may have
    key: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def num_cached(self) -> int:
        """Tokens whose keys are known: all but the last one drawn."""
        return len(self.prompt) + len(self.tokens) - 1


class _Group:
    """Sequences that go through the pipeline together; sequence i is in row i of the caches, one cache a chunk."""

    def __init__(self, caches: list[KeyValueCache]) -> None:
        self.caches = caches
        self.running: list[_Sequence] = []
        self.drawn: torch.Tensor | None = None  # fp64 [sequences, 2] of the last pass, with the last stage
        self.arriving: dist.Work | None = None
        self.sent: Sent = []


class _Replica:
    """One replica's work: its groups of sequences in turn, until nothing waits and nothing runs."""

    def __init__(
        self,
        role: Role,
        requests: Sequence[Request],
        places: Sequence[int],
        options: SamplingOptions,
        *,
        on_answer: OnAnswer,
        ends_at: EndsAt | None,
        max_sequences: int,
    ) -> None:
        self._groups, self._options = role.groups, options
        self._on_answer, self._ends_at = on_answer, ends_at
        longest = role.model.max_position_embeddings
        self._waiting = deque(
            _Sequence(
                place,
                requests[place].prompt,
                min(options.max_response_length, longest - len(requests[place].prompt)),
                sequence_key(options.seed, requests[place].epoch, requests[place].row, requests[place].index),
            )
            for place in places
        )
        self._model = ReplicaForward(role)
        self._stops = frozenset(options.stop_ids)
        self._sampler = self._model.sampler(options)
        # As many groups as stages, so that each stage has one to work on.
        number = role.groups.pp_size
        self._rows = math.ceil(min(max_sequences, len(places)) / number)
        self._batches = [_Group([chunk.new_cache(self._rows) for chunk in self._model.chunks]) for _ in range(number)]

    def run(self) -> None:
        """All passes. Each stage goes through the groups in the same order, and waits only for what it needs."""
        while True:
            passes: list[tuple[_Group, Pass]] = []
            for group in self._batches:
                self._settle(group)
                self._begin(group)
                if group.running:
                    passes.append((group, self._planned(group)))
                    self._forward(*passes[-1], chunk=0)
            if not passes:
                return
            for chunk in range(1, len(self._model.chunks)):
                for group, now in passes:
                    self._forward(group, now, chunk=chunk)

    def _settle(self, group: _Group) -> None:
        """Takes in what the group's last pass has drawn; ends what is to end, and closes the gaps."""
        if not group.running:
            return
        if self._sampler is None:
            group.drawn = torch.empty(len(group.running), 2, dtype=torch.float64, device=device.current())
            group.arriving = broadcast_from_last_stage(group.drawn, self._groups)
        if group.arriving is not None:
            group.arriving.wait()
        wait_until_sent(group.sent)
        assert group.drawn is not None, "the last stage draws in every pass"
        is_over = []
        for sequence, (token, logprob) in zip(group.running, group.drawn.tolist(), strict=True):
            sequence.tokens.append(int(token))
            sequence.logprobs.append(logprob)
            has_stopped = sequence.tokens[-1] in self._stops
            if self._ends_at is not None:
                has_stopped = has_stopped or self._ends_at(sequence.place, sequence.tokens)
            is_over.append(has_stopped or len(sequence.tokens) >= sequence.limit)
            if is_over[-1]:
                reason = "stop" if has_stopped else "length"
                self._on_answer(sequence.place, Answer(sequence.tokens, sequence.logprobs, reason))
        if any(is_over):
            self._close_gaps(group, is_over)

    def _close_gaps(self, group: _Group, is_over: Sequence[bool]) -> None:
        for row in reversed(range(len(is_over))):
            if is_over[row]:
                last = group.running.pop()
                if row < len(group.running):
                    for cache in group.caches:
                        cache.move(source=len(group.running), target=row, length=last.num_cached)
                    group.running[row] = last

    def _begin(self, group: _Group) -> None:
        """Waiting sequences take the free rows; as many as one pass has room for the prompts of."""
        num_tokens, before = 0, len(group.running)
        while self._waiting and len(group.running) < self._rows:
            sequence = self._waiting[0]
            is_same = len(group.running) > before and group.running[-1].prompt is sequence.prompt
            if not is_same:
                num_tokens += len(sequence.prompt)
                if num_tokens > MAX_PROMPT_TOKENS and len(group.running) > before:
                    break
            group.running.append(self._waiting.popleft())

    def _planned(self, group: _Group) -> Pass:
        """The next pass: the last token of each sequence that goes on, and the prompts of those that begin."""
        running = group.running
        going_on = sum(bool(sequence.tokens) for sequence in running)  # those that begin come last
        tokens = [sequence.tokens[-1] for sequence in running[:going_on]]
        positions = [sequence.num_cached for sequence in running[:going_on]]
        rows = list(range(going_on))
        lengths: list[int] = []
        outputs = list(range(going_on))
        copied: list[int] = []
        copied_to: list[int] = []
        for row in range(going_on, len(running)):
            prompt = running[row].prompt
            if row > going_on and running[row - 1].prompt is prompt:
                copied.extend(range(len(tokens) - len(prompt), len(tokens)))
                copied_to.extend([row] * len(prompt))
            else:
                tokens.extend(prompt)
                positions.extend(range(len(prompt)))
                rows.extend([row] * len(prompt))
                lengths.append(len(prompt))
            outputs.append(len(tokens) - 1)
        longest = max(positions[:going_on], default=-1) + 1
        for cache in group.caches:
            cache.reserve(max(longest, max(lengths, default=0)))
        where = on_device(positions)
        mask = None
        if going_on and min(positions[:going_on]) + 1 < longest:
            reach = torch.arange(longest, device=device.current())
            mask = (reach <= where[:going_on, None])[:, None, None, :]
        return Pass(
            tokens=on_device(tokens),
            positions=where,
            rows=on_device(rows),
            num_going_on=going_on,
            longest=longest,
            mask=mask,
            prompts=PackedDocuments.of(lengths) if lengths else None,
            copies=(on_device(copied), on_device(copied_to)) if copied else None,
            outputs=on_device(outputs) if lengths else None,
        )

    def _forward(self, group: _Group, now: Pass, *, chunk: int) -> None:
        """One chunk's part of a pass: from the stage before, to the next one, or to the drawing of tokens."""
        cos, sin = rotation(now.positions, self._model.frequencies)
        attend = self._model.chunks[chunk].attend

        def read(layer: int, projected: torch.Tensor) -> torch.Tensor:
            cached = group.caches[chunk].layer(layer)
            return attend_with_cache(projected, cached, now, cos=cos, sin=sin, attend=attend)

        logits = self._model.forward(now.tokens, chunk=chunk, read=read, outputs=now.outputs, sent=group.sent)
        if logits is not None:
            self._draw(group, logits)

    def _draw(self, group: _Group, logits: torch.Tensor) -> None:
        assert self._sampler is not None, "the last stage draws"
        options = self._options
        lengths = np.array([len(sequence.tokens) for sequence in group.running], dtype=np.int64)
        keys = too_short = None
        if options.temperature:
            of_sequences = np.array([sequence.key for sequence in group.running], dtype=np.uint64)
            keys = device.moved_here(position_keys(of_sequences, lengths))
        if (lengths + 1 < options.min_response_length).any():
            too_short = device.moved_here(lengths + 1 < options.min_response_length)
        group.drawn = self._sampler.sample(logits, keys=keys, too_short=too_short)
        if self._groups.pp_size > 1:
            group.arriving = broadcast_from_last_stage(group.drawn, self._groups)
