"""A SentencePiece BPE model -> the tokenizer.json that encodes every text to the same ids, or why there is none.

transformers' own conversion differs from SentencePiece in how it treats leading spaces; this one keeps to the model:
normal pieces and their merges by score, a dummy prefix, spaces as U+2581, bytes as the fallback. It holds no added
tokens, no post-processor and no merge into a control piece: no text yields a control id.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from sentencepiece import sentencepiece_model_pb2

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # types of pieces in sentencepiece_model.proto
SPACE = "\u2581"
_BPE = 2


def parse_model(serialized: bytes) -> Any:
    """The ModelProto in the bytes of a SentencePiece model that sentencepiece itself has loaded."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(serialized)
    return model


def pieces_by_type(model: Any) -> defaultdict[int, list[str]]:
    """{type: spellings in order of the ids}, empty for a type of which there are none."""
    pieces: defaultdict[int, list[str]] = defaultdict(list)
    for piece in model.pieces:
        pieces[piece.type].append(piece.piece)
    return pieces


def inexact_reasons(model: Any) -> list[str]:
    """Why no tokenizer.json encodes as this model does; empty where one does."""
    pieces = pieces_by_type(model)
    normal, special = {*pieces[NORMAL]}, pieces[UNKNOWN] + pieces[CONTROL]
    reasons = {
        "it is not a BPE model": model.trainer_spec.model_type != _BPE,
        "it has no byte fallback": not model.trainer_spec.byte_fallback,
        "it has no piece for each of the 256 bytes": len(pieces[BYTE]) != 256,
        "it has user-defined pieces": not pieces.keys() <= {NORMAL, UNKNOWN, CONTROL, BYTE},
        "it has pieces with characters that are no pieces themselves": not set("".join(normal)) <= normal,
        "it has pieces with blanks": " " in "".join(normal),
        "it has control pieces of a single character": any(len(piece) == 1 for piece in special),
        "it normalises text by a character map": bool(model.normalizer_spec.precompiled_charsmap),
        "it removes extra whitespace": model.normalizer_spec.remove_extra_whitespaces,
        "it leaves spaces as they are": not model.normalizer_spec.escape_whitespaces,
        "it treats whitespace as a suffix": model.trainer_spec.treat_whitespace_as_suffix,
    }  # fmt: skip
    return [reason for reason, holds in reasons.items() if holds]


def tokenizer_json(model: Any) -> dict[str, Any]:
    """The contents of tokenizer.json for a model without `inexact_reasons`."""
    prefix = [{"type": "Prepend", "prepend": SPACE}] if model.normalizer_spec.add_dummy_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*prefix, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.trainer_spec.unk_piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.piece: index for index, piece in enumerate(model.pieces)},
            "merges": _merges(model),
        },
    }


def _merges(model: Any) -> list[str]:
    """Every two normal pieces that make a normal one, best score first, as "LEFT RIGHT": what SentencePiece would join.

    A piece holds no blank: U+2581 stands for it.
    """
    normal = {piece.piece: (-piece.score, index) for index, piece in enumerate(model.pieces) if piece.type == NORMAL}
    ranked = []
    for piece, rank in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                ranked.append((rank, normal[left][1], normal[right][1], f"{left} {right}"))
    return [merge for *_, merge in sorted(ranked)]
