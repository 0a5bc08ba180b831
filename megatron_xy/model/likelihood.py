"""How likely given continuations are after their contexts, under any layout: what many of them share is computed once.

    questions -> sequences in alphabetical order -> segments behind shared prefixes -> passes -> log-likelihoods

In alphabetical order sequences are a tree's branches, depth first. Each is computed from where it leaves the one
before; what it shares with that (examples of a category, a question before its choices) is in the cache. A pass holds
the new tokens of many sequences one after the other, and each of them attends to its own branch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from megatron_xy import device
from megatron_xy.losses import token_logprobs_and_entropy
from megatron_xy.model.cached_attention import rotation, turned_by
from megatron_xy.model.inference import ReplicaForward, Sent, on_device, wait_until_sent
from megatron_xy.model.sampling import SamplingOptions
from megatron_xy.role import Role

PASS_TOKENS = 2048  # new tokens of a pass, but for one longer sequence

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Question:
    """Token ids of a context, at least one, and of the continuations to it that are compared, each at least one."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Likelihood:
    """The sum of a continuation's log-probabilities, and whether each of its tokens is the most likely one."""

    logprob: float
    is_greedy: bool


OnQuestion = Callable[[int, list[Likelihood]], None]


def likelihoods_of_share(role: Role, questions: Sequence[Question], *, on_question: OnQuestion) -> None:
    """Computes this replica's share of the questions; the last pipeline stage is told each one's place and result.

    Collective over a replica's ranks; replicas do not wait for each other. A context with a continuation less its last
    token must not be longer than the model's longest sequence.
    """
    groups = role.groups
    mine = _share_of(questions, dp_size=groups.dp_size, dp_rank=groups.dp_rank)
    passes = plan_passes([questions[place] for place in mine])
    books = _Books([questions[place] for place in mine], lambda place, found: on_question(mine[place], found))
    with torch.inference_mode():
        work = _Replica(role, books)
        for first in range(0, len(passes), groups.pp_size):  # as many as stages, so that each has one to work on
            together = passes[first : first + groups.pp_size]
            for chunk in range(len(role.chunks)):
                for now in together:
                    work.forward(now, chunk=chunk)
            wait_until_sent(work.sent)


@dataclass(frozen=True)
class Piece:
    """Tokens `begin` to `end` of a sequence, which a segment, or the one that it shares them with, has computed."""

    segment: int
    begin: int
    end: int


@dataclass(frozen=True)
class Wanted:
    """A token whose probability is wanted after token `depth` of a sequence."""

    depth: int
    token: int
    question: int
    continuation: int


@dataclass
class Segment:
    """The tokens of a sequence from `begin` on, and the pieces before them, in order."""

    begin: int
    tokens: Tokens
    path: list[Piece]
    wanted: list[Wanted] = field(default_factory=list)


@dataclass
class ScoringPass:
    """Segments of one pass. kept: slots of the cache after the last pass that stay, as slots 0 to len(kept) - 1."""

    segments: list[Segment]
    kept: Tokens
    reached: list[Tokens]  # slots that each segment's tokens attend to, its own last

    @property
    def num_tokens(self) -> int:
        """New ones."""
        return sum(len(segment.tokens) for segment in self.segments)


def plan_passes(questions: Sequence[Question], *, pass_tokens: int = PASS_TOKENS) -> list[ScoringPass]:
    """The passes that answer all questions."""
    passes: list[ScoringPass] = []
    slots: dict[int, int] = {}  # of a segment's first token, in the cache as it stands after the last pass
    segments = _segments_of(questions)
    first = 0
    while first < len(segments):
        last, num_tokens = first, 0
        while last < len(segments) and (last == first or num_tokens + len(segments[last].tokens) <= pass_tokens):
            num_tokens += len(segments[last].tokens)
            last += 1

        def slots_of(pieces: Sequence[Piece], where: dict[int, int]) -> Tokens:
            spans = (where[p.segment] + np.arange(p.begin, p.end) - segments[p.segment].begin for p in pieces)
            return np.concatenate([np.zeros(0, dtype=np.int64), *spans])

        path = segments[first].path  # all that later ones of the pass share with earlier passes
        kept = slots_of(path, slots)
        slots = {piece.segment: segments[piece.segment].begin for piece in path}
        place = len(kept)
        for number in range(first, last):
            slots[number] = place
            place += len(segments[number].tokens)
        reached = [
            np.concatenate(
                [slots_of(segments[number].path, slots), slots[number] + np.arange(len(segments[number].tokens))]
            )
            for number in range(first, last)
        ]
        passes.append(ScoringPass(segments[first:last], kept, reached))
        first = last
    return passes


