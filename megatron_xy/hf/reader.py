"""Reads the weights of an HF folder, tensor by tensor, from safetensors alone: no pickle, no link out of the folder."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_xy.config import ModelConfig
from megatron_xy.errors import DataError
from megatron_xy.hf.folder import file_inside, read_object
from megatron_xy.hf.names import EMBEDDING, OUTPUT_LAYER, from_hf, global_names, hf_names, hf_shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class HFReader:
    """The weights of an HF folder under the global names. A context manager: holds files open.

    Raises DataError where the folder holds no weights in safetensors, or biases, which would be dropped silently.
    """

    def __init__(self, directory: Path, *, model: ModelConfig) -> None:
        self.directory, self.model = directory, model
        self._stack = contextlib.ExitStack()
        self._open: dict[str, Any] = {}
        index = _weight_map(directory)
        self._files = dict.fromkeys(self._file(SINGLE).keys(), SINGLE) if index is None else index
        if biases := sorted(name for name in self._files if name.endswith(".bias")):
            raise DataError(f"{directory} holds {biases[0]}; only Llama shapes without biases are supported")
        self._refuse_unused()

    def __enter__(self) -> HFReader:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()
        self._open.clear()

    def _refuse_unused(self) -> None:
        """What config.json has no place for would be dropped silently. A tied head beside its embedding is no loss."""
        used = {part for name in global_names(self.model) for part in hf_names(name)}
        unused = sorted(name for name in self._files.keys() - used if not name.endswith("rotary_emb.inv_freq"))
        head, embedding = hf_names(OUTPUT_LAYER)[0], hf_names(EMBEDDING)[0]
        if head in unused and not self.model.untie_embeddings_and_output_weights:
            shape = hf_shapes(EMBEDDING, self.model)[0]
            if torch.equal(self._tensor(head, shape), self._tensor(embedding, shape)):
                unused.remove(head)
        if unused:
            raise DataError(
                f"{self.directory} holds {len(unused)} tensor(s) that its config.json has no place for, the first is "
                f"{unused[0]}; correct num_hidden_layers or tie_word_embeddings there"
            )

    def read(self, name: str) -> torch.Tensor:
        """The global tensor `name`, whole, in its own dtype. Raises DataError where HF's tensors do not make it up."""
        shapes = dict(zip(hf_names(name), hf_shapes(name, self.model), strict=True))
        return from_hf(name, lambda part: self._tensor(part, shapes[part]), model=self.model)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in self._files:
            raise DataError(f"{self.directory} holds no {name}, which config.json calls for")
        file = self._files[name]
        path = self.directory / file
        try:
            tensor: torch.Tensor = self._file(file).get_tensor(name)
        except SafetensorError as error:
            raise DataError(f"{path} does not hold {name}, though {INDEX} says so: {error}") from None
        if tuple(tensor.shape) != shape:
            raise DataError(f"{path}: {name} is {list(tensor.shape)}, but config.json makes it {list(shape)}")
        if tensor.dtype not in DTYPES.values():
            raise DataError(f"{path}: {name} is of type {tensor.dtype}; only {', '.join(DTYPES)} are supported")
        return tensor

    def _file(self, file: str) -> Any:
        if file not in self._open:
            path = file_inside(self.directory, file)
            if path is None:
                raise DataError(f"{self.directory / file} is named by {INDEX} and is not there")
            try:
                self._open[file] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path} is damaged: {error}; copy it again") from None
        return self._open[file]


def _weight_map(directory: Path) -> dict[str, str] | None:
    """{HF tensor name: file} from the folder's index; None where one file holds all weights."""
    index = read_object(directory, INDEX)
    if index is None:
        if file_inside(directory, SINGLE) is not None:
            return None
        if any(directory.glob("pytorch_model*.bin")):
            raise DataError(
                f"{directory} holds pytorch_model.bin, a pickle, which is never opened; load and save it once with "
                f"transformers' save_pretrained, which writes safetensors"
            )
        raise DataError(f"{directory} holds neither {SINGLE} nor {INDEX}")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise DataError(f"{directory / INDEX} has no weight_map; copy it again")
    for file in set(map(str, weight_map.values())):
        if not file.endswith(".safetensors"):
            raise DataError(f"{directory / INDEX} names {file}, which is no .safetensors file; it is refused")
        file_inside(directory, file)
    return weight_map
