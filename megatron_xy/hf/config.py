"""HF's config.json <-> the model section: shape, RoPE and numerics carried exactly, from any transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_xy.config import Head, InvalidConfig, ModelConfig, Problem
from megatron_xy.errors import DataError
from megatron_xy.hf.folder import read_object
from megatron_xy.hf.values import Values

CONFIG = "config.json"
SHAPE_KEYS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size",
    "untie_embeddings_and_output_weights", "add_qkv_bias",
)  # fmt: skip
_FOR_HEAD = {"language_model": "ForCausalLM", "value": "ForSequenceClassification"}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
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
        constants={"sliding_window": None},  # none as short as the context, which is what is read
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
    given = _read(directory)
    _refuse_quantised(directory, given)
    path, family = given.path, FAMILIES[_model_type(given)]
    values = Values(path, {**family.defaults, **given.values})
    _refuse_other_shapes(values)
    hidden_size, heads = values.count("hidden_size"), values.count("num_attention_heads")
    groups = values.count("num_key_value_heads", heads)
    head_dim = values.count("head_dim", max(hidden_size // heads, 1))
    if head_dim * heads != hidden_size:
        raise DataError(
            f"{path}: head_dim ({head_dim}) x num_attention_heads ({heads}) must be hidden_size ({hidden_size})"
        )
    if heads % groups:
        raise DataError(f"{path}: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({groups})")
    base, scaling = _read_rope(values)
    return ModelConfig(
        num_layers=values.count("num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=values.count("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        vocab_size=values.count("vocab_size"),
        max_position_embeddings=values.count("max_position_embeddings"),
        rotary_base=base,
        rope_scaling=scaling,
        norm_epsilon=values.number("rms_norm_eps", 1e-6),
        untie_embeddings_and_output_weights=not values.flag("tie_word_embeddings", default=False),
        add_qkv_bias=family.add_qkv_bias,
        head=_head_of(values),
    )


def read_model_type(directory: Path) -> str:
    """The family of DIR/config.json. Raises as `read_hf_config`."""
    return _model_type(_read(directory))


def read_token_ids(directory: Path) -> dict[str, Any]:
    """bos_token_id, eos_token_id (one or several) and pad_token_id of DIR/config.json, where given."""
    return dict(_read(directory).token_ids(*TOKEN_IDS))


def hf_config(
    model: ModelConfig, *, dtype: str, token_ids: dict[str, Any], model_type: str | None = None
) -> dict[str, Any]:
    """The config.json of `model`, in the spellings of transformers 4 and 5: each of them reads only its own.

    dtype: torch's name of the weights' type; token_ids: bos_token_id, eos_token_id, pad_token_id where known;
    model_type: the family that the model came from, if it came from one.
    """
    scaling = None
    parameters: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling is not None:
        kind = model.rope_scaling.get("rope_type", model.rope_scaling.get("type"))
        parameters = {name: value for name, value in model.rope_scaling.items() if name != "type"} | {"rope_type": kind}
        scaling = {**parameters, "type": kind}
    if model_type is None:
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
    # null leaves a key out; for rope_scaling it says that there is none.
    section = model.model_dump(exclude_unset=True)
    given = {name: value for name, value in section.items() if value is not None or name == "rope_scaling"}
    problems = [
        Problem(f"model.{name}", f"model.{name} ({given[name]}) is {value} in {origin}; leave it out or correct it")
        for name in SHAPE_KEYS
        if name in given and given[name] != (value := getattr(stored, name))
    ]
    if problems:
        raise InvalidConfig(problems)
    return ModelConfig.model_validate({**known, **given})


def _read(directory: Path) -> Values:
    values = read_object(directory, CONFIG)
    if values is None:
        raise DataError(f"{directory} holds no {CONFIG}: it is no HF model folder; name one that is")
    return Values(directory / CONFIG, values)


def _read_rope(values: Values) -> tuple[float, dict[str, Any] | None]:
    """Theta and scaling, from transformers 5's rope_parameters or from version 4's two keys."""
    parameters, scaling = _rope_of_all_layers(values), values.object("rope_scaling")
    places = [place for place in (scaling, parameters) if place.values]
    thetas = [place.number("rope_theta") for place in (*places, values) if "rope_theta" in place.values]
    if len(set(thetas)) > 1:
        told = " and ".join(f"{theta:g}" for theta in dict.fromkeys(thetas))
        raise DataError(f"{values.path}: rope_theta is given as {told}; versions of transformers read one each")
    for place in (values, *places):
        if (share := place.number("partial_rotary_factor", 1.0)) != 1.0:
            raise DataError(f"{values.path}: partial_rotary_factor ({share}) is not supported; 1.0 is")
    found = [_scaling_of(place) for place in places]
    if any(other != found[0] for other in found):
        raise DataError(
            f"{values.path}: rope_scaling and rope_parameters differ; versions of transformers read one each"
        )
    return thetas[0] if thetas else 10000.0, found[0] if found else None


def _rope_of_all_layers(values: Values) -> Values:
    """rope_parameters, which transformers 5 also has by type of layer: taken where these do not differ."""
    parameters = values.object("rope_parameters")
    if not any(isinstance(value, dict) for value in parameters.values.values()):
        return parameters
    by_type = [parameters.object(name) for name in parameters.values]
    if any(other.values != by_type[0].values for other in by_type):
        raise DataError(
            f"{values.path}: rope_parameters differ between {', '.join(parameters.values)}; only layers that are alike "
            f"are supported"
        )
    return by_type[0]


def _scaling_of(place: Values) -> dict[str, Any] | None:
    """A model section's rope_scaling; None for none."""
    kind = place.text("rope_type", place.text("type", "default"))
    if kind not in _ROPE_KEYS:
        raise DataError(f"{place.path}: RoPE scaling of kind {kind!r} is not supported; linear and llama3 are")
    if missing := [name for name in _ROPE_KEYS[kind] if name not in place]:
        raise DataError(f"{place.path}: RoPE scaling of kind {kind} lacks {', '.join(missing)}")
    factors = {name: place.number(name) for name in _ROPE_KEYS[kind]}
    if kind == "llama3" and factors["high_freq_factor"] <= factors["low_freq_factor"]:
        high, low = factors["high_freq_factor"], factors["low_freq_factor"]
        raise DataError(f"{place.path}: RoPE scaling's high_freq_factor ({high}) must be above low_freq_factor ({low})")
    return {"rope_type": kind, **{name: place.values[name] for name in factors}} if factors else None