def _segments_of(questions: Sequence[Question]) -> list[Segment]:
    """The tree's segments, depth first, each with the tokens whose probabilities are read off it."""
    rows: list[tuple[bytes, Tokens, int, int]] = []
    for number, question in enumerate(questions):
        for place, continuation in enumerate(question.continuations):
            tokens = np.array([*question.context, *continuation[:-1]], dtype=np.int64)
            rows.append((tokens.astype(">u4").tobytes(), tokens, number, place))  # bytes sort as the ids do
    rows.sort(key=lambda row: (row[0], row[2], row[3]))
    segments: list[Segment] = []
    path: list[Piece] = []
    before: Tokens = np.zeros(0, dtype=np.int64)
    for _, tokens, number, place in rows:
        shared = _common(before, tokens)
        path = [Piece(p.segment, p.begin, min(p.end, shared)) for p in path if p.begin < shared]
        if shared < len(tokens):
            segments.append(Segment(shared, tokens[shared:], path))
            path = [*path, Piece(len(segments) - 1, shared, len(tokens))]
        before, question = tokens, questions[number]
        for depth, token in enumerate(question.continuations[place], start=len(question.context) - 1):
            owner = next(p.segment for p in reversed(path) if p.begin <= depth)
            segments[owner].wanted.append(Wanted(depth, token, number, place))
    return segments


def _common(one: Tokens, other: Tokens) -> int:
    """How many tokens two sequences begin alike."""
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length


