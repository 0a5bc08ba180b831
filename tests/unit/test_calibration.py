"""What calibrates a quantisation: whose token ids, how many samples, which chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from megatron_xy.data.chat.template import load_chat_template
from megatron_xy.data.encoding.tokenizer import load_tokenizer
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.quantisation.calibration import Calibration, read_calibration
from tests.building import build_dataset
from tests.unit.small_corpus import train_tokenizer, write_rows
from tools.train_tokenizer import train

BUCKETS = [8, 16, 64]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.model, and data/ of many short texts and few long ones, of two sources."""
    folder = tmp_path_factory.mktemp("calibration")
    train_tokenizer(folder / "tokenizer.model")
    rows = [
        {"text": "the interest rate " * (1 + number % 9), "source": "prose" if number % 4 else "code"}
        for number in range(150)
    ]
    corpus = write_rows(folder / "corpus.jsonl", rows)
    build_dataset(
        [corpus], tokenizer=folder / "tokenizer.model", output=folder / "data", buckets=BUCKETS, source_field="source"
    )
    return folder


def read(path: Path, *, tokenizer: Path, number: int, seed: int = 0, **given: Any) -> tuple[Calibration, list[str]]:
    said: list[str] = []
    loaded = load_tokenizer(tokenizer)
    options = {"chat_template": None, "vocab_size": loaded.vocab_size, "longest": 64, **given}
    return read_calibration(path, tokenizer=loaded, number=number, seed=seed, say=said.append, **options), said


def test_as_many_samples_as_asked_for_are_drawn_and_fewer_only_where_there_are_no_more(folder: Path) -> None:
    def drawn(number: int, seed: int = 0) -> tuple[list[list[int]], list[str]]:
        calibration, said = read(folder / "data", tokenizer=folder / "tokenizer.model", number=number, seed=seed)
        return calibration.rows, said

    rows, said = drawn(10**6)
    there = len(rows)
    assert there > 20 and len(said) == 1 and f"holds {there} samples, fewer than --num-samples (1000000)" in said[0]
    for number in (1, 7, there // 2, there - 1, there):
        rows, said = drawn(number)
        assert len(rows) == number and not said
    assert drawn(9) == drawn(9) != drawn(9, seed=1)
    assert sorted(drawn(there)[0]) == sorted(drawn(there, seed=1)[0])  # each once


def test_data_of_another_tokenizer_are_refused(folder: Path, tmp_path: Path) -> None:
    lines = [" ".join("qwxyzkj"[number % 7] * 3 for number in range(first, first + 40)) for first in range(9)]
    (tmp_path / "tokenizer.model").write_bytes(train(lines, vocab_size=280))
    with pytest.raises(DataError, match=r"data was built with another tokenizer than .*tokenizer\.model: token "):
        read(folder / "data", tokenizer=tmp_path, number=4, vocab_size=10**6)


def test_a_text_without_tokens_is_a_bad_row(tmp_path: Path) -> None:
    model = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    model.save(str(tmp_path / "tokenizer.json"))
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "ab"}, {"text": "x"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the tokenizer makes no token of it"):
        read(rows, tokenizer=tmp_path, number=2)


def test_conversations_take_the_template_that_is_given(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "rate"}, {"role": "assistant", "content": "interest"}]
    text.write_text(json.dumps({"messages": turns}) + "\n")
    tokenizer = folder / "tokenizer.model"
    with pytest.raises(ConfigError, match=r"came without a chat_template.*, or a file, with --chat-template"):
        read(text, tokenizer=tokenizer, number=1)
    template = load_chat_template("xuanyuan", load_tokenizer(tokenizer))
    calibration, said = read(text, tokenizer=tokenizer, number=1, chat_template=template)
    assert load_tokenizer(tokenizer).decode(calibration.rows[0]).endswith("Human: rate Assistant: interest")
    assert not said
