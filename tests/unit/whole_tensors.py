"""A whole global tensor out of a folder, as tests compare it."""

import torch

from megatron_xy.tensors.files import TensorReader, torch_dtype
from megatron_xy.tensors.shards import whole


def read_full(reader: TensorReader, name: str) -> torch.Tensor:
    """The tensor in its stored dtype."""
    entry = reader.manifest.tensors[name]
    full = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
    reader.read_into(name, full, whole(entry.shape))
    return full
