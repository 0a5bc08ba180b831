"""Questions and answers out of plain documents (self-QA): a model asks what a text teaches, and answers given the text.

    python tools/self_qa.py --documents CORPUS... --model ckpt:DIR --output DIR
    python tools/self_qa.py --documents CORPUS... --endpoint URL --model NAME --output DIR

Documents are what `data build` takes: jsonl, also compressed, Parquet, txt. Of each the model is asked for questions
that can be understood without it; each question is then answered with the text at hand. The model is ours, a
checkpoint or an HF folder (`megatron-xy generate` answers, on --nproc-per-node ranks), or one behind an
OpenAI-compatible endpoint.

What does not stand by itself is pruned: questions that are none, refer to the text, are too short or long, in another
language than the text, or nearly the same as an earlier one; answers that are empty, cut, refer to the text or say that
it does not tell. What is left is written to DIR/rows.jsonl, conversations to fine-tune on, each with source, file and
line of its document; DIR/pruned.jsonl holds the rest, each with the reason, DIR/report.json the counts.

The same command goes on where a killed one stopped: what a model has said stays in DIR.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from annotation import lines_of, make_folder
from chat_endpoint import ChatEndpoint, endpoint_of, keep_results
from rich.console import Console
from rich.table import Table

from megatron_xy.data.corpus.documents import Document
from megatron_xy.data.corpus.inputs import read_documents
from megatron_xy.data.corpus.rows import read_rows
from megatron_xy.errors import ConfigError, DataError, UsageError, with_exit_code
from megatron_xy.reward.split import clusters_of
from megatron_xy.storage import file_sha256, write_json, write_text

ASK = {
    "zh": "阅读下面的文字, 提出{count}个问题。每个问题都要能脱离这段文字单独理解, 不要提到这段文字。"
    "每行一个问题, 不要编号。\n\n{text}",
    "en": "Read the text below and ask {count} questions that it answers. Each must be understood by itself, without "
    "the text, and must not mention it. One question a line, no numbers.\n\n{text}",
}
ANSWER = {
    "zh": "根据下面的文字回答问题。直接、完整地回答, 不要提到这段文字。\n\n{text}\n\n问题: {question}",
    "en": "Answer the question by what the text below says. Answer directly and in full, and do not mention the text."
    "\n\n{text}\n\nQuestion: {question}",
}
# How questions and answers speak of a text that their reader will not see.
_REFERS = re.compile(
    r"(本|该|此|上述|以上|下面|这篇|这段|这一)(文|段|材料|篇)|文中|文章(中|里|提到|指出)|原文|上文|根据(材料|文字|资料|内容)"
    r"|作者(认为|指出|提到|觉得|如何)"
    r"|\b(the|this|that|given|provided|above)\s+(text|passage|article|document|paragraph|excerpt|author|writer)\b"
    r"|\baccording to (it|the (text|passage|article|document))\b|\bmentioned above\b",
    re.IGNORECASE,
)
_KNOWS_NOT = re.compile(
    r"(没有|未)(提到|提及|说明|给出)|无法(回答|得知|确定)"
    r"|(\bnot|n't) (mention|state|specif|say|tell)|\bcannot be (answered|determined)\b",
    re.IGNORECASE,
)
_NUMBERING = re.compile(r"^\s*(?:[-*•]|(?:问题|Q|question)?\s*[(\uff08]?\d{1,2}[)\uff09.、:\uff1a])\s*", re.IGNORECASE)
QUESTION_MARKS = ("?", "\uff1f")
_HAN = re.compile("[\u4e00-\u9fff]")
_LETTER = re.compile("[A-Za-z]")
QUESTION_LENGTH = {"zh": (6, 120), "en": (15, 300)}  # characters
ANSWER_LENGTH = {"zh": (2, 2000), "en": (3, 5000)}
Answer = tuple[str, bool]  # what the model says, and whether it came to an end
Model = Callable[[Path, Path, int], list[Answer]]  # prompts, where the answers are kept, most tokens of one


@dataclass(frozen=True)
class Origin:
    """Where a question comes from."""

    source: str
    file: str
    line: int


@dataclass(frozen=True)
class Asked:
    """A question, the text that it is about, and its answer once there is one."""

    origin: Origin
    text: str
    question: str
    answer: str = ""


@with_exit_code
def main() -> None:
    """The exit code: 0, 2 (wrong options), 65 (bad documents; none left), 74 (no storage) or 78 (no such path)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", nargs="+", required=True, metavar="PATH")
    parser.add_argument("--text-field", default="text")
    parser.add_argument("--source-field")
    parser.add_argument("--model", required=True, metavar="ckpt:DIR|hf:DIR|NAME", help="NAME: of the endpoint")
    parser.add_argument("--endpoint", metavar="URL", help="such as http://localhost:8000/v1")
    parser.add_argument(
        "--key-variable", default="OPENAI_API_KEY", help="the environment variable with its key, if any"
    )
    parser.add_argument("--chat-template", metavar="NAME|FILE", help="of our own model; the model's unless given")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="ranks of our own model")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--questions", type=int, default=2, help="asked for, a document")
    parser.add_argument("--most-characters", type=int, default=3000, help="of a document that the model is shown")
    parser.add_argument("--most-tokens", type=int, default=512, help="of an answer")
    parser.add_argument("overrides", nargs="*", metavar="parallel.key=value", help="layout of our own model")
    options = parser.parse_args()
    report = self_qa(options)
    Console().print(table_of(report))
    print(f"wrote {options.output / 'rows.jsonl'}")


