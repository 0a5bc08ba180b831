"""A toy set of conversations: who has what, who paid how much; every question is answered by what was said before.

Writes train.jsonl and held_out.jsonl, which share no conversation, in two sources, general and finance, 4 to 1.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ["Ann", "Bob", "Eve", "Tom", "Lin", "Max", "Mia", "Sam"]
THINGS = [
    "book", "list", "file", "name", "type", "line", "test", "code", "word", "page", "text", "form", "table", "point",
    "value", "class", "state", "field", "number", "object", "string", "module", "option", "result", "method", "source",
    "target", "window", "server", "client", "system", "thread", "record", "column", "letter", "symbol",
]  # fmt: skip
AMOUNTS = ["ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
SYSTEMS = ["Answer in a few words.\n", "Be brief.\n"]


def main() -> None:
    """Runs the tool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, type=Path, help="folder of the two files")
    parser.add_argument("--train", type=int, default=6000, help="conversations to learn from")
    parser.add_argument("--held-out", type=int, default=200, help="conversations to test on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    made = conversations(random.Random(options.seed))
    options.output.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for name, count in (("held_out", options.held_out), ("train", options.train)):
        lines: list[str] = []
        while len(lines) < count:
            line = json.dumps(next(made))
            if line not in seen:
                seen.add(line)
                lines.append(line + "\n")
        (options.output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"wrote {options.output / name}.jsonl: {count} conversations")


def conversations(chance: random.Random) -> Iterator[dict[str, Any]]:
    """Rows without end: four of general, then one of finance; some with a system message, some of two turns."""
    number = 0
    while True:
        source = "finance" if number % 5 == 4 else "general"
        messages = [{"role": "system", "content": chance.choice(SYSTEMS)}] if chance.random() < 0.2 else []
        for name in chance.sample(NAMES, 2 if chance.random() < 0.4 else 1):
            if source == "finance":
                answer = f"{chance.choice(AMOUNTS)} yuan for the {chance.choice(THINGS)}"
                question = f"{name} paid {answer}. What did {name} pay?"
            else:
                answer = "the {} and the {}".format(*chance.sample(THINGS, 2))
                question = f"{name} has {answer}. What does {name} have?"
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield {"messages": messages, "source": source}
        number += 1


if __name__ == "__main__":
    main()
