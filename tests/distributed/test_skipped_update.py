"""A gradient that is not finite on one rank: no rank updates, and the next step is as if nothing had been."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_xy.config import OptimizerConfig
from tests.distributed import models
from tests.distributed.models import Layout
from tests.distributed.spawn import run_ranks

OPTIMIZER = OptimizerConfig(lr=1e-3, lr_warmup_iters=0, adam_eps=1e-6)
LAYOUT = Layout(tp=2, pp=2, sp=True)


def state_of(role: Any) -> dict[str, torch.Tensor]:
    """Weights, main weights, moments and step counts, copied."""
    from megatron_xy.optimizer import torch_optimizers

    state = {named.name: named.parameter.detach().clone() for named in role.named_parameters()}
    for inner in torch_optimizers(role.optimizer):
        for number, parameter in enumerate(p for group in inner.param_groups for p in group["params"]):
            state[f"main.{number}"] = parameter.detach().clone()
            state |= {f"{name}.{number}": value.clone() for name, value in inner.state[parameter].items()}
    assert any(name.startswith("exp_avg_sq") for name in state)
    return state


def step(role: Any, number: int, *, bad_rank: int | None = None, bad_value: float = 0.0) -> tuple[float, bool]:
    """One step in its pieces, with a bad value planted in a split weight's gradient on one rank in between."""
    from megatron_xy.training.train_step import forward_backward, language_model_loss, on_device

    role.chunks[0].zero_grad_buffer()
    role.optimizer.zero_grad()
    batches = [on_device(batch) for batch in models.micro_batches(number, dp_size=1, dp_rank=0)]
    forward_backward(role, batches, loss_of=partial(language_model_loss, role, 2))
    if dist.get_rank() == bad_rank:
        planted = next(named for named in role.named_parameters() if named.name.endswith("linear_fc1.weight"))
        planted.parameter.main_grad[3, 5] = bad_value
    return models.update(role, lr=OPTIMIZER.lr, clip_grad=1.0)


def train_over_bad_steps(dtype: str) -> dict[str, Any]:
    """A good step, four that one rank each spoils, and another good one; and the same without the bad ones."""
    model = models.MODEL.model_copy(update={"params_dtype": dtype})
    undisturbed = models.make_role(LAYOUT, model=model, optimizer=OPTIMIZER, name="undisturbed")
    role = models.make_role(LAYOUT, model=model, optimizer=OPTIMIZER)
    assert role is not None and undisturbed is not None
    good = [step(role, 0)]
    before, bad = state_of(role), []
    for bad_rank in range(LAYOUT.world_size):
        value = math.nan if bad_rank % 2 else math.inf
        bad.append(step(role, 1 + bad_rank, bad_rank=bad_rank, bad_value=value))
        after = state_of(role)
        assert after.keys() == before.keys()
        changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
        assert not changed, f"rank {bad_rank} was bad, and changed {changed}"
    good.append(step(role, 5))
    want = [step(undisturbed, 0), step(undisturbed, 5)]
    expected = state_of(undisturbed)
    assert all(torch.equal(value, expected[name]) for name, value in state_of(role).items())
    assert any(not torch.equal(value, before[name]) for name, value in state_of(role).items())
    return {"good": good, "bad": bad, "want": want}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_ranks_skip_a_step_that_one_rank_spoils(dtype: str) -> None:
    for rank in run_ranks(train_over_bad_steps, dtype, world_size=LAYOUT.world_size):
        assert rank["good"] == rank["want"] and all(updated for _, updated in rank["good"])
        assert [updated for _, updated in rank["bad"]] == [False] * LAYOUT.world_size
        assert not any(math.isfinite(norm) for norm, _ in rank["bad"])


def spoiled_batch(layout: Layout) -> list[tuple[float, bool]]:
    """One rank's weight overflows the forward pass of a whole step; then a step with the weight mended."""
    from megatron_xy.training.train_step import train_step

    role = models.make_role(layout, optimizer=OPTIMIZER)
    assert role is not None
    batches = models.micro_batches(0, dp_size=layout.dp, dp_rank=role.groups.dp_rank)
    weight = next(named.parameter for named in role.named_parameters() if named.name.endswith("linear_fc2.weight"))
    results = []
    for value in (math.inf, 0.0):
        if role.groups.is_first_stage and role.groups.tp_rank == 0 and role.groups.dp_rank == 0:
            with torch.no_grad():
                weight[0, 0] = value
        result = train_step(role, batches, num_sources=2, lr=OPTIMIZER.lr, clip_grad=1.0)
        results.append((result.loss, result.updated))
    return results


@pytest.mark.parametrize("layout", [LAYOUT, Layout(tp=2, dp=2)], ids=str)
def test_an_overflow_in_the_forward_pass_of_one_rank_skips_the_step_on_all(layout: Layout) -> None:
    results = run_ranks(spoiled_batch, layout, world_size=layout.world_size)
    for (bad_loss, bad_updated), (good_loss, good_updated) in results:
        assert not bad_updated and not math.isfinite(bad_loss)
        assert good_updated and good_loss == results[0][1][0]
