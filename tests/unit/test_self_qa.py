"""tools/self_qa.py: questions and answers out of documents, by a model behind a server of this machine."""

from __future__ import annotations

import json
import re
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tests.unit.chat_server import endpoint
from tests.unit.small_corpus import train_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import self_qa

RIVERS = "The Rhine is 1,233 km long and ends in the North Sea. It passes through six countries."
LOANS = "贷款的年利率是百分之四。还款期限最长为三十年, 提前还款不收违约金。"
TOWNS = "Bern lies on the Aare. Its old town is a world heritage site."


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    rows = [(RIVERS, "general"), (LOANS, "finance"), (TOWNS, "general")]
    path = tmp_path / "documents.jsonl"
    lines = [json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n" for text, source in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def model(text: str) -> str:
    """Asks and answers as a model would that does not always keep to what it is told."""
    if RIVERS in text and "Question:" not in text:
        return "1. How long is the river Rhine?\n2. What does the text say about the sea?\n3. Where does it end?"
    if LOANS in text and "问题:" not in text:
        return "贷款的年利率是多少\uff1f\n提前还款要付违约金吗\uff1f"
    if TOWNS in text and "Question:" not in text:
        return "- How long is the River Rhine??\n- Which river does the city of Bern lie on?"
    answers = {"How long": "1,233 km.", "年利率": "百分之四。", "违约金": "文中没有提到。", "Bern lie": "On the Aare."}
    return next(answer for key, answer in answers.items() if key in text.rpartition("\n\n")[2])


def run(documents: Path, output: Path, *options: str) -> int:
    sys.argv = [
        "self_qa.py",
        "--documents",
        str(documents),
        "--source-field",
        "source",
        "--output",
        str(output),
        *options,
    ]
    return self_qa.main()


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_stand_by_themselves_and_name_their_document(documents: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with endpoint(model) as (url, asked):
        assert run(documents, out, "--endpoint", url, "--model", "m") == 0
        first = len(asked)
        assert run(documents, out, "--endpoint", url, "--model", "m") == 0
        assert len(asked) == first == 3 + 4, "what the model has said is not asked again"
        assert run(documents, out, "--endpoint", url, "--model", "another") == 78
    rows = rows_of(out / "rows.jsonl")
    turns = [[message["content"] for message in row["messages"]] for row in rows]
    assert turns == [
        ["How long is the river Rhine?", "1,233 km."],
        ["贷款的年利率是多少\uff1f", "百分之四。"],
        ["Which river does the city of Bern lie on?", "On the Aare."],
    ]
    assert [(row["source"], Path(row["file"]).name, row["line"]) for row in rows] == [
        ("general", "documents.jsonl", 1), ("finance", "documents.jsonl", 2), ("general", "documents.jsonl", 3)
    ]  # fmt: skip
    pruned = {row["question"]: row["reason"] for row in rows_of(out / "pruned.jsonl")}
    assert pruned == {
        "What does the text say about the sea?": "refers to the text",
        "How long is the River Rhine??": "like an earlier one",
        "提前还款要付违约金吗\uff1f": "says that the text does not tell",
    }
    report = json.loads((out / "report.json").read_text())
    assert report["questions"]["kept"] == 4 and report["answers"] == {
        "kept": 3, "says that the text does not tell": 1
    }  # fmt: skip


def test_a_run_goes_on_where_the_server_went_away(documents: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "out", list[str]()

    def dies_at_the_third(text: str) -> str:
        if len(said) == 2:
            raise ConnectionError("gone")
        said.append(text)
        return model(text)

    with endpoint(dies_at_the_third) as (url, _):
        assert run(documents, out, "--endpoint", url, "--model", "m") == 74
        assert not (out / "rows.jsonl").exists()
    port = int(re.findall(r":(\d+)/", url)[0])
    with endpoint(model, port=port) as (url, asked):  # it is back
        assert run(documents, out, "--endpoint", url, "--model", "m") == 0
        assert len(asked) == 1 + 4, "two questions were kept"


def test_of_long_documents_only_what_the_model_is_shown_is_kept(tmp_path: Path) -> None:
    long = "Rivers are long. " * 60_000  # 1 MB
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": long, "source": "x"}) + "\n" for _ in range(20)))
    with endpoint(lambda text: "nothing to ask") as (url, asked):
        tracemalloc.start()
        code = run(path, tmp_path / "out", "--endpoint", url, "--model", "m")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert code == 65 and len(asked) == 20
    assert most < 24e6, "of 20 MB, what the reader takes at a time"


def test_answers_of_an_endpoint_that_are_cut_or_null_are_pruned(documents: Path, tmp_path: Path) -> None:
    def cuts_and_falls_silent(text: str) -> Any:
        question = text.rpartition("\n\n")[2]
        if RIVERS in text and "Question:" not in text:
            return "1. How long is the river Rhine?\n2. Which sea does the Rhine end i", "length"
        return ("1,233", "length") if "How long" in question else None if "Bern lie on" in question else model(text)

    with endpoint(cuts_and_falls_silent) as (url, _):
        assert run(documents, tmp_path / "out", "--endpoint", url, "--model", "m") == 0
    pruned = {row["question"]: row["reason"] for row in rows_of(tmp_path / "out" / "pruned.jsonl")}
    assert pruned["How long is the river Rhine?"] == "cut"
    assert pruned["Which river does the city of Bern lie on?"] == "empty"
    assert (
        "None" not in (tmp_path / "out" / "rows.jsonl").read_text()
        and len(rows_of(tmp_path / "out" / "rows.jsonl")) == 1
    )


@pytest.mark.slow  # three processes that open a model
def test_a_model_without_a_chat_template_is_asked_by_the_named_one(
    documents: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tests.end_to_end.random_model import write_random_model

    folder = write_random_model(tmp_path / "hf", max_position_embeddings=2048)
    train_tokenizer(folder / "tokenizer.model")
    options = ["--model", f"hf:{folder}", "--most-tokens", "8", "--questions", "1"]
    with pytest.raises(SystemExit, match="78"):
        run(documents, tmp_path / "out", *options)
    assert "came without a chat_template; name one of" in capfd.readouterr().err
    assert run(documents, tmp_path / "out", *options, "--chat-template", "xuanyuan") == 65, "it talks at random"
    assert len(rows_of(tmp_path / "out" / "questions.jsonl")) == 3


@pytest.mark.parametrize(
    ("question", "fault"),
    [
        ("How long is the river Rhine?", None),
        ("How long is the river", "no question"),
        ("How long?", "too short"),
        ("Why? " * 100, "too long"),
        ("According to the passage, how long is the Rhine?", "refers to the text"),
        ("莱茵河有多长呢\uff1f", "another language"),
    ],
)
def test_questions_that_do_not_stand_alone_are_pruned(question: str, fault: str | None) -> None:
    assert self_qa.question_faults([(question.strip(), RIVERS)]) == [fault]


def test_answers_that_are_cut_or_evade_are_pruned() -> None:
    assert self_qa.answer_fault("It is long.", RIVERS, has_ended=True) is None
    assert self_qa.answer_fault("It is long.", RIVERS, has_ended=False) == "cut"
    assert (
        self_qa.answer_fault("The text doesn't mention it.", RIVERS, has_ended=True)
        == "says that the text does not tell"
    )
    assert self_qa.answer_fault("", RIVERS, has_ended=True) == "empty"
    assert self_qa.answer_fault("文章指出利率是百分之四。", LOANS, has_ended=True) == "refers to the text"
    assert list(self_qa.questions_in("1) a?\n\n- b?\n问题3\uff1ac", most=5, has_ended=False)) == ["a?", "b?"]


def test_wrong_options_are_named(documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(documents, out, "--model", "m") == 2 and "--model (m) must be ckpt:DIR" in capsys.readouterr().err
    assert run(documents, out, "--model", "m", "--endpoint", "file:///etc") == 2
    assert run(documents, out, "--model", "hf:x", "--questions", "0") == 2
    template = ["--chat-template", "chatml"]
    assert run(documents, out, "--model", "m", "--endpoint", "http://localhost/v1", *template) == 2
    assert "--chat-template goes with --model ckpt:DIR" in capsys.readouterr().err
    with endpoint(lambda text: "nothing to ask") as (url, _):
        assert run(documents, out, "--model", "m", "--endpoint", url) == 65
    assert not (out / "rows.jsonl").exists() and rows_of(out / "pruned.jsonl")
