"""A folder of jsonl -> Megatron's .bin/.idx by datatrove: what bench_tokenize.py compares with, no part of the package.

PYTHON_THAT_HAS_DATATROVE tools/datatrove_tokenize.py INPUT_FOLDER tokenizer.json OUTPUT_FOLDER WORKERS
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    """Prints how many tokens were written, and datatrove's version."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    inputs, tokenizer, output, workers = sys.argv[1:]
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(inputs, glob_pattern="*.jsonl"),
            MegatronDocumentTokenizer(f"{output}/tokens", tokenizer_name_or_path=tokenizer, eos_token="</s>"),
        ],
        tasks=int(workers),
        workers=int(workers),
        start_method="spawn",  # a fork server would keep its workers' CPU seconds to itself
        logging_dir=f"{output}/logs",
    ).run()
    size = sum(path.stat().st_size for path in Path(output, "tokens").glob("*.bin"))
    print(json.dumps({"tokens": size // 2, "version": version("datatrove")}))


if __name__ == "__main__":
    main()
