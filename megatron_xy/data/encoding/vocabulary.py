"""A SentencePiece BPE model with more pieces: which ones, from lists or a corpus, how they are spelt, what they save.

Old ids stay. New pieces have lower scores than all old ones, so they join only what no old piece joins: text in which
no new piece applies is encoded as before.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from megatron_xy.data.corpus.inputs import read_documents
from megatron_xy.data.encoding.sentencepiece_json import NORMAL, SPACE, parse_model
from megatron_xy.errors import ConfigError, DataError

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_HAN_CHARACTER, _HAN_RUN = re.compile(f"[{HAN}]"), re.compile(f"[{HAN}]{{2,}}")
CHINESE_SHARE = 0.3  # of its characters: from here on a document counts as Chinese
LONGEST_PIECE = 8  # characters of a piece taken from a corpus
MOST_RUNS = 5_000_000  # of Chinese characters that pieces are learned from, drawn from the corpus at random
MOST_REPORTED_CHARACTERS = 20_000_000
BATCH_CHARACTERS = 1_000_000  # encoded at a time
_SAID_EVERY = 1_000_000_000
Say = Callable[[str], None]


@dataclass(frozen=True)
class Tally:
    """Tokens of the same texts before and after, and the share of them in Chinese documents."""

    characters: int = 0
    before: int = 0
    after: int = 0

    def add(self, characters: int, before: int, after: int) -> Tally:
        """With another text's."""
        return Tally(self.characters + characters, self.before + before, self.after + after)

    def __str__(self) -> str:
        ratio = self.after / self.before if self.before else 1.0
        return f"{self.before:,} -> {self.after:,} tokens ({ratio:.4f}) for {self.characters:,} characters"


def listed_characters(file: Path) -> list[str]:
    """The characters of a text file in their order, however it is cut into lines; whitespace is none."""
    return list(dict.fromkeys("".join(_text_of(file).split())))


def listed_pieces(file: Path) -> list[str]:
    """The lines of a text file, each a piece; spaces are U+2581 in pieces."""
    lines = (line.strip("\r") for line in _text_of(file).split("\n"))
    return [line.replace(" ", SPACE) for line in dict.fromkeys(lines) if line]


def frequent_characters(corpus: str, *, say: Say) -> list[str]:
    """The Chinese characters of a corpus, the most frequent first. Raises ConfigError or DataError as `data build`."""
    counts: Counter[str] = Counter()
    for text in _texts(corpus, say=say):
        counts.update(text)
    return sorted(filter(_HAN_CHARACTER.match, counts), key=lambda character: (-counts[character], character))


def frequent_pieces(corpus: str, *, number: int, say: Say) -> list[str]:
    """At most `number` pieces of several Chinese characters, as byte pair encoding of a corpus finds them.

    The corpus is read twice, and never held.
    """
    characters: set[str] = set()
    for run in _han_runs(corpus, say=say):
        characters.update(run)
    if not characters:
        raise DataError(f"corpus ({corpus}) holds no two Chinese characters side by side; name one of Chinese text")
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_han_runs(corpus, say=say),
        model_writer=trained,
        model_type="bpe",
        vocab_size=len(characters) + number + 4,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        max_sentencepiece_length=LONGEST_PIECE,
        input_sentence_size=MOST_RUNS,
        shuffle_input_sentence=True,
        num_threads=os.cpu_count() or 1,
        minloglevel=2,
    )
    pieces = (piece.piece for piece in parse_model(trained.getvalue()).pieces if piece.type == NORMAL)
    return [piece for piece in pieces if len(piece) > 1]


