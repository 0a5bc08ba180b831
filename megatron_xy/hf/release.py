"""What lies beside the weights of an HF folder: tokenizer and licence files, generation_config.json, the model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_xy import __version__
from megatron_xy.data.chat.encode import Chat
from megatron_xy.data.chat.template import template_of_run
from megatron_xy.data.encoding.engines import TOKENIZER_CONFIG
from megatron_xy.data.encoding.tokenizer import TOKENIZER_FILE, TOKENIZER_JSON, load_tokenizer
from megatron_xy.errors import DataError
from megatron_xy.hf.folder import file_inside, read_object
from megatron_xy.hf.kept import GENERATION_CONFIG, end_ids
from megatron_xy.hf.source import Source
from megatron_xy.hf.tokenizer import write_hf_tokenizer
from megatron_xy.record_files import lines_backwards
from megatron_xy.storage import storage_errors, write_json, write_text

MODEL_CARD = "README.md"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_JSON,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    CHAT_TEMPLATE,
)
LICENCE_FILES = (  # what a model's licence asks to hand on with copies of it
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "NOTICE.md",
    "USE_POLICY", "USE_POLICY.txt", "USE_POLICY.md",
)  # fmt: skip
_FACTS = ("iteration", "consumed_samples", "consumed_tokens", "optimizer_steps", "world_size")
_METRICS = ("loss", "score_mean", "kl")
Say = Callable[[str], None]


def write_release_files(
    folder: Path,
    source: Source,
    *,
    tokenizer: Path | None,
    dtype: str,
    say: Say,
    quantisation: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Writes all but weights and config.json; returns the token ids that config.json carries.

    quantisation: what the model card says of it.
    """
    copy_side_files(source.folder, folder, names=LICENCE_FILES)
    kept = _write_tokenizer(folder, source, tokenizer=tokenizer, say=say)
    warn_of_other_ids(folder, source, say=say)
    token_ids: dict[str, Any] = kept.get("token_ids", {})
    if not (folder / GENERATION_CONFIG).exists():
        write_json(folder / GENERATION_CONFIG, kept.get("generation_config", {"_from_model_config": True, **token_ids}))
    learned = source.manifest.state.get("chat_template")
    if isinstance(learned, str):
        write_text(folder / CHAT_TEMPLATE, learned)
        _add_end_of_answers(folder, kept, source.manifest.state)
    write_text(folder / MODEL_CARD, _model_card(source, dtype=dtype, quantisation=quantisation))
    return token_ids


def _add_end_of_answers(folder: Path, kept: dict[str, Any], state: dict[str, Any]) -> None:
    """An answer ends where the template ends it, also for whoever generates with nothing but the release."""
    if not any((folder / name).is_file() for name in (TOKENIZER_FILE, TOKENIZER_JSON)):
        return
    tokenizer = load_tokenizer(folder)
    template = template_of_run(state, tokenizer)
    assert template is not None, "asked for where there is one"
    known = end_ids(kept)
    if new := [index for index in Chat(tokenizer, template).stop_ids if index not in known]:
        values = read_object(folder, GENERATION_CONFIG) or {}
        write_json(folder / GENERATION_CONFIG, {**values, "eos_token_id": [*known, *new]})


def tokenizer_place(source: Source) -> Path | None:
    """The source's folder where its tokenizer lies there, or else where its run had it; None where it is not there."""
    if any(file_inside(source.folder, name) for name in TOKENIZER_FILES):
        return source.folder
    named = source.manifest.state.get("tokenizer")
    return Path(named) if named is not None and Path(named).exists() else None


def copy_side_files(
    source: Path, folder: Path, *, names: Sequence[str] = (*TOKENIZER_FILES, GENERATION_CONFIG, *LICENCE_FILES)
) -> set[str]:
    """Copies tokenizer, generation and licence files as they are; returns the names of those that there were."""
    found = {name: path for name in names if (path := file_inside(source, name))}
    with storage_errors(folder):
        for name, path in found.items():
            shutil.copyfile(path, folder / name)
    return set(found)


