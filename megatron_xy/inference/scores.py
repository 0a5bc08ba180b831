"""`megatron-xy score`: a file of answers -> the same rows with a reward model's scores, in the same order.

    F.jsonl -> token rows -> forward passes on the model's ranks -> OUTPUT.partial -> OUTPUT

Everything that can be wrong with the request is found before a rank starts. Scores are kept pass by pass; the same
command goes on after a kill, also in another layout.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xy.config import RunConfig
from megatron_xy.data.chat.conversations import BadConversation, parse_prompt
from megatron_xy.data.chat.encode import answer_tokens
from megatron_xy.data.corpus.rows import BadRow, Row, check_json, read_rows
from megatron_xy.data.encoding.tokenizer import Tokenizer
from megatron_xy.data.inspection.progress import showing_progress
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.inference.answers import Chats, find_tokenizer, identity_of, prompt_tokens
from megatron_xy.inference.model_job import ModelJob
from megatron_xy.inference.model_ranks import complete_options, joined
from megatron_xy.inference.partial_results import PartialResults, complete_job
from megatron_xy.model.source import stored_head
from megatron_xy.reward.scoring import MICRO_BATCHES_A_PASS, passes, score_pass
from megatron_xy.storage import file_sha256


@dataclass(frozen=True)
class ScoreArguments:
    """The verb's own arguments, as JSON has them."""

    input: str
    output: str
    micro_batch_tokens: int
    tokenizer: str | None
    chat_template: str | None


@dataclass(frozen=True)
class AnswerRow:
    """A row as it was given, and the token ids of its prompt and answer."""

    given: dict[str, Any]
    prompt: list[int]
    response: list[int]


@dataclass(frozen=True)
class Work:
    """What every rank makes of the arguments: the same on all."""

    config: RunConfig
    rows: list[Row[AnswerRow]]
    micro_batch_tokens: int
    facts: dict[str, Any]  # what the scores depend on


def run(job: ModelJob, *, say: Callable[[str], None]) -> int:
    """The whole verb; returns the exit code.

    Raises ConfigError for arguments and paths, DataError for bad rows and damaged weights, StorageError.
    """
    work = prepare(job)

    def in_this_process() -> None:
        _score(job, work, beat=lambda: None)

    return complete_job(job, work.facts, wanted=len(work.rows), what="scores", in_this_process=in_this_process, say=say)


def run_in_rank(job: ModelJob, *, beat: Callable[[], None]) -> None:
    """One rank's part of the verb. beat: called at every pass."""
    _score(job, prepare(job), beat=beat)


def prepare(job: ModelJob) -> Work:
    """Reads and checks everything but the weights; raises as `run` does."""
    arguments = ScoreArguments(**job.arguments)
    config = complete_options(job.options(), head="value")
    origin = str(config.model.load)
    if stored_head(origin) != "value":
        raise DataError(f"{origin} is a language model, which gives no scores; name a reward model")
    tokenizer = find_tokenizer(origin, given=arguments.tokenizer)
    if tokenizer.eos_id is None:
        raise ConfigError(f"--tokenizer ({tokenizer.path}) has no end token, so no answer could end; name another one")
    chats = Chats(origin, tokenizer, given=arguments.chat_template)
    longest, vocab_size = config.model.max_position_embeddings, config.model.vocab_size or 0

    def parse(row: dict[str, Any]) -> AnswerRow:
        check_json(row)
        answer = AnswerRow(row, prompt_tokens(row, tokenizer, chats), _response_tokens(row, tokenizer, chats))
        length = len(answer.prompt) + len(answer.response)
        if length > longest:
            raise BadRow(
                f"prompt and answer have {length} tokens, must have at most the model's max_position_embeddings "
                f"({longest}); shorten them, or leave the row out"
            )
        for name, tokens in (("prompt", answer.prompt), ("answer", answer.response)):
            if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
                raise BadRow(f"the {name} holds a token that the model does not know; it knows 0..{vocab_size - 1}")
        return answer

    rows = read_rows(Path(arguments.input), option="--input", parse=parse)
    most = max(len(row.value.prompt) + len(row.value.response) for row in rows)
    facts = {
        "model": identity_of(origin),
        "input": file_sha256(Path(arguments.input)),
        "tokenizer": tokenizer.sha256,
        "chat_template": chats.used,
    }
    return Work(config, rows, max(arguments.micro_batch_tokens, most), facts)


def _response_tokens(row: dict[str, Any], tokenizer: Tokenizer, chats: Chats) -> list[int]:
    """`response_tokens` as they are, or `response` with its end token behind it. Raises BadRow."""
    tokens, text = row.get("response_tokens"), row.get("response")
    if tokens is not None:
        if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
            raise BadRow("response_tokens must be a list of token ids; an answer that says nothing is the end token")
        return tokens
    if not isinstance(text, str):
        raise BadRow(f"response is {'missing' if text is None else 'no string'}, and there are no response_tokens")
    if not text.strip():
        raise BadRow("response is an empty answer; one that says nothing is the end token alone, in response_tokens")
    prompt = row.get("prompt")
    try:
        if isinstance(prompt, list):
            return answer_tokens(tokenizer, chats.needed(), parse_prompt(row).messages, text)
        return answer_tokens(tokenizer, chats.of_the_run(), "", text)
    except BadConversation as problem:
        raise BadRow(f"response: {problem}") from None


def _score(job: ModelJob, work: Work, *, beat: Callable[[], None]) -> None:
    """This rank's part, in a world that it joins; the leader keeps the scores of each pass."""
    results = PartialResults(Path(job.arguments["output"]))
    left = results.left(len(work.rows))
    prompts = [work.rows[number].value.prompt for number in left]
    responses = [work.rows[number].value.response for number in left]
    with joined(work.config) as role, contextlib.ExitStack() as stack:
        stack.enter_context(role.evaluating())
        writer = stack.enter_context(results.writing(0 if role.groups.is_leader else None))
        progress = stack.enter_context(showing_progress())
        most = MICRO_BATCHES_A_PASS * work.micro_batch_tokens * role.groups.dp_size
        for part in passes(prompts, responses, most=most):
            beat()
            scores = score_pass(role, prompts[part], responses[part], micro_batch_tokens=work.micro_batch_tokens)
            if writer is not None:
                for number, score in zip(left[part], scores.tolist(), strict=True):
                    if not math.isfinite(score):
                        raise DataError(f"the score of line {work.rows[number].line} is {score}: the model is damaged")
                    writer.add(number, {**work.rows[number].value.given, "score": score})
                progress("score", part.stop, len(left), "answers")
