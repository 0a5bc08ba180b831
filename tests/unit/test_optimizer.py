"""The update against torch's AdamW on a plain copy."""

import math
from functools import partial

import pytest
import torch

from megatron_xy.config import OptimizerConfig, ParallelConfig
from megatron_xy.optimizer import torch_optimizers
from megatron_xy.role import build_role
from megatron_xy.tensors.names import EMBEDDING
from megatron_xy.training.train_step import forward_backward, language_model_loss, on_device
from tests.distributed import models


def gradients(role, step):
    """Forward and backward of one step; gradients stand in main_grad."""
    role.chunks[0].zero_grad_buffer()
    role.optimizer.zero_grad()
    batches = [on_device(batch) for batch in models.micro_batches(step, dp_size=1, dp_rank=0)]
    forward_backward(role, batches, loss_of=partial(language_model_loss, role, 2))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("clip_grad", [0.0, 0.3])
def test_the_update_is_adamw_without_weight_decay_on_norms(alone, dtype, clip_grad):
    """Ours on the role's weights, torch's plain AdamW on fp32 copies of them, from the same gradients."""
    config = OptimizerConfig(weight_decay=0.5, adam_beta1=0.8, adam_beta2=0.9, adam_eps=1e-6)
    model = models.MODEL.model_copy(update={"num_layers": 2, "params_dtype": dtype})
    role = build_role(alone, model=model, parallel=ParallelConfig(), optimizer=config, seed=1)
    named = list(role.named_parameters())
    weights = [getattr(part.parameter, "main_param", part.parameter) for part in named]
    copies = [weight.detach().clone().requires_grad_() for weight in weights]
    norms = [copy for part, copy in zip(named, copies, strict=True) if part.name.endswith("layernorm.weight")]
    assert len(norms) == 2 * 2 + 1
    others = [copy for copy in copies if not any(copy is norm for norm in norms)]
    plain = torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.5}, {"params": norms, "weight_decay": 0.0}],
        betas=(0.8, 0.9), eps=1e-6, foreach=False,
    )  # fmt: skip
    for step, lr in enumerate([1e-2, 3e-3, 2e-2, 0.0]):
        gradients(role, step)
        for part, copy in zip(named, copies, strict=True):
            copy.grad = part.parameter.main_grad.float().clone()
        want_norm = math.sqrt(sum(float(copy.grad.double().square().sum()) for copy in copies))
        torch.nn.utils.clip_grad_norm_(copies, clip_grad or math.inf)
        if clip_grad:
            assert want_norm > clip_grad, "clipping must take part in the comparison"
        for group in plain.param_groups:
            group["lr"] = lr
        plain.step()
        norm, updated = models.update(role, lr=lr, clip_grad=clip_grad)
        assert updated and norm == pytest.approx(want_norm, rel=1e-9)
        for part, copy in zip(named, copies, strict=True):
            weight = getattr(part.parameter, "main_param", part.parameter)
            torch.testing.assert_close(weight.detach(), copy.detach(), rtol=1e-6, atol=1e-7)
            assert torch.equal(part.parameter, weight.to(part.parameter.dtype))


def test_weight_decay_alone_shrinks_matrices_and_leaves_norms(alone):
    config = OptimizerConfig(weight_decay=0.5)
    model = models.MODEL.model_copy(update={"num_layers": 1})
    role = build_role(alone, model=model, parallel=ParallelConfig(), optimizer=config, seed=1)
    before = {part.name: part.parameter.detach().clone() for part in role.named_parameters()}
    role.chunks[0].zero_grad_buffer()
    assert models.update(role, lr=0.1, clip_grad=1.0) == (0.0, True)
    for part in role.named_parameters():
        factor = 1.0 if part.name.endswith("layernorm.weight") else 1 - 0.1 * 0.5
        torch.testing.assert_close(part.parameter.detach(), before[part.name] * factor)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_norm_is_that_of_what_is_trained_alone(alone, dtype):
    model = models.MODEL.model_copy(update={"num_layers": 1, "params_dtype": dtype})
    role = build_role(alone, model=model, parallel=ParallelConfig(), optimizer=OptimizerConfig(), seed=1)
    gradients(role, 0)
    named = {part.name: part.parameter for part in role.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    want = float(named[EMBEDDING].main_grad.double().norm())
    norm, updated = models.update(role, lr=1e-2, clip_grad=1.0, frozen=role.frozen(["embedding"]))
    assert updated and norm == pytest.approx(want, rel=1e-9)
    assert [name for name, parameter in named.items() if not torch.equal(parameter, before[name])] == [EMBEDDING]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_changes_nothing(alone, dtype, bad):
    model = models.MODEL.model_copy(update={"num_layers": 1, "params_dtype": dtype})
    role = build_role(alone, model=model, parallel=ParallelConfig(), optimizer=OptimizerConfig(), seed=1)
    gradients(role, 0)
    assert models.update(role, lr=1e-2, clip_grad=1.0)[1]
    before = state_of(role)
    gradients(role, 1)
    planted = list(role.named_parameters())[-1].parameter
    planted.main_grad.view(-1)[7] = bad
    norm, updated = models.update(role, lr=1e-2, clip_grad=1.0)
    assert not updated and not math.isfinite(norm)
    assert state_of(role).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in state_of(role).items())
    gradients(role, 1)
    assert models.update(role, lr=1e-2, clip_grad=1.0)[1]
    assert any(not torch.equal(value, before[name]) for name, value in state_of(role).items())


def state_of(role):
    """Weights, main weights, moments and step counts, copied."""
    state = {part.name: part.parameter.detach().clone() for part in role.named_parameters()}
    for inner in torch_optimizers(role.optimizer):
        for number, parameter in enumerate(p for group in inner.param_groups for p in group["params"]):
            state[f"main.{number}"] = parameter.detach().clone()
            state |= {f"{name}.{number}": value.clone() for name, value in inner.state[parameter].items()}
    assert any(name.startswith("exp_avg_sq") for name in state)
    return state
