"""Reads any part of global tensors out of the pieces that a manifest names, whatever layout cut them; as bits.

Without torch: for conversions and checks of folders. files.py reads into torch's tensors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from megatron_xy.checkpoint.files import Manifest, Piece
from megatron_xy.errors import DataError
from megatron_xy.tensors.dtypes import Bits, bits_dtype, cast, itemsize
from megatron_xy.tensors.safetensors_file import BLOCK_BYTES, FileRange, SafetensorsFile, empty_block, memory_of
from megatron_xy.tensors.shards import ParameterShard, Placed, whole

_BLOCKS_IN_TURN = 2


class Overlap(NamedTuple):
    """A block that a file and a local tensor both hold: in the file's tensor `name`, and where in each."""

    file: SafetensorsFile
    name: str
    there: Placed
    here: Placed


class BlockReader:
    """The tensors of a folder by their global names. A context manager: holds files open."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self._files: dict[str, SafetensorsFile] = {}
        self._blocks: list[Bits] = []  # the memory that `blocks` hands out in turn

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __contains__(self, name: str) -> bool:
        return name in self.manifest.tensors

    def blocks(
        self,
        name: str,
        shard: ParameterShard | None = None,
        *,
        dtype: str | None = None,
        max_numel: int | None = None,
    ) -> Iterator[Bits]:
        """A part of a global tensor (default: all of it) as contiguous blocks of whole rows, one after the other.

        dtype: the stored one if None. A block has max_numel elements at most (`block_numel` unless given), or one row,
        and stands until the next but one is asked for, of whatever tensor. Raises DataError behind the last one where
        values are too large for `dtype`.
        """
        entry = self.manifest.tensors[name]
        dtype = dtype or entry.dtype
        num_too_large = 0
        for part in (shard or whole(entry.shape)).in_parts(max_numel or self.block_numel(name, dtype=dtype)):
            block = self._next_block(part.local_shape, dtype)
            if dtype == entry.dtype:
                self.copy_into(name, block, part)
            else:
                stored = empty_block(part.numel * itemsize(entry.dtype)).view(bits_dtype(entry.dtype))
                self.copy_into(name, stored.reshape(part.local_shape), part)
                num_too_large += cast(stored, block, dtypes=(entry.dtype, dtype))
            yield block
        if num_too_large:
            raise DataError(
                f"{self.directory}: {name} holds {num_too_large} value(s) too large for {dtype}, which would become "
                f"infinite; take {'bfloat16 (--dtype bf16)' if dtype == 'float16' else 'float32 (--dtype fp32)'}"
            )

    def block_numel(self, name: str, *, dtype: str) -> int:
        """Elements of a block of 2 MB, as stored or as wanted."""
        return BLOCK_BYTES // max(itemsize(dtype), itemsize(self.manifest.tensors[name].dtype))

    def parts(self, name: str, shard: ParameterShard, *, dtype: str) -> Iterable[Bits | FileRange]:
        """As `blocks`, but what lies in the files as it is wanted is told as ranges of them, unread."""
        if dtype != self.manifest.tensors[name].dtype:
            return self.blocks(name, shard, dtype=dtype)
        ranges = {}
        for file, stored_name, there, here in self.overlaps(name, shard):
            if there.span is None or here.span is None:
                return self.blocks(name, shard)
            ranges[here.span] = file.range(stored_name, *there.span)
        assert sum(stop - start for start, stop in ranges) == shard.numel, "the pieces make up the tensor"
        return [ranges[span] for span in sorted(ranges)]

    def copy_into(self, name: str, local: Bits, shard: ParameterShard) -> None:
        """Fills `local`, which holds `shard` of the global tensor `name`; its padding stays. Raises as `overlaps`."""
        for file, stored_name, there, here in self.overlaps(name, shard):
            file.copy(stored_name, there, here.of(local))

    def overlaps(self, name: str, shard: ParameterShard) -> Iterator[Overlap]:
        """Where what `shard` holds of the global tensor `name` lies, and no more.

        Raises DataError where the folder has no such tensor.
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
                yield Overlap(self._file_of(piece, name), piece.tensor or name, there, here)

    def _next_block(self, shape: tuple[int, ...], dtype: str) -> Bits:
        num_bytes = math.prod(shape) * itemsize(dtype)
        if num_bytes > BLOCK_BYTES:
            return empty_block(num_bytes).view(bits_dtype(dtype)).reshape(shape)
        if len(self._blocks) < _BLOCKS_IN_TURN:
            self._blocks.insert(0, empty_block(BLOCK_BYTES))
        memory = self._blocks.pop(0)
        self._blocks.append(memory)
        return memory[:num_bytes].view(bits_dtype(dtype)).reshape(shape)

    def _file_of(self, piece: Piece, name: str) -> SafetensorsFile:
        """The file that holds the piece, which lies there as the manifest says."""
        file = self._file(piece.file)
        stored = file.tensors.get(piece.tensor or name)
        dtype = self.manifest.tensors[name].dtype
        if stored is None or stored.num_bytes != piece.shard.numel * itemsize(stored.dtype):
            raise DataError(f"{file.path} is damaged: it does not hold {piece.tensor or name} as the manifest says")
        if stored.dtype != dtype:
            raise DataError(f"{file.path} is damaged: {name} is {stored.dtype} there and {dtype} in the manifest")
        return file

    def _file(self, file: str) -> SafetensorsFile:
        if file not in self._files:
            self._files[file] = SafetensorsFile(self.directory / file)
        return self._files[file]


def tensor_hashes(directory: Path, manifest: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, {shape, dtype, sha256}) of every global tensor: the same for every layout. Holds a block at a time."""
    with BlockReader(directory, manifest) as reader:
        for name, entry in sorted(manifest.tensors.items()):
            digest = hashlib.sha256()
            for block in reader.blocks(name):
                digest.update(memory_of(block))
            yield name, {"shape": list(entry.shape), "dtype": entry.dtype, "sha256": digest.hexdigest()}
