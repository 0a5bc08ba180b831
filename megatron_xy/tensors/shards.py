"""Which part of a global tensor a local one holds: boxes, and the copying between two ways of cutting one tensor.

A local tensor is one or more boxes of the global one, concatenated along dimension 0 (the gated fc1 under tensor
parallelism holds a box of the gate and one of the up projection), or a flat range of those boxes' elements. Rows of
padding behind the boxes belong to no global tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

Array = TypeVar("Array")  # torch's or numpy's


@dataclass(frozen=True)
class Box:
    """A half-open block [start, stop) of a global tensor."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Size along each dimension."""
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        """Elements in the block."""
        return math.prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """The common block, or None."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if any(first >= last for first, last in zip(start, stop, strict=True)):
            return None
        return Box(start, stop)

    def slices_in(self, outer: Box, *, row_offset: int = 0) -> tuple[slice, ...]:
        """This block's place in a tensor that holds `outer` from row `row_offset` on."""
        first, *others = (slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, outer.start, strict=True))
        return slice(first.start + row_offset, first.stop + row_offset), *others


@dataclass(frozen=True)
class Placed:
    """A block that a local tensor holds: all of `outer`, which begins at element `offset` of the flattened tensor.

    `inner` is the part of it that is meant.
    """

    inner: Box
    outer: Box
    offset: int
    is_flat: bool

    def of(self, local: Array) -> Array:
        """The block's view of the local tensor."""
        held: Any = local
        row_offset = 0
        if self.is_flat:
            held = held[self.offset : self.offset + self.outer.numel].reshape(self.outer.shape)
        elif row_numel := math.prod(self.outer.shape[1:]):
            row_offset = self.offset // row_numel
        view: Array = held[self.inner.slices_in(self.outer, row_offset=row_offset)]
        return view

    @property
    def span(self) -> tuple[int, int] | None:
        """The elements [start, stop) that the block takes of the flattened tensor; None where others lie between."""
        start, stride, is_whole = self.offset, 1, True
        for first, size, outer_first, outer_size in reversed(
            list(zip(self.inner.start, self.inner.shape, self.outer.start, self.outer.shape, strict=True))
        ):
            if size > 1 and not is_whole:
                return None
            start += (first - outer_first) * stride
            stride *= outer_size
            is_whole = is_whole and size == outer_size
        return start, start + self.inner.numel

    def in_rows(self, max_numel: int) -> Iterator[tuple[slice, Placed]]:
        """The block in parts of whole rows, of as many of `outer` as have `max_numel` elements, or one. With each part
        its rows in the block."""
        inner, outer = self.inner, self.outer
        step = max(1, max_numel // max(1, math.prod(outer.shape[1:])))
        for first in range(0, inner.shape[0], step):
            last = min(first + step, inner.shape[0])
            start, stop = inner.start[0] + first, inner.start[0] + last
            part = Box((start, *inner.start[1:]), (stop, *inner.stop[1:]))
            yield slice(first, last), Placed(part, outer, self.offset, self.is_flat)


@dataclass(frozen=True)
class ParameterShard:
    """The part of a global tensor that a local one holds.

    flat: where only a part of the boxes is held, as a flat tensor: the half-open range of their elements, flattened one
    box after the other. So the distributed optimizer cuts a parameter.
    """

    global_shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    flat: tuple[int, int] | None = None

    @property
    def numel(self) -> int:
        """Elements of the local tensor that belong to the global one."""
        return self.flat[1] - self.flat[0] if self.flat else sum(box.numel for box in self.boxes)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The local tensor's shape, without padding: the boxes concatenated, or the flat range."""
        if self.flat:
            return (self.numel,)
        return (sum(box.shape[0] for box in self.boxes), *self.boxes[0].shape[1:])

    def part(self, start: int, stop: int) -> ParameterShard:
        """Elements [start, stop) of the flattened local tensor; what lies in its padding is left out."""
        assert self.flat is None, "a part is taken of a whole shard"
        numel = self.numel
        return ParameterShard(self.global_shape, self.boxes, (min(start, numel), min(stop, numel)))

    def trim(self, local: Array) -> Array:
        """The local tensor without the padding behind what belongs to the global one."""
        held: Any = local
        view: Array = held[: self.local_shape[0]]
        return view

    def blocks(self) -> Iterator[tuple[Box, int]]:
        """The blocks of the global tensor that the local one holds; of each, the element at which it begins there."""
        offset = 0
        for box in self.boxes:
            if self.flat is None:
                yield box, offset
            else:
                start, stop = (min(max(edge - offset, 0), box.numel) for edge in self.flat)
                for block, place in _blocks_of_range(box, start, stop):
                    yield block, offset + place - self.flat[0]
            offset += box.numel

    def overlaps(self, other: ParameterShard) -> Iterator[tuple[Placed, Placed]]:
        """(place here, place there) of every block that both hold."""
        theirs = list(other.blocks())
        for my_box, my_offset in self.blocks():
            for their_box, their_offset in theirs:
                if common := my_box.intersect(their_box):
                    yield (
                        Placed(common, my_box, my_offset, self.flat is not None),
                        Placed(common, their_box, their_offset, other.flat is not None),
                    )

    def in_parts(self, max_numel: int) -> Iterator[ParameterShard]:
        """The boxes in consecutive parts of whole rows, of at most `max_numel` elements but for rows longer than it."""
        assert self.flat is None, "boxes are cut by rows"
        gathered: list[Box] = []
        for box in self.boxes:
            rows = max(1, max_numel // max(1, math.prod(box.shape[1:])))
            for start in range(box.start[0], box.stop[0], rows):
                part = Box((start, *box.start[1:]), (min(start + rows, box.stop[0]), *box.stop[1:]))
                if gathered and sum(other.numel for other in gathered) + part.numel > max_numel:
                    yield ParameterShard(self.global_shape, tuple(gathered))
                    gathered = []
                gathered.append(part)
        if gathered:
            yield ParameterShard(self.global_shape, tuple(gathered))


def whole(shape: tuple[int, ...]) -> ParameterShard:
    """The shard that is the whole tensor."""
    return ParameterShard(shape, (Box((0,) * len(shape), shape),))


def split_shard(
    shape: tuple[int, ...], dimension: int, *, size: int, place: int, num_places: int, num_parts: int = 1
) -> ParameterShard:
    """What tensor parallelism gives to one of `num_places` ranks: `size` rows or columns of each of the tensor's equal
    parts (two in the gated fc1); the last ranks have less where it does not go round."""
    boxes = []
    for part in range(num_parts):
        first = (part * num_places + place) * size
        start, stop = [0] * len(shape), list(shape)
        start[dimension], stop[dimension] = (min(edge, shape[dimension]) for edge in (first, first + size))
        boxes.append(Box(tuple(start), tuple(stop)))
    return ParameterShard(shape, tuple(boxes))


def _blocks_of_range(box: Box, start: int, stop: int) -> Iterator[tuple[Box, int]]:
    """Elements [start, stop) of a flattened box as boxes in order, and the element at which each begins.

    Whole rows in the middle, and what is left of the first and the last one.
    """
    if start >= stop:
        return
    row_numel = math.prod(box.shape[1:])
    first_whole, last_whole = -(-start // row_numel), stop // row_numel
    if first_whole > last_whole:  # within one row
        yield from _blocks_of_row(box, last_whole, start, stop)
        return
    yield from _blocks_of_row(box, first_whole - 1, start, first_whole * row_numel)
    if first_whole < last_whole:
        rows = Box(
            (box.start[0] + first_whole, *box.start[1:]),
            (box.start[0] + last_whole, *box.stop[1:]),
        )
        yield rows, first_whole * row_numel
    yield from _blocks_of_row(box, last_whole, last_whole * row_numel, stop)


def _blocks_of_row(box: Box, row: int, start: int, stop: int) -> Iterator[tuple[Box, int]]:
    """The same within one row of a box of two or more dimensions."""
    if start >= stop:
        return
    first = row * math.prod(box.shape[1:])
    inner = Box(box.start[1:], box.stop[1:])
    place = box.start[0] + row
    for block, offset in _blocks_of_range(inner, start - first, stop - first):
        yield Box((place, *block.start), (place + 1, *block.stop)), first + offset
