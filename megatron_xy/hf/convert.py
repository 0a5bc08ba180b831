"""Checkpoint folder <-> HF folder, through memory; the target is there whole or not at all."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_xy import checkpoint_files as files
from megatron_xy.config import ModelConfig
from megatron_xy.data.tokenizer import load_tokenizer
from megatron_xy.errors import ConfigError, DataError, StorageError
from megatron_xy.hf.config import CONFIG, hf_config, read_hf_config, read_token_ids
from megatron_xy.hf.folder import file_inside
from megatron_xy.hf.names import EMBEDDING, global_names, to_hf
from megatron_xy.hf.reader import DTYPES, INDEX, SINGLE, HFReader
from megatron_xy.hf.tokenizer import write_hf_tokenizer
from megatron_xy.shards import whole
from megatron_xy.storage import TEMPORARY_PREFIX, storage_errors, sync_file, sync_folder, write_json

MAX_SHARD_BYTES = 5 * 10**9
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
Say = Callable[[str], None]


def checkpoint_to_hf(source: Path, target: Path, *, dtype: str | None, tokenizer: Path | None, say: Say) -> None:
    """Writes an HF folder from a checkpoint of any layout: safetensors, configs, tokenizer files.

    dtype: fp32, bf16 or fp16; the checkpoint's own if None. tokenizer: a SentencePiece model; if None, the files that
    lie beside the checkpoint, or else the tokenizer that its run named. Raises ConfigError, DataError or StorageError.
    """
    manifest = files.read_manifest(source)
    files.verify_files(source, manifest)
    model = ModelConfig.model_validate(manifest.state["model"])
    if missing := [name for name in global_names(model) if name not in manifest.tensors]:
        raise DataError(f"{source}: the checkpoint holds no {missing[0]}; only causal language models can be exported")
    wanted = DTYPES[dtype] if dtype else None
    dtype_name = files.DTYPE_NAMES[wanted] if wanted else manifest.tensors[EMBEDDING].dtype
    with _whole_or_absent(target) as folder:
        num_shards = _write_tensors(folder, source, manifest, model=model, dtype=wanted)
        token_ids = _write_tokenizer(folder, source, manifest, model=model, tokenizer=tokenizer, say=say)
        write_json(folder / CONFIG, hf_config(model, dtype=dtype_name, token_ids=token_ids))
        if not (folder / GENERATION_CONFIG).exists():
            write_json(folder / GENERATION_CONFIG, {"_from_model_config": True, **token_ids})
    say(f"wrote {target}: {num_shards} safetensors file(s), {dtype_name}")


def hf_to_checkpoint(source: Path, target: Path, *, dtype: str | None, say: Say) -> None:
    """Writes a checkpoint, opened by any layout, from an HF folder: the weights, and its tokenizer files beside them.

    dtype: fp32, bf16 or fp16; each tensor's own if None. Raises ConfigError, DataError or StorageError.
    """
    model = read_hf_config(source)
    wanted = DTYPES[dtype] if dtype else None
    file = "rank-00000-of-00001.safetensors"
    with _whole_or_absent(target) as folder:
        with HFReader(source, model=model) as reader:
            # Copied out of the memory map, so that the target never depends on the source.
            tensors = {name: reader.read(name).to(dtype=wanted, copy=True) for name in global_names(model)}
        facts = files.write_shard(folder, file=file, tensors=tensors)
        entries = {
            name: files.TensorEntry(
                tuple(tensor.shape),
                files.DTYPE_NAMES[tensor.dtype],
                [files.Piece(file, whole(tuple(tensor.shape)))],
            )
            for name, tensor in tensors.items()
        }
        state = {
            **asdict(files.TrainingState()),
            "world_size": 1,
            "model": model.model_dump(mode="json", exclude_unset=True),
            "token_ids": read_token_ids(source),
            "origin": f"hf:{source}",
        }
        files.write_manifest(folder, files.Manifest(state, entries, {}, {file: facts}))
        if not _copy_files(source, folder) & set(TOKENIZER_FILES):
            say(f"warning: {source} holds no tokenizer files; the checkpoint has none beside it")
    say(f"wrote {target}: {len(tensors)} tensors, {files.DTYPE_NAMES[tensors[EMBEDDING].dtype]}")


def _write_tensors(
    folder: Path, source: Path, manifest: files.Manifest, *, model: ModelConfig, dtype: torch.dtype | None
) -> int:
    """The weights in files of about MAX_SHARD_BYTES and, if there are several, their index; returns their number."""
    shards = _plan_shards(manifest, model=model, dtype=dtype)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    with files.TensorReader(source, manifest) as reader:
        for number, names in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors: dict[str, torch.Tensor] = {}
            for name in names:
                tensors |= to_hf(name, reader.read_full(name).to(dtype=dtype), model=model)
            try:
                save_file(tensors, folder / file, metadata={"format": "pt"})
            except SafetensorError as error:
                raise StorageError(f"{folder / file} cannot be written: {error}; make room") from error
            weight_map |= dict.fromkeys(tensors, file)
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    return len(shards)


def _plan_shards(manifest: files.Manifest, *, model: ModelConfig, dtype: torch.dtype | None) -> list[list[str]]:
    """The global names that each file takes, in the model's order."""
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name in global_names(model):
        entry = manifest.tensors[name]
        num_bytes = math.prod(entry.shape) * (dtype or files.DTYPES[entry.dtype]).itemsize
        if shards[-1] and shard_bytes + num_bytes > MAX_SHARD_BYTES:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += num_bytes
    return shards


