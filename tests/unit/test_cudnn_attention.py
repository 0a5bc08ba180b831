"""How documents are padded and batched for cuDNN: with torch's own kernels in its place, which a CPU has."""

from __future__ import annotations

import contextlib

import pytest
import torch

from megatron_xy import device
from megatron_xy.model import cudnn_attention
from megatron_xy.model.cudnn_attention import LENGTHS_PER_DOUBLING, padded_length
from megatron_xy.model.rotary import PackedDocuments
from megatron_xy.model.torch_attention import attend_by_sdpa

device.start(num_threads=1)


@pytest.fixture(autouse=True)
def kernels_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes [documents, tokens, heads, head_dim] that came as batches."""
    shapes: list[tuple[int, ...]] = []
    attend = cudnn_attention._attend_to_batch

    def noted(query, key, value, scale):
        shapes.append(tuple(query.shape))
        return attend(query, key, value, scale)

    monkeypatch.setattr(cudnn_attention, "_attend_to_batch", noted)
    monkeypatch.setattr(cudnn_attention, "sdpa_kernel", lambda backend: contextlib.nullcontext())
    monkeypatch.setattr(cudnn_attention, "attend_by_torch_varlen", attend_by_sdpa)
    monkeypatch.setattr(cudnn_attention, "SHORT", 32)
    cudnn_attention._batches.cache_clear()
    return shapes


@pytest.mark.parametrize(
    ("lengths", "batches"),
    [
        ((64, 64), [(2, 64, 4, 8)]),  # as it lies
        ((65, 65), [(2, 72, 4, 8)]),
        ((72, 66), [(2, 72, 4, 8)]),
        ((7, 66, 1, 32, 70, 3), [(2, 72, 4, 8), (1, 32, 4, 8)]),
        ((5, 1, 31), []),
        ((128,), [(1, 128, 4, 8)]),
    ],
)
def test_output_and_gradients_are_those_of_each_document_alone(
    lengths: tuple[int, ...], batches: list[tuple[int, ...]], kernels_of_a_cpu: list[tuple[int, ...]]
) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value, grad = (
        torch.randn(sum(lengths), heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4)
    )
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    packed = PackedDocuments.of(lengths)
    for scale in (None, 0.3):
        kernels_of_a_cpu.clear()
        ours = cudnn_attention.attend_by_torch_cudnn(*inputs, packed, scale, least_work=0)
        theirs = attend_by_sdpa(*inputs, packed, scale)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad))
        assert kernels_of_a_cpu == batches


def test_batches_too_small_for_a_gpu_go_to_the_flash_kernel_with_the_short(
    monkeypatch: pytest.MonkeyPatch, kernels_of_a_cpu: list[tuple[int, ...]]
) -> None:
    together: list[tuple[int, ...]] = []

    def flash(query, key, value, packed, scale):
        together.append(packed.segment_lengths)
        return attend_by_sdpa(query, key, value, packed, scale)

    monkeypatch.setattr(cudnn_attention, "attend_by_torch_varlen", flash)
    packed = PackedDocuments.of((40, 3, 66, 70, 35, 68))
    tensor = torch.randn(282, 4, 8, generator=torch.Generator().manual_seed(2))
    output = cudnn_attention.attend_by_torch_cudnn(tensor, tensor, tensor, packed, None, least_work=4 * 200)
    torch.testing.assert_close(output, attend_by_sdpa(tensor, tensor, tensor, packed, None))
    assert (kernels_of_a_cpu, together) == ([(3, 72, 4, 8)], [(40, 3, 35)])


def test_borders_are_made_where_they_are_needed_and_of_use_to_training_though_answers_were_drawn_first() -> None:
    assert cudnn_attention._batches((5, 1, 31), 0).packed_short is None
    assert cudnn_attention._batches((64, 64), 0).packed_short is None
    with torch.inference_mode():
        cudnn_attention._batches((64, 5), 0)
    packed = cudnn_attention._batches((64, 5), 0).packed_short
    assert packed is not None and packed.cu_seqlens_q.tolist() == [0, 5] and not packed.cu_seqlens_q.is_inference()


def test_few_padded_lengths_and_little_padding() -> None:
    padded = {length: padded_length(length) for length in range(1024, 16385)}
    assert all(length <= found <= length * (1 + 1 / LENGTHS_PER_DOUBLING) for length, found in padded.items())
    assert len(set(padded.values())) == 4 * LENGTHS_PER_DOUBLING + 1
    assert all(padded_length(1 << power) == 1 << power for power in range(1, 20))
