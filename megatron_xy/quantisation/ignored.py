"""Which linear layers of a model stay as they are when it is quantised."""

from __future__ import annotations

import re

from megatron_xy.config import ModelConfig
from megatron_xy.errors import ConfigError, UsageError
from megatron_xy.hf.names import global_names, global_shape, hf_shards
from megatron_xy.tensors.names import EMBEDDING

LM_HEAD = "lm_head"
PATTERN = "re:"  # begins a regular expression, as for llm-compressor
_FIRST = "model.layers.0."


def ignored_layers(names: list[str], model: ModelConfig) -> list[str]:
    """The layers that `names` mean, in the model's order; lm_head always where it is the embedding.

    A name is one or more whole parts of a layer's, such as lm_head, layers.0 or down_proj; or `re:` and an expression
    that fits its beginning. Raises UsageError for an expression that is none, ConfigError for a name of no layer, and
    where no layer is left.
    """
    layers = _linear_layers(model)
    ignored = {LM_HEAD} if model.has_tied_output_layer else set()
    for name in names:
        meant = {layer for layer in layers if _means(name, layer)}
        if not meant:
            raise ConfigError(f"--ignore {name}: the model has no such layer; it has {_told(layers)}; name one")
        ignored |= meant
    if ignored >= set(layers):
        raise ConfigError(f"--ignore {', '.join(names)}: leaves no layer to quantise; name fewer")
    return [layer for layer in layers if layer in ignored]


def _linear_layers(model: ModelConfig) -> list[str]:
    """All but the embedding, named as in transformers."""
    weights = [name for name in global_names(model) if name != EMBEDDING and len(global_shape(name, model)) > 1]
    layers = [part.removesuffix(".weight") for name in weights for part in hf_shards(name, model)]
    return [*layers, LM_HEAD] if model.has_tied_output_layer else layers


def _means(name: str, layer: str) -> bool:
    if not name.startswith(PATTERN):
        return f".{name}." in f".{layer}."
    try:
        return re.match(name.removeprefix(PATTERN), layer) is not None
    except re.error as error:
        raise UsageError(f"--ignore {name}: is no regular expression: {error}") from error


def _told(layers: list[str]) -> str:
    """Those of the first layer stand for all."""
    num_layers = sum(layer.endswith("o_proj") for layer in layers)
    parts = [layer.removeprefix(_FIRST) for layer in layers if layer.startswith(_FIRST)]
    return f"model.layers.0 to {num_layers - 1}, each with {', '.join(parts)}, and {LM_HEAD}"
