"""A folder of jsonl -> Megatron's .bin/.idx by datatrove: what bench_tokenize.py compares with, no part of the package.

PYTHON_THAT_HAS_DATATROVE tools/datatrove_tokenize.py INPUT_FOLDER tokenizer.json OUTPUT_FOLDER WORKERS
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """Prints how many tokens were written, and datatrove's version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("inputs", "tokenizer", "output"):
        parser.add_argument(name)
    parser.add_argument("workers", type=int)
    options = parser.parse_args()
    if find_spec("datatrove") is None:  # 78 is EXIT_BAD_CONFIG of megatron_xy, which this Python need not have
        parser.exit(78, f"{sys.executable} has no datatrove; pip install 'datatrove[processing]', or name another\n")
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(options.inputs, glob_pattern="*.jsonl"),
            MegatronDocumentTokenizer(
                f"{options.output}/tokens", tokenizer_name_or_path=options.tokenizer, eos_token="</s>"
            ),
        ],
        tasks=options.workers,
        workers=options.workers,
        start_method="spawn",  # a fork server would keep its workers' CPU seconds to itself
        logging_dir=f"{options.output}/logs",
    ).run()
    size = sum(path.stat().st_size for path in Path(options.output, "tokens").glob("*.bin"))
    print(json.dumps({"tokens": size // 2, "version": version("datatrove")}))


if __name__ == "__main__":
    main()
