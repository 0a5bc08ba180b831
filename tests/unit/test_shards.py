"""Two ways of cutting one tensor: what both hold is copied once and only once, padding never."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xy.tensors.shards import Box, ParameterShard


def cut_points(draw, size):
    inner = draw(st.lists(st.integers(0, size), max_size=4))
    return sorted({0, size, *inner})


@st.composite
def cuts(draw, shape):
    """ParameterShards that make up a tensor of `shape`: along one dimension, in a grid, or as gate and up."""
    kind = draw(st.sampled_from(["rows", "columns", "grid", "gated"]))
    if kind == "gated" and (shape[0] % 2 or shape[0] == 0):
        kind = "rows"
    if len(shape) == 1 and kind in ("columns", "grid"):
        kind = "rows"
    rest_start, rest_stop = (0,) * (len(shape) - 1), shape[1:]
    if kind == "rows":
        points = cut_points(draw, shape[0])
        boxes = [(Box((a, *rest_start), (b, *rest_stop)),) for a, b in itertools.pairwise(points)]
    elif kind == "gated":
        half = shape[0] // 2
        points = cut_points(draw, half)
        boxes = [
            (Box((a, *rest_start), (b, *rest_stop)), Box((half + a, *rest_start), (half + b, *rest_stop)))
            for a, b in itertools.pairwise(points)
        ]
    else:
        rows = cut_points(draw, shape[0]) if kind == "grid" else [0, shape[0]]
        columns = cut_points(draw, shape[1])
        boxes = [
            (Box((a, c, *rest_start[1:]), (b, d, *rest_stop[1:])),)
            for a, b in itertools.pairwise(rows)
            for c, d in itertools.pairwise(columns)
        ]
    shards = [ParameterShard(shape, parts) for parts in boxes]
    return [part for shard in shards for part in flat_parts(draw, shard)] if draw(st.booleans()) else shards


def flat_parts(draw, shard):
    """The shard as the distributed optimizer cuts it: flat ranges of its elements, one after the other."""
    return [shard.part(a, b) for a, b in itertools.pairwise(cut_points(draw, shard.numel)) if a < b]


@st.composite
def two_cuts(draw):
    shape = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    return shape, draw(cuts(shape)), draw(cuts(shape))


def local_of(shard, full, *, padding=0):
    """The local tensor by concatenation, independent of `slices_in`; NaN in the padding rows behind."""
    parts = [full[tuple(map(slice, box.start, box.stop))] for box in shard.boxes]
    if shard.flat:
        flat = torch.cat([part.reshape(-1) for part in parts])[slice(*shard.flat)]
        return torch.cat([flat, torch.full((padding,), torch.nan)])
    return torch.cat([*parts, torch.full((padding, *parts[0].shape[1:]), torch.nan)])


@settings(deadline=None, derandomize=True, max_examples=200)
@given(two_cuts(), st.integers(0, 3), st.integers(0, 3))
def test_every_element_is_copied_once_between_any_two_cuts(cutting, from_padding, to_padding):
    shape, sources, targets = cutting
    full = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
    assert sum(shard.numel for shard in sources) == full.numel()
    for target in targets:
        wanted = local_of(target, full, padding=to_padding)
        assert len(target.trim(wanted)) + to_padding == len(wanted)
        local, times = torch.full_like(wanted, torch.nan), torch.zeros_like(wanted)
        for source in sources:
            held = local_of(source, full, padding=from_padding)
            for here, there in target.overlaps(source):
                assert here.of(local).shape == there.of(held).shape
                here.of(local).copy_(there.of(held))
                assert (there.span is not None) == there.of(held).is_contiguous()
                if there.span is not None:
                    assert torch.equal(held.reshape(-1)[slice(*there.span)], there.of(held).reshape(-1))
                found = [part.of(held) for _, part in there.in_rows(to_padding + 5)]
                assert torch.equal(torch.cat(found), there.of(held))
                here.of(times).add_(1)
        assert (target.trim(times) == 1).all()
        assert times.sum() == target.numel, "padding belongs to no global tensor"
        assert torch.equal(target.trim(local), target.trim(wanted))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(two_cuts(), st.integers(1, 40))
def test_parts_follow_each_other_and_are_small(cutting, max_numel):
    shape, shards, _ = cutting
    full = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
    for shard in shards:
        boxes = ParameterShard(shape, shard.boxes)
        parts = list(boxes.in_parts(max_numel))
        row = max(torch.Size(box.shape[1:]).numel() for box in shard.boxes)
        assert all(part.numel <= max(max_numel, row) for part in parts)
        assert torch.equal(torch.cat([local_of(part, full) for part in parts]), local_of(boxes, full))


boxes = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=2).map(
    lambda ranges: Box(tuple(min(r) for r in ranges), tuple(max(r) for r in ranges))
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(boxes, boxes)
def test_the_common_block_is_what_both_cover(first, second):
    cover = torch.zeros(6, 6, dtype=torch.int)
    for box in (first, second):
        cover[tuple(map(slice, box.start, box.stop))] += 1
    common = first.intersect(second)
    assert common == second.intersect(first)
    assert (common.numel if common else 0) == int((cover == 2).sum())
    if common:
        inside = torch.zeros(first.shape)
        inside[common.slices_in(first)] = 1
        assert inside.sum() == common.numel


def test_a_rank_of_padding_only_holds_and_copies_nothing():
    """A vocabulary of 300 rows padded to 3 x 256: the third tensor parallel rank."""
    shape = (300, 4)
    empty = ParameterShard(shape, (Box((300, 0), (300, 4)),))
    whole = ParameterShard(shape, (Box((0, 0), shape),))
    assert empty.numel == 0 and len(empty.trim(torch.ones(256, 4))) == 0
    assert list(empty.overlaps(whole)) == list(whole.overlaps(empty)) == []


def test_a_flat_part_of_a_gate_and_an_up_projection_is_whole_rows_and_the_rest_of_two():
    shard = ParameterShard((8, 3), (Box((0, 0), (2, 3)), Box((4, 0), (6, 3))))
    assert list(shard.part(1, 11).blocks()) == [
        (Box((0, 1), (1, 3)), 0),
        (Box((1, 0), (2, 3)), 2),
        (Box((4, 0), (5, 3)), 5),
        (Box((5, 0), (6, 2)), 8),
    ]
    assert shard.part(10, 40).flat == (10, 12), "what lies in the padding is left out"
    assert list(shard.part(13, 40).blocks()) == []
