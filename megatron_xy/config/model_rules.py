"""What one model's shape, layout and learning-rate schedule must hold, whether it is a run's only one or a role's.

Rules yield (key, sentence) of whatever does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_xy.config.fields import LARGEST_INTEGER
from megatron_xy.config.problems import as_written, nearest_divisors, nearest_multiples, refuse
from megatron_xy.config.roles import PlacedRole
from megatron_xy.config.sections import ModelConfig, OptimizerConfig, ParallelConfig, RoleName, RunConfig

MOST_LAYERS = 10_000  # they are gone through one by one


def check_shape(config: RunConfig) -> None:
    """The rules of the model's shape once it is complete: `model.load` has filled it in. Raises InvalidConfig."""
    refuse(shape_rules(config.model, config.parallel))


def check_role_shapes(roles: Mapping[RoleName, PlacedRole]) -> None:
    """The same of every role of PPO, once their models are complete, and of their one vocabulary.

    Raises InvalidConfig with all problems.
    """
    shapes = [
        (f"roles.{name}.{key}", f"roles.{name}: {text}")
        for name, role in roles.items()
        for key, text in shape_rules(role.model, role.parallel)
    ]
    refuse([*shapes, *vocabulary_rules(roles)])


def vocabulary_rules(roles: Mapping[RoleName, PlacedRole]) -> Iterator[tuple[str, str]]:
    """All roles of PPO read the same token ids, as far as their sizes are known."""
    wanted = roles["actor"].model.vocab_size
    for name, role in roles.items():
        if None not in (wanted, role.model.vocab_size) and role.model.vocab_size != wanted:
            yield (
                f"roles.{name}.model.vocab_size",
                f"roles.{name} has a vocabulary of {role.model.vocab_size}, the actor one of {wanted}; the roles read "
                f"the same token ids: take models of one tokenizer",
            )


def data_parallel_size(parallel: ParallelConfig, *, world_size: int) -> int:
    """Replicas of the model over `world_size` ranks; raises InvalidConfig where that does not divide."""
    if world_size % parallel.model_parallel_size:
        refuse([("parallel", world_rule(parallel, world_size))])
    return world_size // parallel.model_parallel_size


