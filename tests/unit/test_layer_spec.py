"""Layers: checkpoint names free of the spec, the attention backends, what is chosen where and why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_xy import device

device.start(num_threads=1)

from megatron_xy.config import ModelConfig  # noqa: E402
from megatron_xy.errors import ConfigError  # noqa: E402
from megatron_xy.model import attention_backends as backends  # noqa: E402
from megatron_xy.model.layer_spec import choose_layers, spec_free_name, split_dimension  # noqa: E402
from megatron_xy.model.rotary import PackedDocuments  # noqa: E402

MODEL = ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, vocab_size=100)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("decoder.layers.3.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.3.input_layernorm.weight"),
        ("decoder.layers.11.mlp.linear_fc1.layer_norm_weight", "decoder.layers.11.pre_mlp_layernorm.weight"),
        ("decoder.layers.3.self_attention.linear_qkv.weight", "decoder.layers.3.self_attention.linear_qkv.weight"),
        ("decoder.layers.3.input_layernorm.weight", "decoder.layers.3.input_layernorm.weight"),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
    ],
)
def test_checkpoint_names_are_free_of_the_spec(name: str, expected: str) -> None:
    assert spec_free_name(name) == expected


def test_the_dimension_that_tensor_parallelism_splits_goes_by_name() -> None:
    assert [split_dimension(f"decoder.layers.0.mlp.{name}") for name in ("linear_fc1", "linear_fc2")] == [0, 1]
    assert split_dimension("output_layer") == split_dimension("embedding.word_embeddings") == 0
    assert split_dimension("decoder.final_layernorm") is None
    assert split_dimension("decoder.layers.0.self_attention") is None


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(30,), (1, 12, 17), (10, 10, 10)])
def test_sdpa_attends_within_each_document(groups: int, lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(30, heads, 8, generator=generator) for heads in (4, groups, groups)]
    query, key, value = (tensor.requires_grad_() for tensor in tensors)
    output = backends.attend_by_sdpa(query, key, value, PackedDocuments.of(lengths), None)
    gradients = torch.autograd.grad(output.square().sum(), (query, key, value))

    # The plain way: one matrix of scores for all, masked to each document's causal part.
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (document[:, None] == document[None]) & torch.ones(30, 30).tril().bool()
    repeated = [tensor.repeat_interleave(4 // groups, dim=1) for tensor in (key, value)]
    scores = torch.einsum("qhd,khd->hqk", query, repeated[0]) / 8**0.5
    weights = F.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)
    expected = torch.einsum("hqk,khd->qhd", weights, repeated[1])
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    plain_gradients = torch.autograd.grad(expected.square().sum(), (query, key, value))
    torch.testing.assert_close(gradients, plain_gradients, rtol=1e-4, atol=1e-5)


def test_grouped_attention_keeps_keys_and_values_once() -> None:
    query, key = torch.randn(64, 8, 16, requires_grad=True), torch.randn(64, 2, 16, requires_grad=True)
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backends.attend_by_sdpa(query, key, key, PackedDocuments.of((64,)), None)
    outputs_and_query = 2 * query.numel() * 4
    assert sum(storages.values()) <= outputs_and_query + key.numel() * 4 + 64 * 8 * 4 + 64  # log-sum-exp; the seeds


def test_a_cpu_takes_torch_and_sdpa_and_says_why() -> None:
    choice = choose_layers(MODEL)
    assert (choice.layer_spec, choice.attention.name) == ("torch", "sdpa")
    assert "transformer_engine" in choice.reason
    named = {finding.name: finding for finding in choice.attention.findings}
    assert [backend.name for backend in backends.BACKENDS] == list(named)
    assert [name for name, finding in named.items() if finding.usable] == ["sdpa"]
    assert named["torch_varlen"].reason == "needs a GPU"
    assert choose_layers(MODEL.model_copy(update={"layer_spec": "torch"})).reason == "as configured"


def test_transformer_engine_asked_for_in_vain_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"layer_spec \(transformer_engine\): transformer_engine .*auto or torch"):
        choose_layers(MODEL.model_copy(update={"layer_spec": "transformer_engine"}))


def test_a_backend_that_gives_wrong_results_or_fails_is_not_used() -> None:
    def unscaled(query, key, value, packed, scale):
        return backends.attend_by_sdpa(query, key, value, packed, 1.0)

    def uncut(query, key, value, packed, scale):
        return backends.attend_by_sdpa(query, key, value, PackedDocuments.of((sum(backends.SELF_TEST),)), scale)

    def absent(query, key, value, packed, scale):
        raise RuntimeError("no kernel image is available\nfor execution")

    def undefined(query, key, value, packed, scale):
        return backends.attend_by_sdpa(query, key, value, packed, scale) * float("nan")

    def right(query, key, value, packed, scale):
        return backends.attend_by_sdpa(query, key, value, packed, scale)

    findings = {
        way.__name__: backends.examine(
            backends.Backend(way.__name__, way, lambda dtype, head_dim: None), torch.float32, 16, deterministic=False
        )
        for way in (unscaled, uncut, undefined, absent, right)
    }
    assert [name for name, finding in findings.items() if finding.usable] == ["right"]
    assert "differs" in findings["uncut"].reason and "differs" in findings["unscaled"].reason
    assert findings["absent"].reason == "fails its self-test: no kernel image is available"
