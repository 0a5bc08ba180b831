"""The checkpoint format on disk: safetensors shards and a JSON manifest with checksums, whatever layout wrote it.

DIR/manifest.json names every global tensor, its shape and dtype, and for each piece the file and the boxes of the
tensor that it holds. It is written last and carries the size and sha256 of every shard and of itself, so what opens is
whole. There is no pickle anywhere. This module knows files only; `checkpoint` knows ranks.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_xy.config import ModelConfig
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.storage import file_sha256, read_error, write_json
from megatron_xy.tensors.shards import Box, ParameterShard

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
METADATA = {"format": "megatron_xy"}  # of the safetensors files
DTYPES = ("float32", "float16", "bfloat16", "uint8", "int32", "int64")  # that a tensor may have


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands, beside its tensors."""

    iteration: int = 0  # iterations done
    data_step: int = 0  # the next step's place in the data
    consumed_samples: int = 0
    consumed_tokens: int = 0  # padding included
    optimizer_steps: int = 0  # updates made; skipped ones not counted

    def after_step(self, *, num_samples: int, num_tokens: int, num_updates: int) -> TrainingState:
        """Where it stands after one more iteration."""
        return TrainingState(
            iteration=self.iteration + 1,
            data_step=self.data_step + 1,
            consumed_samples=self.consumed_samples + num_samples,
            consumed_tokens=self.consumed_tokens + num_tokens,
            optimizer_steps=self.optimizer_steps + num_updates,
        )


@dataclass(frozen=True)
class Piece:
    """A part of a global tensor as one file holds it, under the tensor's name unless it has another one there."""

    file: str
    shard: ParameterShard
    tensor: str | None = None


@dataclass
class TensorEntry:
    """A global tensor: its shape, dtype and where its pieces lie."""

    shape: tuple[int, ...]
    dtype: str
    pieces: list[Piece] = field(default_factory=list)


