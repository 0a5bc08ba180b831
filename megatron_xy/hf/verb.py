"""`megatron-xy convert`: which way, with which tokenizer, and the verification."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_xy import checkpoint_files as files
from megatron_xy.errors import ConfigError
from megatron_xy.hf.convert import DTYPES, checkpoint_to_hf, find_tokenizer, hf_to_checkpoint
from megatron_xy.hf.verify import TOLERANCE, largest_logit_difference, tensors_agree


def convert(
    source: str, target: str, *, dtype: str | None, tokenizer: Path | None, verify: bool, say: Callable[[str], None]
) -> bool:
    """Converts `ckpt:DIR` to `hf:DIR` or the other way; returns whether the verification holds (True without one).

    Raises ConfigError for arguments that do not fit, DataError for a damaged source, StorageError.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
    (from_kind, from_path), (to_kind, to_path) = _place(source, "--from"), _place(target, "--to")
    if {from_kind, to_kind} != {"ckpt", "hf"}:
        raise ConfigError(f"--from {source} --to {target}: one side must be ckpt:DIR and the other hf:DIR")
    if from_kind == "ckpt":
        if tokenizer is None:
            tokenizer = find_tokenizer(from_path, named=files.read_manifest(from_path).state.get("tokenizer"))
        checkpoint_to_hf(from_path, to_path, dtype=dtype, tokenizer=tokenizer, say=say)
        checkpoint, hf_folder = from_path, to_path
    else:
        hf_to_checkpoint(from_path, to_path, dtype=dtype, say=say)
        checkpoint, hf_folder = to_path, from_path
    return _verified(checkpoint, hf_folder, say=say) if verify else True


def _verified(checkpoint: Path, hf_folder: Path, *, say: Callable[[str], None]) -> bool:
    same = tensors_agree(checkpoint, hf_folder, say=say)
    difference = largest_logit_difference(hf_folder)
    holds = difference <= TOLERANCE
    comparison = "<=" if holds else "> "
    say(f"logits of transformers and ours, fp32: largest difference {difference:.2e} {comparison} {TOLERANCE:.0e}")
    return same and holds


def _place(text: str, option: str) -> tuple[str, Path]:
    kind, colon, folder = text.partition(":")
    if kind not in ("ckpt", "hf") or not colon or not folder:
        raise ConfigError(f"{option} {text}: must be ckpt:DIR or hf:DIR")
    return kind, Path(folder)
