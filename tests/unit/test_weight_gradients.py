"""Weight gradients are added up in fp32 by the product itself, in the place of apex's kernel."""

from __future__ import annotations

import pytest
import torch

from megatron_xy import device

device.start(num_threads=1)

from megatron_xy import mcore  # noqa: E402
from megatron_xy.bench.measure import full_samples  # noqa: E402
from megatron_xy.config import ModelConfig, OptimizerConfig  # noqa: E402
from megatron_xy.role import build_role_alone  # noqa: E402
from megatron_xy.training.train_step import train_step  # noqa: E402


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_the_sum_goes_on_in_fp32_where_it_lies(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, grad = (torch.randn(64, width, generator=generator).to(dtype) for width in (8, 5))
    buffer = torch.randn(2, 5, 8, generator=generator)
    before, total = buffer.clone(), buffer[1]
    mcore._WeightGradients.wgrad_gemm_accum_fp32(inputs, grad, total)
    expected = before[1].double() + grad.double().t() @ inputs.double()
    torch.testing.assert_close(total.double(), expected, rtol=tolerance, atol=tolerance * 8)
    assert torch.equal(buffer[0], before[0])


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.usefixtures("alone")
def test_every_linear_layer_of_a_step_adds_up_so(is_tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    added = 0
    add = mcore._WeightGradients.wgrad_gemm_accum_fp32

    def count(inputs: torch.Tensor, grad: torch.Tensor, total: torch.Tensor) -> None:
        nonlocal added
        added += 1
        add(inputs, grad, total)

    monkeypatch.setattr(mcore._WeightGradients, "wgrad_gemm_accum_fp32", staticmethod(count))
    model = ModelConfig(
        num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, num_query_groups=1, vocab_size=64,
        max_position_embeddings=32, untie_embeddings_and_output_weights=not is_tied,
    )  # fmt: skip
    role = build_role_alone(model, optimizer=OptimizerConfig(), seed=1)
    batches = [full_samples(bucket=16, micro_batch_tokens=32, vocab_size=64, seed=seed) for seed in range(3)]
    sums = []
    for is_fused in (True, False):
        for module in role.chunks[0].modules():
            if hasattr(module, "gradient_accumulation_fusion"):
                module.gradient_accumulation_fusion = is_fused
        train_step(role, batches, num_sources=1, lr=0.0, clip_grad=1.0)
        sums.append([parameter.main_grad.clone() for parameter in role.chunks[0].parameters()])
    assert added == 3 * (2 * 4 + 1)  # four linear layers in each of two, and the output layer
    assert all(total.count_nonzero() for total in sums[0])
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-7)