def _write_tokenizer(
    folder: Path, source: Path, manifest: files.Manifest, *, model: ModelConfig, tokenizer: Path | None, say: Say
) -> dict[str, Any]:
    """Tokenizer files where there is a tokenizer; returns the token ids that the configs carry."""
    if tokenizer is None and not any((source / name).is_file() for name in TOKENIZER_FILES):
        named = manifest.state.get("tokenizer")
        if named is None or not Path(named).is_file():
            say("warning: no tokenizer found, neither beside the checkpoint nor where its run had it; name --tokenizer")
            return dict(manifest.state.get("token_ids", {}))
        tokenizer = Path(named)
    if tokenizer is None:
        _copy_files(source, folder)
        return dict(manifest.state.get("token_ids", {}))
    loaded = load_tokenizer(tokenizer)
    assert model.vocab_size, "a checkpoint has a whole shape"
    if loaded.vocab_size > model.vocab_size:
        raise DataError(
            f"tokenizer ({loaded.path}) has {loaded.vocab_size} pieces, more than the checkpoint's vocab_size "
            f"({model.vocab_size}); name the tokenizer that it was trained with"
        )
    if loaded.path.suffix == ".json":  # HF's own files, as they are
        with storage_errors(folder):
            for path in (loaded.path, loaded.path.with_name("tokenizer_config.json")):
                if path.is_file():
                    shutil.copyfile(path, folder / path.name)
    else:
        write_hf_tokenizer(loaded.path, folder, model_max_length=model.max_position_embeddings)
    ids = {"bos_token_id": loaded.bos_id, "eos_token_id": loaded.eos_id, "pad_token_id": loaded.pad_id}
    return {name: value for name, value in ids.items() if value is not None}


def _copy_files(source: Path, folder: Path) -> set[str]:
    """Copies tokenizer and generation files as they are; returns the names of those that there were."""
    found = {name: path for name in (*TOKENIZER_FILES, GENERATION_CONFIG) if (path := file_inside(source, name))}
    with storage_errors(folder):
        for name, path in found.items():
            shutil.copyfile(path, folder / name)
    return set(found)


@contextmanager
def _whole_or_absent(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that gets its name once the block is done, or goes."""
    if target.exists():
        raise ConfigError(f"{target} exists; name a folder that does not, or remove it")
    folder = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    with storage_errors(target):
        if folder.exists():  # left by a conversion that was killed
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    try:
        yield folder
        with storage_errors(target):
            # safetensors makes files that only their owner reads; a release is read by others, as the umask says.
            readable = folder.stat().st_mode & 0o666
            for path in folder.iterdir():
                path.chmod(readable)
                sync_file(path)
            sync_folder(folder)
            folder.rename(target)
            sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
