"""The tokenizer: text -> token ids and back, from a SentencePiece tokenizer.model or an HF tokenizer.json.

Text never yields a control id: "<s>" in a document is text; control ids are added by whoever builds a sequence.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_xy.data.encoding.engines import (
    TOKENIZER_CONFIG,
    Engine,
    PlacedTokens,
    SentencePieceEngine,
    TokenBatch,
    TokenizersEngine,
)
from megatron_xy.errors import ConfigError, DataError

TOKENIZER_FILE = "tokenizer.model"
TOKENIZER_JSON = "tokenizer.json"


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer in `path`: a SentencePiece model, an HF tokenizer.json (any .json), or a folder that holds one.

    A folder's tokenizer.model goes before its tokenizer.json. Raises ConfigError (missing) and DataError (damaged, or
    text could yield control ids).
    """
    file = tokenizer_file(path)
    serialized = file.read_bytes()
    if not serialized:
        raise DataError(f"tokenizer ({file}) is empty; copy it again")
    engine = TokenizersEngine if file.suffix == ".json" else SentencePieceEngine
    return Tokenizer(file, engine(serialized, file))


def tokenizer_file(path: Path | str) -> Path:
    """The file that `load_tokenizer` reads. Raises ConfigError where there is none."""
    file = Path(path)
    if file.is_dir():
        found = [file / name for name in (TOKENIZER_FILE, TOKENIZER_JSON) if (file / name).is_file()]
        if not found:
            raise ConfigError(
                f"tokenizer ({file}): the folder holds no {TOKENIZER_FILE} and no {TOKENIZER_JSON}; name one that does"
            )
        file = found[0]
    if not file.is_file():
        raise ConfigError(f"tokenizer ({file}) does not exist; name a {TOKENIZER_FILE} or a {TOKENIZER_JSON}")
    return file


class Tokenizer:
    """A tokenizer file, read by the library it belongs to.

    Attributes: path, sha256 (of the file), engine, vocab_size, bos_id, eos_id, pad_id (None where there is none), and
    file_name: tokenizer.model or tokenizer.json, what a copy of the file is called; config_path: of the
    tokenizer_config.json beside a tokenizer.json, if there is one; control_tokens: {spelling: id}; special_tokens:
    {bos_token: spelling} and likewise eos_token and pad_token, those that there are.
    """

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path = path
        self.engine = engine
        self.sha256 = hashlib.sha256(engine.serialized).hexdigest()
        self.file_name = TOKENIZER_JSON if path.suffix == ".json" else TOKENIZER_FILE
        config = path.with_name(TOKENIZER_CONFIG)
        self.config_path = config if path.suffix == ".json" and config.is_file() else None
        self.vocab_size = engine.vocab_size
        self.bos_id, self.eos_id, self.pad_id = engine.bos_id, engine.eos_id, engine.pad_id
        self.control_tokens = {engine.spelling(index): index for index in engine.control_ids}
        special = {"bos_token": engine.bos_id, "eos_token": engine.eos_id, "pad_token": engine.pad_id}
        self.special_tokens = {name: engine.spelling(index) for name, index in special.items() if index is not None}
        self._is_control = np.zeros(engine.vocab_size, dtype=bool)
        self._is_control[engine.control_ids] = True

    @property
    def without_end_token(self) -> str:
        """What is said to who wants an end token where `eos_id` is None."""
        where = ""
        if self.file_name == TOKENIZER_JSON:
            beside = "has none" if self.config_path is not None else "is not there"
            where = f": it is looked for in {TOKENIZER_CONFIG} beside it, which {beside}"
        return f"the tokenizer {self.path} has no end token{where}"

    def text_prompt(self, text: str) -> list[int]:
        """The ids of a text as it stands, behind the begin token if there is one: what a model goes on from."""
        return [*([] if self.bos_id is None else [self.bos_id]), *self.encode(text).tolist()]

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token ids [length] of one text, without control ids."""
        return self.encode_flat([text]).ids

    def encode_flat(self, texts: Sequence[str]) -> TokenBatch:
        """Token ids of each text, without control ids. A text must hold no lone surrogates."""
        return self.checked(self.engine.encode(texts))

    def encode_parts(self, parts: Sequence[tuple[str, bool]]) -> PlacedTokens:
        """The ids of one text in parts, and where each comes from: (text, False), which never yields a control id, or
        (spelling, True) of one of `control_tokens`, which does."""
        placed = self.engine.encode_parts(parts, self.control_tokens)
        num_controls = int(self._is_control[placed.ids].sum())
        assert num_controls == sum(is_control for _, is_control in parts), "text must never yield a control id"
        return placed

    def checked(self, batch: TokenBatch) -> TokenBatch:
        """The batch itself: all its ids are in the vocabulary, and none is a control id."""
        if len(batch.ids):
            lowest, highest = int(batch.ids.min()), int(batch.ids.max())
            assert 0 <= lowest <= highest < self.vocab_size, "an engine's ids must lie in the vocabulary"
            # Most often all control ids lie below those of text, and no gather over the batch is needed.
            if self._is_control[lowest : highest + 1].any():
                assert not self._is_control[batch.ids].any(), "text must never yield a control id"
        return batch

    def decode_runs(self, ids: NDArray[Any], marks: NDArray[Any]) -> list[tuple[str, bool]]:
        """The text of a sequence in runs of tokens of equal `marks` [tokens] bool, control tokens spelt out.

        A character whose bytes fall into two runs stands in the second.
        """
        runs: list[tuple[str, bool]] = []
        is_control = self._is_control[ids]
        borders = np.flatnonzero((np.diff(marks) != 0) | is_control[1:] | is_control[:-1]) + 1
        begin, known = 0, ""  # the text since the last control token: a tokenizer's spaces depend on what came before
        for first, last in itertools.pairwise([0, *borders.tolist(), len(ids)]):
            if is_control[first]:
                text, begin, known = self.engine.spelling(int(ids[first])), last, ""
            else:
                whole = self.decode(ids[begin:last]).rstrip("\ufffd" if last < len(ids) else "")
                text, known = whole.removeprefix(known), whole
            if runs and runs[-1][1] == bool(marks[first]):
                text = runs.pop()[0] + text
            runs.append((text, bool(marks[first])))
        return runs

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The text of token ids; control ids yield none. Raises DataError for an id outside the vocabulary."""
        plain = [int(index) for index in ids]
        if plain and not 0 <= min(plain) <= max(plain) < self.vocab_size:
            raise DataError(f"token ids {min(plain)}..{max(plain)} are outside 0..{self.vocab_size} of {self.path}")
        return self.engine.decode(plain)

    def decode_answer(self, ids: Sequence[int]) -> str:
        """The text of what a model has said. A model may have rows beyond the vocabulary: their ids yield none."""
        return self.decode([index for index in ids if index < self.vocab_size])
