"""`data build` of a small corpus in a process of its own, cut into many pieces of work; says when it begins.

python -m tests.end_to_end.build_process CORPUS TOKENIZER OUTPUT [--workers N] [--shard I/N] [--deduplicate] [--chat]

Its last word is its peak memory in bytes.
"""

import argparse
from pathlib import Path

from megatron_xy.data.building import build_folder, deduplicate, pack_shards
from megatron_xy.data.building.options import Share
from megatron_xy.data.corpus import inputs
from tests.building import build_dataset


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus")
    parser.add_argument("tokenizer")
    parser.add_argument("output")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--shard", type=Share.parse)
    parser.add_argument("--deduplicate", action="store_true")
    parser.add_argument("--chat", action="store_true")
    options = parser.parse_args()
    inputs.PART_BYTES, build_folder.WINDOW_DOCUMENTS, pack_shards.SHARD_TOKENS = 20_000, 100, 2000
    deduplicate.ROWS_IN_MEMORY = 200
    print("begins", flush=True)
    result = build_dataset(
        [options.corpus],
        tokenizer=options.tokenizer,
        output=options.output,
        buckets=(64, 256),
        source_field="src",
        bad_lines="skip",
        workers=options.workers,
        shard=options.shard,
        deduplicate=options.deduplicate,
        chat_template="xuanyuan" if options.chat else None,
    )
    print("finished" if result["finished"] else "left to others")
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")))


if __name__ == "__main__":
    main()
