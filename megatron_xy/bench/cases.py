"""What the two suites measure: fixed models, buckets and step sizes, as plain values; `tiny` proves that they run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

SMALL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 256,
    "ffn_hidden_size": 704,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 16384,
}
TINY: dict[str, Any] = {**SMALL, "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "vocab_size": 512}
ONE_B: dict[str, Any] = {
    "num_layers": 20,
    "hidden_size": 2048,
    "ffn_hidden_size": 5632,
    "num_attention_heads": 16,
    "num_query_groups": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 16384,
    "params_dtype": "bf16",
}
SEVEN_B_SHAPE: dict[str, Any] = {
    **ONE_B,
    "num_layers": 6,  # of 32: the layers of a 7B, as many as one GPU trains
    "hidden_size": 4096,
    "ffn_hidden_size": 11008,
    "num_attention_heads": 32,
    "num_query_groups": 32,
}


@dataclass(frozen=True)
class Case:
    """One model at several buckets. Each step takes `num_micro_batches` rows of `micro_batch_tokens`."""

    model: dict[str, Any]
    buckets: tuple[int, ...]
    micro_batch_tokens: int
    num_micro_batches: int = 2
    warmup_steps: int = 1
    steps: int = 3

    def with_model(self, **changes: Any) -> Case:
        """The same with other keys of the model."""
        return replace(self, model={**self.model, **changes})

    def at(self, *buckets: int) -> Case:
        """The same at these buckets."""
        return replace(self, buckets=buckets)


CPU = Case(SMALL, (256, 512, 1024, 2048), 2048)
CPU_TINY = Case(TINY, (32, 64), 64, steps=1)
GPU_ONE_B = Case(ONE_B, (2048, 4096, 8192, 16384), 16384, num_micro_batches=4, warmup_steps=2, steps=5)
GPU_SEVEN_B = replace(GPU_ONE_B, model=SEVEN_B_SHAPE)
