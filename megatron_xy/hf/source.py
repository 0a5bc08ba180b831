"""What a conversion reads: a checkpoint or HF folder, as a manifest of its tensors and the model that they make."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xy.checkpoint import files
from megatron_xy.config import ModelConfig
from megatron_xy.errors import DataError
from megatron_xy.hf.config import read_hf_config
from megatron_xy.hf.kept import kept_facts
from megatron_xy.hf.names import global_names
from megatron_xy.hf.reader import hf_manifest


@dataclass(frozen=True)
class Source:
    """A folder of weights, looked at but for their contents."""

    kind: str  # ckpt | hf
    folder: Path
    manifest: files.Manifest
    model: ModelConfig
    kept: dict[str, Any]  # of the HF folder that it is or comes from

    def fingerprint(self) -> dict[str, Any]:
        """What changes when the folder's contents do: of a checkpoint checksums, of an HF folder times."""
        if self.kind == "ckpt":
            return {"folder": str(self.folder.resolve()), "files": self.manifest.files}
        stats = {path.name: path.stat() for path in sorted(self.folder.iterdir()) if path.is_file()}
        return {
            "folder": str(self.folder.resolve()),
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        }

    @contextmanager
    def verified(self) -> Iterator[None]:
        """Compares the checksums that a checkpoint has beside the work of the block.

        Raises DataError, at the block's end, where they differ.
        """
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            checks = [
                pool.submit(files.verify_files, self.folder, self.manifest, files=[file])
                for file in sorted(self.manifest.files)
            ]
            try:
                yield
                for check in checks:
                    check.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def open_source(kind: str, folder: Path) -> Source:
    """The folder's tensors and model.

    Raises ConfigError where it is not there, DataError where it is no whole model.
    """
    if kind == "hf":
        model = read_hf_config(folder)
        return Source(kind, folder, hf_manifest(folder, model=model), model, kept_facts(kind, folder))
    manifest = files.read_manifest(folder)
    files.verify_coverage(folder, manifest)
    model = files.stored_model(folder, manifest)
    if missing := [name for name in global_names(model) if name not in manifest.tensors]:
        raise DataError(f"{folder}: the checkpoint holds no {missing[0]}, which its model section calls for")
    return Source(kind, folder, manifest, model, kept_facts(kind, folder))


def manifest_of(kind: str, folder: Path) -> files.Manifest:
    """The tensors of `ckpt` or `hf` and its folder, by their headers. Raises as `open_source`."""
    return files.read_manifest(folder) if kind == "ckpt" else hf_manifest(folder, model=read_hf_config(folder))
