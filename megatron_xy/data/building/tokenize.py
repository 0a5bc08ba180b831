"""Documents -> token shards: each part of the corpus (about 8 MB) becomes one indexed file a source, by one worker.

Workers share nothing but files. The cut into shards depends on the corpus alone, so the result is the same for any
number of workers; a shard's receipt is written last, and a shard that has one is not done again. Text is encoded by
fastokens where the task says so, else by the tokenizer's own library; a conversation always by the latter, which
knows where in the text each token stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_xy.data.building.workers import Advance
from megatron_xy.data.chat.conversations import BadConversation
from megatron_xy.data.chat.encode import Chat, ChatOptions, ChatTokens
from megatron_xy.data.chat.template import ChatTemplate
from megatron_xy.data.corpus.documents import BadLinePolicy, Document, LineReport, Part, read_part
from megatron_xy.data.corpus.row_contents import RowFields
from megatron_xy.data.encoding.engines import TokenBatch
from megatron_xy.data.encoding.fast_engine import FastTokenizer, chosen_texts
from megatron_xy.data.encoding.loaded import loaded_fast_tokenizer, loaded_tokenizer
from megatron_xy.data.encoding.tokenizer import Tokenizer
from megatron_xy.data.indexed import bin_path, dtype_for, idx_path
from megatron_xy.data.origins import TracedWriter, document_rows, trace_path
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.storage import write_text

BATCH_CHARACTERS = 1_000_000  # handed to the tokenizer at a time
MOST_SOURCES = 256  # each has files of its own open while a shard is written


@dataclass(frozen=True)
class TokenizeTask:
    """One shard: parts of the corpus, and how to read and encode them. Output: FOLDER/SOURCE.{bin,idx}, FOLDER.json."""

    folder: Path
    parts: tuple[Part, ...]
    tokenizer: Path
    fields: RowFields
    append_eod: bool
    bad_lines: BadLinePolicy
    fast: bool = False  # by fastokens, which engine_choice.py found to be exact here
    chat: ChatOptions | None = None  # None: a row that holds a conversation is no document


@dataclass(frozen=True)
class TokenShard:
    """The receipt of one finished shard; its sources in the order of their names."""

    folder: Path
    documents: dict[str, int]
    report: LineReport
    engine: str = ""  # what encoded it, with its version
    checked_documents: int = 0  # of them, compared with what the tokenizer's own library makes of them

    @staticmethod
    def receipt(folder: Path) -> Path:
        """FOLDER.json"""
        return folder.with_name(folder.name + ".json")


class MadeMeanwhile(Exception):
    """Another build, whose claims do not reach this machine, has made the shard, and may be reading it."""


def leave_alone_if_made(folder: Path) -> None:
    """Raises MadeMeanwhile where the shard in `folder` is finished: its files stay the ones that they are."""
    if read_receipt(folder) is not None:
        raise MadeMeanwhile


def tokenize_documents(task: TokenizeTask, advance: Advance) -> TokenShard:
    """One token shard of texts and conversations. Memory: one batch of text and one document.

    Under "fail" nothing is encoded after the first bad line; all bad lines of the shard are in the report.
    Raises DataError (a damaged file; fastokens differs from the reference), ConfigError (too many sources).
    """
    tokenizer = loaded_tokenizer(task.tokenizer)
    fast = loaded_fast_tokenizer(task.tokenizer) if task.fast else None
    report, num_checked = LineReport(), 0
    with ExitStack() as stack:
        writers: dict[str, TracedWriter] = {}
        write = partial(_write, task=task, tokenizer=tokenizer, writers=writers, stack=stack, report=report)
        for batch in _batches(task, report, advance):
            if report.bad_lines and task.bad_lines == "fail":
                continue
            # A source holds texts or conversations: either by itself, in order of the corpus.
            texts = [document.text for document in batch.texts]
            encoded = tokenizer.encode_flat(texts) if fast is None else fast.encode_flat(texts)
            if fast is not None:
                num_checked += _check(batch.texts, encoded, fast=fast)
            write(batch.texts, encoded, learned=None)
            if batch.chats:
                ids = TokenBatch.of([tokens.ids for _, tokens in batch.chats])
                learned = np.concatenate([tokens.learned for _, tokens in batch.chats])
                write([document for document, _ in batch.chats], ids, learned=learned)
        leave_alone_if_made(task.folder)
    counts = {name: writers[name].num_documents for name in sorted(writers)}
    documents = {name: count for name, count in counts.items() if count}
    name = tokenizer.engine.name if fast is None else fast.name
    return TokenShard(task.folder, documents, report, engine=name, checked_documents=num_checked)


def write_receipt(shard: TokenShard) -> None:
    """Say that all files of the shard are there."""
    receipt = asdict(shard)
    del receipt["folder"]  # which may be moved
    shard.folder.parent.mkdir(parents=True, exist_ok=True)
    write_text(TokenShard.receipt(shard.folder), json.dumps(receipt))


def read_receipt(folder: Path) -> TokenShard | None:
    """The receipt of the shard in `folder`, if it is finished; one that cannot be read, or misses a file, is none."""
    path = TokenShard.receipt(folder)
    if not path.is_file():
        return None
    try:
        receipt = json.loads(path.read_bytes())
        shard = TokenShard(folder, **{**receipt, "report": LineReport(**receipt["report"])})
        prefixes = [folder / source for source in shard.documents]
    except (ValueError, TypeError, KeyError):  # cut, or another file's contents
        return None
    files = [path for prefix in prefixes for path in (bin_path(prefix), idx_path(prefix), trace_path(prefix))]
    return shard if all(path.is_file() for path in files) else None


@dataclass
class _Batch:
    """Documents read one after another, each kind sorted by source; stable, so within a source as in the corpus."""

    texts: list[Document] = field(default_factory=list)
    chats: list[tuple[Document, ChatTokens]] = field(default_factory=list)

    def sort(self) -> _Batch:
        self.texts.sort(key=lambda document: document.source)
        self.chats.sort(key=lambda chat: chat[0].source)
        return self


def _batches(task: TokenizeTask, report: LineReport, advance: Advance) -> Iterator[_Batch]:
    batch, characters = _Batch(), 0
    for part in task.parts:
        for document in read_part(part, task.fields, report=report, advance=advance):
            if document.conversation is None:
                batch.texts.append(document)
            elif (tokens := _conversation_tokens(document, task=task, report=report)) is not None:
                batch.chats.append((document, tokens))
            characters += len(document.text)
            if characters >= BATCH_CHARACTERS:
                yield batch.sort()
                batch, characters = _Batch(), 0
    if batch.texts or batch.chats:
        yield batch.sort()


def _conversation_tokens(document: Document, *, task: TokenizeTask, report: LineReport) -> ChatTokens | None:
    """None where the line is a bad one, which is noted."""
    assert task.chat is not None and document.conversation is not None, "asked for where there is one"
    chat = _chat(loaded_tokenizer(task.tokenizer), task.chat.template, task.chat.name)
    conversation = document.conversation
    try:
        tokens = chat.conversation(
            conversation.messages, tools=conversation.tools, last_turn_only=task.chat.last_turn_only
        )
    except BadConversation as error:
        report.bad(document.path, document.line, str(error))
        return None
    if task.chat.overflow == "refuse" and len(tokens.ids) > task.chat.longest:
        report.bad(
            document.path,
            document.line,
            f"a conversation of {len(tokens.ids)} tokens, longer than the largest bucket ({task.chat.longest}); give a "
            f"larger one, or chat_overflow truncate_left or split",
        )
        return None
    return tokens


def _check(batch: list[Document], encoded: TokenBatch, *, fast: FastTokenizer) -> int:
    """Compare some of a batch with the reference; returns how many. Raises DataError that names the document."""
    texts = [document.text for document in batch]
    chosen = chosen_texts(texts)
    different = fast.first_difference(texts, encoded, chosen)
    if different is not None:
        document = batch[different]
        raise DataError(
            f"{document.path}:{document.line}: {fast.name} encodes this document otherwise than "
            f"{fast.reference.engine.name}; uninstall fastokens and run again, shards that it made are then done anew"
        )
    return len(chosen)


def _write(
    batch: list[Document],
    encoded: TokenBatch,
    *,
    learned: NDArray[np.bool_] | None,
    task: TokenizeTask,
    tokenizer: Tokenizer,
    writers: dict[str, TracedWriter],
    stack: ExitStack,
    report: LineReport,
) -> None:
    """Append a batch, sorted by source, to the writers of its sources, which are opened as sources turn up.

    learned [tokens]: of conversations; None: the batch is of texts.
    """
    dtype = dtype_for(tokenizer.vocab_size)
    kept = np.flatnonzero(encoded.lengths)
    documents = [batch[index] for index in kept.tolist()]
    report.skipped_empty += len(batch) - len(documents)
    ids, lengths = encoded.ids.astype(dtype), encoded.lengths[kept]
    if task.append_eod and learned is None:
        assert tokenizer.eos_id is not None, "the build refuses append_eod where there is no end token"
        ids, lengths = np.insert(ids, np.cumsum(lengths), tokenizer.eos_id), lengths + 1
    first = start = 0
    for source, run in groupby(documents, key=attrgetter("source")):
        written = list(run)
        if source not in writers:
            if len(writers) == MOST_SOURCES:
                raise ConfigError(
                    f"source_field ({task.fields.source}) names more than {MOST_SOURCES} sources in "
                    f"{batch[0].path}; name a field that says where a text comes from, not which it is"
                )
            writer = TracedWriter(task.folder / source, dtype=dtype, masked=learned is not None)
            writers[source] = stack.enter_context(writer)
        last = first + len(written)
        stop = start + int(lengths[first:last].sum())
        if writers[source].masked != (learned is not None):
            raise DataError(f"{written[0].path}:{written[0].line}: {mixed_source(source)}")
        writers[source].add_documents(ids[start:stop], lengths=lengths[first:last])
        if learned is not None:
            writers[source].add_mask(learned[start:stop])
        writers[source].add_rows(document_rows([d.file for d in written], [d.line for d in written]))
        first, start = last, stop


def mixed_source(source: str) -> str:
    """Why a source that holds texts and conversations is refused."""
    return (
        f"source {source} holds texts and conversations; give them sources of their own with a source field, so that "
        f"each has its weight and its loss"
    )


@lru_cache(maxsize=1)
def _chat(tokenizer: Tokenizer, template: str, name: str) -> Chat:
    return Chat(tokenizer, ChatTemplate(template, name=name, tokenizer=tokenizer))
