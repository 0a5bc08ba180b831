"""Megatron's merge_datasets, by its own flags: all .bin/.idx pairs of a folder, in the order of names -> one pair."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from megatron_xy.data.indexed import IndexedReader, IndexedWriter
from megatron_xy.errors import ConfigError, DataError, with_exit_code

TOKENS_AT_A_TIME = 64 * 1024 * 1024


@with_exit_code
def main() -> None:
    """Runs the tool and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True, type=Path, help="folder of the pairs")
    parser.add_argument("--output-prefix", required=True, type=Path)
    options = parser.parse_args()
    num_documents, num_tokens = merge(options.input, prefix=options.output_prefix)
    print(
        f"{options.output_prefix}.bin, {options.output_prefix}.idx: {num_documents:,} documents, {num_tokens:,} tokens"
    )


def merge(folder: Path, *, prefix: Path) -> tuple[int, int]:
    """Writes the merged pair and returns its documents and tokens. Raises ConfigError or DataError."""
    if not folder.is_dir():
        raise ConfigError(f"--input ({folder}) is no folder")
    prefixes = sorted(path.with_suffix("") for path in folder.glob("*.idx"))
    if lone := [path for path in sorted(folder.glob("*.bin")) if path.with_suffix("") not in prefixes]:
        raise ConfigError(f"--input ({folder}) holds {lone[0].name} without its .idx; copy that too, or move it away")
    if not prefixes:
        raise ConfigError(f"--input ({folder}) holds no .idx")
    if any(one.resolve() == prefix.resolve() for one in prefixes):
        raise ConfigError(f"--output-prefix ({prefix}) is one of the pairs to merge; name another")
    readers = [IndexedReader(one) for one in prefixes]
    dtypes = {reader.dtype.name for reader in readers}
    if len(dtypes) > 1:
        raise DataError(
            f"--input ({folder}) holds ids of several types ({', '.join(sorted(dtypes))}); merge them apart"
        )
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(prefix, dtype=readers[0].dtype) as writer:
        for reader in readers:
            ends = reader.tokens_before()
            for first, last in _spans(reader):
                sequences = reader.document_indices[first : last + 1].astype(np.int64)
                writer.add_documents(
                    reader.tokens[ends[sequences[0]] : ends[sequences[-1]]],
                    lengths=reader.sequence_lengths[sequences[0] : sequences[-1]],
                    num_pieces=np.diff(sequences),
                )
        return writer.num_documents, writer.num_tokens


def _spans(reader: IndexedReader) -> list[tuple[int, int]]:
    """Runs of documents [first, last) of bounded size."""
    average = max(1, reader.num_tokens // max(1, reader.num_documents))
    step = max(1, TOKENS_AT_A_TIME // average)
    return [(first, min(first + step, reader.num_documents)) for first in range(0, reader.num_documents, step)]


if __name__ == "__main__":
    sys.exit(main())