def shape_rules(model: ModelConfig, parallel: ParallelConfig) -> Iterator[tuple[str, str]]:
    """Sizes of the model that must divide, with the nearest values that do."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size

    def divides(name: str, value: int | None, unit_name: str, unit: int | None) -> Iterator[tuple[str, str]]:
        if value is not None and unit is not None and value % unit:
            other = ""
            if unit_name == "tensor_model_parallel_size":
                other = f"; or {unit_name} {nearest_divisors(unit, math.gcd(*divisible))}"
            yield (
                f"model.{name}",
                f"model.{name} ({value}) must be a multiple of {unit_name} ({unit}); "
                f"nearest: {nearest_multiples(value, unit)}{other}",
            )

    groups = model.num_query_groups or model.num_attention_heads
    divisible = [size for size in (model.num_attention_heads, groups, model.ffn_hidden_size) if size]
    yield from divides("hidden_size", model.hidden_size, "num_attention_heads", model.num_attention_heads)
    yield from divides("num_attention_heads", model.num_attention_heads, "num_query_groups", model.num_query_groups)
    yield from divides("num_attention_heads", model.num_attention_heads, "tensor_model_parallel_size", tp)
    if model.num_attention_heads is not None and model.num_attention_heads % tp == 0:
        yield from divides("num_query_groups", groups, "tensor_model_parallel_size", tp)
    yield from divides("ffn_hidden_size", model.ffn_hidden_size, "tensor_model_parallel_size", tp)
    if model.num_layers is not None and model.num_layers > MOST_LAYERS:
        yield "model.num_layers", f"model.num_layers ({model.num_layers}) must be at most {MOST_LAYERS}; is it a typo?"
    num_chunks = pp * parallel.num_chunks
    if model.num_layers is not None and model.num_layers < num_chunks:
        yield (
            "model.num_layers",
            f"model.num_layers ({model.num_layers}) must be at least pipeline x virtual pipeline size "
            f"({pp} x {parallel.num_chunks} = {num_chunks}), a layer a chunk; split it less",
        )
    if (
        model.hidden_size
        and model.num_attention_heads
        and model.hidden_size % model.num_attention_heads == 0
        and model.head_dim % 2
    ):
        yield (
            "model.hidden_size",
            f"model.hidden_size / num_attention_heads ({model.head_dim}) must be even for RoPE",
        )
    if model.rope_scaling is not None:
        yield from _rope_scaling_rules(model.rope_scaling)


def _rope_scaling_rules(scaling: dict[str, Any]) -> Iterator[tuple[str, str]]:
    kind = scaling.get("rope_type", scaling.get("type"))
    needed = {
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    }
    if not isinstance(kind, str) or kind not in needed:
        yield (
            "model.rope_scaling",
            f"model.rope_scaling: kind {as_written(kind)} is not supported; linear and llama3 are",
        )
        return
    if missing := sorted(needed[kind] - set(scaling)):
        yield "model.rope_scaling", f"model.rope_scaling of kind {kind} lacks {', '.join(missing)}"
    for key in sorted(set(scaling) - needed[kind] - {"rope_type", "type"}):
        yield (
            "model.rope_scaling",
            f"model.rope_scaling.{as_written(key)}: unknown key; kind {kind} has {', '.join(sorted(needed[kind]))}",
        )
    for key in sorted(needed[kind] & set(scaling)):
        value = scaling[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST_INTEGER:
            yield (
                "model.rope_scaling",
                f"model.rope_scaling.{key} ({as_written(value)}) must be a number above 0 and in 64 bits, such as 8.0",
            )
            return
    low, high = (scaling.get(f"{edge}_freq_factor", 0) for edge in ("low", "high"))
    if kind == "llama3" and not missing and high <= low:
        yield (
            "model.rope_scaling",
            f"model.rope_scaling.high_freq_factor ({high}) must be above low_freq_factor ({low})",
        )


def layout_rules(parallel: ParallelConfig) -> Iterator[tuple[str, str]]:
    """Switches that need others, and sizes that are not supported."""
    if parallel.context_parallel_size != 1:
        yield (
            "parallel.context_parallel_size",
            f"context_parallel_size ({parallel.context_parallel_size}): only 1 is supported",
        )
    if parallel.num_chunks > 1 and parallel.pipeline_model_parallel_size == 1:
        yield (
            "parallel.virtual_pipeline_model_parallel_size",
            f"virtual_pipeline_model_parallel_size ({parallel.num_chunks}) needs pipeline_model_parallel_size above 1; "
            f"leave it out",
        )
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        yield (
            "parallel.overlap_param_gather",
            "overlap_param_gather (true) needs use_distributed_optimizer and overlap_grad_reduce; set both to true",
        )


def model_verb_rules(parallel: ParallelConfig, *, world_size: int) -> Iterator[tuple[str, str]]:
    """The rules of a layout by itself, for verbs that do not train."""
    yield from layout_rules(parallel)
    if world_size % parallel.model_parallel_size:
        yield "parallel", f"--nproc-per-node: {world_rule(parallel, world_size)}"


def world_rule(parallel: ParallelConfig, world_size: int) -> str:
    """What is said of a world that does not divide into replicas of the model."""
    unit = parallel.model_parallel_size
    return (
        f"world size ({world_size}) must be a multiple of tensor x pipeline x context parallel size "
        f"({parallel.tensor_model_parallel_size} x {parallel.pipeline_model_parallel_size} x "
        f"{parallel.context_parallel_size} = {unit}); nearest: {nearest_multiples(world_size, unit)}"
    )


def schedule_rules(optimizer: OptimizerConfig) -> Iterator[tuple[str, str]]:
    """A schedule counts in iterations or in tokens, has an end if it decays, and never rises but by its warm-up."""
    style, is_decaying = optimizer.lr_decay_style, optimizer.lr_decay_style != "constant"
    if optimizer.min_lr > optimizer.lr and is_decaying:
        yield (
            "optimizer.min_lr",
            f"optimizer.min_lr ({optimizer.min_lr:g}) must not exceed lr ({optimizer.lr:g}); lower it",
        )
    if optimizer.lr_warmup_init > optimizer.lr:
        yield (
            "optimizer.lr_warmup_init",
            f"optimizer.lr_warmup_init ({optimizer.lr_warmup_init:g}) must not exceed lr ({optimizer.lr:g}); lower it",
        )
    needed = {"lr_warmup_tokens", "lr_decay_tokens"} if optimizer.is_by_tokens else set()
    unit, other_unit = ("tokens", "iters") if optimizer.is_by_tokens else ("iters", "tokens")
    if not is_decaying:
        needed.discard("lr_decay_tokens")
    if style == "WSD":
        needed.add(f"lr_wsd_decay_{unit}")
    for name in sorted(needed):
        if getattr(optimizer, name) is None:
            yield (
                f"optimizer.{name}",
                f"optimizer.{name} is missing; a schedule of style {style} that counts {unit} needs it"
                f"{' (0: no warm-up)' if name == 'lr_warmup_tokens' else ''}",
            )
    for name in (f"lr_decay_{other_unit}", f"lr_wsd_decay_{other_unit}"):
        if getattr(optimizer, name) is not None:
            yield (
                f"optimizer.{name}",
                f"optimizer.{name} ({getattr(optimizer, name)}): this schedule counts {unit}; give "
                f"{name.replace(other_unit, unit)} in its place, or every length of the schedule in {other_unit}",
            )
    for name in ("lr_wsd_decay_iters", "lr_wsd_decay_tokens"):
        if style != "WSD" and getattr(optimizer, name) is not None:
            yield f"optimizer.{name}", f"optimizer.{name}: only lr_decay_style WSD has it; leave it out"
