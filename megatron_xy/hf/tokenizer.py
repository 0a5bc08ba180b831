"""A SentencePiece BPE model as HF's tokenizer files, encoding every text to the same ids; whether data have a model's.

The conversion itself is the data layer's; here come the control pieces, which transformers wants as special tokens, and
the <s> that Llama puts before a text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_xy.config import InvalidConfig, Problem
from megatron_xy.data.encoding.engines import TOKENIZER_CONFIG
from megatron_xy.data.encoding.sentencepiece_json import CONTROL, UNKNOWN, inexact_reasons, parse_model, tokenizer_json
from megatron_xy.data.encoding.tokenizer import TOKENIZER_FILE, load_tokenizer
from megatron_xy.data.manifest import read_manifest
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.storage import write_json


def write_hf_tokenizer(sentencepiece_model: Path, directory: Path, *, model_max_length: int) -> None:
    """Writes tokenizer.model, tokenizer.json and tokenizer_config.json into `directory`.

    Encoding adds the model's <s>, as Llama does. A control piece spelt out in a text becomes its id, as everywhere in
    transformers; with `split_special_tokens=True` it stays text, as in SentencePiece. model_max_length: in tokens.
    Raises DataError where the model is of a kind that HF's BPE cannot reproduce.
    """
    serialized = sentencepiece_model.read_bytes()
    model = _exact_model(serialized, sentencepiece_model)
    control = {piece.piece: index for index, piece in enumerate(model.pieces) if piece.type in (UNKNOWN, CONTROL)}
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
    (directory / TOKENIZER_FILE).write_bytes(serialized)
    write_json(directory / "tokenizer.json", {**tokenizer_json(model), **_special_tokens(model, control=control)})
    write_json(directory / TOKENIZER_CONFIG, settings)


def check_export(tokenizer: Path, *, hf_interval: int) -> None:
    """That the HF folders which a run is to write can have its tokenizer, if it is there. Raises InvalidConfig."""
    if not hf_interval or not tokenizer.exists():
        return
    try:
        loaded = load_tokenizer(tokenizer)
        if loaded.file_name == TOKENIZER_FILE:
            _exact_model(loaded.engine.serialized, loaded.path)
    except DataError as error:
        rule = f"checkpoint.hf_interval ({hf_interval}): no HF folder can be made with the run's tokenizer"
        remedy = "set it to 0, or train with another tokenizer"
        raise InvalidConfig([Problem("checkpoint.hf_interval", f"{rule}: {error}; {remedy}")]) from error


def check_tokenizers(data_folder: Path, model_folder: Path, *, say: Callable[[str], None]) -> None:
    """Whether the token ids of a `data build` folder are those of the tokenizer that lies with the model.

    A model's tokenizer may have further pieces behind the data's. Where it has none that can be read, a warning says
    so. Raises DataError where an id means another piece, ConfigError where there are no data.
    """
    entry = read_manifest(data_folder).tokenizer
    try:
        models = load_tokenizer(model_folder)
    except (ConfigError, DataError) as error:
        say(f"warning: whether {data_folder} was built with the tokenizer of {model_folder} is not known: {error}")
        return
    if models.sha256 == entry.sha256:
        return
    # Other bytes may be the same tokenizer, as tokenizer.json beside the tokenizer.model that it was made of.
    datas = load_tokenizer(data_folder / entry.file)
    for index in range(datas.vocab_size):
        spelling = datas.engine.spelling(index)
        if index >= models.vocab_size or models.engine.spelling(index) != spelling:
            there = repr(models.engine.spelling(index)) if index < models.vocab_size else "nothing"
            raise DataError(
                f"{data_folder} was built with another tokenizer than {models.path}: token {index} is {spelling!r} in "
                f"{datas.path} and {there} there; build the data with --tokenizer {models.path}"
            )


def _exact_model(serialized: bytes, path: Path) -> Any:
    """The model that tokenizer.json is made of. Raises DataError where none encodes as it does."""
    model = parse_model(serialized)
    if reasons := inexact_reasons(model):
        raise DataError(f"{path} cannot be written as an exact tokenizer.json: {reasons[0]}")
    return model


def _special_tokens(model: Any, *, control: dict[str, int]) -> dict[str, Any]:
    """What tokenizer.json says of the control pieces, given with their ids: that they are tokens; where <s> goes."""
    added = [
        {
            "id": index, "content": piece, "special": True,
            "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        }
        for piece, index in control.items()
    ]  # fmt: skip
    bos = model.trainer_spec.bos_piece
    if bos not in control:
        return {"added_tokens": added}

    def begun(part: str, type_id: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": bos, "type_id": type_id}}, {"Sequence": {"id": part, "type_id": type_id}}]

    template = {
        "type": "TemplateProcessing",
        "single": begun("A", 0),
        "pair": [*begun("A", 0), *begun("B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [control[bos]], "tokens": [bos]}},
    }
    return {"added_tokens": added, "post_processor": template}
