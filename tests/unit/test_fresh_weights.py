"""Fresh weights: the same whatever part of a tensor is held, normal, and zero in the padding."""

import itertools
import math

import torch

from megatron_xy.model.fresh_weights import TILE, draw_tensor
from megatron_xy.tensors.shards import Box, ParameterShard, whole
from tests.distributed.models import MODEL

SHAPE = (TILE + 100, 2 * TILE - 24)


def drawn(shard, shape, *, name="decoder.layers.0.mlp.linear_fc1.weight", seed=3):
    local = torch.full(shape, torch.nan)
    draw_tensor(name, [(local, shard)], model=MODEL, seed=seed)
    return local


def test_every_part_is_a_slice_of_the_same_tensor():
    full = drawn(whole(SHAPE), SHAPE)
    for rows, columns in itertools.product([(0, 700), (300, 612), (511, 513)], [(0, 1000), (400, 600)]):
        shape = (min(rows[1], SHAPE[0]) - rows[0], columns[1] - columns[0])
        box = Box((rows[0], columns[0]), (rows[0] + shape[0], columns[1]))
        assert torch.equal(drawn(ParameterShard(SHAPE, (box,)), shape), full[rows[0] : rows[1], slice(*columns)])
    flat = whole(SHAPE).part(1234, 400_000)
    assert torch.equal(drawn(flat, (400_000 - 1234,)), full.reshape(-1)[1234:400_000])


def test_padding_is_zero_and_norms_are_one():
    shard = ParameterShard((300, 8), (Box((256, 0), (300, 8)),))
    local = drawn(shard, (256, 8), name="embedding.word_embeddings.weight")
    assert torch.count_nonzero(local[:44]) == 44 * 8 and not local[44:].any()
    assert (drawn(whole((64,)), (64,), name="decoder.final_layernorm.weight") == 1).all()


def test_spread_and_independence():
    full = drawn(whole(SHAPE), SHAPE)
    assert full.mean().abs() < 1e-4 and math.isclose(full.std().item(), MODEL.init_method_std, rel_tol=0.01)
    scaled = drawn(whole(SHAPE), SHAPE, name="decoder.layers.0.mlp.linear_fc2.weight")
    assert math.isclose(scaled.std().item(), MODEL.init_method_std / math.sqrt(2 * MODEL.num_layers), rel_tol=0.01)
    tiles = [full[row : row + 100, column : column + 476] for row in (0, TILE) for column in (0, TILE)]
    other_seed, other_name = drawn(whole(SHAPE), SHAPE, seed=4)[:100, :476], scaled[:100, :476]
    for one, other in itertools.combinations([*tiles, other_seed, other_name], 2):
        assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.02
