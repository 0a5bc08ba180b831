"""Peak memory of writing an HF folder in fewer bits, over what the process begins with: printed, in bytes.

argv: the model's folder, the folder to write, the scheme, calibration text for GPTQ.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from megatron_xy.hf.source import open_source

FILE_BYTES = 32_000_000


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    source, folder, scheme = open_source("hf", Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
    folder.mkdir()
    if scheme in ("int8", "nf4"):
        from megatron_xy.quantisation.bits import write_bits

        before = peak()
        write_bits(
            folder, source, scheme=scheme, ignore=["lm_head"], token_ids={}, say=print, max_shard_bytes=FILE_BYTES
        )
    else:
        from megatron_xy.quantisation.gptq import write_gptq

        before = peak()
        write_gptq(
            folder,
            source,
            scheme=scheme,
            calibration=Path(sys.argv[4]),
            num_samples=8,
            ignore=["lm_head"],
            beside=folder,
            say=print,
            max_shard_bytes=FILE_BYTES,
        )
    print(peak() - before)


if __name__ == "__main__":
    main()
