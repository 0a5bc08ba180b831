"""Casts of stored tensors: the bits that torch gives, for every value of the 16-bit types and drawn ones of fp32."""

import itertools

import numpy as np
import pytest
import torch

from megatron_xy.tensors.dtypes import CODES, bits_dtype, cast, itemsize
from megatron_xy.tensors.files import bits_of, torch_dtype

BEYOND = ("float32", "bfloat16")  # its largest values round to infinity
TYPES = ("float32", "float16", "bfloat16")


def every_kind_of_value(dtype):
    """All bit patterns of a 16-bit type; of fp32 drawn ones, and those half-way between two of bfloat16 and beside."""
    all_16_bits = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    if dtype != "float32":
        return all_16_bits.to(torch.int16).view(torch_dtype(dtype))
    drawn = torch.randint(-(2**31), 2**31, (1 << 18,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    beside = [(all_16_bits << 16) + low for low in (0, 0x7FFF, 0x8000, 0x8001)]
    return torch.cat([drawn, *beside]).view(torch.float32)


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(TYPES, 2)))
def test_a_cast_gives_the_bits_that_torch_gives(source, target):
    values = every_kind_of_value(source)
    wanted, found = values.to(torch_dtype(target)), np.empty(values.shape, bits_dtype(target))
    num_too_large = cast(bits_of(values), found, dtypes=(source, target))
    assert num_too_large == (wanted.isinf() & values.isfinite()).sum()
    assert (num_too_large > 0) == ((source, target) in (("float32", "float16"), ("bfloat16", "float16"), BEYOND))
    is_nan = wanted.isnan()
    assert torch.equal(torch.from_numpy(found).view(torch_dtype(target)).isnan(), is_nan)
    numbers = ~is_nan.numpy()
    assert is_nan.any() and np.array_equal(found[numbers], bits_of(wanted)[numbers])


def test_sizes_are_those_of_torch():
    for dtype in CODES:
        assert itemsize(dtype) == torch_dtype(dtype).itemsize == bits_dtype(dtype).itemsize
