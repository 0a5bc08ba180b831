"""`megatron-xy convert`: which way, with which tokenizer, and the verification."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from megatron_xy.errors import ConfigError
from megatron_xy.hf.convert import checkpoint_to_hf, hf_to_checkpoint
from megatron_xy.hf.reader import DTYPES
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
    if verify and find_spec("transformers") is None:
        raise ConfigError("--verify needs transformers; it comes with the extra: pip install 'megatron-xy[hf]'")
    if from_kind == "ckpt":
        checkpoint_to_hf(from_path, to_path, dtype=dtype, tokenizer=tokenizer, say=say)
    else:
        hf_to_checkpoint(from_path, to_path, dtype=dtype, say=say)
    if not verify:
        return True
    folders = {from_kind: from_path, to_kind: to_path}
    same = tensors_agree(folders["ckpt"], folders["hf"], target=to_kind, say=say)
    difference = largest_logit_difference(folders["hf"])
    say(f"logits of transformers and ours, fp32: largest difference {difference:.2e}, {TOLERANCE:.0e} is allowed")
    return same and difference <= TOLERANCE


def _place(text: str, option: str) -> tuple[str, Path]:
    kind, _, folder = text.partition(":")
    if kind not in ("ckpt", "hf") or not folder:
        raise ConfigError(f"{option} {text}: must be ckpt:DIR or hf:DIR")
    return kind, Path(folder)
