"""Checkpoint folder or HF folder -> either of them, block by block; the target is there whole or not at all."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_xy.checkpoint import files
from megatron_xy.errors import ConfigError, DataError, StorageError
from megatron_xy.hf.config import CONFIG, hf_config
from megatron_xy.hf.names import global_names, hf_shards
from megatron_xy.hf.reader import INDEX, SINGLE
from megatron_xy.hf.release import TOKENIZER_FILES, copy_side_files, write_release_files
from megatron_xy.hf.source import Source, open_source
from megatron_xy.hf.target import Output, plan_files, whole_or_absent, write_files
from megatron_xy.storage import storage_errors, write_json, write_text
from megatron_xy.tensors.names import EMBEDDING
from megatron_xy.tensors.safetensors_file import stored_tensors
from megatron_xy.tensors.shards import whole

MAX_SHARD_BYTES = 5 * 10**9  # as transformers has it
MAX_CHECKPOINT_BYTES = 10**9  # smaller: files are hashed by a thread each, some at a time
CHECKSUMS = "checksums.sha256"
Say = Callable[[str], None]


def to_hf(
    source: Source,
    target: Path,
    *,
    dtype: str | None,
    tokenizer: Path | None,
    say: Say,
    max_shard_bytes: int | None = None,
    verify: bool = True,
) -> None:
    """Writes an HF folder: safetensors, their checksums, configs, tokenizer files, a model card.

    dtype: the source's own if None. tokenizer: a SentencePiece model; if None, the files that lie beside the source, or
    else the tokenizer that its run named. verify: the source's checksums are compared meanwhile. Raises ConfigError,
    DataError or StorageError.
    """
    manifest, model = source.manifest, source.model
    shards = plan_hf_files(source, dtype=dtype, max_bytes=max_shard_bytes or MAX_SHARD_BYTES)
    dtype_name = dtype or manifest.tensors[EMBEDDING].dtype
    work = {**_work("hf", source, shards), "tokenizer": str(tokenizer)}
    with whole_or_absent(target, work=work) as folder, source.verified() if verify else nullcontext():
        token_ids = write_release_files(folder, source, tokenizer=tokenizer, dtype=dtype_name, say=say)
        values = hf_config(model, dtype=dtype_name, token_ids=token_ids, model_type=source.kept.get("model_type"))
        write_json(folder / CONFIG, values)
        facts = write_files(folder, shards, source=source, metadata={"format": "pt"}, say=say)
        write_index(folder, facts)
    say(f"wrote {target}: {len(shards)} safetensors file(s), {dtype_name}")


def plan_hf_files(source: Source, *, dtype: str | None, max_bytes: int) -> dict[str, list[Output]]:
    """{file: the HF tensors of it}, named as transformers does. dtype: the source's own if None."""
    outputs = [
        Output(part, name, shard, dtype or source.manifest.tensors[name].dtype)
        for name in global_names(source.model)
        for part, shard in hf_shards(name, source.model).items()
    ]
    planned = plan_files(outputs, max_bytes=max_bytes)
    names = [f"model-{number:05d}-of-{len(planned):05d}.safetensors" for number in range(1, len(planned) + 1)]
    return dict(zip(names if len(planned) > 1 else [SINGLE], planned, strict=True))


