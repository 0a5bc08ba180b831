"""What the keys of a whole run must hold together, whatever its task; the parts that have files of their own included.

Rules yield (key, sentence) of whatever does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_xy.config.data_rules import conversation_rules, phase_rules, reward_rules, weight_rules
from megatron_xy.config.model_rules import layout_rules, schedule_rules, shape_rules, world_rule
from megatron_xy.config.ppo_rules import ppo_rules
from megatron_xy.config.problems import nearest_multiples, refuse
from megatron_xy.config.sections import Head, RunConfig


def check_world(config: RunConfig, *, world_size: int) -> None:
    """The rules between keys, those that need the number of ranks included; raises InvalidConfig."""
    refuse(run_rules(config, world_size=world_size))


def run_rules(config: RunConfig, *, world_size: int | None) -> Iterator[tuple[str, str]]:
    """(key, sentence) of every rule between keys that does not hold."""
    yield from _sections_of_other_tasks(config)
    saved, exported = config.checkpoint.save_interval, config.checkpoint.hf_interval
    if exported % saved:
        yield (
            "checkpoint.hf_interval",
            f"checkpoint.hf_interval ({exported}) must be a multiple of save_interval ({saved}): an HF folder is made "
            f"of a checkpoint; nearest: {nearest_multiples(exported, saved)}",
        )
    if config.task == "ppo":
        yield from ppo_rules(config, world_size=world_size)
        return
    if "head" in config.model.model_fields_set and config.model.head != head_of(config):
        yield "model.head", f"model.head ({config.model.head}): task {config.task} has {head_of(config)}; leave it out"
    yield from shape_rules(config.model, config.parallel)
    yield from _batch_rules(config, world_size=world_size)
    training, data = config.training, config.data
    yield from layout_rules(config.parallel)
    yield from _profile_rules(config, world_size=world_size)
    yield from schedule_rules(config.optimizer)
    if training.eval_interval and data.eval_path is None and not config.has_pairs:
        yield (
            "data.eval_path",
            f"data.eval_path is missing; training.eval_interval ({training.eval_interval}) needs held-out data, such "
            f"as the held_out folder of `megatron-xy data build --held-out`",
        )
    yield from weight_rules(data.weights, key="data.weights")
    yield from phase_rules(training.phases)
    if not data.paths:
        yield "data.path", "data.path is missing; name a folder that `megatron-xy data build` wrote"
    yield from reward_rules(config) if config.task == "reward" else conversation_rules(config)
    if config.model.load is None:
        for key in config.model.missing_shape:
            yield f"model.{key}", f"model.{key} is missing; give it, or model.load: hf:DIR that has it"


def head_of(config: RunConfig) -> Head:
    """The task's: what `model.load` names may have another one, which is then left out or made anew."""
    return "value" if config.task == "reward" else "language_model"


def _batch_rules(config: RunConfig, *, world_size: int | None) -> Iterator[tuple[str, str]]:
    """The world divides into replicas, and a step's tokens into their micro-batches; pairs are packed as they come."""
    training, parallel = config.training, config.parallel
    tp = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and training.micro_batch_tokens % tp:
        yield (
            "training.micro_batch_tokens",
            f"training.micro_batch_tokens ({training.micro_batch_tokens}) must be a multiple of "
            f"tensor_model_parallel_size ({tp}) under sequence_parallel; nearest: "
            f"{nearest_multiples(training.micro_batch_tokens, tp)}",
        )
    factors = {"micro_batch_tokens": training.micro_batch_tokens}
    if parallel.num_chunks > 1:  # the interleaved schedule takes them in rounds of as many as there are stages
        factors["pipeline_model_parallel_size"] = parallel.pipeline_model_parallel_size
    if world_size is not None and world_size % parallel.model_parallel_size:
        yield "parallel", world_rule(parallel, world_size)
    elif world_size is not None:
        factors["data parallel size"] = world_size // parallel.model_parallel_size
    if config.has_pairs:
        return
    unit = math.prod(factors.values())
    unit_name = f"{' x '.join(factors)} ({' x '.join(map(str, factors.values()))}"
    unit_name += f" = {unit})" if len(factors) > 1 else ")"
    sizes = [("training", training.global_batch_tokens)]
    for number, phase in enumerate(training.phases):
        if phase.global_batch_tokens is not None:
            sizes.append((f"training.phases[{number}]", phase.global_batch_tokens))
    for key, tokens in sizes:
        if tokens % unit:
            name = f"{key}.global_batch_tokens"
            rule = f"{name} ({tokens}) must be a multiple of {unit_name}; nearest: {nearest_multiples(tokens, unit)}"
            yield name.split("[")[0], rule


def _profile_rules(config: RunConfig, *, world_size: int | None) -> Iterator[tuple[str, str]]:
    """The profiled ranks and iterations are some of the run's."""
    runtime, training = config.runtime, config.training
    last = max(runtime.profile_ranks, default=0)
    if runtime.profile is not None and world_size is not None and last >= world_size:
        yield (
            "runtime.profile_ranks",
            f"runtime.profile_ranks names rank {last}, and the ranks go from 0 to {world_size - 1}; leave it out",
        )
    window = runtime.profiled_iterations
    if training.epochs is None and window.start > training.train_iters:
        yield (
            "runtime.profile",
            f"runtime.profile ({runtime.profile}) begins after the last step, training.train_iters "
            f"({training.train_iters}); take an earlier window, or leave it out",
        )


def _sections_of_other_tasks(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Sections that the task would not read are refused, never ignored."""
    if config.task != "ppo":
        if config.roles is not None:
            yield "roles", f"roles: only task ppo has roles, and task is {config.task}; leave them out"
        if config.ppo is not None:
            yield "ppo", f"ppo: only task ppo has this section, and task is {config.task}; leave it out"
    if config.task != "reward" and config.reward is not None:
        yield "reward", f"reward: only task reward has this section, and task is {config.task}; leave it out"
