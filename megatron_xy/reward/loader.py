"""A data step's micro-batches of pairs for one data parallel rank, the next ones prepared in the background."""

from __future__ import annotations

from megatron_xy.config import RunConfig
from megatron_xy.data.loader import PreparedStep
from megatron_xy.data.prefetcher import Prefetcher
from megatron_xy.reward.batches import PairOrder, pair_micro_batches
from megatron_xy.reward.pairs import PairData


class PairLoader:
    """What StepLoader is for packed documents."""

    def __init__(self, config: RunConfig, *, data: PairData, order: PairOrder, dp_size: int, dp_rank: int) -> None:
        self.sources = data.sources
        self.data_fingerprints = data.fingerprints
        self.chat_template = data.chat_template
        self._config, self._pairs, self._order = config, data.training, order
        self._dp_size, self._dp_rank = dp_size, dp_rank
        self._source_ids = [self.sources.index(pair.source) for pair in self._pairs]
        self._drawn = dict.fromkeys(self.sources, 0)  # tokens before the step of `_drawn_until`
        self._drawn_until = 0
        self._prefetcher = Prefetcher(self._prepare)

    def get(self, data_step: int) -> tuple[PreparedStep, float]:
        """The step's micro-batches and the seconds waited for them."""
        return self._prefetcher.get(data_step)

    def ends_epoch(self, iteration: int) -> bool:
        """Whether an iteration, from 1 on, is the last of its epoch."""
        return self._order.step(iteration - 1).ends_epoch

    def epochs_by_source(self, data_step: int) -> dict[str, dict[str, float]]:
        """Untold: an epoch of pairs goes through all sources at once, and its end leaves a checkpoint."""
        return {}

    def begun_epochs(self, data_step: int) -> list[tuple[str, int, int]]:
        """None, as for `epochs_by_source`."""
        return []

    def consumed_shares(self, data_step: int) -> dict[str, float]:
        """{source: its part of the tokens of all steps before `data_step`}, from step 1 on."""
        if data_step < self._drawn_until:
            self._drawn, self._drawn_until = dict.fromkeys(self.sources, 0), 0
        for step in range(self._drawn_until, data_step):
            for number in self._order.step(step).pairs:
                self._drawn[self._pairs[number].source] += self._pairs[number].num_tokens
        self._drawn_until = data_step
        total = sum(self._drawn.values())
        return {source: tokens / total for source, tokens in self._drawn.items()}

    def close(self) -> None:
        """Ends the background thread."""
        self._prefetcher.close()

    def _prepare(self, data_step: int) -> PreparedStep:
        numbers, config = self._order.step(data_step).pairs, self._config
        micro_batches = pair_micro_batches(
            [self._pairs[number] for number in numbers],
            source_ids=[self._source_ids[number] for number in numbers],
            width=config.training.micro_batch_tokens,
            reward=config.reward_section,
            dp_size=self._dp_size,
            dp_rank=self._dp_rank,
            multiple=config.parallel.micro_batches_a_round,
        )
        samples: dict[str, list[int]] = {}
        for number in numbers:
            samples.setdefault(self._pairs[number].source, []).append(number)
        return PreparedStep(
            bucket=config.training.micro_batch_tokens,
            micro_batches=micro_batches,
            num_samples=len(numbers),
            num_tokens=sum(self._pairs[number].num_tokens for number in numbers),
            samples=samples,
        )
