"""Reads the weights of an HF folder, tensor by tensor, from safetensors alone: no pickle, no link out of the folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_xy.config import ModelConfig
from megatron_xy.errors import DataError
from megatron_xy.hf.names import from_hf, hf_names, hf_shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class HFReader:
    """The weights of an HF folder under the global names. A context manager: holds files open."""

    def __init__(self, directory: Path, *, model: ModelConfig) -> None:
        self.directory, self.model = directory, model
        self._files = tensor_files(directory)
        self._stack = contextlib.ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> HFReader:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()
        self._open.clear()

    def read(self, name: str) -> torch.Tensor:
        """The global tensor `name`, whole. Raises DataError where HF's tensors are missing or of another shape."""
        shapes = dict(zip(hf_names(name), hf_shapes(name, self.model), strict=True))
        return from_hf(name, lambda part: self._tensor(part, shapes[part]), model=self.model)

    def dtype(self) -> torch.dtype:
        """The type of the embedding, which stands for all weights."""
        return self._file("model.embed_tokens.weight").get_tensor("model.embed_tokens.weight").dtype

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor: torch.Tensor = self._file(name).get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise DataError(
                f"{self.directory / self._files[name]}: {name} is {list(tensor.shape)}, "
                f"but config.json makes it {list(shape)}"
            )
        return tensor

    def _file(self, name: str) -> Any:
        if name not in self._files:
            raise DataError(f"{self.directory} holds no tensor {name}, which its config.json calls for")
        file = self._files[name]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(_opened(self.directory / file))
        return self._open[file]


def tensor_files(directory: Path) -> dict[str, str]:
    """{HF tensor name: file} of a folder, from its index or its single file."""
    index = directory / INDEX
    if index.is_file():
        try:
            files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{index} is damaged: {error!r}") from None
        for file in set(files.values()):
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise DataError(f"{index}: {file!r} is no plain name of a .safetensors file; the index is refused")
            _require_inside(directory, file)
        return files
    if (directory / SINGLE).is_file():
        _require_inside(directory, SINGLE)
        with _opened(directory / SINGLE) as opened:
            return dict.fromkeys(opened.keys(), SINGLE)  # noqa: SIM118: safe_open has no iterator
    if any(directory.glob("pytorch_model*.bin")):
        raise DataError(
            f"{directory} holds pytorch_model.bin, a pickle, which is never opened; load and save it once with "
            f"transformers' save_pretrained, which writes safetensors"
        )
    raise DataError(f"{directory} holds neither {SINGLE} nor {INDEX}")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        opened = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is damaged or missing: {error}") from None
    with opened as handle:
        yield handle


def _require_inside(directory: Path, file: str) -> None:
    """Links may lead to the blobs of the hub cache's own model folder, nowhere else."""
    path = directory / file
    target = path.resolve()
    root = directory.resolve()
    cache = root.parent.parent if root.parent.name == "snapshots" else None
    inside_cache = cache is not None and cache.name.startswith("models--") and target.parent == cache / "blobs"
    if target.parent != root and not inside_cache:
        raise DataError(f"{path} is a link out of its folder, to {target}; it is refused")
    if not target.is_file():
        raise DataError(f"{path} is named by the index and is not there")
