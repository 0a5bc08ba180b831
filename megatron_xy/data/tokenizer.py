"""The tokenizer: text -> token ids and back, from a SentencePiece tokenizer.model.

Text never yields a control id: "<s>" in a document is text; control ids are added by whoever builds a sequence.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from megatron_xy.errors import ConfigError, DataError

TOKENIZER_FILE = "tokenizer.model"

# sentencepiece 0.2.3 and newer write ids straight into arrays; older ones only give lists.
_ENCODE_OPTIONS: dict[str, Any] = (
    {"return_type": "numpy"}
    if "return_type" in inspect.signature(sentencepiece.SentencePieceProcessor.Encode).parameters
    else {"out_type": int}
)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer in `path`: a SentencePiece .model file, or a folder that holds tokenizer.model.

    Raises ConfigError (missing, or of a kind that is not supported) and DataError (damaged).
    """
    file = Path(path)
    if file.is_dir():
        if not (file / TOKENIZER_FILE).is_file():
            raise ConfigError(f"tokenizer ({file}): the folder holds no {TOKENIZER_FILE}; name one that does")
        file = file / TOKENIZER_FILE
    if not file.is_file():
        raise ConfigError(f"tokenizer ({file}) does not exist; name a SentencePiece {TOKENIZER_FILE}")
    if file.suffix == ".json":
        raise ConfigError(
            f"tokenizer ({file}): tokenizer.json is not supported yet, only SentencePiece models; name the "
            f"{TOKENIZER_FILE} of the same model"
        )
    return Tokenizer(file)


class Tokenizer:
    """A SentencePiece model.

    Attributes: path, sha256 (of the file), vocab_size, bos_id, eos_id, pad_id (None where the model has none).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        serialized = path.read_bytes()
        self.sha256 = hashlib.sha256(serialized).hexdigest()
        if not serialized:
            raise DataError(f"tokenizer ({path}) is empty; copy it again")
        try:
            # From memory, so that the hash is the hash of what was loaded.
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=serialized)
        except RuntimeError as error:
            raise DataError(f"tokenizer ({path}) is no SentencePiece model, or a damaged one: {error}") from error
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id = _known(self._model.bos_id())
        self.eos_id = _known(self._model.eos_id())
        self.pad_id = _known(self._model.pad_id())
        self._is_control = np.array([self._model.is_control(index) for index in range(self.vocab_size)], dtype=bool)

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token ids [length] of one text, without control ids."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Token ids of each text, [length] each, without control ids. A text must hold no lone surrogates."""
        encoded = self._model.encode(list(texts), num_threads=1, **_ENCODE_OPTIONS)
        arrays = [np.asarray(ids, dtype=np.int32) for ids in encoded]
        if arrays:
            assert not self._is_control[np.concatenate(arrays)].any(), "text must never yield a control id"
        return arrays

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The text of token ids; control ids yield none. Raises DataError for an id outside the vocabulary."""
        plain = [int(index) for index in ids]
        if plain and not 0 <= min(plain) <= max(plain) < self.vocab_size:
            raise DataError(f"token ids {min(plain)}..{max(plain)} are outside 0..{self.vocab_size} of {self.path}")
        return str(self._model.decode(plain))


def _known(index: int) -> int | None:
    """SentencePiece says -1 where a model lacks a control piece."""
    return None if index < 0 else index