def _share_of(questions: Sequence[Question], *, dp_size: int, dp_rank: int) -> list[int]:
    """The places of a replica's questions: a stretch of them in alphabetical order, where alike ones stand together."""
    ordered = sorted(range(len(questions)), key=lambda place: (list(questions[place].context), place))
    return ordered[len(ordered) * dp_rank // dp_size : len(ordered) * (dp_rank + 1) // dp_size]


class _Books:
    """What is known of each question so far."""

    def __init__(self, questions: Sequence[Question], on_question: OnQuestion) -> None:
        self._on_question = on_question
        self._sums = [[0.0] * len(question.continuations) for question in questions]
        self._greedy = [[True] * len(question.continuations) for question in questions]
        self._left = [sum(map(len, question.continuations)) for question in questions]

    def add(self, wanted: Sequence[Wanted], logprobs: Sequence[float], greedy: Sequence[int]) -> None:
        """Takes in a pass's tokens, and hands on the questions that are answered by them."""
        for token, logprob, best in zip(wanted, logprobs, greedy, strict=True):
            number = token.question
            self._sums[number][token.continuation] += logprob
            self._greedy[number][token.continuation] &= best == token.token
            self._left[number] -= 1
            if not self._left[number]:
                found = zip(self._sums[number], self._greedy[number], strict=True)
                self._on_question(number, [Likelihood(*likelihood) for likelihood in found])


class _Replica:
    """A replica's caches, one a chunk, and its passes through the pipeline."""

    def __init__(self, role: Role, books: _Books) -> None:
        self._role, self._books, self._model = role, books, ReplicaForward(role)
        self.sent: Sent = []
        # [layers, slots, groups, key and value, head_dim]
        self._caches = [
            torch.empty(
                part.num_layers, 0, part.num_groups, 2, part.head_dim, dtype=part.dtype, device=device.current()
            )
            for part in self._model.chunks
        ]
        self._greedy = self._model.sampler(SamplingOptions(temperature=0.0))

    def forward(self, now: ScoringPass, *, chunk: int) -> None:
        """One chunk's part of a pass: from the stage before, to the next one, or to the probabilities."""
        tokens = on_device(np.concatenate([segment.tokens for segment in now.segments]))
        positions = [segment.begin + np.arange(len(segment.tokens)) for segment in now.segments]
        cos, sin = rotation(on_device(np.concatenate(positions)), self._model.frequencies)
        cache = self._made_room(now, chunk=chunk)
        reached = [on_device(slots) for slots in now.reached]
        lengths = [len(segment.tokens) for segment in now.segments]
        places, rows = _outputs(now) if self._model.chunks[chunk].is_last else ([], [])

        def read(layer: int, projected: torch.Tensor) -> torch.Tensor:
            return attend_along_branches(
                projected, cache[layer], reached, lengths=lengths, first=len(now.kept), cos=cos, sin=sin
            )

        logits = self._model.forward(tokens, chunk=chunk, read=read, outputs=on_device(places), sent=self.sent)
        if logits is not None:
            self._take(now, logits, rows=on_device(rows))

    def _made_room(self, now: ScoringPass, *, chunk: int) -> torch.Tensor:
        """The chunk's cache with what stays in front and room for the new tokens behind it."""
        before = self._caches[chunk]
        layers, _, *rest = before.shape
        cache = before.new_empty(layers, len(now.kept) + now.num_tokens, *rest)
        cache[:, : len(now.kept)] = before[:, on_device(now.kept)]
        self._caches[chunk] = cache
        return cache

    def _take(self, now: ScoringPass, logits: torch.Tensor, *, rows: torch.Tensor) -> None:
        assert self._greedy is not None, "the last stage has a head"
        wanted = [token for segment in now.segments for token in segment.wanted]
        if not wanted:
            return
        best = self._greedy.sample(logits, keys=None, too_short=None)[rows, 0]
        labels = on_device([token.token for token in wanted])
        logprobs, _ = token_logprobs_and_entropy(
            logits[rows],
            labels,
            vocab_size=self._role.model.vocab_size or 0,
            temperature=1.0,
            tp_group=self._role.groups.collection.tp,
        )
        self._books.add(wanted, logprobs.tolist(), [int(token) for token in best.tolist()])


def attend_along_branches(
    projected: torch.Tensor,
    cached: torch.Tensor,
    reached: Sequence[torch.Tensor],
    *,
    lengths: Sequence[int],
    first: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """What a layer's queries read of their branches; writes the pass's keys and values into `cached` from slot `first`.

    projected [tokens, groups x (queries a group + 2) x head_dim]; cached [slots, groups, 2, head_dim] of the layer;
    reached: of each segment the slots [begin + length] that its last token attends to; lengths: its new tokens. Returns
    [tokens, heads x head_dim].
    """
    groups, head_dim = cached.size(1), cached.size(-1)
    heads = projected.view(len(projected), groups, -1, head_dim)
    turned = turned_by(heads[:, :, :-1], cos, sin)
    cached[first:, :, 0], cached[first:, :, 1] = turned[:, :, -1], heads[:, :, -1]
    parts, begin = [], 0
    for slots, length in zip(reached, lengths, strict=True):
        queries = turned[begin : begin + length, :, :-1]
        begin += length
        keys, values = cached[slots].movedim(0, 1).unbind(dim=2)  # [groups, slots, head_dim]
        # The queries of a group stand one after the other: they share keys, and none is repeated for them.
        folded = queries.movedim(0, 1).reshape(groups, -1, head_dim)
        mask = _reach(length, len(slots), times=queries.size(2), device=slots.device)
        found = F.scaled_dot_product_attention(folded[None], keys[None], values[None], attn_mask=mask)
        parts.append(found.view(groups, length, -1, head_dim).movedim(1, 0).reshape(length, -1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _reach(length: int, num_slots: int, *, times: int, device: torch.device) -> torch.Tensor | None:
    """Bool [length x times, slots]: each of the last `length` slots sees those before it, for `times` queries each."""
    if length == 1:
        return None
    own = torch.arange(num_slots - length, num_slots, device=device).repeat_interleave(times)
    return torch.arange(num_slots, device=device) <= own[:, None]


def _outputs(now: ScoringPass) -> tuple[list[int], list[int]]:
    """Places in the pass of tokens whose successors are wanted, and for each wanted one, in order, which of them."""
    places: dict[int, int] = {}
    rows: list[int] = []
    begin = 0
    for segment in now.segments:
        rows += [places.setdefault(begin + token.depth - segment.begin, len(places)) for token in segment.wanted]
        begin += len(segment.tokens)
    return list(places), rows
