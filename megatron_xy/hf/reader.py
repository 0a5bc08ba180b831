"""An HF folder read as a checkpoint: the manifest of its safetensors, made of their headers.

No pickle is opened, and no link out of the folder followed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_xy.checkpoint.files import Manifest, Piece, TensorEntry
from megatron_xy.config import ModelConfig
from megatron_xy.errors import DataError
from megatron_xy.hf.folder import file_inside, read_object
from megatron_xy.hf.names import PLAIN, global_names, global_shape, hf_shards
from megatron_xy.hf.values import Values
from megatron_xy.tensors.block_reader import BlockReader
from megatron_xy.tensors.names import EMBEDDING, OUTPUT_LAYER
from megatron_xy.tensors.safetensors_file import StoredTensor, stored_tensors
from megatron_xy.tensors.shards import whole

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_HEAD = PLAIN[OUTPUT_LAYER]


def hf_manifest(directory: Path, *, model: ModelConfig) -> Manifest:
    """Where each global tensor of `model`, the folder's own, lies in its files; for a BlockReader.

    Raises DataError where the folder holds no weights in safetensors, lacks one, or holds one that would be dropped.
    """
    stored = _stored_tensors(directory)
    manifest = Manifest(state={}, tensors={}, files={})
    for name in global_names(model):
        shape = global_shape(name, model)
        pieces, dtypes = [], []
        for part, shard in hf_shards(name, model).items():
            if part not in stored:
                raise DataError(f"{directory} holds no {part}, which config.json calls for")
            file, tensor = stored.pop(part)
            wanted = shard.local_shape
            if tensor.shape != wanted:
                raise DataError(
                    f"{directory / file}: {part} is {list(tensor.shape)}, but config.json makes it {list(wanted)}; "
                    f"there {_explained(part, model)}"
                )
            if tensor.dtype not in DTYPES.values():
                raise DataError(
                    f"{directory / file}: {part} is of type {tensor.dtype}; only {', '.join(DTYPES)} are supported"
                )
            pieces.append(Piece(file, shard, part))
            dtypes.append(tensor.dtype)
        if len(set(dtypes)) > 1:
            raise DataError(f"{directory}: the parts of {name} are of different types; save them in one")
        manifest.tensors[name] = TensorEntry(shape, dtypes[0], pieces)
    _refuse_unused(directory, manifest, stored, model=model)
    return manifest


def read_index(directory: Path) -> dict[str, Any] | None:
    """The folder's index as it is; None where one file holds all weights. As in transformers, that file goes first.

    Raises ConfigError or DataError.
    """
    return None if file_inside(directory, SINGLE) is not None else read_object(directory, INDEX)


def _explained(part: str, model: ModelConfig) -> str:
    """The values of config.json that make up the shape of an HF tensor."""
    values = {"hidden_size": model.hidden_size}
    if ".self_attn." in part:
        values |= {"num_attention_heads": model.num_attention_heads, "num_key_value_heads": model.num_query_groups}
    elif ".mlp." in part:
        values |= {"intermediate_size": model.ffn_hidden_size}
    elif part in (PLAIN[EMBEDDING], _HEAD):
        values |= {"vocab_size": model.vocab_size}
    return ", ".join(f"{name} is {value}" for name, value in values.items())


def _refuse_unused(
    directory: Path, manifest: Manifest, rest: dict[str, tuple[str, StoredTensor]], *, model: ModelConfig
) -> None:
    """What config.json has no place for would be dropped silently. A tied head beside its embedding is no loss."""
    unused = sorted(name for name in rest if not name.endswith("rotary_emb.inv_freq"))
    if _HEAD in unused and model.has_tied_output_layer:
        file, tensor = rest[_HEAD]
        shape = global_shape(EMBEDDING, model)
        if tensor.shape == shape:
            head = TensorEntry(shape, tensor.dtype, [Piece(file, whole(shape), _HEAD)])
            both = Manifest({}, {EMBEDDING: manifest.tensors[EMBEDDING], OUTPUT_LAYER: head}, {})
            with BlockReader(directory, both) as reader:
                blocks = zip(*(reader.blocks(name, dtype="float32") for name in both.tensors), strict=True)
                if all(np.array_equal(a, b) for a, b in blocks):
                    unused.remove(_HEAD)
    if biases := [name for name in unused if name.endswith(".bias")]:
        raise DataError(f"{directory} holds {biases[0]}; of biases, only those of Qwen2's QKV are supported")
    if unused:
        raise DataError(
            f"{directory} holds {len(unused)} tensor(s) that its config.json has no place for, the first is "
            f"{unused[0]}; correct num_hidden_layers, tie_word_embeddings or architectures there"
        )


def _stored_tensors(directory: Path) -> dict[str, tuple[str, StoredTensor]]:
    """{HF tensor name: (file, place)} of all weights of the folder."""
    index = _weight_map(directory)
    headers: dict[str, dict[str, StoredTensor]] = {}
    for file in [SINGLE] if index is None else sorted(set(index.values())):
        path = file_inside(directory, file)
        if path is None:
            raise DataError(f"{directory / file} is named by {INDEX} and is not there; copy it again")
        headers[file] = stored_tensors(path)
    if index is None:
        index = dict.fromkeys(headers[SINGLE], SINGLE)
    for name, file in index.items():
        if name not in headers[file]:
            raise DataError(f"{directory / file} does not hold {name}, though {INDEX} says so; copy both again")
    return {name: (file, headers[file][name]) for name, file in index.items()}


def _weight_map(directory: Path) -> dict[str, str] | None:
    """{HF tensor name: file} from the folder's index; None where one file holds all weights."""
    index = read_index(directory)
    if index is None:
        if file_inside(directory, SINGLE) is not None:
            return None
        if any(directory.glob("pytorch_model*.bin")):
            raise DataError(
                f"{directory} holds pytorch_model.bin, a pickle, which is never opened; load and save it once with "
                f"transformers' save_pretrained, which writes safetensors"
            )
        raise DataError(f"{directory} holds neither {SINGLE} nor {INDEX}; name a folder with weights")
    values = Values(directory / INDEX, index)
    values.object("metadata")
    weight_map = dict(values.object("weight_map").values)
    if not weight_map:
        raise DataError(f"{directory / INDEX} names no files: its weight_map is missing or empty; copy it again")
    for file in set(map(str, weight_map.values())):
        if not file.endswith(".safetensors"):
            raise DataError(f"{directory / INDEX} names {file}, which is no .safetensors file; it is refused")
    return weight_map
