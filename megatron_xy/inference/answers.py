"""`megatron-xy generate`: a file of prompts -> a file of answers, one row each, in the prompts' order.

    F.jsonl -> token rows -> generation on the model's ranks -> OUTPUT.partial -> OUTPUT

Everything that can be wrong with the request is found before a rank starts. Answers are kept as they end; the same
command goes on after a kill, also in another layout, and gives the same texts.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_xy.checkpoint import files
from megatron_xy.config import RunConfig
from megatron_xy.data.chat.conversations import BadConversation, parse_prompt
from megatron_xy.data.chat.encode import Chat
from megatron_xy.data.chat.renderer import PROMPT_FIELDS
from megatron_xy.data.chat.template import load_chat_template, template_of_run, template_of_tokenizer
from megatron_xy.data.corpus.rows import BadRow, Row, check_json, read_rows
from megatron_xy.data.encoding.tokenizer import Tokenizer, load_tokenizer
from megatron_xy.data.inspection.progress import showing_progress
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.hf.kept import end_ids, kept_facts
from megatron_xy.inference.model_job import ModelJob
from megatron_xy.inference.model_ranks import complete_options, joined, replica_writer
from megatron_xy.inference.partial_results import PartialResults, complete_job
from megatron_xy.model.generate import Answer, Request, generate_share, share_of
from megatron_xy.model.sampling import SamplingOptions
from megatron_xy.model.source import own_tokenizer, split_origin
from megatron_xy.storage import file_sha256


@dataclass(frozen=True)
class GenerateArguments:
    """The verb's own arguments, as JSON has them. stop: control tokens by their spelling, or token ids."""

    prompts: str
    output: str
    num_answers: int
    temperature: float
    top_p: float
    top_k: int
    min_response_length: int
    max_response_length: int
    max_sequences: int
    seed: int
    stop: list[str]
    tokenizer: str | None
    chat_template: str | None


@dataclass(frozen=True)
class Prompt:
    """PROMPT_FIELDS as a row gave them, and the prompt's token ids."""

    given: dict[str, Any]
    tokens: list[int]


@dataclass(frozen=True)
class Work:
    """What every rank makes of the arguments: the same on all."""

    arguments: GenerateArguments
    config: RunConfig
    tokenizer: Tokenizer
    prompts: list[Row[Prompt]]
    options: SamplingOptions
    facts: dict[str, Any]  # what the answers depend on

    @property
    def requests(self) -> list[Request]:
        """All answers that are wanted, in the order of the output."""
        return [
            Request(prompt.value.tokens, row=row, index=index)
            for row, prompt in enumerate(self.prompts)
            for index in range(self.arguments.num_answers)
        ]


def run(job: ModelJob, *, say: Callable[[str], None]) -> int:
    """The whole verb; returns the exit code.

    Raises ConfigError for arguments and paths, DataError for bad rows and damaged weights, StorageError.
    """
    work = prepare(job)

    def in_this_process() -> None:
        _generate(work, beat=lambda: None)

    wanted = len(work.requests)
    return complete_job(job, work.facts, wanted=wanted, what="answers", in_this_process=in_this_process, say=say)


def run_in_rank(job: ModelJob, *, beat: Callable[[], None]) -> None:
    """One rank's part of the verb. beat: called as it begins, once the weights are there."""
    _generate(prepare(job), beat=beat)


