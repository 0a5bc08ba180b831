"""FLOPs and parameters against published figures, a count over real matrices, and the identities between them."""

import pytest
import torch

from megatron_xy.config import ModelConfig
from megatron_xy.errors import ConfigError
from megatron_xy.flops import PEAK_BF16_FLOPS, flops_per_token, num_parameters, peak_flops, recomputed_flops, step_flops

LLAMA_2_70B = ModelConfig(
    num_layers=80,
    hidden_size=8192,
    ffn_hidden_size=28672,
    num_attention_heads=64,
    num_query_groups=8,
    vocab_size=32000,
)
SMALL = ModelConfig(
    num_layers=3, hidden_size=48, ffn_hidden_size=112, num_attention_heads=6, num_query_groups=2, vocab_size=77
)


def test_llama_2_70b_has_its_published_number_of_parameters():
    assert num_parameters(LLAMA_2_70B) == 68_976_648_192


@pytest.mark.parametrize(
    ("length", "gigaflops", "attention_percent"),
    [(2048, 420, 1.9), (4096, 428, 3.8), (8192, 445, 7.2), (16384, 477, 13.5)],
)
def test_llama_2_70b_costs_its_published_flops(length, gigaflops, attention_percent):
    flops = flops_per_token(LLAMA_2_70B, attention_length=length)
    assert flops / 1e9 == pytest.approx(gigaflops, abs=0.6)  # 444.49 is published as 445
    attention = flops - flops_per_token(LLAMA_2_70B, attention_length=0)
    assert round(100 * attention / flops, 1) == attention_percent


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("groups", [None, 2])
def test_parameters_equal_those_of_transformers_llama(tied, groups):
    transformers = pytest.importorskip("transformers")
    model = SMALL.model_copy(update={"untie_embeddings_and_output_weights": not tied, "num_query_groups": groups})
    llama = transformers.LlamaConfig(
        num_hidden_layers=3,
        hidden_size=48,
        intermediate_size=112,
        num_attention_heads=6,
        num_key_value_heads=groups or 6,
        vocab_size=77,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        counted = sum(parameter.numel() for parameter in transformers.LlamaForCausalLM(llama).parameters())
    assert num_parameters(model) == counted


def test_a_step_costs_the_sum_of_its_documents():
    lengths = [5, 17, 64, 1]
    total = step_flops(SMALL, num_tokens=sum(lengths), sum_squared_lengths=sum(n * n for n in lengths))
    assert total == pytest.approx(sum(n * flops_per_token(SMALL, attention_length=n) for n in lengths))
    mean_length = sum(n * n for n in lengths) / sum(lengths)
    assert total == pytest.approx(sum(lengths) * flops_per_token(SMALL, attention_length=mean_length))
    joined = step_flops(SMALL, num_tokens=sum(lengths), sum_squared_lengths=sum(lengths) ** 2)
    assert joined > total  # attention across document borders is work too


@pytest.mark.parametrize("documents", [[4096], [1000, 3000, 96]])
def test_recomputation_adds_the_forward_pass_of_what_is_recomputed(documents):
    work = {"num_tokens": sum(documents), "sum_squared_lengths": sum(n * n for n in documents)}
    layers, hidden, ffn, vocab = 80, 8192, 28672, 32000
    mlp = 2 * 3 * hidden * ffn * layers * work["num_tokens"]
    projections = 2 * (2 * hidden * 64 * 128 + 2 * hidden * 8 * 128) * layers * work["num_tokens"]
    attention = sum(2 * 2 * n * n * 64 * 128 * layers / 2 for n in documents)  # two products over the causal half
    head = 2 * hidden * vocab * work["num_tokens"]
    assert step_flops(LLAMA_2_70B, **work) == pytest.approx(3 * (mlp + projections + attention + head), rel=1e-12)
    for granularity, want in (("none", 0), ("selective", mlp), ("full", mlp + projections + attention)):
        model = LLAMA_2_70B.model_copy(update={"recompute_granularity": granularity})
        assert recomputed_flops(model, **work) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H800", 989),
        ("NVIDIA H20", 148),
    ],
)
def test_peaks_go_by_the_name_that_the_driver_gives(name, teraflops):
    assert peak_flops(name) == teraflops * 1e12


def test_what_the_table_does_not_know_has_no_peak():
    assert peak_flops("NVIDIA GeForce RTX 4090") is None
    assert peak_flops("cpu") is None
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert all(peak_flops(name) == peak for name, peak in PEAK_BF16_FLOPS.items())


def test_an_incomplete_shape_is_refused_by_its_keys():
    with pytest.raises(ConfigError, match=r"model\.num_layers, model\.vocab_size missing"):
        num_parameters(SMALL.model_copy(update={"num_layers": None, "vocab_size": None}))
