"""`megatron-xy convert`: from where to where, in which type, with which tokenizer; what ckpt:DIR and hf:DIR name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from megatron_xy.errors import UsageError
from megatron_xy.hf.convert import to_checkpoint, to_hf
from megatron_xy.hf.reader import DTYPES
from megatron_xy.hf.source import open_source
from megatron_xy.hf.target import AlreadyWritten

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def convert(
    source: str,
    target: str,
    *,
    dtype: str | None,
    tokenizer: Path | None,
    max_shard_size: str | None = None,
    may_be_there: bool = False,
    say: Callable[[str], None],
) -> None:
    """Converts `ckpt:DIR` or `hf:DIR` to either.

    may_be_there: a target that the same command has finished before is left as it is. Raises UsageError for arguments
    that do not fit, ConfigError for paths, DataError for a damaged source, StorageError.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
    (from_kind, from_path), (to_kind, to_path) = place(source, "--from"), place(target, "--to")
    max_bytes = None if max_shard_size is None else _bytes(max_shard_size)
    if tokenizer is not None and to_kind == "ckpt":
        raise UsageError("--tokenizer goes with --to hf:DIR; a checkpoint takes the files that lie beside its source")
    opened = open_source(from_kind, from_path)
    wanted = DTYPES[dtype] if dtype else None
    try:
        if to_kind == "hf":
            to_hf(opened, to_path, dtype=wanted, tokenizer=tokenizer, max_shard_bytes=max_bytes, say=say)
        else:
            to_checkpoint(opened, to_path, dtype=wanted, max_shard_bytes=max_bytes, say=say)
    except AlreadyWritten:
        if not may_be_there:
            raise
        say(f"{to_path} is there, as this command has written it before")


def place(text: str, option: str) -> tuple[str, Path]:
    """("ckpt" or "hf", the folder). Raises UsageError."""
    kind, _, folder = text.partition(":")
    if kind not in ("ckpt", "hf") or not folder:
        raise UsageError(f"{option} {text}: must be ckpt:DIR or hf:DIR")
    return kind, Path(folder)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+) ?(|KB|MB|GB)", text)
    if match is None or int(match[1]) == 0:
        raise UsageError(f"--max-shard-size {text}: must be a number of bytes, KB, MB or GB, such as 5GB")
    return int(match[1]) * _UNITS[match[2]]
