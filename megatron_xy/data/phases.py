"""The phases of a run, from its config to the sampler: weights and batch size from a data step on."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_xy.config import DataConfig, TrainingConfig
from megatron_xy.data.sampler import SamplerPhase


def sampler_phases(data: DataConfig, training: TrainingConfig) -> list[SamplerPhase]:
    """`data.weights` and `global_batch_tokens` from step 0, then each of `training.phases`.

    What a phase leaves out stays as it was before it. One that begins at step 0 takes the place of the first.
    """
    phases = [SamplerPhase(0, data.weights, training.global_batch_tokens)]
    for phase in training.phases:
        before = phases[-1]
        weights = before.weights if phase.weights is None else phase.weights
        batch_tokens = phase.global_batch_tokens or before.global_batch_tokens
        if phase.from_iter == 0 and len(phases) == 1:
            phases.clear()
        phases.append(SamplerPhase(phase.from_iter, weights, batch_tokens))
    return phases


def total_tokens(phases: Sequence[SamplerPhase], *, train_iters: int) -> int:
    """Tokens, padding included, of `train_iters` steps."""
    ends = [*(phase.from_step for phase in phases[1:]), train_iters]
    return sum(
        phase.global_batch_tokens * max(0, min(end, train_iters) - phase.from_step)
        for phase, end in zip(phases, ends, strict=True)
    )