def write_index(folder: Path, facts: dict[str, dict[str, Any]]) -> None:
    """Writes the files' checksums and, where there are several files, which tensor lies in which."""
    if len(facts) > 1:
        held = {file: stored_tensors(folder / file) for file in facts}
        weight_map = {name: file for file, tensors in held.items() for name in tensors}
        total = sum(tensor.num_bytes for tensors in held.values() for tensor in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_checksums(folder, facts)


def write_checksums(folder: Path, facts: dict[str, dict[str, Any]]) -> None:
    """facts: {file: {sha256}}. As sha256sum -c reads them."""
    write_text(folder / CHECKSUMS, "".join(f"{told['sha256']}  {file}\n" for file, told in sorted(facts.items())))


@dataclass(frozen=True)
class Exports:
    """The HF folders that a run makes of every `interval`-th checkpoint (0: of none); part: of PPO's, the role's."""

    run_dir: Path
    interval: int
    say: Say
    part: str = ""

    def make(self, iteration: int, checkpoint: Path) -> None:
        """That of a whole checkpoint, if one is due."""
        if self._is_due(iteration):
            export(checkpoint / self.part, self.run_dir, name=checkpoint.name, say=self.say)

    def is_missing(self, iteration: int, checkpoint: Path) -> bool:
        """Whether a kill came between a checkpoint and its HF folder."""
        return self._is_due(iteration) and not (self.run_dir / "hf" / checkpoint.name).exists()

    def _is_due(self, iteration: int) -> bool:
        return self.interval > 0 and iteration % self.interval == 0


def export(checkpoint: Path, run_dir: Path, *, name: str, say: Say) -> None:
    """RUN/hf/NAME of a run's whole checkpoint, block by block out of its shards: nothing is gathered.

    Where it cannot be made, that is said, and the run goes on: the checkpoint is there to be converted.
    """
    target = run_dir / "hf" / name
    try:
        with storage_errors(target):
            if target.exists():  # an older run's
                shutil.rmtree(target)
            to_hf(open_source("ckpt", checkpoint), target, dtype=None, tokenizer=None, verify=False, say=say)
    except (ConfigError, DataError, StorageError) as error:
        say(
            f"warning: no HF folder of {checkpoint}, which is whole: {error}; the run goes on; later: megatron-xy "
            f"convert --from ckpt:{checkpoint} --to hf:{target}"
        )


def to_checkpoint(
    source: Source, target: Path, *, dtype: str | None, say: Say, max_shard_bytes: int | None = None
) -> None:
    """Writes a checkpoint, opened by any layout: the weights, of a checkpoint also the optimizer's state.

    dtype: of the weights; each tensor's own if None. Tokenizer files come along. Raises ConfigError, DataError or
    StorageError.
    """
    manifest = source.manifest
    weights = list(global_names(source.model))
    others = sorted(manifest.tensors.keys() - set(weights))
    outputs = [
        Output(name, name, whole(manifest.tensors[name].shape), wanted or manifest.tensors[name].dtype)
        for names, wanted in ((weights, dtype), (others, None))
        for name in names
    ]
    planned = plan_files(outputs, max_bytes=max_shard_bytes or MAX_CHECKPOINT_BYTES)
    shards = {f"rank-{number:05d}-of-{len(planned):05d}.safetensors": held for number, held in enumerate(planned)}
    if source.kind == "ckpt":
        state = manifest.state
    else:
        state = {
            **asdict(files.TrainingState()),
            "world_size": 1,
            "model": source.model.model_dump(mode="json", exclude_unset=True),
            **source.kept,
            "origin": f"hf:{source.folder}",
        }
    with whole_or_absent(target, work=_work("ckpt", source, shards)) as folder, source.verified():
        copied = copy_side_files(source.folder, folder)
        facts = write_files(folder, shards, source=source, metadata=files.METADATA, say=say)
        entries = {
            output.tensor: files.TensorEntry(output.shard.local_shape, output.dtype, [files.Piece(file, output.shard)])
            for file, held in shards.items()
            for output in held
        }
        files.write_manifest(folder, files.Manifest(state, entries, facts))
    if source.kind == "hf" and not copied & set(TOKENIZER_FILES):
        say(f"warning: {source.folder} holds no tokenizer files; the checkpoint has none beside it")
    say(f"wrote {target}: {len(outputs)} tensors, {entries[EMBEDDING].dtype}")


def _work(kind: str, source: Source, shards: dict[str, list[Output]]) -> dict[str, Any]:
    """What a conversion writes and out of what: a killed one is gone on with where this is the same."""
    plan = [[file, output.name, output.dtype] for file, held in shards.items() for output in held]
    plan_sha256 = hashlib.sha256(repr(plan).encode()).hexdigest()
    return {"to": kind, "from": source.fingerprint(), "plan_sha256": plan_sha256}
