"""A toy task on which PPO must learn: "echo the key". Its first word is the key; a good answer says nothing else.

A prompt has 4 words of a vocabulary of 16, the first is one of the 4 keys. The true score of an answer of up to 12
tokens: the share of its words that equal the key, and 0.5 more where it stops by itself after at least 4 of them. An
untrained model scores about 0.27, the best answer 1.5.

    python tools/make_echo_task.py DIR [--prompts 512] [--pairs 6000] [--seed 0]

writes DIR/tokenizer.json and tokenizer_config.json, prompts.jsonl, pairs.jsonl (half of whose repeated words are wrong
ones) and score.py, whose function `true_score` is the rule, as `ppo.reward_function` takes it.
"""

from __future__ import annotations

import argparse
import inspect
import random
from collections.abc import Sequence
from pathlib import Path

from toy_files import write_rows, write_tokenizer

WORDS = [f"w{number:02d}" for number in range(16)]
KEYS = WORDS[:4]

MOST_TOKENS = 12  # the end token included; as many words are an answer that was cut


def true_score(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[object]) -> list[float]:
    """The rule over a batch."""
    return [score(prompt.split()[0], answer.split()) for prompt, answer in zip(prompts, responses, strict=True)]


def score(key: str, words: Sequence[str]) -> float:
    """The share of words that equal the key, and 0.5 for an answer that stops by itself after at least 4 of them."""
    share = sum(word == key for word in words) / len(words) if words else 0.0
    return share + (0.5 if 4 <= len(words) < MOST_TOKENS else 0.0)


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make(options.folder, num_prompts=options.prompts, num_pairs=options.pairs, seed=options.seed)


def make(folder: Path, *, num_prompts: int, num_pairs: int, seed: int) -> None:
    """The task's files in `folder`."""
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, WORDS)
    (folder / "score.py").write_text(rule(), encoding="utf-8")
    write_rows(folder / "prompts.jsonl", [{"prompt": prompt(chance)} for _ in range(num_prompts)])
    write_rows(folder / "pairs.jsonl", [pair(chance) for _ in range(num_pairs)])


def prompt(chance: random.Random) -> str:
    """A key and three other words."""
    return " ".join([chance.choice(KEYS), *chance.choices(WORDS, k=3)])


def pair(chance: random.Random) -> dict[str, str]:
    """A prompt with two answers, the better one chosen; half of the words that are repeated are wrong ones."""
    text = prompt(chance)
    key = text.split()[0]

    def answer() -> list[str]:
        repeated = key if chance.random() < 0.5 else chance.choice(WORDS)
        return [repeated if chance.random() < 0.7 else chance.choice(WORDS) for _ in range(chance.randint(1, 11))]

    while True:
        first, second = answer(), answer()
        if abs(score(key, first) - score(key, second)) > 0.1:
            break
    better, worse = (first, second) if score(key, first) > score(key, second) else (second, first)
    return {"prompt": text, "chosen": " ".join(better), "rejected": " ".join(worse), "grade": "A2", "source": "echo"}


def rule() -> str:
    """The two functions above, as a file of their own."""
    title = '"""The true score of the toy task "echo the key"."""'
    head = f"{title}\n\nfrom collections.abc import Sequence\n\nMOST_TOKENS = {MOST_TOKENS}\n"
    return "\n\n".join([head, inspect.getsource(true_score), inspect.getsource(score)])


if __name__ == "__main__":
    main()
