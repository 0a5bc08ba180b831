"""A role: ranks, process groups, model and optimizer. A training job is one role; PPO has four in one world.

Nothing is drawn from generators that a process shares: weights and samples have noise of their own, by what they are,
and there is no dropout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_xy import device, mcore
from megatron_xy.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_xy.model.build import NamedParameter, build_model, named_parameters
from megatron_xy.model.fresh_weights import draw_tensor
from megatron_xy.model.parts import part_of_model, trained_parts
from megatron_xy.optimizer import OwnedParameter, build_optimizer, owned_parameters
from megatron_xy.parallel import Groups, build_groups
from megatron_xy.tensors.shards import ParameterShard


@dataclass
class Role:
    """One model on its ranks. `optimizer` is None where the weights stay as they are."""

    groups: Groups
    model: ModelConfig
    parallel: ParallelConfig
    chunks: list[torch.nn.Module]  # this rank's parts of the model: one, or several under a virtual pipeline
    optimizer: Any | None

    @property
    def name(self) -> str:
        """The role's name: "model" in a training job, actor, critic and so on in PPO."""
        return self.groups.name

    @property
    def vocab_size(self) -> int:
        """The true size, without padding."""
        assert self.model.vocab_size, "the shape is complete once a model is built"
        return self.model.vocab_size

    def named_parameters(self) -> Iterator[NamedParameter]:
        """Every parameter of this rank under its global name."""
        for chunk in self.chunks:
            yield from named_parameters(chunk, model=self.model, groups=self.groups)

    def owned_parameters(self) -> dict[torch.nn.Parameter, OwnedParameter]:
        """Every parameter of which this rank's optimizer updates something; none where there is no optimizer."""
        if self.optimizer is None:
            return {}
        return owned_parameters(self.optimizer, [named.parameter for named in self.named_parameters()])

    def frozen(self, train_only: Collection[str] | None) -> list[torch.Tensor]:
        """What this rank's optimizer holds of the parameters outside the parts `train_only`; None: nothing."""
        trained = trained_parts(train_only, model=self.model)
        owned = self.owned_parameters()
        return [
            owned[named.parameter].main
            for named in self.named_parameters()
            if named.parameter in owned and part_of_model(named.name) not in trained
        ]

    def draw_weights(self, *, seed: int, names: Container[str] | None = None) -> None:
        """Fresh weights, the same in every layout; names: of these parameters alone."""
        all_owned = self.owned_parameters()
        for named in self.named_parameters():
            if names is not None and named.name not in names:
                continue
            targets: list[tuple[torch.Tensor, ParameterShard]] = [(named.parameter, named.shard)]
            owned = all_owned.get(named.parameter)
            if owned is not None and owned.has_main_weights:
                targets.append((owned.main, owned.shard_of(named.shard)))
            draw_tensor(named.name, targets, model=self.model, seed=seed)

    def zero_gradients(self) -> None:
        """Clears what the last step accumulated, and prepares the buffers for the next one."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the modules are in evaluation mode; afterwards in training mode."""
        for chunk in self.chunks:
            chunk.eval()
        try:
            yield
        finally:
            for chunk in self.chunks:
                chunk.train()


def build_role(
    groups: Groups,
    *,
    model: ModelConfig,
    parallel: ParallelConfig,
    optimizer: OptimizerConfig | None,
    seed: int,
    draw: bool = True,
) -> Role:
    """The role's part on this rank; an optimizer where `optimizer` is given. Collective over the role's ranks.

    draw: fill in fresh weights; without it the caller does, or loads others.
    """
    # megatron-core's layers ask for its generators by name and draw nothing; a user's reward function may draw from the
    # process's own, which stay as they are.
    with torch.random.fork_rng([] if device.is_cpu() else [device.current()]):
        mcore.tensor_parallel_random.model_parallel_cuda_manual_seed(
            seed, tp_rank=groups.tp_rank, ep_rank=0, etp_rank=0, force_reset_rng=True
        )
    chunks = build_model(model, parallel=parallel, groups=groups, is_frozen=optimizer is None)
    trained = None
    if optimizer is not None:
        trained = build_optimizer(optimizer, chunks=chunks, groups=groups, parallel=parallel, model=model)
    role = Role(groups, model, parallel, chunks, trained)
    if draw:
        role.draw_weights(seed=seed)
    return role


def build_role_alone(
    model: ModelConfig, *, optimizer: OptimizerConfig | None = None, seed: int = 0, draw: bool = True
) -> Role:
    """`build_role` in the world of `parallel.start_alone`, of this process's one rank."""
    groups = build_groups("model", ranks=[0], parallel=ParallelConfig(), timeout_seconds=120)
    assert groups is not None, "this process is the role's one rank"
    return build_role(groups, model=model, parallel=ParallelConfig(), optimizer=optimizer, seed=seed, draw=draw)
