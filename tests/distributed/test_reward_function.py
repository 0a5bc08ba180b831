"""A function in place of the reward model: what it is given is its own, and what it does wrong is told by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.spawn import run_ranks

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from toy_files import write_rows, write_tokenizer

RULES = """
import sys

def takes_rows_apart(prompts, responses, rows):
    assert prompts == ["w00 w01", "w01"] and responses == ["w01 w02", ""], (prompts, responses)
    wanted = [len(row.pop("wanted")) for row in rows]
    rows[0]["prompt"] = "changed"
    return wanted

def fails(prompts, responses, rows):
    return rows[0]["missing"]

def leaves(prompts, responses, rows):
    sys.exit(3)

def one_for_all(prompts, responses, rows):
    return [1.0]

def forgets(prompts, responses, rows):
    [1.0, 2.0]

def yields(prompts, responses, rows):
    yield from (1 / len(response) for response in responses)

def overflows(prompts, responses, rows):
    return [10**400, 1.0]

def divides(prompts, responses, rows):
    return [1.0, float("nan")]

def grows(prompts, responses, rows):
    return [1e300, 1.0]
"""


def scored(folder: Path, name: str) -> dict[str, Any]:
    """What becomes of two answers on one rank: their scores, or the error; the phases told, the rows afterwards."""
    import torch

    from megatron_xy.data.encoding.tokenizer import load_tokenizer
    from megatron_xy.errors import DataError
    from megatron_xy.ppo.experience import Rollout
    from megatron_xy.ppo.prompts import DrawnPrompt, PromptFile
    from megatron_xy.ppo.reward_function import FunctionScorer, load_reward_function

    prompts, phases = PromptFile(folder / "prompts.jsonl", seed=0), []
    scorer = FunctionScorer(
        load_reward_function(f"{folder / 'rules.py'}:{name}"),
        prompts=prompts,
        tokenizer=load_tokenizer(folder / "tokenizer.json"),
        beat=phases.append,
    )
    answers = [[2, 9, 3, 7], [7]]  # 9 is beyond the vocabulary, 7 the end token
    drawn = [DrawnPrompt(0, 0), DrawnPrompt(1, 0)]
    rollout = Rollout(drawn, {}, answers, torch.tensor([True, True]), torch.ones(2, 4))
    try:
        outcome: Any = scorer.score(rollout).tensors["scores"].tolist()
    except DataError as error:
        outcome = str(error)
    return {"outcome": outcome, "phases": phases, "rows": [row.value for row in prompts.rows]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rule")
    write_tokenizer(folder, [f"w{number:02d}" for number in range(5)])
    write_rows(
        folder / "prompts.jsonl",
        [{"prompt": "w00 w01", "wanted": "abc", "line": "its own"}, {"prompt": "w01", "wanted": ""}],
    )
    (folder / "rules.py").write_text(RULES)
    return folder


def test_it_may_take_its_rows_apart(folder: Path) -> None:
    (found,) = run_ranks(scored, folder, "takes_rows_apart", world_size=1)
    assert found["outcome"] == [3.0, 0.0]
    assert found["phases"] == ["reward.function"]
    assert [row["prompt"] for row in found["rows"]] == ["w00 w01", "w01"], "rank 0 alone would read other prompts"
    assert found["rows"][0]["line"] == "its own"
    assert [row["wanted"] for row in found["rows"]] == ["abc", ""]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("fails", "rules.py:11: KeyError: 'missing'; mend the function and run again"),
        ("leaves", "rules.py:14: SystemExit: 3"),
        ("one_for_all", "gave 1 scores for 2 answers; it must give one for each"),
        ("forgets", "ppo.reward_function gave None for 2 answers ('NoneType' object is not iterable); it must give a"),
        ("yields", "ZeroDivisionError: division by zero; mend the function and run again"),
        ("overflows", "it must give a number for each"),
        ("divides", "gave nan for an answer to the prompt on line 2 of"),
        ("grows", "gave 1e+300 for an answer to the prompt on line 1 of"),
    ],
)
def test_what_it_does_wrong_is_told(folder: Path, name: str, text: str) -> None:
    (found,) = run_ranks(scored, folder, name, world_size=1)
    assert text in found["outcome"]
