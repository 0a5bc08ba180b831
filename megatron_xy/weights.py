"""Where a model's weights and shape come from: `model.load`, a checkpoint folder or an HF folder, under any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_xy import checkpoint_files as files
from megatron_xy.checkpoint_choice import shared_problem
from megatron_xy.checkpoint_state import load_weights
from megatron_xy.config import Head, ModelConfig
from megatron_xy.errors import DataError
from megatron_xy.hf.config import complete_model, read_hf_config
from megatron_xy.hf.reader import hf_manifest
from megatron_xy.model.heads import VALUE_HEAD
from megatron_xy.role import Role

NEW_IN_A_CONTINUED_RUN = ("rotary_base", "rope_scaling", "max_position_embeddings", "norm_epsilon")
NOT_OF_THE_WEIGHTS = {"load", "layer_spec", "recompute_granularity", "params_dtype", "init_method_std"}


def split_origin(origin: str) -> tuple[str, Path]:
    """("ckpt" or "hf", the folder) of `ckpt:DIR` or `hf:DIR`, which the config has checked."""
    kind, _, folder = origin.partition(":")
    return kind, Path(folder)


def resolve_model(model: ModelConfig) -> ModelConfig:
    """`model` with what it leaves out taken from the weights that it loads.

    Raises ConfigError where the folder is not there or the shapes differ, DataError where it is damaged.
    """
    if model.load is None:
        return model
    stored, origin = _stored_model(model.load)
    return complete_model(model, stored, origin=origin)


def stored_head(load: str) -> Head:
    """The head of the weights that `load` names. Raises as `resolve_model`."""
    return _stored_model(load)[0].head


def changes_to_source(model: ModelConfig) -> dict[str, list[Any]]:
    """{key: [in the weights that a run loads, in the run]} of what a continued run may set anew, and does."""
    if model.load is None:
        return {}
    stored, _ = _stored_model(model.load)
    both = {name: [getattr(stored, name), getattr(model, name)] for name in NEW_IN_A_CONTINUED_RUN}
    return {name: pair for name, pair in both.items() if name in stored.model_fields_set and pair[0] != pair[1]}


def _stored_model(load: str) -> tuple[ModelConfig, str]:
    """The section of the weights that `load` names, and the file that it stands in."""
    kind, folder = split_origin(load)
    if kind == "hf":
        return read_hf_config(folder), f"{folder}/config.json"
    stored = files.stored_model(folder, files.read_manifest(folder), without=NOT_OF_THE_WEIGHTS)
    if stored.num_query_groups is None:
        stored = stored.model_copy(update={"num_query_groups": stored.num_attention_heads})
    return stored, f"{folder}/{files.MANIFEST}"


@torch.no_grad()
def load_initial_weights(role: Role, *, seed: int) -> None:
    """Fills a role from `model.load`, each rank with what it holds; where there is none, with fresh weights.

    A ckpt: folder's checksums are compared first, each rank its share of the files. Collective over the role's ranks.
    Raises DataError, on all ranks alike, where they do not hold.
    """
    if role.model.load is None:
        role.draw_weights(seed=seed)
        return
    kind, folder = split_origin(role.model.load)
    role.draw_weights(seed=seed, names={VALUE_HEAD})  # fresh where the loaded model, a language model, has none
    if kind == "ckpt":
        if problem := shared_problem(folder, role.groups):
            raise DataError(problem)
        manifest = files.read_manifest(folder)
    else:
        manifest = hf_manifest(folder, model=read_hf_config(folder))
    load_weights(role, folder, manifest)
