"""A run's config -> the phases of its sampler, the sampler itself, and how often the run goes through its data."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from megatron_xy.config import RunConfig
from megatron_xy.data.draws.phase_draws import SamplerPhase
from megatron_xy.data.draws.sampler import BucketSampler, Stream
from megatron_xy.errors import ConfigError


def sampler_phases(config: RunConfig) -> list[SamplerPhase]:
    """`data.weights` and `training.global_batch_tokens` from data step 0 on, then what `training.phases` change.

    What a phase leaves out stays as it was before it. A phase from step 0 on takes the place of the first.
    """
    phases = [SamplerPhase(0, config.data.weights, config.training.global_batch_tokens)]
    for number, phase in enumerate(config.training.phases):
        before = phases[-1]
        weights = before.weights if phase.weights is None else phase.weights
        tokens = before.global_batch_tokens if phase.global_batch_tokens is None else phase.global_batch_tokens
        if phase.from_iter == before.from_step == 0:
            phases.pop()
        phases.append(SamplerPhase(phase.from_iter, weights, tokens, key=f"training.phases[{number}]"))
    return phases


def run_sampler(config: RunConfig, streams: Sequence[Stream]) -> BucketSampler:
    """The sampler of a run over `streams`. Raises ConfigError where weights or batch sizes do not fit them."""
    return BucketSampler(streams, seed=config.seed, phases=sampler_phases(config))


def with_epochs(config: RunConfig, streams: Sequence[Stream], *, conversation_sources: Collection[str]) -> RunConfig:
    """The config with the train_iters that its epochs come to, if it counts in epochs. Raises as `epoch_ends`."""
    ends = epoch_ends(config, streams, conversation_sources=conversation_sources)
    if not ends:
        return config
    return config.model_copy(update={"training": config.training.model_copy(update={"train_iters": ends[-1]})})


def epoch_ends(config: RunConfig, streams: Sequence[Stream], *, conversation_sources: Collection[str]) -> list[int]:
    """The last iteration of each epoch; none where the run does not count in epochs.

    In an epoch as many tokens of conversations are drawn as there are, padding included; other sources come by their
    weights. It ends with the step that completes it, which may begin the next one. Raises ConfigError as `run_sampler`,
    and where no conversations are drawn.
    """
    epochs = config.training.epochs
    if epochs is None:
        return []
    sampler = run_sampler(config, streams)
    share = sum(part for (source, _), part in sampler.shares().items() if source in conversation_sources)
    held = sum(stream.bucket * stream.num_samples for stream in streams if stream.source in conversation_sources)
    if not share:
        raise ConfigError(f"training.epochs ({epochs}): the data.weights leave out all conversations; use train_iters")
    steps = held / share / sampler_phases(config)[0].global_batch_tokens
    return [math.ceil(round(epoch * steps, 6)) for epoch in range(1, epochs + 1)]


def check_epochs(config: RunConfig, sampler: BucketSampler) -> None:
    """Raises ConfigError where the planned steps draw a (source, bucket) more often than `data.max_epochs` allows.

    In a run that counts in epochs the last step, which completes them, may go beyond.
    """
    steps, limit = config.training.train_iters, config.data.max_epochs
    if limit is None:
        return
    in_epochs = config.training.epochs is not None
    epochs = sampler.epochs(steps - in_epochs)
    source, bucket = max(epochs, key=lambda stream: epochs[stream])
    if epochs[source, bucket] > limit:
        most, key = sampler.epochs(steps)[source, bucket], "epochs" if in_epochs else "train_iters"
        raise ConfigError(
            f"data.max_epochs ({limit:g}): {steps} steps would draw source {source}, bucket {bucket}, {most:.4g} "
            f"times; give it less weight or more data, lower training.{key}, or raise data.max_epochs"
        )


def describe_epochs(config: RunConfig, sampler: BucketSampler) -> str:
    """How often each source will have been drawn at the end of the planned steps, in a line."""
    epochs = sampler.epochs(config.training.train_iters)
    most: dict[str, float] = {}
    for (source, _), times in epochs.items():  # its buckets differ by rounding alone
        most[source] = max(most.get(source, 0.0), times)
    of_sources = ", ".join(f"{source} {times:.3g}" for source, times in most.items())
    return f"epochs after {config.training.train_iters} steps: {of_sources}"
