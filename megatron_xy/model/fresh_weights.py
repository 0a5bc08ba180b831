"""Fresh weights that no layout changes: each tile of a global tensor is drawn from (seed, its name, its place).

A rank draws the tiles that it holds something of, and no others: the work per rank falls with tensor parallelism, and
no tensor is ever whole in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from megatron_xy.config import ModelConfig
from megatron_xy.tensors.shards import Box, ParameterShard

TILE = 512  # rows and columns; another size draws another model


@torch.no_grad()
def draw_tensor(
    name: str, targets: Sequence[tuple[torch.Tensor, ParameterShard]], *, model: ModelConfig, seed: int
) -> None:
    """Fills the local tensors `targets`, each a part of the global tensor `name`; what is padding becomes 0.

    Normal with `init_method_std`, output projections over sqrt(2 layers) as in Megatron; norms are 1, biases 0.
    """
    assert model.num_layers, "the shape is complete once a run starts"
    (shape,) = {shard.global_shape for _, shard in targets}
    std = model.init_method_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * model.num_layers)
    for local, shard in targets:
        if len(shape) == 1:
            shard.trim(local).fill_(0.0 if name.endswith(".bias") else 1.0)
        else:
            local.zero_()
    if len(shape) == 1:
        return
    for tile in _tiles_of(shape, (shard for _, shard in targets)):
        values = None
        for local, shard in targets:
            for here, there in shard.overlaps(ParameterShard(shape, (tile,))):
                if values is None:
                    values = _draw(tile, name=name, seed=seed) * std
                here.of(local).copy_(there.of(values))


def _tiles_of(shape: tuple[int, ...], shards: Iterable[ParameterShard]) -> Iterator[Box]:
    """The tiles that the blocks of `shards` touch, each once."""
    seen = set()
    for block, _ in itertools.chain.from_iterable(shard.blocks() for shard in shards):
        if not block.numel:
            continue
        ranges = (range(a // TILE, -(-b // TILE)) for a, b in zip(block.start, block.stop, strict=True))
        for place in itertools.product(*ranges):
            if place not in seen:
                seen.add(place)
                start = tuple(index * TILE for index in place)
                yield Box(start, tuple(min(a + TILE, size) for a, size in zip(start, shape, strict=True)))


def _draw(tile: Box, *, name: str, seed: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}/{name}/{tile.start}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(tile.shape, generator=generator)
