"""Greedy answers of an HF folder by transformers, in its own process: JSON {folder, prompts, stop_ids} in, ids out."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM


def main():
    case = json.load(sys.stdin)
    model = AutoModelForCausalLM.from_pretrained(case["folder"]).eval()
    answers = []
    for prompt in case["prompts"]:
        with torch.no_grad():
            made = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=30,
                do_sample=False,
                eos_token_id=case["stop_ids"],
                pad_token_id=0,
            )
        answers.append(made[0, len(prompt) :].tolist())
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
