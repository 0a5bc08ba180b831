"""`quantize --ignore`: names, parts of names and expressions -> layers."""

from __future__ import annotations

import pytest

from megatron_xy.config import ModelConfig
from megatron_xy.errors import ConfigError, UsageError
from megatron_xy.quantisation.ignored import ignored_layers


def model(*, tied: bool = False) -> ModelConfig:
    return ModelConfig(
        num_layers=12, hidden_size=64, ffn_hidden_size=192, num_attention_heads=4, vocab_size=301,
        untie_embeddings_and_output_weights=not tied, add_qkv_bias=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("lm_head", ["lm_head"]),
        ("model.layers.1.mlp.down_proj", ["model.layers.1.mlp.down_proj"]),
        ("layers.1.mlp", [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")]),
        ("k_proj", [f"model.layers.{number}.self_attn.k_proj" for number in range(12)]),
        (r"re:.*layers\.(0|11)\.self_attn\.o", [f"model.layers.{number}.self_attn.o_proj" for number in (0, 11)]),
    ],
)
def test_a_name_means_the_layers_that_it_is_a_part_of(name: str, layers: list[str]) -> None:
    assert ignored_layers([name], model()) == layers
    assert ignored_layers([name, "lm_head"], model()) == list(dict.fromkeys([*layers, "lm_head"]))


def test_an_output_layer_that_is_the_embedding_always_stays() -> None:
    assert ignored_layers(["layers.0.mlp.up_proj"], model(tied=True)) == ["model.layers.0.mlp.up_proj", "lm_head"]


@pytest.mark.parametrize("name", ["nonsense", "head", "embed_tokens", "layers.12", "re:k_proj"])
def test_a_name_of_no_layer_is_refused_and_told_which_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no such layer; it has model\.layers\.0 to 11, each with .*q_proj.*lm_head"):
        ignored_layers(["lm_head", name], model())


def test_that_no_layer_is_left_and_a_bad_expression_are_refused() -> None:
    with pytest.raises(ConfigError, match="leaves no layer"):
        ignored_layers(["layers", "lm_head"], model())
    with pytest.raises(UsageError, match="is no regular expression"):
        ignored_layers(["re:("], model())
