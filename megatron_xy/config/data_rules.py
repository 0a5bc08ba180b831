"""What the data of a run must hold: buckets, weights and phases, and what each task reads.

Rules yield (key, sentence) of whatever does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_xy.config.problems import as_written, nearest_multiples, refuse
from megatron_xy.config.sections import DataConfig, Phase, RunConfig, TrainingConfig
from megatron_xy.rows_files import is_file_of_rows


def check_buckets(training: TrainingConfig, *, buckets: Sequence[int], whose: str = "the data's buckets") -> None:
    """A micro-batch holds a whole number of samples of every bucket; raises InvalidConfig."""
    bad = [bucket for bucket in buckets if training.micro_batch_tokens % bucket]
    if bad:
        rule = (
            f"training.micro_batch_tokens ({training.micro_batch_tokens}) must be a common multiple of {whose} "
            f"({', '.join(map(str, buckets))}); it is none of {', '.join(map(str, bad))}; "
            f"nearest: {nearest_multiples(training.micro_batch_tokens, math.lcm(*buckets))}"
        )
        refuse([("training.micro_batch_tokens", rule)])


def reward_rules(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Pairs are read from files of rows, whole and as they are: what other tasks do with their data is refused."""
    data, training, defaults = config.data, config.training, DataConfig()
    for key, path in _named_paths(data):
        if not is_file_of_rows(path):
            yield (
                key,
                f"{key} ({as_written(path)}): task reward takes jsonl files of rows with prompt, chosen and rejected",
            )
    if data.tokenizer is None:
        yield "data.tokenizer", "data.tokenizer is missing; pairs are text, and answers end with its end token"
    for key in ("weights", "max_epochs", "chat_overflow", "last_turn_only", "split_documents"):
        if (value := getattr(data, key)) != getattr(defaults, key):
            yield f"data.{key}", f"data.{key} ({as_written(value)}): task reward draws every pair whole; leave it out"
    if training.phases:
        yield "training.phases", "training.phases: task reward has one phase; leave it out"
    reward = config.reward_section
    if not reward.score_band[0] < reward.score_band[1]:
        yield "reward.score_band", f"reward.score_band ({list(reward.score_band)}) must rise, such as [-1, 1]"


def conversation_rules(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Files of rows, which a tokenizer reads, and epochs are for tasks that learn conversations."""
    data, training = config.data, config.training
    files = [(key, path) for key, path in _named_paths(data) if is_file_of_rows(path)]
    if config.task == "pretrain":
        for key, path in files:
            yield (
                key,
                f"{key} ({as_written(path)}): task pretrain takes folders that `megatron-xy data build` wrote; build "
                f"one from it",
            )
        if training.epochs is not None:
            yield (
                "training.epochs",
                f"training.epochs ({training.epochs}): task pretrain counts in train_iters; use them",
            )
    elif files and data.tokenizer is None:
        yield (
            "data.tokenizer",
            f"data.tokenizer is missing; {as_written(files[0][1])} is to be tokenised: name a tokenizer.model",
        )
    if training.epochs is not None and any(phase.from_iter for phase in training.phases):
        yield (
            "training.epochs",
            f"training.epochs ({training.epochs}): training.phases count in iterations; give train_iters, not epochs",
        )


def _named_paths(data: DataConfig) -> list[tuple[str, Path]]:
    """Each path that the config names, with its key."""
    held_out = [] if data.eval_path is None else [("data.eval_path", data.eval_path)]
    return [*(("data.path", path) for path in data.paths), *held_out]


def weight_rules(weights: dict[str, float] | None, *, key: str) -> Iterator[tuple[str, str]]:
    """Weights of sources are 0 or more, one is above, and they have a sum."""
    if weights is None:
        return
    where = key.split("[")[0]
    for source, weight in weights.items():
        if weight < 0:
            yield where, f"{key}.{source} ({weight:g}) must not be negative; 0 leaves it out"
    if not any(weight > 0 for weight in weights.values()):
        yield where, f"{key}: at least one source needs a weight above 0"
    if math.isinf(sum(weights.values())):
        yield where, f"{key}: they add up to infinity; give smaller ones"


def phase_rules(phases: Sequence[Phase]) -> Iterator[tuple[str, str]]:
    """Phases stand in the order in which they begin, each changes something, and their weights are such."""
    for number, phase in enumerate(phases):
        key = f"training.phases[{number}]"
        if number and phase.from_iter <= phases[number - 1].from_iter:
            yield (
                "training.phases",
                f"{key}.from_iter ({phase.from_iter}) must be above that of the phase before it "
                f"({phases[number - 1].from_iter}); sort the phases, and name each step once",
            )
        unfreezes = bool(number) and phases[number - 1].train_only is not None
        if phase.weights is None and phase.global_batch_tokens is None and phase.train_only is None and not unfreezes:
            yield "training.phases", f"{key} changes nothing; give it weights, global_batch_tokens or train_only"
        yield from weight_rules(phase.weights, key=f"{key}.weights")