def prepare(job: ModelJob) -> Work:
    """Reads and checks everything but the weights; raises as `run` does."""
    arguments = GenerateArguments(**job.arguments)
    config = complete_options(job.options())
    origin = str(config.model.load)
    tokenizer = find_tokenizer(origin, given=arguments.tokenizer)
    longest = config.model.max_position_embeddings
    chat = Chats(origin, tokenizer, given=arguments.chat_template)
    vocab_size = config.model.vocab_size or 0

    def parse(row: dict[str, Any]) -> Prompt:
        given = {name: row[name] for name in PROMPT_FIELDS if name in row}
        check_json(given)
        prompt = Prompt(given, prompt_tokens(row, tokenizer, chat))
        if not 0 < len(prompt.tokens) < longest:
            raise BadRow(
                f"the prompt has {len(prompt.tokens)} tokens, must have 1 to {longest - 1} (the model's "
                f"max_position_embeddings - 1); shorten it, or leave the row out"
            )
        if max(prompt.tokens) >= vocab_size:
            raise BadRow(
                f"the prompt holds token {max(prompt.tokens)}; the model knows 0..{vocab_size - 1}: name the tokenizer "
                f"that it was trained with, or leave the row out"
            )
        return prompt

    prompts = read_rows(Path(arguments.prompts), option="--prompts", parse=parse)
    options = SamplingOptions(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_response_length=arguments.min_response_length,
        max_response_length=arguments.max_response_length,
        stop_ids=tuple(_stop_ids(origin, tokenizer, chat, given=arguments.stop, vocab_size=vocab_size)),
        seed=arguments.seed,
    )
    facts = {
        "model": identity_of(origin),
        "prompts": file_sha256(Path(arguments.prompts)),
        "tokenizer": tokenizer.sha256,
        "num_answers": arguments.num_answers,
        **asdict(options),
        "stop_ids": list(options.stop_ids),
        "chat_template": chat.used,
    }
    return Work(arguments, config, tokenizer, prompts, options, facts)


def find_tokenizer(origin: str, *, given: str | None) -> Tokenizer:
    """The tokenizer of a model: the one given, what lies beside its weights, or what its run named.

    Raises ConfigError where there is none.
    """
    if given is not None:
        return load_tokenizer(given)
    found = own_tokenizer(origin)
    if found is None or not found.exists():
        where = f", and that of its run ({found}) is not there any more" if found else ""
        raise ConfigError(f"{origin} has no tokenizer beside its weights{where}; name one with --tokenizer")
    return load_tokenizer(found)


class Chats:
    """The chat template for prompts that are messages, looked for when the first one comes.

    The one given, that of the checkpoint's run, or the tokenizer's own.
    """

    def __init__(self, origin: str, tokenizer: Tokenizer, *, given: str | None) -> None:
        self._origin, self._tokenizer = origin, tokenizer
        self._chat = None if given is None else Chat(tokenizer, load_chat_template(given, tokenizer))

    @property
    def chat(self) -> Chat | None:
        """What has been used so far, or was given."""
        return self._chat

    @property
    def used(self) -> str | None:
        """The template's text, by which it is known."""
        if self._chat is None:
            return None
        return hashlib.sha256(self._chat.template.source.encode()).hexdigest()

    def of_the_run(self) -> Chat | None:
        """The one given, or that of the checkpoint's run; None where there is neither."""
        kind, folder = split_origin(self._origin)
        if self._chat is None and kind == "ckpt":
            template = template_of_run(files.read_manifest(folder).state, self._tokenizer)
            self._chat = None if template is None else Chat(self._tokenizer, template)
        return self._chat

    def needed(self) -> Chat:
        """Raises ConfigError where there is no template."""
        self._chat = self.of_the_run()
        if self._chat is None:
            self._chat = Chat(self._tokenizer, template_of_tokenizer(self._tokenizer))
        return self._chat


def prompt_tokens(row: dict[str, Any], tokenizer: Tokenizer, chat: Chats) -> list[int]:
    """A string as it stands behind the begin token, or messages as the chat template renders them. Raises BadRow."""
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        try:
            asked = parse_prompt(row)
            return [int(token) for token in chat.needed().prompt(asked.messages, tools=asked.tools)]
        except BadConversation as problem:
            raise BadRow(f"prompt: {problem}") from None
    if not isinstance(prompt, str):
        raise BadRow(f"prompt is {'missing' if prompt is None else 'neither a string nor a list of messages'}")
    return tokenizer.text_prompt(prompt)


