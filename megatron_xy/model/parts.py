"""The parts of a model that `train_only` names, and what belongs to neither: which of them a weight is of."""

from __future__ import annotations

from collections.abc import Collection

from megatron_xy.config import ModelConfig
from megatron_xy.tensors.names import EMBEDDING, OUTPUT_LAYER, VALUE_HEAD

MODEL_PARTS = ("embedding", "output_layer", "rest")
_PARTS = {EMBEDDING: "embedding", OUTPUT_LAYER: "output_layer", VALUE_HEAD: "output_layer"}


def part_of_model(name: str) -> str:
    """Which of MODEL_PARTS the weight of this global name is of."""
    return _PARTS.get(name, "rest")


def trained_parts(train_only: Collection[str] | None, *, model: ModelConfig) -> set[str]:
    """Those of MODEL_PARTS that train; None: all. A tied output layer is the embedding, by either name."""
    if train_only is None:
        return set(MODEL_PARTS)
    return {*train_only, *(["embedding"] if model.has_tied_output_layer else [])}
