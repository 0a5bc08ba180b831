"""`megatron-xy quantize`: a model -> an HF folder in 8 or 4 bits, by bitsandbytes or llm-compressor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_xy.errors import ConfigError, UsageError
from megatron_xy.hf.release import write_release_files
from megatron_xy.hf.source import open_source
from megatron_xy.hf.target import whole_or_absent
from megatron_xy.hf.verb import place
from megatron_xy.quantisation.ignored import LM_HEAD, ignored_layers

BITSANDBYTES = ("int8", "nf4")
Say = Callable[[str], None]


def quantize(
    source: str,
    target: str,
    *,
    scheme: str,
    calibration: Path | None,
    num_samples: int,
    chat_template: str | None = None,
    ignore: list[str],
    say: Say,
) -> None:
    """Writes the HF folder `target`; the same command goes on with what a killed one left, or does it again.

    ignore: names of layers that stay as they are; chat_template: a name or a file. Raises UsageError for arguments
    that do not go together, ConfigError for paths and names, DataError for a damaged source, StorageError.
    """
    (from_kind, from_path), (to_kind, to_path) = place(source, "--from"), place(target, "--to")
    if to_kind != "hf":
        raise UsageError(f"--to {target}: must be hf:DIR")
    if scheme in BITSANDBYTES and calibration is not None:
        raise UsageError(f"--scheme {scheme} takes no --calibration; leave it out")
    if scheme not in BITSANDBYTES and calibration is None:
        raise UsageError(f"--scheme {scheme} needs --calibration, a `data build` folder or a jsonl file")
    if chat_template is not None and (calibration is None or calibration.is_dir()):
        raise UsageError("--chat-template goes with --calibration F.jsonl, for conversations; a data folder has tokens")
    opened = open_source(from_kind, from_path)
    if opened.model.head != "language_model":
        raise ConfigError(f"--from {source}: is a reward model; only language models are quantised")
    layers = ignored_layers(ignore, opened.model)
    left = sorted({*ignore, *(name for name in layers if name == LM_HEAD)})
    work = {
        "to": scheme,
        "from": opened.fingerprint(),
        "calibration": str(calibration),
        "num_samples": num_samples,
        "chat_template": chat_template,
        "ignore": layers,
    }
    facts = {
        "quantised from": from_path.name,
        "scheme": scheme,
        "left as they are": ", ".join(left).replace("|", r"\|"),
    }
    release = partial(write_release_files, source=opened, tokenizer=None, dtype="bfloat16", say=say, quantisation=facts)
    with whole_or_absent(to_path, work=work) as folder:
        if calibration is None:
            from megatron_xy.quantisation.bits import write_bits

            write_bits(folder, opened, scheme=scheme, ignore=layers, token_ids=release(folder), say=say)
        else:
            from megatron_xy.quantisation.gptq import write_gptq

            facts["calibration"] = write_gptq(
                folder,
                opened,
                scheme=scheme,
                calibration=calibration,
                num_samples=num_samples,
                chat_template=chat_template,
                ignore=layers,
                beside=to_path,
                say=say,
            )
            release(folder)
    size = sum(path.stat().st_size for path in to_path.iterdir())
    say(f"wrote {to_path}: {scheme}, {size / 1e6:,.1f} MB")
