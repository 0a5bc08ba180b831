"""`megatron-xy vocab extend`: an HF folder with more pieces in its SentencePiece tokenizer, and rows for them.

A new piece's row in embedding and output layer starts as the mean of the rows of the old pieces that spell it. Every
other tensor and every old row stays as it is, bit for bit, copied from file to file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from megatron_xy.data.encoding import vocabulary
from megatron_xy.data.encoding.engines import TOKENIZER_CONFIG
from megatron_xy.data.encoding.sentencepiece_json import inexact_reasons, parse_model
from megatron_xy.data.encoding.tokenizer import TOKENIZER_FILE, load_tokenizer
from megatron_xy.errors import ConfigError, DataError, UsageError
from megatron_xy.hf.config import CONFIG
from megatron_xy.hf.convert import write_checksums
from megatron_xy.hf.folder import file_inside, read_object
from megatron_xy.hf.names import PLAIN
from megatron_xy.hf.reader import INDEX, SINGLE, read_index
from megatron_xy.hf.release import copy_side_files, warn_of_other_ids
from megatron_xy.hf.source import Source, open_source
from megatron_xy.hf.target import whole_or_absent
from megatron_xy.hf.tokenizer import write_hf_tokenizer
from megatron_xy.hf.verb import place
from megatron_xy.storage import write_json
from megatron_xy.tensors.dtypes import Bits, itemsize
from megatron_xy.tensors.files import bits_of, torch_dtype
from megatron_xy.tensors.names import EMBEDDING, OUTPUT_LAYER
from megatron_xy.tensors.safetensors_file import FileRange, SafetensorsFile, write_safetensors
from megatron_xy.tensors.shards import Box, Placed

CORPUS = "corpus:"
WITH_ROWS_BY_PIECE = (PLAIN[EMBEDDING], PLAIN[OUTPUT_LAYER])
ROWS_AT_A_TIME = 256
_KEPT_SETTINGS = ("chat_template", "model_max_length", "padding_side", "truncation_side", "pad_token")
Say = Callable[[str], None]


def extend(
    source: str, target: str, *, characters: str | None, pieces: str | None, size: int, corpus: str | None, say: Say
) -> None:
    """Writes `hf:DIR` anew with a vocabulary of exactly `size` pieces.

    characters, pieces: FILE, or corpus:PATH for its most frequent ones; characters come first. corpus: what the report
    counts tokens of, if not what pieces come from. Raises UsageError, ConfigError, DataError or StorageError.
    """
    (from_kind, from_path), (to_kind, to_path) = place(source, "--from"), place(target, "--to")
    if from_kind != "hf" or to_kind != "hf":
        raise UsageError(
            f"--from {source} --to {target}: a vocabulary is extended from hf:DIR to hf:DIR; convert first"
        )
    if characters is None and pieces is None:
        raise UsageError("name what to add: --characters FILE|corpus:PATH, --pieces FILE|corpus:PATH, or both")
    opened = open_source("hf", from_path)
    old = _tokenizer_of(opened, size=size)
    serialized = old.SerializeToString()
    chosen, impossible = vocabulary.choose_pieces(
        old, _candidates(characters, pieces, number=size - len(old.pieces), say=say), size=size
    )
    if impossible:
        say(f"warning: {len(impossible)} pieces are left out, for no two others build them, such as {impossible[0]}")
    extended = vocabulary.extended_model(old, chosen)
    spelt = vocabulary.spellings(old, chosen)
    work = {"extends": opened.fingerprint(), "pieces": chosen}
    with whole_or_absent(to_path, work=work) as folder:
        write_checksums(folder, _write_weights(folder, opened, first_new=len(old.pieces), spelt=spelt))
        copy_side_files(from_path, folder)
        _write_tokenizer(folder, from_path, extended, opened, say=say)
        warn_of_other_ids(folder, opened, say=say)
        write_json(folder / CONFIG, {**(read_object(from_path, CONFIG) or {}), "vocab_size": size})
    say(f"wrote {to_path}: {len(old.pieces)} -> {size} pieces, the last is {chosen[-1]}")
    corpora = (given.removeprefix(CORPUS) for given in (pieces, characters) if given and given.startswith(CORPUS))
    counted = corpus or next(corpora, None)
    if counted is not None:
        for name, tally in vocabulary.compare(serialized, extended, counted, say=say).items():
            say(f"{name}: {tally}")


def _candidates(characters: str | None, pieces: str | None, *, number: int, say: Say) -> Iterator[str]:
    if characters is not None and characters.startswith(CORPUS):
        yield from vocabulary.frequent_characters(characters.removeprefix(CORPUS), say=say)
    elif characters is not None:
        yield from vocabulary.listed_characters(Path(characters))
    if pieces is not None and pieces.startswith(CORPUS):
        yield from vocabulary.frequent_pieces(pieces.removeprefix(CORPUS), number=number, say=say)
    elif pieces is not None:
        yield from vocabulary.listed_pieces(Path(pieces))


def _tokenizer_of(source: Source, *, size: int) -> Any:
    """The folder's SentencePiece model. Raises DataError where the extended one could not stand in its place."""
    path = file_inside(source.folder, TOKENIZER_FILE)
    if path is None:
        raise DataError(f"{source.folder} holds no {TOKENIZER_FILE}; only SentencePiece vocabularies can be extended")
    model = parse_model(load_tokenizer(path).engine.serialized)
    if reasons := inexact_reasons(model):
        raise DataError(f"{path} cannot be extended: {reasons[0]}")
    rows = source.model.vocab_size
    assert rows, "an HF folder has a whole shape"
    if len(model.pieces) > rows:
        raise DataError(f"{path} has {len(model.pieces)} pieces, more than the model's vocab_size ({rows})")
    if size < rows:
        raise ConfigError(f"--size ({size}) must not be below the model's vocab_size ({rows}); rows would be lost")
    for token, index in _added_tokens(source.folder):
        if index >= len(model.pieces):
            raise DataError(
                f"{source.folder}: the added token {token} ({index}) lies behind the {len(model.pieces)} pieces of "
                f"{TOKENIZER_FILE}, where new ones would come; make it a piece of {TOKENIZER_FILE} first"
            )
    return model


