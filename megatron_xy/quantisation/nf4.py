"""Which layers in NF4 bitsandbytes 0.50 computes on a CPU with AVX512-BF16; on other devices it computes all."""

from __future__ import annotations

from typing import Any

ROWS, COLUMNS = 32, 64  # it takes so many of a layer's at a time


def is_uneven(layer: Any) -> bool:
    """Whether a linear layer has other numbers of rows or columns, which it does not compute there."""
    return bool(layer.out_features % ROWS or layer.in_features % COLUMNS)
