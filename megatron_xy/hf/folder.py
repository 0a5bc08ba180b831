"""The files of an HF folder that may be opened: its own, and the blobs of the hub's cache that it links to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_xy.errors import ConfigError, DataError
from megatron_xy.storage import read_error


def file_inside(directory: Path, file: str) -> Path | None:
    """DIR/file, None where there is none.

    A link may lead to another file of the folder, or from a snapshot of the hub's cache to the blobs of the same model
    (models--X/snapshots/Y/file -> models--X/blobs/Z). Raises ConfigError where the folder is missing, DataError for any
    other link and for a name that is no plain one, StorageError where the storage does not tell.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory}: there is no such folder; name one with config.json and *.safetensors")
    if Path(file).name != file or file == "..":
        raise DataError(f"{directory}: {file!r} is no plain name of a file in the folder; it is refused")
    path = directory / file
    try:
        root, target, is_there = directory.resolve(), path.resolve(), path.is_file()
    except OSError as error:
        raise read_error(path, error) from None
    except (ValueError, RuntimeError) as error:  # a NUL in its name, links in a circle
        raise DataError(f"{directory}: {file!r} cannot be opened: {error}; copy the folder again") from None
    allowed = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        allowed.append(root.parent.parent / "blobs")
    if target.parent not in allowed:
        raise DataError(f"{path} is a link out of its folder, to {target}; it is refused; copy the file there")
    return path if is_there else None


def read_object(directory: Path, file: str) -> dict[str, Any] | None:
    """The JSON object in DIR/file, None where there is no such file. Raises ConfigError, DataError or StorageError."""
    path = file_inside(directory, file)
    if path is None:
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise read_error(path, error) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}; copy it again") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__} instead of a JSON object; copy it again")
    return value
