"""HF's config.json <-> the model section: shape, RoPE and numerics carried exactly, from any transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_xy.config import Head, InvalidConfig, ModelConfig, Problem
from megatron_xy.errors import DataError
from megatron_xy.hf.folder import read_object

CONFIG = "config.json"
SHAPE_KEYS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size",
    "untie_embeddings_and_output_weights", "add_qkv_bias",
)  # fmt: skip
_FOR_HEAD = {"language_model": "ForCausalLM", "value": "ForSequenceClassification"}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class Family:
    """What tells one of HF's model types from a Llama: its classes' name, biases, and what it leaves out by default."""

    name: str
    add_qkv_bias: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)  # in the config.json that is written


FAMILIES = {
    "llama": Family(
        "Llama",
        defaults={"max_position_embeddings": 2048},
        constants={"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    ),
    "mistral": Family(
        "Mistral",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2",
        add_qkv_bias=True,
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
        constants={"use_sliding_window": False, "sliding_window": None},
    ),
}


def read_hf_config(directory: Path) -> ModelConfig:
    """The model section of DIR/config.json; what config.json does not settle is left unset.

    Raises ConfigError where the folder is not there, DataError where it is no Llama-shaped model that this project has.
    """
    path = directory / CONFIG
    values = _read(directory)
    family = _family_of(path, values)
    values = {**family.defaults, **values}
    _refuse_other_shapes(path, values)
    heads = values["num_attention_heads"]
    groups = values.get("num_key_value_heads") or heads
    head_dim = values.get("head_dim") or values["hidden_size"] // heads
    if head_dim * heads != values["hidden_size"]:
        raise DataError(
            f"{path}: head_dim ({head_dim}) x num_attention_heads ({heads}) must be hidden_size "
            f"({values['hidden_size']})"
        )
    if heads % groups:
        raise DataError(f"{path}: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({groups})")
    base, scaling = _read_rope(path, values)
    try:
        return ModelConfig(
            num_layers=values["num_hidden_layers"],
            hidden_size=values["hidden_size"],
            ffn_hidden_size=values["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=groups,
            vocab_size=values["vocab_size"],
            max_position_embeddings=values["max_position_embeddings"],
            rotary_base=base,
            rope_scaling=scaling,
            norm_epsilon=values.get("rms_norm_eps", 1e-6),
            untie_embeddings_and_output_weights=not values.get("tie_word_embeddings", False),
            add_qkv_bias=family.add_qkv_bias,
            head=_head_of(path, values),
        )
    except ValidationError as error:
        raise DataError(f"{path}: {error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from None


def read_token_ids(directory: Path) -> dict[str, Any]:
    """bos_token_id, eos_token_id (one or several) and pad_token_id of DIR/config.json, where given."""
    values = _read(directory)
    return {name: values[name] for name in _TOKEN_IDS if values.get(name) is not None}


def hf_config(model: ModelConfig, *, dtype: str, token_ids: dict[str, Any]) -> dict[str, Any]:
    """The config.json of `model`, in the spellings of transformers 4 and 5: each of them reads only its own.

    dtype: torch's name of the weights' type; token_ids: bos_token_id, eos_token_id, pad_token_id where known.
    """
    scaling = None
    parameters: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling is not None:
        kind = model.rope_scaling.get("rope_type", model.rope_scaling.get("type"))
        parameters = {name: value for name, value in model.rope_scaling.items() if name != "type"} | {"rope_type": kind}
        scaling = {**parameters, "type": kind}
    model_type = "qwen2" if model.add_qkv_bias else "llama"
    family = FAMILIES[model_type]
    return {
        "architectures": [f"{family.name}{_FOR_HEAD[model.head]}"],
        "model_type": model_type,
        **family.constants,
        **({"id2label": {"0": "score"}, "label2id": {"score": 0}} if model.head == "value" else {}),
        "attention_dropout": 0.0,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_method_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "rope_scaling": scaling,
        "rope_parameters": {**parameters, "rope_theta": model.rotary_base},
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
        "vocab_size": model.vocab_size,
        **token_ids,
    }


def complete_model(model: ModelConfig, stored: ModelConfig, *, origin: str) -> ModelConfig:
    """`model` with what it leaves out taken from `stored`, the section of the weights that it loads.

    Shape keys given twice must agree (InvalidConfig); RoPE, context length and epsilon may be set anew, as a continued
    run does.
    """
    known = stored.model_dump(exclude_unset=True)
    given = {name: value for name, value in model.model_dump(exclude_unset=True).items() if value is not None}
    problems = [
        Problem(f"model.{name}", f"model.{name} ({given[name]}) is {value} in {origin}; leave it out or correct it")
        for name in SHAPE_KEYS
        if name in given and given[name] != (value := getattr(stored, name))
    ]
    if problems:
        raise InvalidConfig(problems)
    return ModelConfig.model_validate({**known, **given})


def _read(directory: Path) -> dict[str, Any]:
    values = read_object(directory, CONFIG)
    if values is None:
        raise DataError(f"{directory} holds no {CONFIG}: it is no HF model folder")
    return values


def _read_rope(path: Path, values: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Theta and scaling, from transformers 5's rope_parameters or from version 4's two keys."""
    parameters = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or parameters
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise DataError(f"{path}: rope_parameters and rope_scaling must be objects")
    base = scaling.get("rope_theta", parameters.get("rope_theta", values.get("rope_theta", 10000.0)))
    for place in (values, parameters, scaling):
        if (share := place.get("partial_rotary_factor", 1.0)) != 1.0:
            raise DataError(f"{path}: partial_rotary_factor ({share}) is not supported; 1.0 is")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _ROPE_KEYS:
        raise DataError(f"{path}: RoPE scaling of kind {kind!r} is not supported; linear and llama3 are")
    if missing := [name for name in _ROPE_KEYS[kind] if not isinstance(scaling.get(name), int | float)]:
        raise DataError(f"{path}: RoPE scaling of kind {kind} lacks {', '.join(missing)}")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        high, low = scaling["high_freq_factor"], scaling["low_freq_factor"]
        raise DataError(f"{path}: RoPE scaling's high_freq_factor ({high}) must be above low_freq_factor ({low})")
    return base, {"rope_type": kind, **{name: scaling[name] for name in _ROPE_KEYS[kind]}} if _ROPE_KEYS[kind] else None


