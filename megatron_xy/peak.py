"""The FLOP/s that this process's device could do at most, against which MFU is told."""

from __future__ import annotations

from megatron_xy import device
from megatron_xy.flops import peak_flops


def peak_rate() -> float | None:
    """From the makers' tables, None for what they lack; on a CPU the rate of a matrix product, measured now."""
    return device.matrix_product_rate() if device.is_cpu() else peak_flops(device.name())