def _model_type(values: Values) -> str:
    model_type = values.text("model_type", "none")
    if model_type not in FAMILIES:
        raise DataError(f"{values.path}: model_type ({model_type}) is not supported; {', '.join(FAMILIES)} are")
    return model_type


def _head_of(values: Values) -> Head:
    """What the model's class has: a language model's output layer, or one number a token."""
    architecture = next(iter(values.texts("architectures")), "ForCausalLM")
    if not architecture.endswith("ForSequenceClassification"):
        return "language_model"
    labels = values.count("num_labels", len(values.object("id2label").values) or 2)
    if labels != 1:
        raise DataError(f"{values.path}: num_labels ({labels}) is not supported; a value head has 1")
    return "value"


def _refuse_quantised(directory: Path, values: Values) -> None:
    if "quantization_config" in values:
        method = values.object("quantization_config").text("quant_method", "an unnamed method")
        raise DataError(
            f"{values.path}: is quantised, by {method} (quantization_config), and only whole weights are read; name "
            f"the form that it was made from, or ask it benchmarks beside that: compare hf:... hf:{directory} --tasks"
        )


def _refuse_other_shapes(values: Values) -> None:
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if values.flag(name, default=False):
            raise DataError(f"{values.path}: {name} (true) is not supported; false is")
    if other := set(values.texts("layer_types")) - {"full_attention"}:
        raise DataError(f"{values.path}: layer_types ({', '.join(sorted(other))}) are not supported; full_attention is")
    if values.values["model_type"] == "mistral" and "sliding_window" in values:
        window, longest = values.count("sliding_window"), values.count("max_position_embeddings")
        if window < longest:
            raise DataError(
                f"{values.path}: sliding_window ({window}) below max_position_embeddings ({longest}) is not supported; "
                f"set max_position_embeddings to {window} there: up to so many tokens it is the same model"
            )
    if (activation := values.text("hidden_act", "silu")) != "silu":
        raise DataError(f"{values.path}: hidden_act ({activation}) is not supported; silu is")
