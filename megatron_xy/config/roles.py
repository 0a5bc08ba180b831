"""Where the roles of a PPO run stand, and their sections: what a role leaves out is the run's.

From a config and a world size to `PlacedRole`s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar, get_args

from megatron_xy.config.fields import Section
from megatron_xy.config.problems import as_written
from megatron_xy.config.sections import (
    Head,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PPOConfig,
    RoleConfig,
    RoleName,
    RunConfig,
)
from megatron_xy.errors import ConfigError

ROLE_NAMES: tuple[RoleName, ...] = get_args(RoleName)
TRAINED_ROLES: tuple[RoleName, ...] = ("actor", "critic")
HEAD_OF_ROLE: dict[RoleName, Head] = {
    "actor": "language_model", "critic": "value", "reference": "language_model", "reward": "value",
}  # fmt: skip

SectionType = TypeVar("SectionType", bound=Section)


@dataclass(frozen=True)
class PlacedRole:
    """One PPO role, settled: its sections with what they leave out filled in, and its ranks, ascending."""

    name: RoleName
    ranks: tuple[int, ...]
    model: ModelConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig | None  # None where the weights stay as they are
    micro_batch_tokens: int
    chat_template: str | None = None

    @property
    def room(self) -> int:
        """Tokens that an answer may have with its prompt."""
        return min(self.model.max_position_embeddings, self.micro_batch_tokens)


def role_names(config: RunConfig) -> tuple[RoleName, ...]:
    """The roles that a PPO run has; a function may stand in for the reward model."""
    has_function = config.ppo_section.reward_function is not None
    return ROLE_NAMES[:-1] if has_function else ROLE_NAMES


def placed_roles(config: RunConfig, *, world_size: int) -> dict[RoleName, PlacedRole]:
    """The roles of a checked config over a world of `world_size` ranks."""
    assert config.roles is not None, "the config's rules ask for roles"
    ranks = ranks_of_roles(config.roles, role_names(config), world_size=world_size)
    return {name: settled_role(config, name, ranks=ranks[name]) for name in role_names(config)}


def settled_role(config: RunConfig, name: RoleName, *, ranks: Sequence[int] = ()) -> PlacedRole:
    """A role that the config has, wherever it stands."""
    assert config.roles is not None, "the config's rules ask for roles"
    role = config.roles[name]
    return PlacedRole(
        name,
        tuple(ranks),
        *role_sections(config, name),
        optimizer=merged(config.optimizer, role.optimizer) if name in TRAINED_ROLES else None,
        micro_batch_tokens=role.micro_batch_tokens or config.training.micro_batch_tokens,
        chat_template=role.chat_template or config.data.chat_template,
    )


def room_for_answers(roles: Iterable[PlacedRole], ppo: PPOConfig) -> tuple[RoleName, int]:
    """The role with the least room, and its tokens for an answer with its prompt. Raises ConfigError for too few."""
    narrowest = min(roles, key=lambda role: role.room)
    if narrowest.room <= ppo.max_response_length:
        raise ConfigError(
            f"ppo.max_response_length ({ppo.max_response_length}) leaves no room for a prompt: the {narrowest.name} "
            f"has {narrowest.room} tokens (the smaller one of max_position_embeddings and micro_batch_tokens); lower it"
        )
    return narrowest.name, narrowest.room


def filling_answer(roles: Iterable[PlacedRole], ppo: PPOConfig) -> int:
    """Tokens of answers, prompts included, that fill micro-batches most: memory is told for these."""
    placed = list(roles)
    _, room = room_for_answers(placed, ppo)
    budget = max(role.micro_batch_tokens for role in placed)
    filling = budget // -(-budget // room)
    return filling if filling > ppo.max_response_length else room


def role_sections(config: RunConfig, name: RoleName) -> tuple[ModelConfig, ParallelConfig]:
    """A role's model and layout: its own keys, the run's sections for the rest."""
    role = (config.roles or {}).get(name, RoleConfig())
    model = merged(config.model, role.model).model_copy(update={"head": HEAD_OF_ROLE[name]})
    return model, merged(config.parallel, role.parallel)


def merged(section: SectionType, changes: SectionType) -> SectionType:
    """The section with the keys that `changes` was given; a default that follows another key follows it there, too."""
    given = {name: getattr(part, name) for part in (section, changes) for name in part.model_fields_set}
    return type(section).model_validate(given)


def ranks_of_roles(
    roles: dict[RoleName, RoleConfig], names: Sequence[RoleName], *, world_size: int
) -> dict[RoleName, list[int]]:
    """Global ranks of each role; shares follow one another. Raises ValueError whose text begins with the key."""
    ranks: dict[RoleName, list[int]] = {}
    taken = 0.0
    for name in names:
        role = roles[name]
        if role.ranks is not None:
            ranks[name] = parsed_ranks(role.ranks, key=f"roles.{name}.ranks")
            continue
        assert role.share is not None, "a role has ranks or a share"
        first, taken = taken * world_size, taken + role.share
        last = taken * world_size
        if abs(first - round(first)) > 1e-6 * world_size or abs(last - round(last)) > 1e-6 * world_size:
            raise ValueError(
                f"roles.{name}.share ({role.share:g}) of {world_size} ranks is no whole number of ranks from "
                f"{first:g} to {last:g}; give shares that are, or ranks"
            )
        ranks[name] = list(range(round(first), round(last)))
    return ranks


def parsed_ranks(value: int | str, *, key: str) -> list[int]:
    """[0, 2, 3] of "0,2-3" as of "2-3,0". Raises ValueError whose text begins with the key."""
    ranks: list[int] = []
    for part in str(value).replace(" ", "").split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(
                f'{key} ({as_written(value)}) must be a rank or ranges of ranks, such as 0, "0-1" or "0,2-3"'
            )
        ranks += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(ranks)) < len(ranks):
        raise ValueError(f"{key} ({as_written(value)}) names a rank twice")
    return sorted(ranks)