@dataclass
class Manifest:
    """What manifest.json says: the run's state as plain numbers, tensors, files."""

    state: dict[str, Any]
    tensors: dict[str, TensorEntry]
    files: dict[str, dict[str, Any]]  # {file: {bytes, sha256}}

    @property
    def training_state(self) -> TrainingState:
        """Where the run stood."""
        return TrainingState(**{name: self.state[name] for name in TrainingState.__dataclass_fields__})

    def to_json(self) -> dict[str, Any]:
        """The manifest with its own checksum."""
        body: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "state": self.state,
            "tensors": {
                name: {
                    "shape": list(entry.shape),
                    "dtype": entry.dtype,
                    "pieces": [{"file": piece.file, **shard_to_json(piece.shard)} for piece in entry.pieces],
                }
                for name, entry in sorted(self.tensors.items())
            },
            "files": dict(sorted(self.files.items())),
        }
        return {**body, "manifest_sha256": _digest_of(body)}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes manifest.json by a temporary name, synced to disk: from here on `directory` is a checkpoint."""
    write_json(directory / MANIFEST, manifest.to_json())


def amend_state(directory: Path, facts: dict[str, Any]) -> None:
    """Adds to what a whole checkpoint's manifest says of its run, or replaces it."""
    manifest = read_manifest(directory)
    manifest.state |= facts
    write_manifest(directory, manifest)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises ConfigError where the folder is not there, DataError where it holds no whole, consistent manifest,
    StorageError where that cannot be told.
    """
    path = directory / MANIFEST
    try:
        if not directory.is_dir():
            raise ConfigError(f"{directory}: there is no such folder; name the one that holds {MANIFEST}")
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        roles = sorted(found.parent.name for found in directory.glob(f"*/{MANIFEST}"))
        if roles:
            text = f"{directory} is a PPO run's checkpoint, of {' and '.join(roles)}; name the folder of one of them"
        else:
            text = f"{directory} holds no {MANIFEST}: it is no checkpoint, or one that was never finished"
        raise DataError(text) from None
    except OSError as error:
        raise read_error(path, error) from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    if not isinstance(body, dict) or "format_version" not in body:
        raise DataError(f"{path} is not a checkpoint's manifest")
    if body["format_version"] != FORMAT_VERSION:
        raise DataError(
            f"{path}: format_version {body['format_version']} is not {FORMAT_VERSION}; a newer megatron_xy wrote it"
        )
    if body.pop("manifest_sha256", None) != _digest_of(body):
        raise DataError(f"{path} is damaged: its contents do not match its own checksum")
    try:
        return _parsed(body, path)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is not laid out as format_version {FORMAT_VERSION} is ({type(error).__name__}: {error}); "
            f"it is foreign or tampered with"
        ) from None


def stored_model(directory: Path, manifest: Manifest, *, without: Set[str] = frozenset()) -> ModelConfig:
    """The model section that a manifest keeps, but for the keys `without`. Raises DataError where it is none."""
    section = manifest.state["model"]
    try:
        return ModelConfig.model_validate({name: section[name] for name in section.keys() - without})
    except AttributeError:
        raise DataError(f"{directory / MANIFEST}: its model section is no object; it is foreign") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(
            f"{directory / MANIFEST}: {'.'.join(map(str, first['loc']))} of its model section: {first['msg']}; a newer "
            f"megatron_xy wrote it, or it is foreign"
        ) from None


def verify_sizes(directory: Path, manifest: Manifest) -> None:
    """Compares the shards' sizes with the manifest.

    Raises DataError at the first that differs, StorageError where that cannot be told.
    """
    for file, facts in manifest.files.items():
        _verify_size(directory / file, facts)


def verify_files(directory: Path, manifest: Manifest, *, files: Iterable[str] | None = None) -> None:
    """Compares size and sha256 of the given shards (default: all) with the manifest. Raises as `verify_sizes`."""
    for file in manifest.files if files is None else files:
        facts, path = manifest.files[file], directory / file
        _verify_size(path, facts)
        try:
            sha256 = file_sha256(path)
        except OSError as error:
            raise read_error(path, error) from None
        if sha256 != facts["sha256"]:
            raise DataError(f"{path} is damaged: its contents do not match the checksum in {MANIFEST}")


def _verify_size(path: Path, facts: dict[str, Any]) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        found = None
    except OSError as error:
        raise read_error(path, error) from None
    if found is None or not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path} is missing from the checkpoint, or is no plain file")
    if found.st_size != facts["bytes"]:
        raise DataError(f"{path} is damaged: {found.st_size} bytes instead of {facts['bytes']}")


def verify_coverage(directory: Path, manifest: Manifest) -> None:
    """Every element of every tensor stands in exactly one piece. Raises DataError."""
    for name, entry in manifest.tensors.items():
        shards = [piece.shard for piece in entry.pieces]
        whole_boxes = [box for shard in shards if shard.flat is None for box in shard.boxes]
        ranges: dict[tuple[Box, ...], list[tuple[int, int]]] = {}  # of the boxes that are held in flat parts
        for shard in shards:
            if shard.flat:
                ranges.setdefault(shard.boxes, []).append(shard.flat)
        boxes = [*whole_boxes, *(box for group in ranges for box in group)]
        complete = sum(box.numel for box in boxes) == math.prod(entry.shape)
        overlap = any(a.intersect(b) for index, a in enumerate(boxes) for b in boxes[:index])
        if not complete or overlap or not all(_is_tiled(group, parts) for group, parts in ranges.items()):
            raise DataError(
                f"{directory / MANIFEST}: the pieces of {name} do not make up its shape {list(entry.shape)}"
            )


def shard_to_json(shard: ParameterShard) -> dict[str, Any]:
    """{boxes, flat} as manifests have them."""
    boxes = [[list(box.start), list(box.stop)] for box in shard.boxes]
    return {"boxes": boxes, "flat": list(shard.flat) if shard.flat else None}


def shard_from_json(body: dict[str, Any], *, shape: tuple[int, ...]) -> ParameterShard:
    """The shard out of its JSON. Raises ValueError where it does not lie within a tensor of `shape`."""
    boxes = tuple(Box(tuple(start), tuple(stop)) for start, stop in body["boxes"])
    for box in boxes:
        if not all(0 <= a <= b <= size for a, b, size in zip(box.start, box.stop, shape, strict=True)):
            raise ValueError(f"a box lies outside the shape {list(shape)}")
    if body["flat"] is None:
        return ParameterShard(shape, boxes)
    start, stop = body["flat"]
    if not (0 <= start <= stop <= sum(box.numel for box in boxes)):
        raise ValueError(f"its flat range {start}:{stop} lies outside its boxes")
    return ParameterShard(shape, boxes, (start, stop))


def _is_tiled(boxes: tuple[Box, ...], ranges: list[tuple[int, int]]) -> bool:
    """Whether flat ranges follow each other from the first to the last element of the boxes."""
    edge = 0
    for start, stop in sorted(ranges):
        if start != edge:
            return False
        edge = stop
    return edge == sum(box.numel for box in boxes)


def _digest_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _parsed(body: dict[str, Any], path: Path) -> Manifest:
    """The manifest out of its JSON, which has passed its checksum: every file listed, every box within its tensor."""
    files = body["files"]
    for file, facts in files.items():
        if file in ("", ".", "..") or Path(file).name != file:
            raise DataError(f"{path}: {file!r} is no plain file name; the manifest is foreign or tampered with")
        if not (isinstance(facts["bytes"], int) and isinstance(facts["sha256"], str)):
            raise DataError(f"{path}: {file} lacks its size or checksum")
    tensors = {}
    for name, entry in body["tensors"].items():
        shape = tuple(entry["shape"])
        if not shape:
            raise DataError(
                f"{path}: {name} has no dimension, and tensors have one or more; the manifest is foreign: go on from "
                f"another checkpoint"
            )
        if entry["dtype"] not in DTYPES:
            raise DataError(f"{path}: {name} has dtype {entry['dtype']}; known are {', '.join(DTYPES)}")
        pieces = []
        for piece in entry["pieces"]:
            if piece["file"] not in files:
                raise DataError(
                    f"{path}: {piece['file']!r} is not among its files, so nothing vouches for its contents"
                )
            try:
                pieces.append(Piece(piece["file"], shard_from_json(piece, shape=shape)))
            except ValueError as error:
                raise DataError(f"{path}: a piece of {name} is impossible: {error}") from None
        tensors[name] = TensorEntry(shape, entry["dtype"], pieces)
    state = body["state"]
    if missing := sorted({*TrainingState.__dataclass_fields__, "world_size", "model"} - set(state)):
        raise DataError(f"{path}: its state lacks {', '.join(missing)}")
    return Manifest(state, tensors, files)
