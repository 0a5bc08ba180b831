"""fastokens behind a gate: several times sentencepiece's speed, used where it is known to give the same ids.

It is given our own conversion of the model (sentencepiece_json.py), in which control pieces have names that no text
can hold. Before it is used it must agree with the reference on a set of awkward texts and on the corpus's first
documents; while it is used, on one document in a hundred.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np

from megatron_xy.data.encoding.engines import SentencePieceEngine, TokenBatch
from megatron_xy.data.encoding.sentencepiece_json import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    inexact_reasons,
    parse_model,
    pieces_by_type,
    tokenizer_json,
)
from megatron_xy.data.encoding.tokenizer import Tokenizer

FAST_ENGINE = "fastokens"
CHECKED_SHARE = 100  # one text in so many is compared with the reference
_HASHED_CHARACTERS = 64
_AWKWARD_TEXTS_A_KIND = 2000
_PIECES_A_TEXT = 100
# Blocks of characters: ASCII, Latin, Cyrillic, Hebrew, Arabic, Thai, Kana, Han, Hangul, private use, emoji, unassigned.
_BLOCKS = [
    range(start, start + 0x80)
    for start in (0, 0x80, 0x400, 0x580, 0x600, 0xE00, 0x3040, 0x4E00, 0xAC00, 0xE000, 0x1F600, 0x50000)
]


@lru_cache(maxsize=1)
def unsuitable(tokenizer: Tokenizer) -> str | None:
    """Why fastokens cannot encode as `tokenizer` does, as far as the model tells."""
    if not isinstance(tokenizer.engine, SentencePieceEngine):
        return "it stands in for SentencePiece models only"
    if find_spec(FAST_ENGINE) is None:
        return "it is not installed (pip install 'megatron-xy[fast]')"
    model = parse_model(tokenizer.engine.serialized)
    reasons = inexact_reasons(model)
    if not _spelt_by_pieces(model):
        reasons.append("it has no pieces for the characters of <0x00>..<0xFF>, which it would take for bytes in a text")
    return f"it cannot take this model: {', '.join(reasons)}" if reasons else None


def disagreement(fast: FastTokenizer, first_texts: Iterable[Sequence[str]]) -> str | None:
    """How `fast` differs from its reference on awkward texts, or on the corpus's first ones, given in batches.

    Half a CPU second for a vocabulary of 32,000 and a million tokens of texts.
    """
    model = parse_model(fast.reference.engine.serialized)
    pieces = [piece.piece for piece in model.pieces]
    normal = [piece.piece for piece in model.pieces if piece.type == NORMAL]
    for kind, batches in (("awkward", [awkward_texts(pieces, normal)]), ("of the corpus", first_texts)):
        for texts in batches:
            different = fast.first_difference(texts, fast.encode_unchecked(texts), range(len(texts)))
            if different is not None:
                shown = texts[different][:80]
                return f"{fast.name} differs from {fast.reference.engine.name} on a text {kind}: {shown!r}"
    return None


class FastTokenizer:
    """A SentencePiece tokenizer whose texts fastokens encodes; `unsuitable` and `disagreement` say whether it may.

    Attributes: name (with the version), reference (the tokenizer itself), conversion_sha256 (of the tokenizer.json
    that fastokens is given).
    """

    def __init__(self, reference: Tokenizer) -> None:
        os.environ["FASTOKENS_BPE_THREADS"] = "1"  # read when it is imported; a worker has one core
        native: Any = importlib.import_module(FAST_ENGINE)
        self.name = f"{FAST_ENGINE} {version(FAST_ENGINE)}"
        self.reference = reference
        model = parse_model(reference.engine.serialized)
        conversion = json.dumps(_without_control_names(model), ensure_ascii=False)
        self.conversion_sha256 = hashlib.sha256(conversion.encode()).hexdigest()
        self._engine: Any = native.Tokenizer.from_json_str(conversion)

    def encode_flat(self, texts: Sequence[str]) -> TokenBatch:
        """As `Tokenizer.encode_flat`."""
        return self.reference.checked(self.encode_unchecked(texts))

    def encode_unchecked(self, texts: Sequence[str]) -> TokenBatch:
        """As `encode_flat`, but the ids may be any, where it is not yet known whether fastokens can be trusted."""
        ids, offsets = self._engine.encode_batch_flat(list(texts), add_special_tokens=False, split_special_tokens=True)
        ends = np.frombuffer(offsets, dtype="<u8").astype(np.int64)
        return TokenBatch(np.frombuffer(ids, dtype="<i4"), ends[1:] - ends[:-1])

    def first_difference(self, texts: Sequence[str], batch: TokenBatch, chosen: Sequence[int]) -> int | None:
        """Which of the `chosen` texts, encoded in `batch` with all the others, the reference encodes otherwise."""
        expected = self.reference.encode_flat([texts[index] for index in chosen])
        lengths, ends = batch.lengths[chosen], np.cumsum(batch.lengths)[chosen]
        unequal = np.flatnonzero(lengths != expected.lengths)
        if not len(unequal) and len(expected.ids):
            spans = zip(ends - lengths, ends, strict=True)
            differing = np.flatnonzero(np.concatenate([batch.ids[start:end] for start, end in spans]) != expected.ids)
            unequal = np.searchsorted(np.cumsum(lengths), differing, side="right")
        return chosen[int(unequal[0])] if len(unequal) else None


def chosen_texts(texts: Sequence[str]) -> list[int]:
    """Which of `texts` are compared with the reference: one in CHECKED_SHARE, by a hash of beginning and length."""
    hashes = (zlib.crc32(text[:_HASHED_CHARACTERS].encode(), len(text)) for text in texts)
    return [index for index, value in enumerate(hashes) if value % CHECKED_SHARE == 0]


def _spelt_by_pieces(model: Any) -> bool:
    """Whether each character of "<0x00>" to "<0xFF>" is a piece; else a text that spells such a name gives the byte."""
    pieces = pieces_by_type(model)
    return {*"".join(pieces[BYTE])} <= {*pieces[NORMAL]}


def _without_control_names(model: Any) -> dict[str, Any]:
    """The conversion with a blank before each control piece: a normalised text holds none."""
    contents = tokenizer_json(model)
    hidden = {piece.piece: f" {piece.piece}" for piece in model.pieces if piece.type in (CONTROL, UNKNOWN)}
    bpe = contents["model"]
    bpe["vocab"] = {hidden.get(name, name): index for name, index in bpe["vocab"].items()}
    bpe["unk_token"] = hidden[bpe["unk_token"]]
    return contents


def awkward_texts(pieces: Sequence[str], normal: Sequence[str]) -> list[str]:
    """Texts on which tokenizers differ, made for a vocabulary; the same ones each time.

    pieces: all of the vocabulary, control pieces too; normal: those that text is made of.
    """
    chance = random.Random(0)
    repeated = sorted({piece[0] for piece in normal if len(piece) > 1 and len(set(piece)) == 1}) or [SPACE]
    # Two of these can overlap in a text: "ere" in "erere". Which one is joined first is a matter of convention.
    may_be = (piece for piece in normal if len(piece) > 2 and piece[0] in piece[1:])
    bordered = [p for p in may_be if any(p.startswith(p[cut:]) for cut in range(1, len(p)))] or [SPACE]
    characters = sorted(set("".join(normal)))
    texts = ["", " ", "  ", " a", "a ", "  a  b  ", "\t", "\r\n", "\0", "a\0b", "\ufeff", "a\ufeffb", "\u3000"]
    texts += [
        "\u00a0a",
        "e\u0301",
        "\u00e9",
        "\u202eabc",
        "\ufdfa",
        "\U0001f98a" * 50,
        "\U0001f469\u200d\U0001f467",
        "\U0010ffff",
    ]
    texts += [chr(code) for code in range(0x250)] + [f"a{chr(code)} {chr(code)}b" for code in range(0x250)]
    # A blank before each, as models put one before a text: it is encoded as by itself, for a third of the cost.
    spelt = [piece for piece in pieces if len(piece) > 1]
    texts += ["\n ".join(spelt[first : first + _PIECES_A_TEXT]) for first in range(0, len(spelt), _PIECES_A_TEXT)]
    texts += [f"a{piece}b {piece}" for piece in sorted({*pieces} - {*normal})]  # control and byte pieces spelt out
    texts += [character * length for character in repeated for length in range(2, 80)]
    for _ in range(_AWKWARD_TEXTS_A_KIND):
        few = [*chance.choices(repeated, k=2), *chance.choices(characters, k=2), SPACE]
        texts.append("".join(chance.choices(few, k=chance.randint(1, 40))))
        texts.append("".join(chance.choices(bordered, k=chance.randint(1, 6))))
        texts.append("".join(chance.choices(normal, k=chance.randint(1, 8))))
        texts.append("".join(chr(chance.choice(_BLOCKS)[chance.randrange(0x80)]) for _ in range(chance.randint(1, 20))))
    marked = texts[-_AWKWARD_TEXTS_A_KIND:]  # U+2581 itself may stand in a text, too
    return [text.replace(SPACE, " ") for text in texts] + marked
