"""Reads any part of global tensors out of the pieces that a manifest names, whatever layout cut them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_xy.checkpoint_files import DTYPES, Manifest, Piece
from megatron_xy.errors import DataError
from megatron_xy.safetensors_file import BLOCK_BYTES, SafetensorsFile, empty_block, memory_of
from megatron_xy.shards import ParameterShard, whole


class TensorReader:
    """The tensors of a folder by their global names. A context manager: holds files open."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self._files: dict[str, SafetensorsFile] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __contains__(self, name: str) -> bool:
        return name in self.manifest.tensors

    def read_into(self, name: str, local: torch.Tensor, shard: ParameterShard) -> None:
        """Fills `local`, which holds `shard` of the global tensor `name`; its dtype may differ, its padding stays.

        Reads the blocks that both have, and no others. Raises DataError where the folder has no such tensor.
        """
        entry = self.manifest.tensors.get(name)
        if entry is None:
            raise DataError(f"{self.directory} holds no {name}; was it written by another kind of model?")
        if entry.shape != shard.global_shape:
            raise DataError(
                f"{self.directory}: {name} is {list(entry.shape)} there and {list(shard.global_shape)} in this run's "
                f"model; give the model section the shape of what it loads"
            )
        for piece in entry.pieces:
            for here, there in shard.overlaps(piece.shard):
                # Copied: adopting the file's memory would change alignment, kernels and so the last bits.
                self._file_of(piece, name).copy(piece.tensor or name, there, here.of(local))

    def read_full(self, name: str) -> torch.Tensor:
        """The whole global tensor in its stored dtype."""
        entry = self.manifest.tensors[name]
        full = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        self.read_into(name, full, whole(entry.shape))
        return full

    def blocks(
        self, name: str, shard: ParameterShard | None = None, *, dtype: torch.dtype | None = None
    ) -> Iterator[torch.Tensor]:
        """A part of a global tensor (default: all of it) as contiguous blocks of whole rows, one after the other.

        dtype: the stored one if None. A block takes 8 MB at most, or one row.
        """
        entry = self.manifest.tensors[name]
        dtype = dtype or DTYPES[entry.dtype]
        for part in (shard or whole(entry.shape)).in_parts(BLOCK_BYTES // dtype.itemsize):
            block = empty_block(part.local_shape, dtype)
            self.read_into(name, block, part)
            yield block

    def read_rank_state(self, rank: int) -> dict[str, torch.Tensor]:
        """The per-rank tensors that global rank `rank` of the writing run left; empty if it had none."""
        names = self.manifest.rank_state.get(str(rank), {})
        return {name: self._file(file).read(f"rank_state.{name}") for name, file in names.items()}

    def _file_of(self, piece: Piece, name: str) -> SafetensorsFile:
        """The file that holds the piece, which lies there as the manifest says."""
        file = self._file(piece.file)
        stored = file.tensors.get(piece.tensor or name)
        dtype = self.manifest.tensors[name].dtype
        if stored is None or stored.num_bytes != piece.shard.numel * stored.dtype.itemsize:
            raise DataError(f"{file.path} is damaged: it does not hold {piece.tensor or name} as the manifest says")
        if piece.tensor is None and stored.dtype != DTYPES[dtype]:
            raise DataError(f"{file.path} is damaged: {name} is {stored.dtype} there and {dtype} in the manifest")
        return file

    def _file(self, file: str) -> SafetensorsFile:
        if file not in self._files:
            self._files[file] = SafetensorsFile(self.directory / file)
        return self._files[file]


def tensor_hashes(directory: Path, manifest: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, {shape, dtype, sha256}) of every global tensor: the same for every layout. Holds a block at a time."""
    with TensorReader(directory, manifest) as reader:
        for name, entry in sorted(manifest.tensors.items()):
            digest = hashlib.sha256()
            for block in reader.blocks(name):
                digest.update(memory_of(block))
            yield name, {"shape": list(entry.shape), "dtype": entry.dtype, "sha256": digest.hexdigest()}