def self_qa(options: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Writes rows, what was pruned and the report: {questions or answers: {kept or reason: number}}."""
    for name in ("questions", "most_characters", "most_tokens"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} ({getattr(options, name)}) must be 1 or more")
    model = model_of(options)
    folder: Path = options.output
    make_folder(folder)
    read = read_documents(options.documents, text_field=options.text_field, source_field=options.source_field)
    documents = [(_origin(document), _start_of(document.text, most=options.most_characters)) for document in read]
    if not documents:
        raise DataError("--documents hold no text")
    prompts = [ASK[language_of(text)].format(count=options.questions, text=text) for _, text in documents]
    replies = _said(model, folder, "questions", prompts, most_tokens=64 * options.questions)
    asked = [
        Asked(origin, text, question)
        for (origin, text), (reply, has_ended) in zip(documents, replies, strict=True)
        for question in questions_in(reply, most=options.questions, has_ended=has_ended)
    ]
    kept, pruned = _sorted_out(asked, question_faults([(row.question, row.text) for row in asked]))
    report = {"questions": _counts(kept, pruned)}
    if kept:
        prompts = [ANSWER[language_of(row.text)].format(text=row.text, question=row.question) for row in kept]
        answers = _said(model, folder, "answers", prompts, most_tokens=options.most_tokens)
        answered = [
            Asked(row.origin, row.text, row.question, reply.strip())
            for row, (reply, _) in zip(kept, answers, strict=True)
        ]
        faults = [
            answer_fault(row.answer, row.text, has_ended=has_ended)
            for row, (_, has_ended) in zip(answered, answers, strict=True)
        ]
        kept, left_out = _sorted_out(answered, faults)
        report["answers"] = _counts(kept, left_out)
        pruned += left_out
    write_text(folder / "pruned.jsonl", lines_of(_pruned_row(row, reason) for row, reason in pruned))
    write_json(folder / "report.json", report)
    if not kept:
        raise DataError(f"no question and answer is left, see {folder / 'pruned.jsonl'}; take a stronger model")
    write_text(folder / "rows.jsonl", lines_of(_row(row) for row in kept))
    return report


def model_of(options: argparse.Namespace) -> Model:
    """What answers prompts: our own model, or one behind an endpoint. Raises UsageError."""
    if options.endpoint is not None:
        if options.chat_template is not None:
            raise UsageError("--chat-template goes with --model ckpt:DIR or hf:DIR; an endpoint applies its model's")
        endpoint = endpoint_of(options.endpoint, options.model, key_variable=options.key_variable)
        return lambda prompts, output, most_tokens: _by_endpoint(endpoint, prompts, output, most_tokens)
    if not options.model.startswith(("ckpt:", "hf:")):
        raise UsageError(f"--model ({options.model}) must be ckpt:DIR or hf:DIR, or goes with --endpoint URL")
    template = [] if options.chat_template is None else ["--chat-template", options.chat_template]
    ranks = ["--nproc-per-node", str(options.nproc_per_node), *options.overrides]
    return lambda prompts, output, most_tokens: _by_generate(
        options.model, template, ranks, prompts, output, most_tokens
    )


def questions_in(reply: str, *, most: int, has_ended: bool) -> Iterator[str]:
    """The lines of a model's reply, their numbers taken off, at most `most`; of a reply that was cut not the last."""
    lines = [_NUMBERING.sub("", line).strip() for line in reply.splitlines() if line.strip()]
    yield from (lines if has_ended else lines[:-1])[:most]


def question_faults(asked: Sequence[tuple[str, str]]) -> list[str | None]:
    """Why each (question, text) is pruned; None where it stays."""
    clusters = clusters_of([question for question, _ in asked])
    return [
        _question_fault(question, text) or (None if cluster == number else "like an earlier one")
        for number, ((question, text), cluster) in enumerate(zip(asked, clusters, strict=True))
    ]


def answer_fault(answer: str, text: str, *, has_ended: bool) -> str | None:
    """Why an answer is pruned; None where it stays."""
    if not has_ended:
        return "cut"
    if not answer:
        return "empty"
    if _KNOWS_NOT.search(answer):
        return "says that the text does not tell"
    return _fault(answer, text, lengths=ANSWER_LENGTH)


def language_of(text: str) -> str:
    """zh where there is more than one Chinese character to three letters, else en."""
    return "zh" if 3 * len(_HAN.findall(text)) > len(_LETTER.findall(text)) else "en"


def table_of(report: dict[str, dict[str, int]]) -> Table:
    """What was kept, and what was pruned for which reason."""
    table = Table(title="self-QA", title_justify="left")
    table.add_column("")
    table.add_column("what became of it")
    table.add_column("number", justify="right")
    for what, counts in report.items():
        for outcome, number in counts.items():
            table.add_row(what, outcome, f"{number:,}")
    return table


def _question_fault(question: str, text: str) -> str | None:
    return _fault(question, text, lengths=QUESTION_LENGTH) or (
        None if question.endswith(QUESTION_MARKS) else "no question"
    )


def _fault(said: str, text: str, *, lengths: dict[str, tuple[int, int]]) -> str | None:
    language = language_of(text)
    least, most = lengths[language]
    if said and language_of(said) != language:
        return "another language"
    if len(said) < least:
        return "too short"
    if len(said) > most:
        return "too long"
    return "refers to the text" if _REFERS.search(said) else None


def _start_of(text: str, *, most: int) -> str:
    """The first characters of a text, to the end of a paragraph or sentence where one lies in the second half."""
    if len(text) <= most:
        return text
    start = text[:most]
    cut = max(start.rfind(mark) for mark in ("\n", "。", ". ", *QUESTION_MARKS))
    return start[: cut + 1] if cut >= most // 2 else start


def _said(model: Model, folder: Path, name: str, prompts: Sequence[str], *, most_tokens: int) -> list[Answer]:
    path = folder / f"{name}.prompts.jsonl"
    write_text(path, lines_of({"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts))
    return model(path, folder / f"{name}.jsonl", most_tokens)


def _by_generate(
    model: str, template: list[str], ranks: list[str], prompts: Path, output: Path, most_tokens: int
) -> list[Answer]:
    """Ends with generate's exit code where it ends badly."""
    facts = {"prompts": file_sha256(prompts), "model": " ".join([model, *template]), "most_tokens": most_tokens}
    if not _is_made_with(output, facts):
        write_json(_facts_of(output), facts)
        limits = ["--temperature", "0", "--max-response-length", str(most_tokens)]
        files = ["--prompts", str(prompts), "--output", str(output)]
        command = [sys.executable, "-m", "megatron_xy", "generate", model, *files, *limits, *template, *ranks]
        if code := subprocess.run(command, check=False).returncode:
            sys.exit(code)  # it has said what is wrong
    return _answers_in(output)


def _by_endpoint(endpoint: ChatEndpoint, prompts: Path, output: Path, most_tokens: int) -> list[Answer]:
    texts = [row.value for row in read_rows(prompts, option="prompts", parse=lambda row: row["prompt"][0]["content"])]
    facts = {"prompts": file_sha256(prompts), "model": f"{endpoint.url} {endpoint.model}", "most_tokens": most_tokens}

    def answered(text: str) -> dict[str, Any]:
        reply = endpoint.ask(text, max_tokens=most_tokens)
        return {"response": reply.text, "finish_reason": "stop" if reply.has_ended else "length"}

    if not _is_made_with(output, facts):
        write_json(_facts_of(output), facts)
        keep_results(output, texts, answered, facts=facts, what=output.stem)
    return _answers_in(output)


def _answers_in(output: Path) -> list[Answer]:
    rows = read_rows(output, option="answers", parse=lambda row: (str(row["response"]), row["finish_reason"] == "stop"))
    return [row.value for row in rows]


def _facts_of(output: Path) -> Path:
    return output.with_suffix(".facts.json")


def _is_made_with(output: Path, facts: dict[str, Any]) -> bool:
    """Whether the answers are there, to these prompts by this model. Raises ConfigError where they are to others."""
    if not output.exists():
        return False
    if not _facts_of(output).exists() or json.loads(_facts_of(output).read_bytes()) != facts:
        raise ConfigError(f"{output} holds answers to other prompts, or of another model; name another --output")
    return True


def _sorted_out(rows: Sequence[Asked], faults: Sequence[str | None]) -> tuple[list[Asked], list[tuple[Asked, str]]]:
    kept = [row for row, fault in zip(rows, faults, strict=True) if fault is None]
    return kept, [(row, fault) for row, fault in zip(rows, faults, strict=True) if fault is not None]


def _counts(kept: Sequence[Asked], pruned: Sequence[tuple[Asked, str]]) -> dict[str, int]:
    return {"kept": len(kept), **dict(Counter(reason for _, reason in pruned).most_common())}


def _origin(document: Document) -> Origin:
    return Origin(document.source, document.path, document.line)


def _row(row: Asked) -> dict[str, Any]:
    messages = [{"role": "user", "content": row.question}, {"role": "assistant", "content": row.answer}]
    return {"messages": messages, **asdict(row.origin)}


def _pruned_row(row: Asked, reason: str) -> dict[str, Any]:
    answer = {"answer": row.answer} if row.answer else {}
    return {"reason": reason, "question": row.question, **answer, **asdict(row.origin)}


if __name__ == "__main__":
    sys.exit(main())
