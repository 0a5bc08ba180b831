"""What a conversion reads: a checkpoint or HF folder, as a manifest of its tensors and the model that they make."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_xy import checkpoint_files as files
from megatron_xy.config import ModelConfig
from megatron_xy.errors import DataError
from megatron_xy.hf.config import read_hf_config
from megatron_xy.hf.kept import kept_facts
from megatron_xy.hf.names import global_names
from megatron_xy.hf.reader import hf_manifest


@dataclass(frozen=True)
class Source:
    """A folder of weights; its files are whole as far as there are checksums."""

    kind: str  # ckpt | hf
    folder: Path
    manifest: files.Manifest
    model: ModelConfig
    kept: dict[str, Any]  # of the HF folder that it is or comes from

    def checks(self) -> list[Callable[[], None]]:
        """Of a checkpoint one for each file: it compares the file with its checksum, and raises DataError."""
        return [
            partial(files.verify_files, self.folder, self.manifest, files=[file])
            for file in sorted(self.manifest.files)
        ]

    def fingerprint(self) -> dict[str, Any]:
        """What changes when the folder's contents do: of a checkpoint checksums, of an HF folder times."""
        if self.kind == "ckpt":
            return {"folder": str(self.folder.resolve()), "files": self.manifest.files}
        stats = {path.name: path.stat() for path in sorted(self.folder.iterdir()) if path.is_file()}
        return {
            "folder": str(self.folder.resolve()),
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        }


def open_source(kind: str, folder: Path, *, verify: bool = True) -> Source:
    """The folder's tensors and model; `verify` compares its checksums, which whoever reads it all may do beside that.

    Raises ConfigError where it is not there, DataError where it is no whole model.
    """
    if kind == "hf":
        model = read_hf_config(folder)
        return Source(kind, folder, hf_manifest(folder, model=model), model, kept_facts(kind, folder))
    manifest = files.read_manifest(folder)
    model = ModelConfig.model_validate(manifest.state["model"])
    source = Source(kind, folder, manifest, model, kept_facts(kind, folder))
    if verify:
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda check: check(), source.checks()))
    files.verify_coverage(folder, manifest)
    if missing := [name for name in global_names(model) if name not in manifest.tensors]:
        raise DataError(f"{folder}: the checkpoint holds no {missing[0]}, which its model section calls for")
    return source
