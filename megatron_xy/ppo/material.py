"""What a PPO run is given, looked at before any process group starts, and by `check --paths`; without torch.

config, files -> roles with their whole shapes, prompts and answers as token ids, what ends an answer
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_xy.checkpoint.files import read_manifest
from megatron_xy.config import (
    TRAINED_ROLES,
    ModelConfig,
    PlacedRole,
    RoleName,
    RunConfig,
    check_role_shapes,
    room_for_answers,
)
from megatron_xy.data.chat.renderer import Renderer
from megatron_xy.data.encoding.tokenizer import Tokenizer, load_tokenizer
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.hf.kept import end_ids, kept_facts
from megatron_xy.hf.tokenizer import check_export
from megatron_xy.model.source import check_head, own_tokenizer, resolve_model, split_origin, stored_head
from megatron_xy.ppo.prompts import GivenResponses, PromptFile

MOST_RENAMED = 0.01  # of the token ids that two tokenizers share: reserved ones that were given a name


@dataclass(frozen=True)
class Material:
    """All that a PPO run is given, looked at and found fit."""

    roles: dict[RoleName, PlacedRole]
    prompts: PromptFile
    responses: GivenResponses | None
    tokenizer: Tokenizer
    renderers: dict[str, Renderer]
    stop_ids: tuple[int, ...]  # any of them ends an answer
    stored_scores: tuple[float, float]  # mean and deviation, as the reward model's checkpoint keeps them

    @property
    def trained_models(self) -> list[ModelConfig]:
        """Those of which the run's checkpoints are."""
        return [self.roles[name].model for name in TRAINED_ROLES]


def look_at(config: RunConfig, placed: Mapping[RoleName, PlacedRole]) -> Material:
    """Opens and checks what the config names, all but the weights themselves. Raises ConfigError or DataError."""
    ppo = config.ppo_section
    assert ppo.prompts is not None and config.data.tokenizer is not None, "the rules ask for them"
    roles = {name: replace(role, model=resolve_model(role.model)) for name, role in placed.items()}
    check_role_shapes(roles)
    _check_heads(roles)
    tokenizer = load_tokenizer(config.data.tokenizer)
    _check_vocabulary(roles["actor"].model, tokenizer)
    _check_tokenizers(roles, tokenizer)
    check_export(tokenizer.path, hf_interval=config.checkpoint.hf_interval)
    prompts = PromptFile(ppo.prompts, seed=config.seed)
    name, room = room_for_answers(roles.values(), ppo)
    reason = f"the {name} has {room} tokens for prompt and answer, ppo.max_response_length is {ppo.max_response_length}"
    by_template = {template: Renderer(tokenizer, template) for template in {r.chat_template for r in roles.values()}}
    for renderer in by_template.values():
        prompts.check_lengths(renderer, most=room - ppo.max_response_length, reason=reason)
    renderers: dict[str, Renderer] = {name: by_template[role.chat_template] for name, role in roles.items()}
    stop_ids = _stop_ids(roles["actor"].model, renderers["actor"])
    responses = None
    if ppo.responses is not None:
        responses = GivenResponses(ppo.responses)
        num_drawn = config.training.train_iters * ppo.rollout_batch_size
        vocab_size = roles["actor"].model.vocab_size
        assert vocab_size, "the shape is complete"
        responses.check(num_drawn=num_drawn, most=ppo.max_response_length, vocab_size=vocab_size)
    elif not stop_ids:
        raise DataError(f"data.tokenizer ({tokenizer.path}) has no end token, so no answer could end; name another one")
    stored = (0.0, 1.0)
    if ppo.reward_normalization == "stored":
        stored = _stored_scores(roles["reward"])
    return Material(roles, prompts, responses, tokenizer, renderers, stop_ids, stored)


def reward_file(name: str) -> Path:
    """FILE of a reward function's FILE.py:FUNCTION. Raises ConfigError where it is not there."""
    path = Path(name.rpartition(":")[0])
    if not path.is_file():
        raise ConfigError(f"ppo.reward_function ({name}): {path} is not there; name FILE.py:FUNCTION")
    return path


def _stop_ids(actor: ModelConfig, renderer: Renderer) -> tuple[int, ...]:
    """The tokenizer's end token, the chat template's, and those that the actor's HF folder names or named."""
    named = [] if actor.load is None else end_ids(kept_facts(*split_origin(actor.load)))
    ids = {renderer.tokenizer.eos_id, *renderer.stop_ids, *named}
    return tuple(sorted(index for index in ids if index is not None))


def _check_heads(roles: Mapping[RoleName, PlacedRole]) -> None:
    """A critic may begin as a language model's trunk; else a head that the weights lack would be drawn at random."""
    for name, role in roles.items():
        check_head(role.model, key=f"roles.{name}.model.load")
        head = role.model.head if role.model.load is None else stored_head(role.model.load)
        if head == "language_model" and name == "reward":
            raise ConfigError(
                f"roles.reward.model.load ({role.model.load}) is a language model, which gives no scores; name a "
                f"reward model"
            )


def _check_vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> None:
    if model.vocab_size is None or tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"data.tokenizer ({tokenizer.path}) has {tokenizer.vocab_size} tokens, the models {model.vocab_size}; name "
            f"the tokenizer that they were trained with"
        )


def _check_tokenizers(roles: Mapping[RoleName, PlacedRole], tokenizer: Tokenizer) -> None:
    """The roles' own tokenizers, as far as they are there, have the same pieces, but for a few that were renamed."""
    for name, role in roles.items():
        path = None if role.model.load is None else own_tokenizer(role.model.load)
        try:
            own = load_tokenizer(path) if path is not None and path.exists() else tokenizer
        except DataError:  # of a kind that is not read here, and not used either
            continue
        if own.sha256 == tokenizer.sha256:
            continue
        shared = range(min(own.vocab_size, tokenizer.vocab_size))
        other = [index for index in shared if own.engine.spelling(index) != tokenizer.engine.spelling(index)]
        if len(other) > MOST_RENAMED * len(shared):
            theirs, ours = (which.engine.spelling(other[0]) for which in (own, tokenizer))
            raise ConfigError(
                f"roles.{name}.model.load ({role.model.load}) reads other token ids than data.tokenizer "
                f"({tokenizer.path}): by its own tokenizer ({own.path}) {len(other)} of {len(shared)} differ, "
                f"{other[0]} is {theirs!r} and not {ours!r}; take models of one tokenizer"
            )


def _stored_scores(role: PlacedRole) -> tuple[float, float]:
    """What the reward model's checkpoint says of its scores on the SFT model's answers."""
    assert role.model.load is not None, "the config's rules ask for a checkpoint"
    scores = read_manifest(split_origin(role.model.load)[1]).state.get("scores")
    if not isinstance(scores, dict) or not float(scores.get("std", 0)) > 0:
        raise DataError(
            f"ppo.reward_normalization (stored): {role.model.load} keeps no mean and deviation of its scores; take "
            f"running or none"
        )
    return float(scores["mean"]), float(scores["std"])
