"""What a PPO checkpoint's manifest keeps of its run, so that a resumed one can tell what has changed; without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_xy.checkpoint.continuation import fixed_keys
from megatron_xy.checkpoint.files import MANIFEST
from megatron_xy.config import PlacedRole, RoleName, RunConfig
from megatron_xy.model.source import split_origin
from megatron_xy.ppo.material import Material, reward_file
from megatron_xy.ppo.placement import spelt_ranks
from megatron_xy.storage import file_sha256, sampled_sha256

FROZEN_ROLES: tuple[RoleName, ...] = ("reference", "reward")


def facts(
    config: RunConfig, roles: Mapping[RoleName, PlacedRole], *, of: RoleName, fingerprints: Mapping[str, str | None]
) -> dict[str, Any]:
    """What `continuation.check_continuation` compares of the trained role `of`: its model, what is drawn and measured
    against, and all settings, every role's included. fingerprints: as below.
    """
    ppo = config.ppo_section
    order = {"seed": config.seed, "ppo.rollout_batch_size": ppo.rollout_batch_size, **fingerprints}
    for frozen in FROZEN_ROLES:
        if frozen in roles:
            kept = fixed_keys(roles[frozen].model.model_dump(mode="json"))
            order |= {f"roles.{frozen}.model.{key}": value for key, value in kept.items()}
    sections = {"ppo": ppo.model_dump(mode="json"), "training": config.training.model_dump(mode="json")}
    if ppo.reward_function is not None:
        contents = file_sha256(reward_file(ppo.reward_function))
        sections["ppo"]["reward_function"] = f"{ppo.reward_function} (sha256 {contents[:12]})"
    for name, role in roles.items():
        sections[f"roles.{name}"] = {"ranks": spelt_ranks(role.ranks), "micro_batch_tokens": role.micro_batch_tokens}
        sections[f"roles.{name}.parallel"] = role.parallel.model_dump(mode="json")
        sections[f"roles.{name}.optimizer"] = {} if role.optimizer is None else role.optimizer.model_dump(mode="json")
    settings = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    return {
        "model": roles[of].model.model_dump(mode="json"),
        "data_order": order,
        "settings": {key: value for key, value in settings.items() if key not in order},
    }


def fingerprints(config: RunConfig, material: Material) -> dict[str, str | None]:
    """Of the files that decide what is drawn and what it is measured against; None where there is none: one that comes
    or goes shows, too."""
    ppo = config.ppo_section
    assert ppo.prompts is not None, "the config's rules ask for them"
    loads = {name: material.roles[name].model.load if name in material.roles else None for name in FROZEN_ROLES}
    return {
        "ppo.prompts": file_sha256(ppo.prompts),
        "data.tokenizer": material.tokenizer.sha256,
        "ppo.responses": None if ppo.responses is None else file_sha256(ppo.responses),
        **{
            f"roles.{name}.model.load": None if load is None else _weights_fingerprint(load)
            for name, load in loads.items()
        },
    }


def _weights_fingerprint(load: str) -> str:
    """Of a checkpoint its manifest, which has all checksums; of an HF folder its small files and samples of the others.

    Training changes every weight, and whole files of a 70B would take minutes.
    """
    kind, folder = split_origin(load)
    if kind == "ckpt":
        return file_sha256(folder / MANIFEST)
    weights = [(path.name, sampled_sha256(path)) for path in sorted(folder.glob("*.safetensors"))]
    small = [file_sha256(path) for path in sorted(folder.glob("*.json")) if _is_of_the_weights(path)]
    return hashlib.sha256(json.dumps([weights, small]).encode()).hexdigest()


def _is_of_the_weights(path: Path) -> bool:
    return path.name in ("config.json", "model.safetensors.index.json")
