"""Log-probabilities of a prompt's tokens by vLLM, in its own process: JSON {folder, prompt} in, numbers out."""

import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its engine in this process: no second start on few cores
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GB; its own default takes much of a machine's memory

from vllm import LLM, SamplingParams


def main():
    case = json.load(sys.stdin)
    model = LLM(model=case["folder"], dtype="bfloat16", enforce_eager=True, max_model_len=128, skip_tokenizer_init=True)
    wanted = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (answer,) = model.generate([{"prompt_token_ids": case["prompt"]}], wanted)
    told = zip(case["prompt"], answer.prompt_logprobs, strict=True)
    print(json.dumps([of_token[token].logprob for token, of_token in told if of_token]))


if __name__ == "__main__":
    main()
