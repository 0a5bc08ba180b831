"""What a checkpoint keeps of the HF folder that its weights come from, so that it goes back as what it was.

The family, the token ids of config.json, generation_config.json: from the folder into manifests, and from one manifest
into the next.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_xy.checkpoint.files import read_manifest
from megatron_xy.hf.config import TOKEN_IDS, read_model_type, read_token_ids
from megatron_xy.hf.folder import read_object
from megatron_xy.hf.values import Values

GENERATION_CONFIG = "generation_config.json"
_KEPT = ("model_type", "token_ids", "generation_config")


def kept_facts(kind: str, folder: Path) -> dict[str, Any]:
    """{model_type, token_ids, generation_config}, those that there are, of `ckpt` or `hf` and its folder.

    Raises ConfigError where it is not there, DataError where it is damaged.
    """
    if kind == "ckpt":
        state = read_manifest(folder).state
        return {name: state[name] for name in _KEPT if name in state}
    facts: dict[str, Any] = {"model_type": read_model_type(folder), "token_ids": read_token_ids(folder)}
    generation = read_object(folder, GENERATION_CONFIG)
    if generation is not None:
        Values(folder / GENERATION_CONFIG, generation).token_ids(*TOKEN_IDS)
        facts["generation_config"] = generation
    return facts


def end_ids(kept: dict[str, Any]) -> list[int]:
    """The ids that end an answer: those of generation_config.json, or else of config.json, as transformers has it."""
    for values in (kept.get("generation_config", {}), kept.get("token_ids", {})):
        if (ids := values.get("eos_token_id")) is not None:
            return list(ids) if isinstance(ids, list) else [ids]
    return []
