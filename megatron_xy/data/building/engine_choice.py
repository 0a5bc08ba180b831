"""Which engine encodes a corpus: fastokens where it can be trusted, else the tokenizer's own library, said aloud."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

from megatron_xy.data.building.tokenize import BATCH_CHARACTERS, TokenizeTask, TokenShard
from megatron_xy.data.corpus.documents import LineReport, read_part
from megatron_xy.data.encoding.engines import SentencePieceEngine
from megatron_xy.data.encoding.fast_engine import disagreement, unsuitable
from megatron_xy.data.encoding.loaded import loaded_fast_tokenizer
from megatron_xy.data.encoding.tokenizer import Tokenizer
from megatron_xy.data.manifest import EngineEntry

# Compared before fastokens is used: so many documents of the corpus, or so much of it if that is less.
GATE_DOCUMENTS, GATE_CHARACTERS = 1000, 8_000_000


def choose_engine(
    tokenizer: Tokenizer,
    tasks: Sequence[TokenizeTask],
    *,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> EngineEntry:
    """The engine for `tasks`, which hold text; about one CPU second. `say` is told where it is not the fast one.

    Raises DataError where a file that holds the first documents is damaged.
    """
    reference = tokenizer.engine.name
    own_library = EngineEntry(name=reference, reference=reference, conversion_sha256=None)
    if not isinstance(tokenizer.engine, SentencePieceEngine):
        return own_library
    why_not = unsuitable(tokenizer)
    if why_not is None:
        fast = loaded_fast_tokenizer(tokenizer.path)
        why_not = disagreement(fast, _first_texts(tasks))
        if why_not is None:
            return EngineEntry(name=fast.name, reference=reference, conversion_sha256=fast.conversion_sha256)
    say(f"encoding with {reference}, several times slower than fastokens: {why_not}")
    return own_library


def with_checked(engine: EngineEntry, shards: Sequence[TokenShard]) -> EngineEntry:
    """The entry, and how many documents of `shards` were compared with the reference while they were encoded."""
    return engine.model_copy(update={"checked_documents": sum(shard.checked_documents for shard in shards)})


def _first_texts(tasks: Sequence[TokenizeTask]) -> Iterator[list[str]]:
    """The first documents, of very long ones the beginning, in batches of bounded size."""
    texts: list[str] = []
    size = num_documents = characters = 0
    for task in tasks:
        for part in task.parts:
            report = LineReport()  # bad lines are told when the corpus is encoded
            for document in read_part(part, task.fields, report=report):
                texts.append(document.text[:BATCH_CHARACTERS])  # the reference takes some 35 bytes for each
                size += len(texts[-1])
                num_documents += 1
                full = num_documents == GATE_DOCUMENTS or characters + size >= GATE_CHARACTERS
                if full or size >= BATCH_CHARACTERS:
                    yield texts
                    characters += size
                    texts, size = [], 0
                if full:
                    return
    yield texts
