"""Logits over a vocabulary split by tensor parallelism -> sampled tokens and their log-probabilities.

Each rank looks at its own slice of the vocabulary; a few numbers a sequence travel, never the logits. Log-probabilities
are those of the whole tempered distribution, softmax(logits / temperature), as a trainer computes them: top-k, top-p
and a minimum length restrict what is drawn and do not enter them. At temperature 0 (greedy) they are those of
temperature 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_xy import device
from megatron_xy.model.noise import exponential_noise, hashed_ids
from megatron_xy.parallel import gathered_over

FIRST_CANDIDATES = 64  # a rank's most likely tokens among which the end of the nucleus is looked for at first


@dataclass(frozen=True)
class SamplingOptions:
    """How answers are drawn. temperature 0 is greedy; top_p 1 and top_k 0 restrict nothing.

    min_response_length and max_response_length count the stop token; any of `stop_ids` ends an answer.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_response_length: int = 0
    max_response_length: int = 512
    stop_ids: tuple[int, ...] = ()
    seed: int = 1234


class Sampler:
    """Draws tokens from this rank's slice of the logits, together with the other ranks of `tp_group`."""

    def __init__(self, options: SamplingOptions, *, columns: int, vocab_size: int, tp_group: dist.ProcessGroup) -> None:
        """columns: of the padded vocabulary on each rank."""
        self._options, self._group, self._columns = options, tp_group, columns
        self._first = tp_group.rank() * columns
        self._valid = max(0, min(columns, vocab_size - self._first))
        self._ids = hashed_ids(self._first, self._first + self._valid, device=device.current())
        stops = [stop - self._first for stop in options.stop_ids if 0 <= stop - self._first < self._valid]
        self._stops = torch.tensor(stops, dtype=torch.int64, device=device.current())

    def sample(
        self, logits: torch.Tensor, *, keys: torch.Tensor | None, too_short: torch.Tensor | None
    ) -> torch.Tensor:
        """One token a row of logits [rows, columns]; returns fp64 [rows, 2]: token id, log-probability.

        keys [rows, 2] int32 of `position_keys`, None where greedy; too_short bool [rows]: these rows must not stop yet.
        The same on all ranks of the group, all of which call it.
        """
        scores = logits[:, : self._valid].float()
        temperature = self._options.temperature
        if temperature not in (0.0, 1.0):
            scores = scores / temperature
        if not self._valid:  # only padding here: a column that can never win keeps the shapes
            scores = scores.new_full((len(scores), 1), -torch.inf)
        highest = scores.amax(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
        weights = (scores - highest).exp_()
        normalizer = weights.sum(dim=1).log() + highest[:, 0]
        allowed = scores
        if too_short is not None and len(self._stops):
            allowed = scores.clone()
            allowed[:, self._stops] = allowed[:, self._stops].masked_fill(too_short[:, None], -torch.inf)
            highest = allowed.amax(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
            weights = (allowed - highest).exp_()
        if temperature == 0.0:
            best, place = allowed.max(dim=1)
        else:
            assert keys is not None, "only greedy generation needs no noise"
            if self._options.top_k or self._options.top_p < 1.0:
                weights.masked_fill_(allowed < self._threshold(allowed)[:, None], 0.0)
            if self._valid:
                weights /= exponential_noise(keys, self._ids)
            best, place = weights.max(dim=1)
            best = best.log() + highest[:, 0]
        chosen = scores.gather(1, place[:, None])[:, 0]
        found = torch.stack([best.double(), place.double() + self._first, chosen.double(), normalizer.double()], dim=1)
        if self._group.size() > 1:
            parts = gathered_over(found, self._group)  # [tp, rows, 4]
            winner = parts[:, :, 0].argmax(dim=0)
            found = parts[winner, torch.arange(len(found), device=found.device)]
            found[:, 3] = parts[:, :, 3].logsumexp(dim=0)
        return torch.stack([found[:, 1], found[:, 2] - found[:, 3]], dim=1)

    def _threshold(self, scores: torch.Tensor) -> torch.Tensor:
        """The score of each row's least likely token that top-k and then top-p leave; [rows].

        Each rank sends its most likely tokens, more of them only where the nucleus is wider than those show.
        """
        top_k, top_p = self._options.top_k, self._options.top_p
        total = scores.logsumexp(dim=1, keepdim=True)
        number = max(top_k, FIRST_CANDIDATES if top_p < 1.0 else 1)
        while True:
            number = min(number, self._columns)
            taken = min(number, scores.size(1))
            candidates = scores.new_full((len(scores), number + 1), -torch.inf)
            candidates[:, :taken] = scores.topk(taken, dim=1).values
            candidates[:, number:] = total
            parts = gathered_over(candidates, self._group)  # [tp, rows, number + 1]
            floor = parts[:, :, number - 1].amax(dim=0)  # above it nothing is missing
            ranked = parts[:, :, :number].movedim(0, 1).flatten(1).sort(dim=1, descending=True).values
            threshold = ranked.new_full((len(ranked),), -torch.inf)
            if top_k:
                threshold = ranked[:, min(top_k, ranked.size(1)) - 1]
            if top_p < 1.0:
                kept = ranked.masked_fill(ranked < threshold[:, None], -torch.inf)
                whole = kept.logsumexp(dim=1) if top_k else parts[:, :, number].logsumexp(dim=0)
                # In whole parts of 2^-52, whose sums no order changes: torch refuses others on a deterministic GPU.
                shares = ((kept - whole[:, None]).double().exp() * 2.0**52).long()
                is_inside = shares.cumsum(dim=1) - shares < top_p * 2.0**52
                last = (is_inside & (kept > -torch.inf)).sum(dim=1).clamp(min=1) - 1
                threshold = kept.gather(1, last[:, None])[:, 0]
                if number < self._columns and not bool((threshold > floor).all()):
                    number *= 4
                    continue
            return threshold
