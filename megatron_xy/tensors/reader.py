"""Reads parts of a folder's global tensors into torch's tensors, of any type and on any device."""

from __future__ import annotations

import torch

from megatron_xy.tensors.block_reader import BlockReader
from megatron_xy.tensors.files import bits_of, torch_dtype
from megatron_xy.tensors.safetensors_file import BLOCK_BYTES
from megatron_xy.tensors.shards import ParameterShard


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
            target = target.reshape(there.inner.with_rows().shape)
            for rows, part in there.in_rows(BLOCK_BYTES // dtype.itemsize):
                block = torch.empty(part.inner.shape, dtype=dtype)
                file.copy(stored_name, part, bits_of(block))
                target[rows].copy_(block)