def _added_tokens(folder: Path) -> Iterator[tuple[str, int]]:
    """(token, id) of what the folder's files add to its tokenizer."""
    settings, listed = read_object(folder, TOKENIZER_CONFIG) or {}, read_object(folder, "added_tokens.json") or {}
    try:
        yield from ((token["content"], int(index)) for index, token in settings.get("added_tokens_decoder", {}).items())
        yield from ((token, int(index)) for token, index in listed.items())
        for token in (read_object(folder, "tokenizer.json") or {}).get("added_tokens", []):
            yield token["content"], int(token["id"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder}: its added tokens are not laid out as transformers does: {error}") from None


def _write_weights(
    folder: Path, source: Source, *, first_new: int, spelt: Sequence[Sequence[int]]
) -> dict[str, dict[str, Any]]:
    """Every file of weights under its name, and the index; returns {file: {bytes, sha256}}."""
    index = read_index(source.folder)
    facts, total = {}, 0
    for file in [SINGLE] if index is None else sorted(set(index["weight_map"].values())):
        opened = SafetensorsFile(source.folder / file)
        try:
            layout = {name: (stored.dtype, stored.shape) for name, stored in opened.tensors.items()}
            for name in WITH_ROWS_BY_PIECE:
                if name in layout:
                    dtype, shape = layout[name]
                    layout[name] = (dtype, (first_new + len(spelt), *shape[1:]))

            def parts_of(name: str, opened: SafetensorsFile = opened) -> Iterable[Bits | FileRange]:
                if name not in WITH_ROWS_BY_PIECE:
                    return [opened.range(name)]
                old = opened.range(name, 0, first_new * math.prod(opened.tensors[name].shape[1:]))
                return itertools.chain([old], _means(opened, name, spelt))

            facts[file] = write_safetensors(folder / file, layout, parts_of=parts_of, metadata={"format": "pt"})
        finally:
            opened.close()
        total += sum(math.prod(shape) * itemsize(dtype) for dtype, shape in layout.values())
    if index is not None:
        metadata = {**index.get("metadata", {}), "total_size": total}
        write_json(folder / INDEX, {**index, "metadata": metadata})
    return facts


def _means(opened: SafetensorsFile, name: str, spelt: Sequence[Sequence[int]]) -> Iterator[Bits]:
    """For each list of ids the mean of their rows, computed in fp32."""
    stored = opened.tensors[name]
    dtype, width = torch_dtype(stored.dtype), stored.shape[1]

    @cache
    def row_of(index: int) -> torch.Tensor:
        row = torch.empty(1, width, dtype=dtype)
        wanted, everything = Box((index, 0), (index + 1, width)), Box((0, 0), stored.shape)
        opened.copy(name, Placed(wanted, everything, 0, False), bits_of(row))
        return row[0]

    for first in range(0, len(spelt), ROWS_AT_A_TIME):
        rows = (torch.stack([row_of(index).float() for index in ids]) for ids in spelt[first : first + ROWS_AT_A_TIME])
        yield bits_of(torch.stack([row.mean(0) for row in rows]).to(dtype))


def _write_tokenizer(folder: Path, source: Path, serialized: bytes, opened: Source, *, say: Say) -> None:
    """tokenizer.model, tokenizer.json and the settings that the old folder had beside what the new ones must say."""
    (folder / TOKENIZER_FILE).write_bytes(serialized)
    write_hf_tokenizer(folder / TOKENIZER_FILE, folder, model_max_length=opened.model.max_position_embeddings)
    for name in ("special_tokens_map.json", "added_tokens.json"):  # tokenizer_config.json says it all
        (folder / name).unlink(missing_ok=True)
    written = read_object(folder, TOKENIZER_CONFIG) or {}
    before = read_object(source, TOKENIZER_CONFIG) or {}
    kept = {name: before[name] for name in _KEPT_SETTINGS if before.get(name) is not None}
    pad = kept.get("pad_token")
    spelling = pad.get("content") if isinstance(pad, dict) else pad
    if spelling is not None and str(spelling) not in {piece.piece for piece in parse_model(serialized).pieces}:
        say(f"warning: pad_token {spelling} is no piece of the tokenizer and is left out")
        del kept["pad_token"]
    write_json(folder / TOKENIZER_CONFIG, {**written, **kept})
