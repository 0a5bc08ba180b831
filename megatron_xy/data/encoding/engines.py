"""Texts -> token ids in bulk, by the library a tokenizer file belongs to: sentencepiece (.model) or tokenizers (.json).

These two define what the ids of a text are. Each keeps control tokens out of texts: spelt out, they are text.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
from numpy.typing import NDArray
from sentencepiece import sentencepiece_pb2

from megatron_xy.errors import ConfigError, DataError

TOKENIZER_CONFIG = "tokenizer_config.json"

# sentencepiece 0.2.3 and newer write ids straight into arrays; older ones only give lists.
_ENCODE_OPTIONS: dict[str, Any] = (
    {"return_type": "numpy"}
    if "return_type" in inspect.signature(sentencepiece.SentencePieceProcessor.Encode).parameters
    else {"out_type": int}
)


@dataclass(frozen=True)
class TokenBatch:
    """The ids of many texts back to back: ids [tokens], lengths [texts]."""

    ids: NDArray[np.int32]
    lengths: NDArray[np.int64]

    @staticmethod
    def of(encoded: Sequence[Any]) -> TokenBatch:
        """The ids of each text joined."""
        arrays = [np.asarray(ids, dtype=np.int32) for ids in encoded]
        lengths = np.fromiter((len(ids) for ids in arrays), dtype=np.int64, count=len(arrays))
        return TokenBatch(np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32), lengths)


@dataclass(frozen=True)
class PlacedTokens:
    """The ids [tokens] of a text, and of what each was made: characters begins[i] to ends[i] of it, [tokens] each.

    Where several tokens make up one character, all but the last may have an empty span.
    """

    ids: NDArray[np.int32]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]


class Engine(Protocol):
    """What a tokenizer asks of a library. Ids of `control_ids` never come out of a text."""

    name: str  # with its version
    serialized: bytes
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    control_ids: list[int]

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        """The ids of texts without lone surrogates."""

    def encode_parts(self, parts: Sequence[tuple[str, bool]], control_tokens: dict[str, int]) -> PlacedTokens:
        """The ids of one text in parts: (text, False), or (the spelling of a control token, True), which gives its id.

        As transformers encodes the whole, a control token being one wherever it is spelt; but not within a text part.
        """

    def decode(self, ids: list[int]) -> str:
        """The text of ids; control ids yield none."""

    def spelling(self, index: int) -> str:
        """What a piece is called in the vocabulary."""


class SentencePieceEngine:
    """A SentencePiece model. Raises DataError where `serialized` is none; `path` is named then."""

    def __init__(self, serialized: bytes, path: Path) -> None:
        try:
            # From memory, so that a hash of the bytes is the hash of what was loaded.
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=serialized)
        except RuntimeError as error:
            raise DataError(f"tokenizer ({path}) is no SentencePiece model, or a damaged one: {error}") from error
        self.name = f"sentencepiece {version('sentencepiece')}"
        self.serialized = serialized
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id = _known(self._model.bos_id())
        self.eos_id = _known(self._model.eos_id())
        self.pad_id = _known(self._model.pad_id())
        self.control_ids = [index for index in range(self.vocab_size) if self._model.is_control(index)]

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        """The ids of texts without lone surrogates."""
        return TokenBatch.of(self._model.encode(list(texts), num_threads=1, **_ENCODE_OPTIONS))

    def encode_parts(self, parts: Sequence[tuple[str, bool]], control_tokens: dict[str, int]) -> PlacedTokens:
        """The ids of one text in parts."""
        return _placed_apart(parts, control_tokens, self._placed)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; control ids yield none."""
        return str(self._model.decode(ids))

    def spelling(self, index: int) -> str:
        """What a piece is called in the vocabulary."""
        return str(self._model.id_to_piece(index))

    def _placed(self, text: str) -> list[tuple[int, int, int]]:
        serialized = self._model.encode(text, out_type="serialized_proto")
        pieces = sentencepiece_pb2.SentencePieceText.FromString(serialized).pieces
        if text.isascii():
            return [(piece.id, piece.begin, piece.end) for piece in pieces]
        # Its places are in bytes of UTF-8.
        sizes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        bytes_before = np.cumsum(1 + (sizes > 0x7F) + (sizes > 0x7FF) + (sizes > 0xFFFF))
        places = np.array([(piece.begin, piece.end) for piece in pieces], dtype=np.int64).reshape(-1, 2)
        characters = np.searchsorted(bytes_before, places, side="right").tolist()
        return [(piece.id, begin, end) for piece, (begin, end) in zip(pieces, characters, strict=True)]


