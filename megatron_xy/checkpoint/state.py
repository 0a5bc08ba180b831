"""A role's state as named global tensors: which part of it this rank writes, and how any layout fills its own again.

Loading reads each rank's boxes out of whatever pieces there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_xy.checkpoint import files
from megatron_xy.checkpoint.files import TrainingState
from megatron_xy.model.build import NamedParameter
from megatron_xy.model.parts import part_of_model
from megatron_xy.optimizer import OwnedParameter
from megatron_xy.role import Role
from megatron_xy.tensors.files import TensorReader
from megatron_xy.tensors.names import EMBEDDING, VALUE_HEAD
from megatron_xy.tensors.shards import ParameterShard

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN_PARAM = "main_param"
FROZEN_UPDATES = "frozen_updates"  # of a manifest: {part of the model: updates in which it stayed as it was}


@dataclass(frozen=True)
class StatePart:
    """A tensor that this rank writes, its global name and place."""

    name: str
    tensor: torch.Tensor
    shard: ParameterShard


@torch.no_grad()
def load_weights(role: Role, folder: Path, manifest: files.Manifest, *, as_released: bool = False) -> None:
    """Fills the role's weights, main weights included, from a folder's tensors of any layout; nothing else of it.

    as_released: fp32 parameters get the stored weights, as a release of the folder has them, not the main weights of
    which these are rounded. A value head stays as it is where the folder, a language model's, holds none.
    """
    owned = role.owned_parameters()
    with TensorReader(folder, manifest) as reader:
        for named in role.named_parameters():
            if named.name in reader or named.name != VALUE_HEAD:
                _load_weight(reader, named, owned.get(named.parameter), as_released=as_released)


def load_state(role: Role, folder: Path, manifest: files.Manifest) -> TrainingState:
    """Fills weights and optimizer from a verified checkpoint; returns where the run stands."""
    state = manifest.training_state
    owned = role.owned_parameters()
    frozen = manifest.state.get(FROZEN_UPDATES, {})
    with TensorReader(folder, manifest) as reader:
        for named in role.named_parameters():
            mine = owned.get(named.parameter)
            _load_weight(reader, named, mine)
            if mine is not None:
                steps = state.optimizer_steps - frozen.get(part_of_model(named.name), 0)
                _load_moments(reader, named, mine, steps=steps)
    return state


def state_parts(role: Role, *, with_moments_to_come: bool = False) -> list[StatePart]:
    """The tensors of the state that this rank writes.

    with_moments_to_come: those too that AdamW has yet to make, in its first update; what they are of stands for them.

    Replicas share the writing: under the distributed optimizer each writes the part that it updates, weights included
    (the rest may be stale until it is gathered); otherwise a tensor goes to the data parallel rank with the fewest
    bytes so far, the same computation on each. One that is not split by tensor parallelism is written by tensor
    parallel rank 0; a tied embedding by stage 0.
    """
    groups = role.groups
    owned = role.owned_parameters()
    is_distributed = role.optimizer is not None and role.parallel.use_distributed_optimizer
    load = [0] * groups.dp_size
    tied_copy = role.model.has_tied_output_layer and groups.pp_size > 1 and groups.is_last_stage
    parts = []
    for named in role.named_parameters():
        mine = owned.get(named.parameter)
        if is_distributed and mine is None:
            continue
        shard = mine.shard_of(named.shard) if mine is not None else named.shard
        tensors = _state_tensors(named, mine, with_moments_to_come=with_moments_to_come)
        if is_distributed:
            writer = groups.dp_rank
        else:
            writer = load.index(min(load))
            load[writer] += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        split = getattr(named.parameter, "tensor_model_parallel", False)
        is_embedding_copy = tied_copy and named.name == EMBEDDING
        is_writer = (
            writer == groups.dp_rank and (split or groups.tp_rank == 0) and not is_embedding_copy and shard.numel > 0
        )
        if is_writer:
            parts += [StatePart(name, tensor, shard) for name, tensor in tensors.items()]
    return parts


@torch.no_grad()
def _load_weight(
    reader: TensorReader, named: NamedParameter, owned: OwnedParameter | None, *, as_released: bool = False
) -> None:
    main_name = f"optimizer.{MAIN_PARAM}.{named.name}"
    full_precision = named.parameter.dtype == torch.float32 and main_name in reader and not as_released
    reader.read_into(main_name if full_precision else named.name, named.parameter, named.shard)
    if owned is not None and owned.has_main_weights:
        # Without stored main weights: in the stored precision, which may be more than the parameter's.
        name = main_name if main_name in reader else named.name
        reader.read_into(name, owned.main, owned.shard_of(named.shard))


def _load_moments(reader: TensorReader, named: NamedParameter, owned: OwnedParameter, *, steps: int) -> None:
    main = owned.main
    moments = {name: torch.zeros_like(main, memory_format=torch.preserve_format) for name in MOMENTS}
    for name, moment in moments.items():
        if steps:
            reader.read_into(f"optimizer.{name}.{named.name}", moment, owned.shard_of(named.shard))
    step = torch.tensor(float(steps), device=main.device)
    owned.inner.state[main] = {"step": step, **moments} if steps else {}


def _state_tensors(
    named: NamedParameter, owned: OwnedParameter | None, *, with_moments_to_come: bool
) -> dict[str, torch.Tensor]:
    """A parameter's tensors by their names in the checkpoint: itself, its main weights, its moments; what is owned."""
    if owned is None:
        return {named.name: named.parameter.detach()}
    tensors = {named.name: owned.part_of(named.parameter.detach())}
    if owned.has_main_weights:
        tensors[f"optimizer.{MAIN_PARAM}.{named.name}"] = owned.main.detach()
    to_come = dict.fromkeys(MOMENTS, owned.main.detach()) if with_moments_to_come else {}
    moments = owned.inner.state.get(owned.main) or to_come
    return {**tensors, **{f"optimizer.{name}.{named.name}": moments[name] for name in MOMENTS if name in moments}}
