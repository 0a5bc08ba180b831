"""A SentencePiece BPE model as HF's tokenizer files, encoding every text to the same ids.

transformers' own conversion differs from SentencePiece in how it treats leading spaces; this one keeps to the model:
normal pieces and their merges by score, a dummy prefix, spaces as U+2581, bytes as the fallback, control pieces never
from text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from megatron_xy.errors import DataError
from megatron_xy.storage import write_json

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_BPE = 2
_SPACE = "\u2581"


def write_hf_tokenizer(sentencepiece_model: Path, directory: Path, *, model_max_length: int) -> None:
    """Writes tokenizer.model, tokenizer.json and tokenizer_config.json into `directory`.

    Encoding adds the model's <s>, as Llama does. A control piece spelt out in a text becomes its id, as everywhere in
    transformers; with `split_special_tokens=True` it stays text, as in SentencePiece. model_max_length: in tokens.
    Raises DataError where the model is of a kind that HF's BPE cannot reproduce.
    """
    serialized = sentencepiece_model.read_bytes()
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(serialized)
    _refuse_inexact(model, sentencepiece_model)
    control = {piece.piece: index for index, piece in enumerate(model.pieces) if piece.type in (_UNKNOWN, _CONTROL)}
    spec = model.trainer_spec
    names = {
        "bos_token": spec.bos_piece, "eos_token": spec.eos_piece,
        "unk_token": spec.unk_piece, "pad_token": spec.pad_piece,
    }  # fmt: skip
    settings = {
        # The one class that transformers 4 and 5 both have and that takes tokenizer.json as it stands.
        "tokenizer_class": "PreTrainedTokenizerFast",
        # Version 4 would add token types, which Llama does not take.
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        **{key: name for key, name in names.items() if name in control},
    }
    (directory / "tokenizer.model").write_bytes(serialized)
    write_json(directory / "tokenizer.json", tokenizer_json(model, control=control))
    write_json(directory / "tokenizer_config.json", settings)


def tokenizer_json(model: Any, *, control: dict[str, int]) -> dict[str, Any]:
    """The contents of tokenizer.json for a parsed SentencePiece model; `control`: its control pieces and their ids."""
    prefix = [{"type": "Prepend", "prepend": _SPACE}] if model.normalizer_spec.add_dummy_prefix else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    bos = model.trainer_spec.bos_piece
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            {"SpecialToken": {"id": bos, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": bos, "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {bos: {"id": bos, "ids": [control[bos]], "tokens": [bos]}} if bos in control else {},
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index, "content": piece, "special": True,
                "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            }
            for piece, index in control.items()
        ],
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, replace]},
        "pre_tokenizer": None,
        "post_processor": template if bos in control else None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
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
    }  # fmt: skip


def _merges(model: Any) -> list[list[str]]:
    """Every pair of normal pieces that makes a normal piece, best score first: what SentencePiece would join."""
    normal = {piece.piece: (piece.score, index) for index, piece in enumerate(model.pieces) if piece.type == _NORMAL}
    ranked = []
    for piece, (score, index) in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                ranked.append((-score, index, normal[left][1], normal[right][1], left, right))
    return [[left, right] for *_, left, right in sorted(ranked)]


def _refuse_inexact(model: Any, path: Path) -> None:
    normal = {piece.piece for piece in model.pieces if piece.type == _NORMAL}
    reasons = {
        "it is no BPE model": model.trainer_spec.model_type != _BPE,
        "it has no byte fallback": not model.trainer_spec.byte_fallback,
        "it has user-defined pieces": any(
            piece.type not in (_NORMAL, _UNKNOWN, _CONTROL, _BYTE) for piece in model.pieces
        ),
        "it has pieces with characters that are no pieces themselves": not set("".join(normal)) <= normal,
        "it normalises text by a character map": bool(model.normalizer_spec.precompiled_charsmap),
        "it removes extra whitespace": model.normalizer_spec.remove_extra_whitespaces,
        "it treats whitespace as a suffix": model.trainer_spec.treat_whitespace_as_suffix,
    }
    for reason, holds in reasons.items():
        if holds:
            raise DataError(f"{path} cannot be written as an exact tokenizer.json: {reason}")