def _family_of(path: Path, values: dict[str, Any]) -> Family:
    if values.get("model_type") not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise DataError(f"{path}: model_type ({values.get('model_type')}) is not supported; {supported} are")
    return FAMILIES[values["model_type"]]


def _head_of(path: Path, values: dict[str, Any]) -> Head:
    """What the model's class has: a language model's output layer, or one number a token."""
    architecture = next(iter(values.get("architectures") or ["ForCausalLM"]))
    if not str(architecture).endswith("ForSequenceClassification"):
        return "language_model"
    labels = values.get("num_labels", len(values.get("id2label") or (0, 1)))
    if labels != 1:
        raise DataError(f"{path}: num_labels ({labels}) is not supported; a value head has 1")
    return "value"


def _refuse_other_shapes(path: Path, values: dict[str, Any]) -> None:
    shape = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    needed = (*shape, "max_position_embeddings")
    if missing := [name for name in needed if not isinstance(values.get(name), int) or values[name] < 1]:
        raise DataError(f"{path}: {', '.join(missing)} missing or no positive number")
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if values.get(name):
            raise DataError(f"{path}: {name} (true) is not supported; false is")
    window = values.get("sliding_window") if values["model_type"] == "mistral" else None
    if window is not None and window < values["max_position_embeddings"]:
        raise DataError(
            f"{path}: sliding_window ({window}) below max_position_embeddings ({values['max_position_embeddings']}) is "
            f"not supported; set max_position_embeddings to {window} there: up to so many tokens it is the same model"
        )
    if values.get("hidden_act", "silu") != "silu":
        raise DataError(f"{path}: hidden_act ({values['hidden_act']}) is not supported; silu is")