class TokenizersEngine:
    """A tokenizer.json, read with Hugging Face's tokenizers; bos, eos and pad are those of tokenizer_config.json.

    Its special tokens are the control tokens. Added tokens that are not special are part of its vocabulary, like any
    other word. Raises ConfigError (the package is missing) and DataError (damaged; texts are not always encoded to the
    same ids, or to control ids); `path` is named then, and TOKENIZER_CONFIG is looked for beside it.
    """

    def __init__(self, serialized: bytes, path: Path) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a build's worker has one core
        try:
            library: Any = importlib.import_module("tokenizers")
        except ModuleNotFoundError as error:
            raise ConfigError(f"tokenizer ({path}) needs {error.name}; pip install 'megatron-xy[hf]'") from error
        try:
            self._tokenizer = library.Tokenizer.from_str(serialized.decode("utf-8"))
        except Exception as error:  # the library raises no narrower type
            raise DataError(f"tokenizer ({path}) is no tokenizer.json, or a damaged one: {error}") from error
        self.name = f"tokenizers {version('tokenizers')}"
        self.serialized = serialized
        self._path = path
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()  # a saved maximum would cut documents
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        added = self._tokenizer.get_added_tokens_decoder().items()
        control = {index: token.content for index, token in added if token.special and token.content != unknown}
        self.control_ids = sorted(control)
        names = _special_names(path.with_name(TOKENIZER_CONFIG))
        self.bos_id, self.eos_id, self.pad_id = (self._id_of(name, path) for name in names)
        if getattr(self._tokenizer.model, "dropout", None):
            raise DataError(f"tokenizer ({path}) drops merges at random (dropout); set it to null in the file")
        for index, content in control.items():
            encoded = self.encode([content, f"a {content} b", f"a{content}b"]).ids
            if not set(self.control_ids).isdisjoint(encoded.tolist()):
                raise DataError(
                    f"tokenizer ({path}): the text {content!r} becomes control id {index}, so documents could forge "
                    "it; its model must not hold the special token as a word"
                )

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        """The ids of texts without lone surrogates."""
        with self._encoding_errors():
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return TokenBatch.of([encoding.ids for encoding in encodings])

    def encode_parts(self, parts: Sequence[tuple[str, bool]], control_tokens: dict[str, int]) -> PlacedTokens:
        """The ids of one text in parts."""
        texts = [text for text, is_control in parts if not is_control]
        if any(spelling in text for text in texts for spelling in control_tokens):
            return _placed_apart(parts, control_tokens, self._placed)
        # In one piece: what stands beside a control token may be encoded otherwise than at the beginning of a text.
        self._tokenizer.encode_special_tokens = False
        try:
            return _placed(self._placed("".join(text for text, _ in parts)))
        finally:
            self._tokenizer.encode_special_tokens = True

    def decode(self, ids: list[int]) -> str:
        """The text of ids; control ids yield none."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def spelling(self, index: int) -> str:
        """What a piece is called in the vocabulary."""
        return str(self._tokenizer.id_to_token(index))

    def _placed(self, text: str) -> list[tuple[int, int, int]]:
        with self._encoding_errors():
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return [(index, *place) for index, place in zip(encoding.ids, encoding.offsets, strict=True)]

    @contextmanager
    def _encoding_errors(self) -> Iterator[None]:
        """Turns what the library says of a text that it cannot encode into a DataError."""
        try:
            yield
        except Exception as error:  # the library raises no narrower type
            raise DataError(
                f"tokenizer ({self._path}) cannot encode every text: {error}; its model needs an unk_token that its "
                "vocabulary holds"
            ) from error

    def _id_of(self, name: str | None, path: Path) -> int | None:
        index: int | None = None if name is None else self._tokenizer.token_to_id(name)
        if name is not None and index is None:
            raise DataError(f"{path.with_name(TOKENIZER_CONFIG)} names the token {name!r}, which {path} does not hold")
        return index


def _placed_apart(
    parts: Sequence[tuple[str, bool]],
    control_tokens: dict[str, int],
    encode: Callable[[str], list[tuple[int, int, int]]],
) -> PlacedTokens:
    """Each part encoded by itself."""
    rows: list[tuple[int, int, int]] = []
    position = 0
    for text, is_control in parts:
        own = [(control_tokens[text], 0, len(text))] if is_control else encode(text)
        rows += [(index, position + begin, position + end) for index, begin, end in own]
        position += len(text)
    return _placed(rows)


def _placed(rows: list[tuple[int, int, int]]) -> PlacedTokens:
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return PlacedTokens(columns[:, 0].astype(np.int32), columns[:, 1], columns[:, 2])


def _special_names(config: Path) -> tuple[str | None, str | None, str | None]:
    """What stands for bos, eos and pad in a tokenizer_config.json, where there is one."""
    if not config.is_file():
        return None, None, None
    try:
        values = json.loads(config.read_bytes())
    except ValueError as error:
        raise DataError(f"{config} is no JSON: {error}; copy it again") from error
    if not isinstance(values, dict):
        raise DataError(f"{config} holds no JSON object; copy it again")
    tokens = [values.get(key) for key in ("bos_token", "eos_token", "pad_token")]
    bos, eos, pad = (token.get("content") if isinstance(token, dict) else token for token in tokens)
    return bos, eos, pad


def _known(index: int) -> int | None:
    """SentencePiece says -1 where a model lacks a control piece."""
    return None if index < 0 else index
