"""What `model.load` names, a checkpoint folder or an HF folder, and the model's section as it stands there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_xy.checkpoint import files
from megatron_xy.config import Head, ModelConfig, RunConfig, role_names, role_sections
from megatron_xy.data.encoding.tokenizer import TOKENIZER_FILE, TOKENIZER_JSON
from megatron_xy.errors import ConfigError
from megatron_xy.hf.config import complete_model, read_hf_config
from megatron_xy.hf.source import open_source
from megatron_xy.tensors.safetensors_file import stored_tensors

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


def with_shapes(config: RunConfig) -> RunConfig:
    """`config` with the shapes that it leaves out taken from the weights that it loads, role by role, as far as these
    are here. Raises as `resolve_model`."""

    def shaped(model: ModelConfig) -> ModelConfig:
        is_here = model.load is not None and split_origin(model.load)[1].is_dir()
        return resolve_model(model) if is_here else model

    if config.task != "ppo":
        return config.model_copy(update={"model": shaped(config.model)})
    roles = {
        name: (config.roles or {})[name].model_copy(update={"model": shaped(role_sections(config, name)[0])})
        for name in role_names(config)
    }
    return config.model_copy(update={"roles": roles})


def stored_head(load: str) -> Head:
    """The head of the weights that `load` names. Raises as `resolve_model`."""
    return _stored_model(load)[0].head


def own_tokenizer(origin: str) -> Path | None:
    """The tokenizer that lies beside weights, or that their run named, which may be gone; None where there is none."""
    kind, folder = split_origin(origin)
    if any((folder / name).is_file() for name in (TOKENIZER_FILE, TOKENIZER_JSON)):
        return folder
    named = files.read_manifest(folder).state.get("tokenizer") if kind == "ckpt" else None
    return None if named is None else Path(named)


def check_head(model: ModelConfig, *, key: str = "model.load") -> None:
    """The other way round, a language model's trunk begins a reward model or critic, with a head drawn anew.

    Raises ConfigError where a language model is to be loaded from one of these; else as `resolve_model`.
    """
    if model.load is not None and model.head == "language_model" and stored_head(model.load) == "value":
        raise ConfigError(
            f"{key} ({model.load}) is a reward model or critic, which says nothing; name a language model"
        )


def check_weights(model: ModelConfig) -> None:
    """That the weights `model.load` names are there whole, by the headers and sizes of their files.

    Raises as `resolve_model`.
    """
    if model.load is None:
        return
    source = open_source(*split_origin(model.load))
    files.verify_sizes(source.folder, source.manifest)
    for file in source.manifest.files:
        stored_tensors(source.folder / file)


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
