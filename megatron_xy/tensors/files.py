"""torch's tensors into safetensors files and out of them: the bits are those of `safetensors_file`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_xy.tensors.block_reader import BlockReader
from megatron_xy.tensors.dtypes import Bits
from megatron_xy.tensors.safetensors_file import BLOCK_BYTES, write_safetensors
from megatron_xy.tensors.shards import ParameterShard


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    metadata: dict[str, str],
    on_progress: Callable[[int], object] = lambda num_bytes: None,
) -> dict[str, Any]:
    """Writes one safetensors file, synced to disk; returns its {bytes, sha256}. Raises StorageError.

    tensors: on the CPU, contiguous. on_progress: called after each block with the bytes written so far.
    """
    return write_safetensors(
        path,
        {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()},
        parts_of=lambda name: [bits_of(tensors[name])],
        metadata=metadata,
        on_progress=on_progress,
    )


class TensorReader(BlockReader):
    """The tensors of a folder by their global names. A context manager: holds files open."""

    def read_into(self, name: str, local: torch.Tensor, shard: ParameterShard) -> None:
        """Fills `local`, which holds `shard` of the global tensor `name`; its dtype may differ, its padding stays.

        Reads the blocks that both have, and no others. Raises DataError where the folder has no such tensor.
        """
        local = local.detach()
        for file, stored_name, there, here in self.overlaps(name, shard):
            target, dtype = here.of(local), torch_dtype(file.tensors[stored_name].dtype)
            # Copied: adopting the file's memory would change alignment, kernels and so the last bits.
            if target.is_cpu and target.dtype == dtype:
                file.copy(stored_name, there, bits_of(target))
                continue
            for rows, part in there.in_rows(BLOCK_BYTES // dtype.itemsize):
                block = torch.empty(part.inner.shape, dtype=dtype)
                file.copy(stored_name, part, bits_of(block))
                target[rows].copy_(block)


def bits_of(tensor: torch.Tensor) -> Bits:
    """The tensor's own memory on the CPU, as integers as wide as its elements."""
    return tensor.detach().view(getattr(torch, f"int{8 * tensor.element_size()}")).numpy()


def dtype_name(dtype: torch.dtype) -> str:
    """As files call it."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """What files call so."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), f"files name types as torch does; {name} is none"
    return dtype
