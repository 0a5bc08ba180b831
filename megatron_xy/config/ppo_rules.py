"""What a PPO run must hold: its algorithm's numbers, each role's model, and where the roles stand.

Rules yield (key, sentence) of whatever does not hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatron_xy.config.model_rules import layout_rules, schedule_rules, shape_rules, vocabulary_rules
from megatron_xy.config.problems import as_written, nearest_divisors, nearest_multiples
from megatron_xy.config.roles import (
    ROLE_NAMES,
    TRAINED_ROLES,
    PlacedRole,
    merged,
    ranks_of_roles,
    role_names,
    role_sections,
    room_for_answers,
    settled_role,
)
from megatron_xy.config.sections import SHAPE, ModelConfig, PPOConfig, RoleName, RunConfig
from megatron_xy.errors import ConfigError


def ppo_rules(config: RunConfig, *, world_size: int | None) -> Iterator[tuple[str, str]]:
    """What a PPO run needs, role by role."""
    ppo, roles, names = config.ppo_section, config.roles or {}, role_names(config)
    if ppo.prompts is None:
        yield "ppo.prompts", "ppo.prompts is missing; name a jsonl file of rows with a prompt"
    if config.data.tokenizer is None:
        yield "data.tokenizer", "data.tokenizer is missing; prompts are text, and answers end with its end token"
    yield from _number_rules(ppo)
    yield from _score_rules(config, ppo)
    yield from _left_out_rules(config)
    for name in ROLE_NAMES:
        if name not in names and name in roles:
            yield f"roles.{name}", "roles.reward: ppo.reward_function stands in for it; leave one of them out"
        elif name in names and name not in roles:
            yield f"roles.{name}", f"roles.{name} is missing; task ppo has the roles {', '.join(names)}"
    given = [name for name in names if name in roles]
    for name in given:
        yield from _role_rules(config, name)
    if "actor" in roles:
        yield from _common_rules({name: settled_role(config, name) for name in given}, ppo)
    if all(name in roles and (roles[name].ranks is None) != (roles[name].share is None) for name in names):
        yield from _placement_rules(config, world_size=world_size)


def _number_rules(ppo: PPOConfig) -> Iterator[tuple[str, str]]:
    """The algorithm's numbers, beside one another."""
    if ppo.rollout_batch_size % ppo.mini_batch_size:
        yield (
            "ppo.mini_batch_size",
            f"ppo.mini_batch_size ({ppo.mini_batch_size}) must divide rollout_batch_size ({ppo.rollout_batch_size}); "
            f"nearest: {nearest_divisors(ppo.mini_batch_size, ppo.rollout_batch_size)}",
        )
    if ppo.kl_loss_coef and ppo.kl_coef:
        yield (
            "ppo.kl_loss_coef",
            f"ppo.kl_loss_coef ({ppo.kl_loss_coef}) and ppo.kl_coef ({ppo.kl_coef}) would count the divergence twice; "
            f"set one of them to 0",
        )
    if ppo.kl_target is not None and not ppo.kl_coef:
        yield "ppo.kl_target", f"ppo.kl_target ({ppo.kl_target:g}) adapts kl_coef, which is 0; give it a start above 0"
    if ppo.kl_target is not None and ppo.kl_horizon < ppo.rollout_batch_size:
        yield (
            "ppo.kl_horizon",
            f"ppo.kl_horizon ({ppo.kl_horizon}) counts answers, and a step has {ppo.rollout_batch_size} "
            f"(rollout_batch_size): kl_coef would leap, even below 0; give at least as many, such as 10000",
        )


def _score_rules(config: RunConfig, ppo: PPOConfig) -> Iterator[tuple[str, str]]:
    """Where scores come from, and what they are normalised by."""
    if ppo.reward_function is not None and not re.fullmatch(r"[^\0:]+\.py:[A-Za-z_]\w*", ppo.reward_function):
        yield "ppo.reward_function", f"ppo.reward_function ({as_written(ppo.reward_function)}) must be FILE.py:FUNCTION"
    if ppo.reward_function is not None and ppo.reward_normalization == "stored":
        yield (
            "ppo.reward_normalization",
            "ppo.reward_normalization (stored): a function has no stored statistics; take running or none",
        )
    elif ppo.reward_normalization == "stored" and "reward" in (config.roles or {}):
        load = role_sections(config, "reward")[0].load
        if load is None or not load.startswith("ckpt:"):
            yield (
                "ppo.reward_normalization",
                f"ppo.reward_normalization (stored): roles.reward.model.load ({as_written(load)}) must be the "
                f"ckpt:DIR of a reward run, whose manifest keeps mean and deviation of its scores; name one, or take "
                f"running or none",
            )