def choose_pieces(model: Any, candidates: Iterable[str], *, size: int) -> tuple[list[str], list[str]]:
    """(the first candidates that bring the vocabulary to `size`, those left out because nothing could build them).

    Characters of a piece that are none themselves come before it. A longer piece is built of two others. Raises
    ConfigError where the candidates are too few, or the vocabulary is as large already.
    """
    known = {piece.piece for piece in model.pieces}
    room = size - len(model.pieces)
    if room < 1:
        raise ConfigError(f"--size ({size}): the tokenizer has {len(model.pieces)} pieces already; name a larger size")
    chosen: list[str] = []
    impossible: list[str] = []
    for candidate in candidates:
        if candidate in known:
            continue
        needed = [character for character in dict.fromkeys(candidate) if character not in known]
        if len(candidate) > 1:
            halves = ((candidate[:cut], candidate[cut:]) for cut in range(1, len(candidate)))
            if not any(all(half in known or len(half) == 1 for half in pair) for pair in halves):
                impossible.append(candidate)
                continue
            needed.append(candidate)
        if len(chosen) + len(needed) <= room:
            chosen += needed
            known.update(needed)
        if len(chosen) == room:
            return chosen, impossible
    raise ConfigError(
        f"--size ({size}): only {len(chosen)} new pieces were found for {room} places; name more of them, or --size "
        f"{len(model.pieces) + len(chosen)}"
    )


def extended_model(model: Any, pieces: Iterable[str]) -> bytes:
    """The model with the pieces behind its own, in their order, as SentencePiece stores it."""
    extended = type(model)()
    extended.CopyFrom(model)
    score = np.float32(min(piece.score for piece in model.pieces))
    for piece in pieces:
        score = min(score - np.float32(1), np.nextafter(score, np.float32(-np.inf)))
        extended.pieces.add(piece=piece, score=float(score), type=NORMAL)
    extended.trainer_spec.vocab_size = len(extended.pieces)
    serialized: bytes = extended.SerializeToString()
    return serialized


def spellings(model: Any, pieces: Iterable[str]) -> list[list[int]]:
    """Of each piece the ids of the model's own pieces that spell it, each character on its own."""
    plain = type(model)()
    plain.CopyFrom(model)
    plain.normalizer_spec.add_dummy_prefix = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=plain.SerializeToString())
    return [
        [index for character in piece for index in processor.encode(character.replace(SPACE, " "))] for piece in pieces
    ]


def compare(before: bytes, after: bytes, corpus: str, *, say: Say) -> dict[str, Tally]:
    """Tokens of a corpus under two models, of all documents and of the Chinese ones; of its beginning, if it is long.

    Raises DataError where a text does not come back the same.
    """
    old, new = (sentencepiece.SentencePieceProcessor(model_proto=model) for model in (before, after))
    tallies = {"all documents": Tally(), "Chinese documents": Tally()}
    for texts in _batches(_texts(corpus, say=say)):
        olds, news = (model.encode(texts, num_threads=os.cpu_count() or 1) for model in (old, new))
        for text, one, other in zip(texts, olds, news, strict=True):
            if old.decode(one) != new.decode(other):
                raise DataError(f"the extended tokenizer gives another text than the old one for {text[:80]!r}")
            counts = (len(text), len(one), len(other))
            tallies["all documents"] = tallies["all documents"].add(*counts)
            if len(_HAN_CHARACTER.findall(text)) >= CHINESE_SHARE * len(text):
                tallies["Chinese documents"] = tallies["Chinese documents"].add(*counts)
        if tallies["all documents"].characters >= MOST_REPORTED_CHARACTERS:
            break
    return tallies


def _text_of(file: Path) -> str:
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such file; name a text file in UTF-8, or corpus:PATH")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: {error}") from None


def _texts(corpus: str, *, say: Say) -> Iterator[str]:
    """Every text of the corpus; says how far it is."""
    characters, told = 0, 0
    for document in read_documents([corpus]):
        yield document.text
        characters += len(document.text)
        if characters // _SAID_EVERY > told:
            told = characters // _SAID_EVERY
            say(f"{corpus}: {characters / 1e9:.0f} billion characters read")


def _han_runs(corpus: str, *, say: Say) -> Iterator[str]:
    """Every run of Chinese characters side by side."""
    for text in _texts(corpus, say=say):
        yield from _HAN_RUN.findall(text)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
