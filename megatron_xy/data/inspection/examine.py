"""`data stats` and `data verify`: what a finished data folder holds, and whether it is whole."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from megatron_xy.data.building.workers import Progress
from megatron_xy.data.indexed import IndexedReader
from megatron_xy.data.inspection.alternatives import fixed_length_alternatives
from megatron_xy.data.manifest import HELD_OUT_NAME, MANIFEST_NAME, FileEntry, Manifest, ShardEntry, read_manifest
from megatron_xy.data.origins import mask_path, read_mask, read_rows, trace_path
from megatron_xy.errors import DataError
from megatron_xy.storage import TEMPORARY_PREFIX, file_sha256


def dataset_stats(directory: Path | str) -> dict[str, Any]:
    """Documents, tokens, samples, the three ratios; per source and bucket samples, tokens, share and padding.

    `fixed_length`: the ratios of samples of fixed length made of the same documents, see `fixed_length_alternatives`.
    `share` is the part of all samples' length, padding included. Raises ConfigError, DataError as `read_manifest`.
    """
    manifest = read_manifest(Path(directory))
    whole = sum(source.packed_length for source in manifest.sources.values())
    sources: dict[str, Any] = {}
    for name, source in manifest.sources.items():
        sources[name] = {
            "documents": source.documents,
            "tokens": source.tokens,
            "samples": source.samples,
            "tokens_learned": source.tokens if source.tokens_learned is None else source.tokens_learned,
            "truncated_documents": source.truncated_documents,
            "share": source.packed_length / whole,
            "padding_ratio": 1 - source.tokens / source.packed_length,
            "truncation_ratio": source.truncated_documents / source.documents,
            "concatenation_ratio": source.documents / source.samples,
            "buckets": {
                size: {
                    "samples": bucket.samples,
                    "tokens": bucket.tokens,
                    "share": int(size) * bucket.samples / whole,
                    "padding_ratio": 1 - bucket.tokens / (int(size) * bucket.samples),
                }
                for size, bucket in source.buckets.items()
            },
        }
    return {
        **manifest.statistics.model_dump(),
        "truncated_documents": sum(source.truncated_documents for source in manifest.sources.values()),
        "buckets": manifest.buckets,
        "sources": sources,
        "fixed_length": fixed_length_alternatives(manifest),
    }


def verify_dataset(directory: Path | str, *, progress: Progress | None = None) -> None:
    """Read a whole data folder: sizes, checksums, every sample within its bucket, every id within the vocabulary.

    A held-out part is a data folder of its own, of which nothing is read. The manifest's fingerprint is taken as it
    stands: it covers options that no manifest holds, such as the fraction held out. Raises ConfigError where the
    folder is missing, DataError with the file and the reason where anything is wrong or there is a file too many.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    tokenizer = folder / manifest.tokenizer.file
    if not tokenizer.is_file() or file_sha256(tokenizer) != manifest.tokenizer.sha256:
        raise DataError(f"{tokenizer} is missing or not the tokenizer of the manifest; copy the right one there")
    further = [entry for entry in (manifest.bad_lines, manifest.tokenizer.config) if entry is not None]
    for entry in further:
        _verify_file(folder, entry)
    of_shards = [entry.name for _, _, shard in manifest.shards for entry in shard.files]
    listed = {MANIFEST_NAME, manifest.tokenizer.file, *(entry.name for entry in further), *of_shards}
    _verify_nothing_else(folder, listed)
    done, total = 0, sum(shard.bin_bytes + shard.idx_bytes for _, _, shard in manifest.shards)
    for _, bucket, shard in manifest.shards:
        if progress is not None:
            progress("verify", done, total, "bytes")
        _verify_shard(folder, shard, bucket=bucket, manifest=manifest)
        done += shard.bin_bytes + shard.idx_bytes
    if progress is not None:
        progress("verify", total, total, "bytes")


def _verify_nothing_else(folder: Path, listed: set[str]) -> None:
    """Nothing lies in the folder but the files `listed`, and the held-out part."""
    folders = {parent.as_posix() for name in listed for parent in PurePosixPath(name).parents}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")} - folders - listed
    unlisted = sorted(name for name in found if PurePosixPath(name).parts[0] != HELD_OUT_NAME)
    if unlisted:
        named = ", ".join(unlisted[:5]) + (f" and {len(unlisted) - 5} more" if len(unlisted) > 5 else "")
        left = " (left by a build that was stopped)" if unlisted[0].startswith(TEMPORARY_PREFIX) else ""
        raise DataError(f"{folder} holds what its manifest does not list: {named}{left}; remove it")


def _verify_shard(folder: Path, shard: ShardEntry, *, bucket: int, manifest: Manifest) -> None:
    for entry in shard.files:
        _verify_file(folder, entry)
    prefix = folder / shard.name
    reader = IndexedReader(prefix)
    if shard.trace is not None:
        files = read_rows(prefix, num_sequences=reader.num_sequences)["file"]
        if files.min() < 0 or files.max() >= len(manifest.inputs):
            raise DataError(f"{trace_path(prefix)} names inputs that the manifest does not list; build it again")
    if shard.mask is not None and read_mask(prefix, num_tokens=reader.num_tokens).max(initial=0) > 1:
        raise DataError(f"{mask_path(prefix)} holds other bytes than 0 and 1; build it again")
    reader.verify(vocab_size=manifest.tokenizer.vocab_size)
    lengths = np.diff(reader.tokens_before()[reader.document_indices])
    if (reader.dtype.name, reader.num_documents, reader.num_tokens) != (manifest.dtype, shard.samples, shard.tokens):
        raise DataError(f"{prefix} holds other counts or another type of ids than the manifest says; build it again")
    if lengths.min() < 1 or lengths.max() > bucket:
        raise DataError(
            f"{prefix} holds samples of {lengths.min()} to {lengths.max()} tokens in bucket {bucket}; build it again"
        )


def _verify_file(folder: Path, entry: FileEntry) -> None:
    path = folder / entry.name
    if not path.is_file():
        raise DataError(f"{path} is missing; copy or build it again")
    if (size := path.stat().st_size) != entry.size:
        raise DataError(f"{path} has {size} bytes, the manifest says {entry.size}; copy or build it again")
    if file_sha256(path) != entry.sha256:
        raise DataError(f"{path} is damaged: its checksum is not the manifest's; copy or build it again")
