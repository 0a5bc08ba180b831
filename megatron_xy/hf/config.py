"""HF's config.json <-> the model section: shape, RoPE and numerics carried exactly, whatever transformers version wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_xy.config import InvalidConfig, ModelConfig, Problem
from megatron_xy.errors import ConfigError, DataError

ARCHITECTURE = "LlamaForCausalLM"
DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def read_hf_config(directory: Path) -> dict[str, Any]:
    """The keys of the model section that DIR/config.json settles.

    Raises ConfigError where the folder is not there, DataError where it is no Llama-shaped model that this project has.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory}: there is no such folder; name one with config.json and *.safetensors")
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{directory} holds no config.json: it is no HF model folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    _refuse_other_families(path, values)
    heads = values["num_attention_heads"]
    head_dim = values.get("head_dim") or values["hidden_size"] // heads
    if head_dim * heads != values["hidden_size"]:
        raise DataError(
            f"{path}: head_dim ({head_dim}) x num_attention_heads ({heads}) must be hidden_size ({values['hidden_size']})"
        )
    base, scaling = _rope(values)
    return {
        "num_layers": values["num_hidden_layers"],
        "hidden_size": values["hidden_size"],
        "ffn_hidden_size": values["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": values.get("num_key_value_heads") or heads,
        "vocab_size": values["vocab_size"],
        "max_position_embeddings": values.get("max_position_embeddings", 2048),
        "rotary_base": base,
        "rope_scaling": scaling,
        "norm_epsilon": values.get("rms_norm_eps", 1e-6),
        "untie_embeddings_and_output_weights": not values.get("tie_word_embeddings", False),
    }


def hf_config(model: ModelConfig, *, dtype: str, token_ids: dict[str, int | None]) -> dict[str, Any]:
    """The config.json of `model`, in the spellings of transformers 4 and 5: each of them reads only its own.

    dtype: torch's name of the weights' type; token_ids: bos_token_id, eos_token_id, pad_token_id where known.
    """
    scaling = None
    if model.rope_scaling is not None:
        kind = model.rope_scaling.get("rope_type", model.rope_scaling.get("type"))
        scaling = {**model.rope_scaling, "rope_type": kind, "type": kind}
    parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": model.rotary_base}
    parameters.pop("type", None)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_method_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "mlp_bias": False,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "rope_scaling": scaling,
        "rope_parameters": parameters,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
        "vocab_size": model.vocab_size,
        **token_ids,
    }


def complete_model(model: ModelConfig, known: dict[str, Any], *, origin: str) -> ModelConfig:
    """`model` with what it leaves out taken from `known`, the shape of the weights that it loads.

    Shape keys given twice must agree (InvalidConfig); RoPE, context length and epsilon may be set anew, as a continued
    run does.
    """
    shape_keys = (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size",
        "untie_embeddings_and_output_weights",
    )  # fmt: skip
    given = {name: getattr(model, name) for name in model.model_fields_set if getattr(model, name) is not None}
    problems = [
        Problem(
            f"model.{name}", f"model.{name} ({given[name]}) is {known[name]} in {origin}; leave it out or correct it"
        )
        for name in shape_keys
        if name in given and given[name] != known[name]
    ]
    if problems:
        raise InvalidConfig(problems)
    return ModelConfig.model_validate({**model.model_dump(), **known, **given})


def _rope(values: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Theta and scaling, from transformers 5's rope_parameters or from version 4's two keys."""
    parameters = values.get("rope_parameters") or {}
    base = float(parameters.get("rope_theta", values.get("rope_theta", 10000.0)))
    scaling = values.get("rope_scaling") or {name: value for name, value in parameters.items() if name != "rope_theta"}
    scaling = {name: value for name, value in scaling.items() if name != "rope_theta"}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return base, None if kind == "default" else scaling


def _refuse_other_families(path: Path, values: Any) -> None:
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    if not isinstance(values, dict) or values.get("model_type") != "llama":
        found = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        raise DataError(f"{path}: model_type {found!r} is not supported; llama is")
    if missing := [name for name in needed if not isinstance(values.get(name), int)]:
        raise DataError(f"{path}: {', '.join(missing)} missing or not a number")
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise DataError(f"{path}: {name} is true; only Llama shapes without biases are supported")
    if values.get("hidden_act", "silu") != "silu":
        raise DataError(f"{path}: hidden_act {values['hidden_act']!r} is not supported; silu is")
