"""Megatron's preprocess_data, by its own flags: jsonl files -> PREFIX_KEY_document.{bin,idx}, byte for byte the same.

For those who come from Megatron-LM with scripts that call it. Without buckets: one document a line, one sequence a
document, in the order of the files; lines without text are left out. Training on buckets wants `data build`, which
also takes what this tool writes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_xy.data.building.engine_choice import choose_engine
from megatron_xy.data.building.token_shards import make_token_shard
from megatron_xy.data.building.tokenize import TokenizeTask
from megatron_xy.data.building.workers import Workers
from megatron_xy.data.corpus.documents import LineReport
from megatron_xy.data.corpus.inputs import find_texts, group_parts, input_size, part_bytes_for, scan_file
from megatron_xy.data.corpus.row_contents import RowFields
from megatron_xy.data.encoding.loaded import load_anew, load_engines
from megatron_xy.data.indexed import IndexedReader, IndexedWriter, dtype_for
from megatron_xy.data.inspection.progress import showing_progress
from megatron_xy.errors import ConfigError, with_exit_code

TOKENIZERS = ("SentencePieceTokenizer", "Llama2Tokenizer", "GPTSentencePieceTokenizer", "HuggingFaceTokenizer")
SHARD = "default"  # the one source of documents without a source field


@with_exit_code
def main() -> None:
    """Runs the tool and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, nargs="+", help="jsonl files, folders or globs")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="one data set is written for each")
    parser.add_argument("--output-prefix", required=True, type=Path)
    parser.add_argument("--tokenizer-type", default="SentencePieceTokenizer", choices=TOKENIZERS)
    parser.add_argument("--tokenizer-model", required=True, type=Path)
    parser.add_argument("--append-eod", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--partitions", type=int, default=1, help="accepted and not needed: any number of workers does")
    options = parser.parse_args()
    for key in options.json_keys:
        prefix = options.output_prefix.with_name(f"{options.output_prefix.name}_{key}_document")
        num_documents, num_tokens = preprocess(
            options.input,
            key=key,
            prefix=prefix,
            tokenizer=options.tokenizer_model,
            append_eod=options.append_eod,
            workers=options.workers,
        )
        print(f"{prefix}.bin, {prefix}.idx: {num_documents:,} documents, {num_tokens:,} tokens")


def preprocess(
    inputs: list[str], *, key: str, prefix: Path, tokenizer: Path, append_eod: bool, workers: int
) -> tuple[int, int]:
    """Writes one data set and returns its documents and tokens; a bad line is an error, and nothing is written then."""
    loaded = load_anew(tokenizer)
    if append_eod and loaded.eos_id is None:
        raise ConfigError(f"--append-eod: {loaded.without_end_token}; leave it off")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".tmp-preprocess-", dir=prefix.parent))
    try:
        prepare = partial(load_engines, loaded.path)
        with showing_progress() as progress, Workers(workers, progress=progress, prepare=prepare) as pool:
            files = find_texts(inputs)
            total = sum(input_size(file) for file in files)
            part_bytes = part_bytes_for(total)
            scanned = [scan_file(file, part_bytes=part_bytes, file=index) for index, file in enumerate(files)]
            tasks = [
                TokenizeTask(scratch / f"{index:06d}", parts, loaded.path, RowFields(key), append_eod, "fail")
                for index, parts in enumerate(group_parts(scanned, part_bytes=part_bytes))
            ]
            fast = choose_engine(loaded, tasks).is_fast
            tasks = [replace(task, fast=fast) for task in tasks]
            report = LineReport()
            with IndexedWriter(prefix, dtype=dtype_for(loaded.vocab_size)) as writer:
                for shard in pool.run("tokenize", make_token_shard, tasks, total=total, unit="bytes"):
                    report.add(shard.report)
                    report.raise_if_bad(remedy="mend them: nothing of this data set was written")
                    if SHARD in shard.documents:
                        reader = IndexedReader(shard.folder / SHARD)
                        writer.add_documents(reader.tokens, lengths=reader.sequence_lengths)
                return writer.num_documents, writer.num_tokens
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    sys.exit(main())