def _stop_ids(origin: str, tokenizer: Tokenizer, chat: Chats, *, given: list[str], vocab_size: int) -> list[int]:
    """The tokenizer's end token, the chat template's, those that the HF folder names or named, and the given."""
    ids = {tokenizer.eos_id, *end_ids(kept_facts(*split_origin(origin)))} - {None}
    template = chat.of_the_run()  # what a model has learned to end an answer with ends one to a string, too
    ids |= set(template.stop_ids) if template is not None else set()
    for text in given:
        if text in tokenizer.control_tokens:
            ids.add(tokenizer.control_tokens[text])
        elif text.isdecimal() and int(text) < vocab_size:
            ids.add(int(text))
        else:
            known = ", ".join(list(tokenizer.control_tokens)[:10])
            raise ConfigError(
                f"--stop {text}: must be a token id from 0 to {vocab_size - 1} or a control token of the tokenizer, "
                f"such as {known}"
            )
    return sorted(int(index) for index in ids if index is not None)


def identity_of(origin: str) -> str:
    """By which the weights are known without reading them: the checkpoint's manifest, the HF folder's files."""
    kind, folder = split_origin(origin)
    if kind == "ckpt":
        return file_sha256(folder / files.MANIFEST)
    shards = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.safetensors"))
    ]
    return hashlib.sha256(f"{file_sha256(folder / 'config.json')} {shards}".encode()).hexdigest()


def _generate(work: Work, *, beat: Callable[[], None]) -> None:
    """This rank's part, in a world that it joins: its replica's answers, kept one by one by the replica's leader."""
    results, requests = PartialResults(Path(work.arguments.output)), work.requests
    left = results.left(len(requests))
    wanted = [requests[number] for number in left]
    with joined(work.config) as role, contextlib.ExitStack() as stack:
        groups = role.groups
        writer = stack.enter_context(results.writing(replica_writer(groups)))
        total = len(share_of(wanted, dp_size=groups.dp_size, dp_rank=groups.dp_rank))
        progress = stack.enter_context(showing_progress()) if groups.is_leader else None
        replica = f" of replica 1 of {groups.dp_size}" if groups.dp_size > 1 else ""
        ended = num_tokens = 0
        beat()

        def keep(place: int, answer: Answer) -> None:
            nonlocal ended, num_tokens
            ended, num_tokens = ended + 1, num_tokens + len(answer.tokens)
            if writer is not None:
                writer.add(left[place], _row(work, left[place], answer))
            if progress is not None:
                progress(f"generate{replica}", ended, total, "answers")

        if progress is not None:
            progress(f"generate{replica}", 0, total, "answers")  # from here on the rate counts
        began = time.monotonic()
        generate_share(role, wanted, work.options, on_answer=keep, max_sequences=work.arguments.max_sequences)
        if groups.is_leader and ended:
            seconds = max(time.monotonic() - began, 1e-9)
            print(
                f"  {ended:,} answers{replica}, {num_tokens:,} tokens in {seconds:.1f} s, "
                f"{num_tokens / seconds:,.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )


def _row(work: Work, number: int, answer: Answer) -> dict[str, Any]:
    """One row of the output. Raises DataError where the model gives no probabilities."""
    row, index = divmod(number, work.arguments.num_answers)
    logprobs_sum = sum(answer.logprobs)
    if not math.isfinite(logprobs_sum):
        raise DataError(
            f"{work.config.model.load}: the log-probability of an answer to line {work.prompts[row].line} of the "
            f"prompts is {logprobs_sum}; its weights are damaged, or overflow in this dtype: verify them, or convert "
            f"them with --dtype fp32"
        )
    return {
        **work.prompts[row].value.given,
        "index": index,
        "response": work.tokenizer.decode_answer(answer.tokens),
        "response_tokens": answer.tokens,
        "logprobs_sum": logprobs_sum,
        "finish_reason": answer.finish_reason,
    }
