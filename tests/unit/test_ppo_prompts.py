"""Files of prompts and of given answers: what is drawn when, and which rows are refused by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_xy.data.chat.renderer import Renderer
from megatron_xy.data.encoding.tokenizer import load_tokenizer
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.inference.answers import Chats, prompt_tokens
from megatron_xy.ppo.prompts import GivenResponses, PromptFile
from tests.unit.small_corpus import train_tokenizer


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_row_is_drawn_once_an_epoch_in_an_order_that_position_and_seed_decide(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", [{"prompt": str(number)} for number in range(7)])
    prompts = PromptFile(path, seed=1)
    drawn = prompts.draw(0, 21)
    for epoch in range(3):
        of_epoch = drawn[7 * epoch : 7 * epoch + 7]
        assert sorted(draw.row for draw in of_epoch) == list(range(7))
        assert {draw.epoch for draw in of_epoch} == {epoch}
    assert len({tuple(draw.row for draw in drawn[first : first + 7]) for first in (0, 7, 14)}) > 1
    assert [*prompts.draw(0, 5), *PromptFile(path, seed=1).draw(5, 16)] == drawn
    assert PromptFile(path, seed=2).draw(0, 21) != drawn


@pytest.mark.parametrize("row", [{"prompt": ""}, {"prompt": []}, {"prompt": 3}, {"text": "a"}, []])
def test_rows_without_a_prompt_are_named(tmp_path: Path, row: Any) -> None:
    path = write(tmp_path / "prompts.jsonl", [{"prompt": "fine"}, row])
    with pytest.raises(DataError, match=f"^{path}:2: "):
        PromptFile(path, seed=1)


def test_a_file_that_is_not_there_is_named_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ppo.prompts \(.*none.jsonl\): there is no such file"):
        PromptFile(tmp_path / "none.jsonl", seed=1)
    with pytest.raises(ConfigError, match=r"ppo.responses \(.*none.jsonl\): there is no such file"):
        GivenResponses(tmp_path / "none.jsonl")


def test_given_answers_that_cannot_be_ones_are_named(tmp_path: Path) -> None:
    fine = {"response_tokens": [5, 2]}
    empty = write(tmp_path / "empty.jsonl", [fine, {"response_tokens": []}])
    with pytest.raises(DataError, match=f"^{empty}:2: response_tokens is missing, empty or of a wrong type; an answer"):
        GivenResponses(empty)
    for tokens, text in (([9], "must be token ids from 0 to 8"), ([3] * 5, "has 5 tokens, must have 1 to 4")):
        path = write(tmp_path / "given.jsonl", [fine, {"response_tokens": tokens}])
        with pytest.raises(DataError, match=f"^{path}:2: response_tokens {text}"):
            GivenResponses(path).check(num_drawn=2, most=4, vocab_size=9)
    with pytest.raises(DataError, match="holds 2 answers, and place 3 is drawn"):
        GivenResponses(write(tmp_path / "few.jsonl", [fine, fine])).check(num_drawn=3, most=4, vocab_size=9)
    only_the_end = GivenResponses(write(tmp_path / "end.jsonl", [{"response_tokens": [2]}]))
    only_the_end.check(num_drawn=1, most=4, vocab_size=9)
    assert only_the_end.of(0, 1) == [[2]]


TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
    "{% for tool in tools or [] %}tool {{ tool.name }} {% endfor %}"
)


def test_a_system_and_tools_beside_the_messages_are_rendered(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train_tokenizer(tmp_path / "fox.model"))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    asked = [{"role": "user", "content": "the fox"}]
    rows = [
        {"prompt": asked},
        {"prompt": asked, "system": "lazy"},
        {"prompt": [{"role": "system", "content": "lazy"}, *asked]},
        {"prompt": asked, "tools": [{"name": "dog"}]},
        {"prompt": [{"role": "system", "content": "lazy"}, *asked], "system": "lazy"},
    ]
    prompts = PromptFile(write(tmp_path / "prompts.jsonl", rows), seed=1)
    renderer = Renderer(tokenizer, str(tmp_path / "template.jinja"))
    plain, beside, within, with_tools = (prompts.tokens(row, renderer) for row in range(4))
    assert plain != beside == within and plain != with_tools != beside
    with pytest.raises(DataError, match=":5: the messages begin with a system turn, and there is a system beside"):
        prompts.tokens(4, renderer)
    chats = Chats("hf:none", tokenizer, given=str(tmp_path / "template.jinja"))
    assert [prompt_tokens(row, tokenizer, chats) for row in rows[:4]] == [plain, beside, within, with_tools]
