"""RoPE against transformers' own, with every scaling that is taken and with positions that restart."""

import numpy as np
import pytest
import torch

from megatron_xy.config import ModelConfig
from megatron_xy.data.dataset import Sample, collate
from megatron_xy.model.kernels import rotated_heads
from megatron_xy.model.rotary import PackedDocuments, RotaryAngles, inverse_frequencies
from megatron_xy.training.train_step import on_device

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CASES = [
    (10000.0, 128, None),
    (500000.0, 64, None),
    (10000.0, 128, {"rope_type": "linear", "factor": 4.0}),
    (10000.0, 32, {"type": "linear", "factor": 2.5}),
    (500000.0, 128, LLAMA3),
    (500000.0, 64, {**LLAMA3, "factor": 32.0}),
    # Context and base that put dimensions in all three regions of a small head.
    (10000.0, 16, {**LLAMA3, "factor": 4.0, "low_freq_factor": 2.0, "original_max_position_embeddings": 512}),
]


def model_of(base, head_dim, scaling):
    return ModelConfig(
        num_layers=1,
        hidden_size=2 * head_dim,
        ffn_hidden_size=64,
        num_attention_heads=2,
        vocab_size=100,
        max_position_embeddings=131072,
        rotary_base=base,
        rope_scaling=scaling,
    )


def hf_rotary(base, head_dim, scaling):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": "default", "rope_theta": base, **(scaling or {})}
    if "type" in parameters:
        parameters["rope_type"] = parameters.pop("type")
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=131072,
        rope_theta=base,
        rope_parameters=parameters,
    )
    return LlamaRotaryEmbedding(config)


def angles_of(model, positions):
    """cos and sin [tokens, head_dim / 2]."""
    cos, sin = RotaryAngles(model).of(PackedDocuments(position_ids=positions))
    return cos[:, 0, 0], sin[:, 0, 0]


@pytest.mark.parametrize(("base", "head_dim", "scaling"), CASES)
def test_frequencies_and_angles_are_those_of_transformers(base, head_dim, scaling):
    model = model_of(base, head_dim, scaling)
    theirs = hf_rotary(base, head_dim, scaling)
    ours = RotaryAngles(model)
    assert ours.inverse_frequencies.dtype == torch.float32
    torch.testing.assert_close(ours.inverse_frequencies, theirs.inv_freq, rtol=1e-7, atol=0)
    assert theirs.attention_scaling == 1.0
    positions = torch.tensor([0, 1, 2, 0, 1, 511, 8191, 8192, 131071, 0, 1])
    for mine, whole in zip(angles_of(model, positions), theirs(torch.zeros(1), positions[None]), strict=True):
        assert mine.dtype == torch.float32 and mine.shape == (len(positions), head_dim // 2)
        torch.testing.assert_close(torch.cat([mine, mine], dim=-1), whole[0], rtol=0, atol=1e-7)


def test_the_scalings_differ_from_none_and_from_each_other():
    frequencies = [inverse_frequencies(model_of(500000.0, 128, scaling)) for scaling in (None, LLAMA3)]
    assert torch.equal(frequencies[0][:20], frequencies[1][:20])  # short wavelengths are kept
    torch.testing.assert_close(frequencies[0][-20:] / 8, frequencies[1][-20:])
    between = (frequencies[1] < frequencies[0]) & (frequencies[1] > frequencies[0] / 8 * 1.001)
    assert between.sum() >= 5


def test_rotated_queries_and_keys_are_those_of_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    positions = torch.tensor([0, 1, 2, 3, 0, 1, 0, 1, 2])
    projected = torch.randn(len(positions), 2, 5, 64, generator=torch.Generator().manual_seed(0))
    cos, sin = RotaryAngles(model_of(10000.0, 64, None)).of(PackedDocuments(position_ids=positions))
    query, key, value = rotated_heads(projected, cos, sin)
    given = [part.permute(1, 0, 2)[None] for part in (projected[:, :, :-2].flatten(1, 2), projected[:, :, -2])]
    theirs = apply_rotary_pos_emb(*given, *hf_rotary(10000.0, 64, None)(torch.zeros(1), positions[None]))
    for mine, other in zip((query, key), theirs, strict=True):
        torch.testing.assert_close(mine.permute(1, 0, 2)[None], other, rtol=0, atol=1e-6)
    assert torch.equal(value, projected[:, :, -1])


def test_angles_restart_with_every_document():
    samples = [
        Sample(np.arange(1, 31), np.array([10, 20])),
        Sample(np.arange(1, 33), np.array([32])),
    ]
    batch = on_device(collate(samples, source_indices=[0, 0], bucket=32, micro_batch_tokens=64, split_documents=True))
    model = model_of(10000.0, 16, None)
    packed, alone = angles_of(model, batch.packed.position_ids), angles_of(model, torch.arange(32))
    for start, stop in ((0, 10), (10, 30), (30, 32), (32, 64)):
        for ours, single in zip(packed, alone, strict=True):
            assert torch.equal(ours[start:stop], single[: stop - start])


def test_layers_of_a_micro_batch_share_their_angles():
    rotary = RotaryAngles(model_of(10000.0, 16, None))
    one, other = (PackedDocuments(position_ids=torch.arange(4) + start) for start in (0, 7))
    cos, sin = rotary.of(one)
    assert rotary.of(one)[0] is cos and rotary.of(one)[1] is sin
    moved = rotary.of(other)[0]
    assert not torch.equal(moved, cos) and rotary.of(other)[0] is moved
    assert torch.equal(rotary.of(one)[0], cos)
