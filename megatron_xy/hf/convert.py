"""Checkpoint folder <-> HF folder, one tensor at a time in memory; the target is there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file

from megatron_xy import checkpoint_files as files
from megatron_xy.config import ModelConfig
from megatron_xy.errors import ConfigError
from megatron_xy.hf.config import complete_model, hf_config, read_hf_config
from megatron_xy.hf.names import global_names, to_hf
from megatron_xy.hf.reader import INDEX, SINGLE, HFReader
from megatron_xy.hf.tokenizer import write_hf_tokenizer
from megatron_xy.storage import TEMPORARY_PREFIX, sync_file, sync_folder

MAX_SHARD_BYTES = 5 * 10**9
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
Say = Callable[[str], None]


def checkpoint_to_hf(source: Path, target: Path, *, dtype: str | None, tokenizer: Path | None, say: Say) -> None:
    """Writes an HF folder from a checkpoint of any layout: safetensors, configs, tokenizer files.

    dtype: fp32, bf16 or fp16; the checkpoint's own if None. tokenizer: a SentencePiece model; a missing one is warned
    about.
    """
    manifest = files.read_manifest(source)
    files.verify_files(source, manifest)
    model = ModelConfig.model_validate(manifest.state["model"])
    stored = files.DTYPES[manifest.tensors["embedding.word_embeddings.weight"].dtype]
    target_dtype = DTYPES[dtype] if dtype else stored
    with _whole_or_absent(target) as folder:
        with files.TensorReader(source, manifest) as reader:
            tensors = (
                part
                for name in global_names(model)
                for part in to_hf(name, reader.read_full(name).to(target_dtype), model=model).items()
            )
            num_shards = _write_tensors(folder, tensors)
        token_ids = _write_tokenizer(tokenizer, folder, say=say)
        dtype_name = files.DTYPE_NAMES[target_dtype]
        _write_json(folder / "config.json", hf_config(model, dtype=dtype_name, token_ids=token_ids))
        _write_json(folder / "generation_config.json", {"_from_model_config": True, **token_ids})
    say(f"wrote {target}: {num_shards} safetensors file(s), {dtype_name}")


def hf_to_checkpoint(source: Path, target: Path, *, dtype: str | None, say: Say) -> None:
    """Writes a checkpoint, opened by any layout, from an HF folder: weights alone, in their own dtype unless given."""
    model = complete_model(ModelConfig(), read_hf_config(source), origin=str(source))
    with _whole_or_absent(target) as folder, HFReader(source, model=model) as reader:
        stored = DTYPES[dtype] if dtype else reader.dtype()
        model = model.model_copy(update={"params_dtype": "fp32" if stored == torch.float32 else "bf16"})
        tensors = {name: reader.read(name).to(stored).contiguous() for name in global_names(model)}
        file = "rank-00000-of-00001.safetensors"
        facts = files.write_shard(folder, file=file, tensors=tensors)
        entries = {}
        for name, tensor in tensors.items():
            shape = tuple(tensor.shape)
            pieces = [files.Piece(file, files.whole(shape))]
            entries[name] = files.TensorEntry(shape, files.DTYPE_NAMES[tensor.dtype], pieces)
        state = {
            **asdict(files.TrainingState()),
            "world_size": 1,
            "model": model.model_dump(mode="json"),
            "origin": str(source),
        }
        files.write_manifest(folder, files.Manifest(state, entries, {}, {file: facts}))
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    say(f"wrote {target}: {len(tensors)} tensors, {files.DTYPE_NAMES[stored]}")


def find_tokenizer(source: Path, *, named: str | None) -> Path | None:
    """The tokenizer of a checkpoint: beside its manifest, else the one that its run named, else none."""
    beside = source / "tokenizer.model"
    if beside.is_file():
        return beside
    path = Path(named) if named else None
    return path if path is not None and path.is_file() else None


def _write_tensors(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> int:
    """Shards of at most MAX_SHARD_BYTES and, if more than one, their index; returns their number."""
    shards: list[dict[str, str]] = []
    held: dict[str, torch.Tensor] = {}
    held_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal held, held_bytes
        file = f"{TEMPORARY_PREFIX}{len(shards)}"
        save_file(held, folder / file, metadata={"format": "pt"})
        shards.append(dict.fromkeys(held, file))
        held, held_bytes = {}, 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and held_bytes + size > MAX_SHARD_BYTES:
            flush()
        held[name] = tensor
        held_bytes += size
        total_bytes += size
    flush()
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        final = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / next(iter(shard.values()))).rename(folder / final)
        # safetensors makes files that only their owner reads; a release is read by others.
        (folder / final).chmod(0o666 & ~_umask())
        weight_map.update(dict.fromkeys(shard, final))
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    return len(shards)


def _write_tokenizer(tokenizer: Path | None, folder: Path, *, say: Say) -> dict[str, int | None]:
    """Tokenizer files where there is a tokenizer; the ids that the configs carry."""
    if tokenizer is None:
        say("warning: no tokenizer found beside the checkpoint; the folder has none. Name it with --tokenizer FILE")
        return {"bos_token_id": 1, "eos_token_id": 2}
    write_hf_tokenizer(tokenizer, folder)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    ids = {"bos_token_id": processor.bos_id(), "eos_token_id": processor.eos_id(), "pad_token_id": processor.pad_id()}
    return {name: value for name, value in ids.items() if value >= 0}


@contextmanager
def _whole_or_absent(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that gets its name once the block is done."""
    if target.exists():
        raise ConfigError(f"{target} exists; name a folder that does not, or remove it")
    folder = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    shutil.rmtree(folder, ignore_errors=True)  # an earlier conversion that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
        for path in folder.iterdir():
            sync_file(path)
        folder.rename(target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
