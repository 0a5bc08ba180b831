"""Log-probabilities of a prompt's tokens by transformers, in its own process: JSON {folder, prompt} in, numbers out."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM


def main():
    case = json.load(sys.stdin)
    model = AutoModelForCausalLM.from_pretrained(case["folder"], dtype=torch.bfloat16).eval()
    tokens = torch.tensor([case["prompt"]])
    with torch.inference_mode():
        logprobs = model(tokens).logits[0, :-1].float().log_softmax(dim=-1)
    print(json.dumps(logprobs.gather(1, tokens[0, 1:, None])[:, 0].tolist()))


if __name__ == "__main__":
    main()
