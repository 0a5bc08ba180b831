"""AdamW through megatron-core's optimizer classes, and the update itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_xy import device, mcore
from megatron_xy.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_xy.parallel import Groups, as_default_group, sum_over
from megatron_xy.tensors.shards import ParameterShard


def build_optimizer(
    config: OptimizerConfig,
    *,
    chunks: list[torch.nn.Module],
    groups: Groups,
    parallel: ParallelConfig,
    model: ModelConfig,
) -> Any:
    """megatron-core's optimizer over this rank's chunks: fp32 main weights under bf16; no weight decay on norms."""
    settings = mcore.OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=model.params_dtype == "bf16",
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    with as_default_group(groups.all_ranks):
        optimizer = mcore.get_megatron_optimizer(
            settings, chunks, use_gloo_process_groups=False, pg_collection=groups.collection
        )
    for inner in torch_optimizers(optimizer):
        for group in inner.param_groups:
            group["weight_decay"] = config.weight_decay * group["wd_mult"]  # 0 for norms
            group["fused"] = True  # torch's one-kernel AdamW, on CPU and GPU
            group["foreach"] = False
    return optimizer


def torch_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside megatron-core's wrappers."""
    return [part.optimizer for part in optimizer.chained_optimizers if part.optimizer is not None]


@dataclass(frozen=True)
class OwnedParameter:
    """What this rank's optimizer updates of a parameter: all of it, or under the distributed optimizer a flat part."""

    main: torch.Tensor  # what torch's optimizer holds: the parameter, its fp32 main weights, or a flat part of these
    inner: torch.optim.Optimizer
    flat: tuple[int, int] | None  # the part's place in the flattened parameter
    has_main_weights: bool  # whether `main` is a tensor of its own beside the parameter

    def part_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The owned part of a tensor of the parameter's shape; flat where it is not all."""
        return tensor if self.flat is None else tensor.reshape(-1)[self.flat[0] : self.flat[1]]

    def shard_of(self, shard: ParameterShard) -> ParameterShard:
        """Which part of the global tensor that is, the parameter being `shard` of it."""
        return shard if self.flat is None else shard.part(*self.flat)


def owned_parameters(
    optimizer: Any, parameters: Iterable[torch.nn.Parameter]
) -> dict[torch.nn.Parameter, OwnedParameter]:
    """Those of `parameters` of which this rank's optimizer updates something."""
    owned = {}
    for part in optimizer.chained_optimizers:
        if part.optimizer is None:
            continue
        if isinstance(part, mcore.DistributedOptimizer):
            # Not by its model_param_group_index_map, which is wrong where a group holds parameters of two dtypes.
            parameter_groups = [*part.model_float16_groups, *part.model_fp32_groups]
            main_groups = [*part.shard_fp32_from_float16_groups, *part.shard_fp32_groups]
            pairs = zip(itertools.chain(*parameter_groups), itertools.chain(*main_groups), strict=True)
            for parameter, main in pairs:
                within = part._get_model_param_range_map(parameter)["param"]
                has_main_weights = parameter.dtype != main.dtype  # else `main` is a view of the parameter
                owned[parameter] = OwnedParameter(main, part.optimizer, (within.start, within.end), has_main_weights)
            continue
        held = {id(tensor) for group in part.optimizer.param_groups for tensor in group["params"]}
        for parameter in parameters:
            main = getattr(parameter, "main_param", parameter)
            if id(main) in held:
                owned[parameter] = OwnedParameter(main, part.optimizer, None, main is not parameter)
    return owned


@torch.no_grad()
def finish_gradients(optimizer: Any, *, frozen: Iterable[torch.Tensor] = ()) -> float:
    """Makes the reduced gradients ready for an update; returns their L2 norm over all ranks of the role, each element
    counted once: the same number on all of them. Collective. Weights and moments stay as they are.

    frozen: `main` of the owned parameters that have no part in the update, nor in the norm.

    Summed in fp64: megatron-core's own fp32 sum, where neither TE nor apex is there, loses digits with a tensor's size
    (1e-5 at 10^5 elements, 1e-3 at 10^7), so that the norm would depend on how the tensor is split. One host sync.
    """
    optimizer.prepare_grads()
    for main in frozen:
        main.grad = None
    total = torch.zeros(1, dtype=torch.float64, device=device.current())
    for part in optimizer.chained_optimizers:
        squares = torch.zeros_like(total)
        for gradient in mcore.gradients_for_norm(part):
            squares += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        total += sum_over(squares, part.get_grad_stats_parallel_group())
    return float(total.sqrt().item())


@torch.no_grad()
def apply_gradients(optimizer: Any, *, lr: float, clip_grad: float, grad_norm: float) -> None:
    """One update of weights and moments from gradients that `finish_gradients` made ready; grad_norm: what it said."""
    for inner in torch_optimizers(optimizer):
        for group in inner.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
    if clip_grad > 0.0:
        for part in optimizer.chained_optimizers:
            mcore.clip_grad_by_total_norm_fp32(part.get_parameters(), clip_grad, grad_norm)
    optimizer.step_with_ready_grads()
