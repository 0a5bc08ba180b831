"""The types of stored tensors by torch's names for them, known without torch: codes, sizes, casts.

A stored tensor is handled as its bits: a numpy array of integers as wide as its elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[Any]  # of `bits_dtype`

_TYPES = {
    "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2), "float64": ("F64", 8),
    "bool": ("BOOL", 1), "uint8": ("U8", 1), "int8": ("I8", 1), "int16": ("I16", 2), "int32": ("I32", 4),
    "int64": ("I64", 8), "float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1),
}  # fmt: skip
CODES = {dtype: code for dtype, (code, _) in _TYPES.items()}  # of safetensors
_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80}  # its bits
_CAST_AT_A_TIME = 1 << 17  # elements: what a cast holds in between stays in a core's cache


def itemsize(dtype: str) -> int:
    """Bytes of an element."""
    return _TYPES[dtype][1]


def bits_dtype(dtype: str) -> np.dtype[Any]:
    """Integers as wide as its elements."""
    return np.dtype(f"i{itemsize(dtype)}")


def cast(source: Bits, target: Bits, *, dtypes: tuple[str, str]) -> int:
    """Fills `target` with `source`, of one size and contiguous, in another of float32, float16 and bfloat16.

    Rounds to the nearest, ties to even, as torch does; not-a-number stays it. Returns how many finite values are too
    large for the type of `target`, where they are infinite.
    """
    flat, out = source.reshape(-1), target.reshape(-1)
    num_too_large = 0
    for start in range(0, flat.size, _CAST_AT_A_TIME):
        part = slice(start, start + _CAST_AT_A_TIME)
        values = _to_float32(flat[part], dtypes[0])
        out[part] = _from_float32(values, dtypes[1])
        if dtypes[1] in _INFINITY:
            is_infinite = out[part] & 0x7FFF == _INFINITY[dtypes[1]]
            num_too_large += int(np.count_nonzero(is_infinite & np.isfinite(values)))
    return num_too_large


def _to_float32(bits: Bits, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "bfloat16":
        return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return bits.view(dtype).astype(np.float32, copy=False)


def _from_float32(values: npt.NDArray[np.float32], dtype: str) -> Bits:
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        quiet_nan = (bits >> 16) | 0x40
        return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16).view(np.int16)
    with np.errstate(over="ignore"):  # which `cast` counts
        return values.astype(dtype, copy=False).view(bits_dtype(dtype))
