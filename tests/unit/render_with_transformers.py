"""What transformers makes of conversations, in a process of its own: JSON of cases in, JSON of ids and masks out.

A case: {folder, template, messages, tools, prompt: whether the generation prompt is added}.
"""

import json
import sys

from transformers import AutoTokenizer


def main():
    tokenizers = {}
    answers = []
    for case in json.load(sys.stdin):
        if case["folder"] not in tokenizers:
            tokenizers[case["folder"]] = AutoTokenizer.from_pretrained(case["folder"])
        options = {"tools": case["tools"], "add_generation_prompt": case["prompt"], "return_dict": True}
        if case["template"] is not None:
            options["chat_template"] = case["template"]
        tokenizer = tokenizers[case["folder"]]
        made = tokenizer.apply_chat_template(case["messages"], return_assistant_tokens_mask=True, **options)
        answers.append([made["input_ids"], made["assistant_masks"]])
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
