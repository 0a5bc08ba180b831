"""Which part of a global tensor a local one holds: boxes, and the copying between two ways of cutting one tensor.

A local tensor is one or more boxes of the global one, concatenated along dimension 0 (the gated fc1 under tensor
parallelism holds a box of the gate and one of the up projection). Rows of padding behind the boxes belong to no global
tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch


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
        slices = [slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, outer.start, strict=True)]
        if slices:
            slices[0] = slice(slices[0].start + row_offset, slices[0].stop + row_offset)
        return tuple(slices)


@dataclass(frozen=True)
class ParameterShard:
    """The part of a global tensor that a local one holds."""

    global_shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the local tensor that belong to the global one; padding stands behind them."""
        return sum(box.shape[0] for box in self.boxes)

    @property
    def numel(self) -> int:
        """Elements of the local tensor that belong to the global one."""
        return sum(box.numel for box in self.boxes)

    def placed_boxes(self) -> Iterator[tuple[Box, int]]:
        """Every box and the local row at which it begins."""
        row = 0
        for box in self.boxes:
            yield box, row
            row += box.shape[0]

    def overlaps(self, other: ParameterShard) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """(slices here, slices there) of every block that both hold."""
        for mine, my_row in self.placed_boxes():
            for theirs, their_row in other.placed_boxes():
                if common := mine.intersect(theirs):
                    yield common.slices_in(mine, row_offset=my_row), common.slices_in(theirs, row_offset=their_row)

    def write(self, local: torch.Tensor, full: torch.Tensor) -> None:
        """Copies this part of the whole tensor `full` into `local`."""
        whole = ParameterShard(self.global_shape, (Box((0,) * len(self.global_shape), self.global_shape),))
        for here, there in self.overlaps(whole):
            local[here].copy_(full[there])
