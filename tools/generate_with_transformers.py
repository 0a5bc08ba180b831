"""Opens an HF folder with transformers alone, as a user of a release would, and prints a text that the model writes."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> int:
    """Prints prompt and continuation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    inputs = tokenizer(options.prompt, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=True, top_k=20, temperature=0.8)
    print(tokenizer.decode(output[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
