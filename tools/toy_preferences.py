"""Toy preferences with a known rule, for a reward model that is to learn it: of two answers the one with more of the
asked colour is the better one.

    python tools/toy_preferences.py --output DIR [--pairs 2000] [--test-pairs 300] [--flipped 0.0] [--messages]

writes DIR/tokenizer.json and tokenizer_config.json, train.jsonl and held_out.jsonl: rows with prompt, chosen, rejected,
grade, source and model. `--flipped` is the share of the training pairs whose answers change places; those held out are
always right. A held-out prompt is none of the training's. `--messages`: prompts as messages, for a chat model, whose
tokenizer goes before the one written here; then also answers.jsonl, conversations that answer well and badly, for a
model to be fine-tuned on before its answers are judged, and new_prompts.jsonl, as many prompts that no pair has.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from toy_files import write_rows, write_tokenizer

COLOURS = ("red", "blue", "green", "white")
THINGS = tuple(f"{first}{second}" for first in "bdfgklmnprst" for second in ("apo", "eki", "ilu", "oma", "usa"))
MOST_WORDS = 10


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--test-pairs", type=int, default=300)
    parser.add_argument("--flipped", type=float, default=0.0)
    parser.add_argument("--messages", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make(
        options.output,
        num_pairs=options.pairs,
        num_test_pairs=options.test_pairs,
        flipped=options.flipped,
        as_messages=options.messages,
        seed=options.seed,
    )


def make(
    folder: Path,
    *,
    num_pairs: int,
    num_test_pairs: int,
    flipped: float = 0.0,
    as_messages: bool = False,
    seed: int = 0,
) -> None:
    """The files in `folder`."""
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, [*COLOURS, *THINGS])
    prompts: set[str] = set()
    rows: list[dict[str, Any]] = []
    while len(rows) < num_pairs + num_test_pairs:
        row = pair(chance)
        if row["prompt"] not in prompts:
            prompts.add(row["prompt"])
            rows.append(row)
    training, held_out = rows[:num_pairs], rows[num_pairs:]
    for row in training:
        if chance.random() < flipped:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    if as_messages:
        new: list[str] = []
        while len(new) < num_pairs:
            text = pair(chance)["prompt"]
            if text not in prompts:
                prompts.add(text)
                new.append(text)
        for row in rows:
            row["prompt"] = asked(row["prompt"])
        write_rows(folder / "new_prompts.jsonl", [{"prompt": asked(text), "source": "new"} for text in new])
        write_rows(folder / "answers.jsonl", [conversation(row, chance) for row in training])
    write_rows(folder / "train.jsonl", training)
    write_rows(folder / "held_out.jsonl", held_out)


def asked(text: str) -> list[dict[str, str]]:
    """A prompt as messages."""
    return [{"role": "user", "content": text}]


def conversation(row: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A pair's prompt with one of its answers, whichever."""
    answer = row[chance.choice(("chosen", "rejected"))]
    return {"messages": [*row["prompt"], {"role": "assistant", "content": answer}], "source": "colours"}


def true_score(prompt: str, answer: str) -> float:
    """The rule: the share of the answer's words that are the prompt's colour; 0 where it has none."""
    words = answer.split()
    return words.count(prompt.split()[0]) / max(1, len(words))


def pair(chance: random.Random) -> dict[str, Any]:
    """A prompt, which begins with a colour, and two answers of which one has clearly more of it."""
    colour = chance.choice(COLOURS)
    prompt = " ".join([colour, *chance.choices(THINGS, k=4)])

    def answer() -> str:
        share = chance.random()
        others = [word for word in COLOURS if word != colour]
        words = [
            colour if chance.random() < share else chance.choice(others) for _ in range(chance.randint(2, MOST_WORDS))
        ]
        return " ".join(words)

    while True:
        answers = sorted((answer(), answer()), key=lambda text: true_score(prompt, text))
        difference = true_score(prompt, answers[1]) - true_score(prompt, answers[0])
        if difference > 0.25:
            break
    grade = "A3" if difference > 0.7 else "A2" if difference > 0.45 else "A1"
    models = {"chosen": chance.choice(("small", "large")), "rejected": chance.choice(("small", "large"))}
    source = "warm" if colour in ("red", "white") else "cold"
    return {
        "prompt": prompt,
        "chosen": answers[1],
        "rejected": answers[0],
        "grade": grade,
        "source": source,
        "model": models,
    }


if __name__ == "__main__":
    main()
