"""Where a model's weights come from: `model.load`, a checkpoint folder or an HF folder, under any layout."""

from __future__ import annotations

import torch

from megatron_xy.checkpoint.choice import shared_problem
from megatron_xy.checkpoint.state import load_weights
from megatron_xy.errors import DataError
from megatron_xy.hf.source import manifest_of
from megatron_xy.model.source import split_origin
from megatron_xy.role import Role
from megatron_xy.tensors.names import VALUE_HEAD


@torch.no_grad()
def load_initial_weights(role: Role, *, seed: int, as_released: bool = False) -> None:
    """Fills a role from `model.load`, each rank with what it holds; where there is none, with fresh weights.

    as_released: as of `load_weights`.
    A ckpt: folder's checksums are compared first, each rank its share of the files. Collective over the role's ranks.
    Raises DataError, on all ranks alike, where they do not hold, StorageError where that cannot be told.
    """
    if role.model.load is None:
        role.draw_weights(seed=seed)
        return
    kind, folder = split_origin(role.model.load)
    role.draw_weights(seed=seed, names={VALUE_HEAD})  # fresh where the loaded model, a language model, has none
    if kind == "ckpt" and (problem := shared_problem(folder, role.groups)):
        raise DataError(problem)
    load_weights(role, folder, manifest_of(kind, folder), as_released=as_released)