def _left_out_rules(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What other tasks have is refused, as nothing would come of it."""
    training, runtime = config.training, config.runtime
    for key, value, why in (
        ("training.eval_interval", training.eval_interval, "task ppo evaluates nothing by itself"),
        ("training.epochs", training.epochs, "task ppo counts in train_iters"),
        ("training.phases", training.phases, "task ppo has one phase"),
        ("training.spike_policy", training.spike_policy == "skip", "task ppo skips no spikes, only what is not finite"),
        ("runtime.profile", runtime.profile, "task ppo is not profiled yet"),
    ):
        if value:
            yield key, f"{key}: {why}; leave it out"


def _role_rules(config: RunConfig, name: RoleName) -> Iterator[tuple[str, str]]:
    assert config.roles is not None, "it has this role"
    role = config.roles[name]
    if role.ranks is None and role.share is None:
        yield f"roles.{name}", f"roles.{name} needs either ranks or a share of the world"
    elif role.ranks is not None and role.share is not None:
        yield (
            f"roles.{name}",
            f"roles.{name} has both ranks and a share ({role.share:g}) of the world; give one of them",
        )
    model, parallel = role_sections(config, name)
    if role.model.load is None and config.model.load is None and model.num_layers is None:
        yield f"roles.{name}.model.load", f"roles.{name}.model.load is missing; name the weights that it starts from"
    rules = [*shape_rules(model, parallel), *layout_rules(parallel)]
    if name in TRAINED_ROLES:
        rules += schedule_rules(merged(config.optimizer, role.optimizer))
    elif role.optimizer.model_fields_set:
        rules.append(("optimizer", f"the {name} is not trained; leave its optimizer out"))
    for key, text in rules:
        yield f"roles.{name}.{key}", f"roles.{name}: {text}"


def _common_rules(roles: Mapping[RoleName, PlacedRole], ppo: PPOConfig) -> Iterator[tuple[str, str]]:
    """What the roles' models must have in common, as far as the config tells: the rest stands beside their weights."""
    yield from vocabulary_rules(roles)
    if "reference" in roles and roles["reference"].model.load is None:
        yield from _fresh_reference_rules(roles["reference"].model, _known_shape(roles["actor"].model))
    try:
        room_for_answers(map(_with_known_room, roles.values()), ppo)
    except ConfigError as error:
        yield "ppo.max_response_length", str(error)


def _fresh_reference_rules(reference: ModelConfig, actor: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Without weights of its own the reference is the actor as it begins."""
    for key, value in _known_shape(reference).items():
        if actor.get(key) not in (None, value):
            yield (
                f"roles.reference.model.{key}",
                f"roles.reference.model.{key} ({as_written(value)}) must be the actor's ({as_written(actor[key])}): a "
                f"reference that loads no weights stands for the actor as it begins; make them the same, or name the "
                f"reference's weights in roles.reference.model.load",
            )


def _known_shape(model: ModelConfig) -> dict[str, Any]:
    """That of the weights but for the vocabulary, as far as the config tells it."""
    shape = {key: getattr(model, key) for key in (*SHAPE, "num_query_groups") if key != "vocab_size"}
    if model.load is None:
        shape["num_query_groups"] = model.num_query_groups or model.num_attention_heads
        shape["add_qkv_bias"] = model.add_qkv_bias
        shape["untie_embeddings_and_output_weights"] = model.untie_embeddings_and_output_weights
    return shape


def _with_known_room(role: PlacedRole) -> PlacedRole:
    """The role with all the context that it may have, where its weights are yet to say it."""
    if role.model.load is None:
        return role
    return replace(role, model=role.model.model_copy(update={"max_position_embeddings": role.micro_batch_tokens}))


def _placement_rules(config: RunConfig, *, world_size: int | None) -> Iterator[tuple[str, str]]:
    """Ranks are there, used, and as many as the layouts need. Without a world size: as far as ranks are named."""
    assert config.roles is not None, "it has roles"
    names = role_names(config)
    shares = [config.roles[name].share for name in names]
    if sum(filter(None, shares)) > 1 + 1e-9:
        yield "roles", f"roles: shares sum to {sum(filter(None, shares)):g}, at most 1; name ranks that roles share"
        return
    if world_size is None and any(share is not None for share in shares):
        return
    try:
        ranks = ranks_of_roles(config.roles, names, world_size=world_size or 0)
    except ValueError as error:
        yield str(error).split(" ", 1)[0], str(error)
        return
    for name in names:
        unit = role_sections(config, name)[1].model_parallel_size
        if len(ranks[name]) % unit:
            yield (
                f"roles.{name}",
                f"roles.{name} has {len(ranks[name])} ranks, which must be a multiple of its tensor x pipeline "
                f"parallel size ({unit}); nearest: {nearest_multiples(len(ranks[name]), unit)}",
            )
        if world_size is not None and (beyond := [rank for rank in ranks[name] if rank >= world_size]):
            yield (
                f"roles.{name}.ranks",
                f"roles.{name}.ranks ({config.roles[name].ranks}) names rank {beyond[0]}, and the world has "
                f"{world_size}, from 0 to {world_size - 1}",
            )
    used = {rank for of_role in ranks.values() for rank in of_role}
    idle = sorted(set(range(world_size if world_size is not None else max(used) + 1)) - used)
    if idle:
        yield "roles", f"roles: no role has rank {', '.join(map(str, idle[:8]))}; every rank of the world needs one"