def _write_tokenizer(folder: Path, source: Source, *, tokenizer: Path | None, say: Say) -> dict[str, Any]:
    """Tokenizer files where there is a tokenizer; returns what of the source's kept facts goes with it."""
    place = tokenizer or tokenizer_place(source)
    if place is None:
        say(
            "warning: no tokenizer found, neither beside the weights nor where their run had it; "
            "`convert --tokenizer` adds one"
        )
    if place is None or (tokenizer is None and place == source.folder):
        copy_side_files(source.folder, folder, names=(*TOKENIZER_FILES, GENERATION_CONFIG))
        _spell_for_both_versions(folder)
        return source.kept
    loaded = load_tokenizer(place)
    model = source.model
    assert model.vocab_size, "what is converted has a whole shape"
    if loaded.vocab_size > model.vocab_size:
        raise DataError(
            f"tokenizer ({loaded.path}) has {loaded.vocab_size} pieces, more than the model's vocab_size "
            f"({model.vocab_size}); name the tokenizer that it was trained with"
        )
    if loaded.path.suffix == ".json":  # HF's own files, as they are
        with storage_errors(folder):
            for name in {loaded.path.name, *TOKENIZER_FILES}:
                if (path := loaded.path.with_name(name)).is_file():
                    shutil.copyfile(path, folder / name)
        _spell_for_both_versions(folder)
    else:
        write_hf_tokenizer(loaded.path, folder, model_max_length=model.max_position_embeddings)
    if loaded.eos_id in end_ids({"token_ids": source.kept.get("token_ids", {})}):
        return source.kept  # the source's own tokenizer, of which the source may name more end tokens
    ids = {"bos_token_id": loaded.bos_id, "eos_token_id": loaded.eos_id, "pad_token_id": loaded.pad_id}
    return {"token_ids": {name: value for name, value in ids.items() if value is not None}}


def warn_of_other_ids(folder: Path, source: Source, *, say: Say) -> None:
    """transformers takes any tokenizer of a Qwen2 folder for Qwen2's, whatever class its files name."""
    if source.model.add_qkv_bias and (folder / TOKENIZER_FILE).is_file():
        say(
            f"warning: {TOKENIZER_FILE} is a SentencePiece model, and transformers' AutoTokenizer takes a Qwen2 "
            f"folder's for a byte-level one: it gives other ids; open it by PreTrainedTokenizerFast.from_pretrained"
        )


def _spell_for_both_versions(folder: Path) -> None:
    """What transformers 5 writes into tokenizer_config.json and version 4 does not open, in words that both have."""
    values = read_object(folder, TOKENIZER_CONFIG) or {}
    spelt = dict(values)
    if values.get("tokenizer_class") == "TokenizersBackend":
        spelt["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        spelt["additional_special_tokens"] = spelt.pop("extra_special_tokens")
    if spelt != values:
        write_json(folder / TOKENIZER_CONFIG, spelt)


def _model_card(source: Source, *, dtype: str, quantisation: Mapping[str, str]) -> str:
    """README.md of a release: the model's shape, and what the checkpoint and its run's folder say of the training."""
    model, state = source.model, source.manifest.state
    rows: dict[str, Any] = {
        "layers": model.num_layers, "hidden size": model.hidden_size, "ffn hidden size": model.ffn_hidden_size,
        "attention heads": model.num_attention_heads, "key/value heads": model.num_query_groups,
        "vocabulary": model.vocab_size, "context": model.max_position_embeddings, "RoPE theta": model.rotary_base,
        "RoPE scaling": json.dumps(model.rope_scaling) if model.rope_scaling else "none", "dtype": dtype,
    }  # fmt: skip
    rows |= quantisation
    rows |= {name.replace("_", " "): state[name] for name in _FACTS if state.get("iteration")}
    rows |= {name.replace("_", " "): state[name] for name in ("origin", "task", "seed") if name in state}
    record = _last_record(source.folder, state.get("iteration"))
    rows |= {f"{name.replace('_', ' ')} of the last step": record[name] for name in _METRICS if name in record}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    kind = "text-classification" if model.head == "value" else "text-generation"
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {kind}\n---\n\n# Model card\n\n"
        f"Trained and exported with megatron_xy {__version__}.\n\n| | |\n|---|---|\n{table}\n"
    )


def _last_record(checkpoint: Path, iteration: int | None) -> dict[str, Any]:
    """What metrics.jsonl of the run that the checkpoint lies in says of its last step; empty where it is not told."""
    places = (folder / "metrics.jsonl" for folder in checkpoint.resolve().parents[:3])
    metrics = next(filter(Path.is_file, places), None)
    if metrics is None or not iteration:
        return {}
    with metrics.open("rb") as stream:
        for _, line in lines_backwards(stream):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and record.get("iteration") == iteration:
                return record
    return {}
