"""Questions of token ids, answered by a model on its ranks: how likely continuations are, and what it says to prompts.

    questions -> FOLDER/*.jsonl -> the model's ranks -> FOLDER/*.results.partial -> results, in the questions' order

What a killed command has answered is kept in the folder, as `generate` and `score` do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_xy.data.corpus.rows import read_rows
from megatron_xy.data.encoding.tokenizer import Tokenizer
from megatron_xy.data.inspection.progress import showing_progress
from megatron_xy.inference.answers import find_tokenizer, identity_of
from megatron_xy.inference.model_job import ModelJob, run_job
from megatron_xy.inference.model_ranks import complete_options, joined, replica_writer
from megatron_xy.inference.partial_results import PartialResults
from megatron_xy.model.generate import Answer, Request, generate_share
from megatron_xy.model.likelihood import Likelihood, Question, likelihoods_of_share
from megatron_xy.model.sampling import SamplingOptions
from megatron_xy.role import Role
from megatron_xy.storage import write_text

VERB = "evaluate"
_LONGEST_TOKENS_A_CHARACTER = 4  # of a text that ends an answer: bytes, each a token
Say = Callable[[str], None]


class JobEnded(Exception):
    """The ranks ended with an exit code, and have said why."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the model's ranks ended with {code}")
        self.code = code


@dataclass(frozen=True)
class Prompt:
    """Token ids that are to be gone on with, how, and the texts of which the first one ends the answer."""

    tokens: list[int]
    options: SamplingOptions
    until: list[str]


@dataclass(frozen=True)
class Model:
    """Whom to ask: a model in a folder, on how many ranks, in which layout; folder: where the work lies."""

    origin: str
    nproc_per_node: int
    overrides: list[str]
    folder: Path
    tokenizer: str | None

    def likelihoods(self, questions: Sequence[Question], *, say: Say) -> list[list[Likelihood]]:
        """Of each question's continuations. Raises JobEnded, ConfigError, DataError, StorageError."""
        rows = self._answered("likelihoods", [asdict(question) for question in questions], say=say)
        return [[Likelihood(**found) for found in row["likelihoods"]] for row in rows]

    def responses(self, prompts: Sequence[Prompt], *, say: Say) -> list[str]:
        """What the model says, up to and with what ended it. Raises as `likelihoods` does."""
        rows = self._answered("responses", [asdict(prompt) for prompt in prompts], say=say)
        return [str(row["response"]) for row in rows]

    def _answered(self, kind: str, rows: list[dict[str, Any]], *, say: Say) -> list[dict[str, Any]]:
        if not rows:
            return []
        text = "".join(json.dumps(row) + "\n" for row in rows)
        digest = hashlib.sha256(text.encode()).hexdigest()
        given = self.folder / f"{kind}-{digest[:16]}.jsonl"
        results = PartialResults(given.with_suffix(".results"))
        if not results.output.exists():
            if not given.exists():
                write_text(given, text)
            arguments = {"kind": kind, "input": str(given), "output": str(results.output), "tokenizer": self.tokenizer}
            run_dir = str(results.run_dir)
            job = ModelJob(VERB, self.origin, self.nproc_per_node, self.overrides, run_dir, arguments)
            facts = {"model": identity_of(self.origin), "questions": digest}

            def work() -> int:
                return run_job(job, in_this_process=lambda: run_in_rank(job, beat=lambda: None))

            if code := results.complete(facts, wanted=len(rows), what=kind, work=work, say=say):
                raise JobEnded(code)
            given.unlink()
        return [row.value for row in read_rows(results.output, option="results", parse=lambda row: row)]


def run_in_rank(job: ModelJob, *, beat: Callable[[], None]) -> None:
    """One rank's part of a job: its replica's answers, kept one by one by the replica's leader.

    beat: called as it begins, once the weights are there.
    """
    config = complete_options(job.options())
    kind, results = job.arguments["kind"], PartialResults(Path(job.arguments["output"]))
    rows = [row.value for row in read_rows(Path(job.arguments["input"]), option="questions", parse=lambda row: row)]
    left = results.left(len(rows))
    with joined(config) as role, contextlib.ExitStack() as stack:
        writer = stack.enter_context(results.writing(replica_writer(role.groups)))
        show = stack.enter_context(showing_progress())
        share, ended = len(left) // role.groups.dp_size, 0
        beat()

        def keep(place: int, result: dict[str, Any]) -> None:
            nonlocal ended
            if writer is not None:
                writer.add(left[place], result)
                ended += 1
                show(kind, ended, max(share, ended), "questions")

        if kind == "likelihoods":
            questions = [Question(**rows[number]) for number in left]
            likelihoods_of_share(
                role,
                questions,
                on_question=lambda place, found: keep(place, {"likelihoods": [asdict(each) for each in found]}),
            )
        else:
            tokenizer = find_tokenizer(str(config.model.load), given=job.arguments["tokenizer"])
            prompts = [_prompt(rows[number]) for number in left]
            _respond(role, prompts, tokenizer, on_response=lambda place, text: keep(place, {"response": text}))


def _respond(
    role: Role, prompts: Sequence[Prompt], tokenizer: Tokenizer, *, on_response: Callable[[int, str], None]
) -> None:
    """Generates the replica's share, prompts with the same options together."""
    by_options: dict[SamplingOptions, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_options.setdefault(prompt.options, []).append(place)

    for options, places in by_options.items():
        requests = [Request(prompts[place].tokens, row=place) for place in places]

        def ends_at(number: int, tokens: Sequence[int], places: list[int] = places) -> bool:
            until = prompts[places[number]].until
            longest = max(map(len, until), default=0)
            tail = tokenizer.decode_answer(tokens[-_LONGEST_TOKENS_A_CHARACTER * (longest + 1) :])
            return any(text in tail for text in until)

        def take(number: int, answer: Answer, places: list[int] = places) -> None:
            on_response(places[number], tokenizer.decode_answer(answer.tokens))

        generate_share(role, requests, options, on_answer=take, ends_at=ends_at)


def _prompt(row: dict[str, Any]) -> Prompt:
    options = {**row["options"], "stop_ids": tuple(row["options"]["stop_ids"])}
    return Prompt(row["tokens"], SamplingOptions(**options), row["until"])
