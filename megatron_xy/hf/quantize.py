"""`megatron-xy quantize`: a model -> an HF folder in 8 or 4 bits, by bitsandbytes or llm-compressor.

ckpt: or hf: -> bf16 in HF format -> quantised, layer after layer where it is calibrated -> the folder, whole
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_xy import __version__
from megatron_xy.config import ModelConfig
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.hf.calibration import Calibration, read_calibration
from megatron_xy.hf.config import read_hf_config
from megatron_xy.hf.convert import to_hf
from megatron_xy.hf.release import MODEL_CARD, TOKENIZER_FILES, copy_side_files
from megatron_xy.hf.source import Source, open_source
from megatron_xy.hf.target import whole_or_absent
from megatron_xy.hf.verb import place
from megatron_xy.storage import TEMPORARY_PREFIX, write_text

BITSANDBYTES = ("int8", "nf4")
CALIBRATED = {"gptq-w4a16": "W4A16", "w8a8": "W8A8", "w8a16": "W8A16"}
SCHEMES = (*BITSANDBYTES, *CALIBRATED)
GROUP_SIZES = (128, 64, 32)  # columns that share a scale in W4A16; the first that divides all of a model's
LONGEST_ROW = 2048  # tokens of a calibration sample
SEED = 0
Say = Callable[[str], None]


def quantize(
    source: str, target: str, *, scheme: str, calibration: Path | None, num_samples: int, ignore: list[str], say: Say
) -> None:
    """Writes the HF folder `target`; what a killed command left is done again.

    ignore: names of layers that stay as they are. Raises ConfigError for arguments that do not fit, DataError for a
    damaged source, StorageError.
    """
    (from_kind, from_path), (to_kind, to_path) = place(source, "--from"), place(target, "--to")
    if to_kind != "hf":
        raise ConfigError(f"--to {target}: must be hf:DIR")
    if (calibration is None) == (scheme in CALIBRATED):
        needs = "needs --calibration, a `data build` folder or a jsonl file" if calibration is None else "takes none"
        raise ConfigError(f"--scheme {scheme} {needs}")
    opened = open_source(from_kind, from_path)
    if opened.model.head != "language_model":
        raise ConfigError(f"--from {source}: is a reward model; only language models are quantised")
    work = {
        "to": scheme,
        "from": opened.fingerprint(),
        "calibration": str(calibration),
        "num_samples": num_samples,
        "ignore": ignore,
    }
    with whole_or_absent(to_path, work=work) as folder, _as_hf(opened, beside=to_path, say=say) as origin:
        told = ["none"]
        if calibration is None:
            _by_bitsandbytes(origin, folder, scheme=scheme, ignore=ignore)
        else:
            model = read_hf_config(origin)
            rows = _calibration(calibration, origin, model, number=num_samples)
            _by_llm_compressor(origin, folder, model, scheme=scheme, rows=rows, ignore=ignore, say=say)
            told = [rows.told]
        copied = copy_side_files(origin, folder)
        if not copied & set(TOKENIZER_FILES):
            say("warning: no tokenizer files beside the weights; the folder has none")
        write_text(folder / MODEL_CARD, _model_card(from_path.name, scheme, calibration=told[0], ignore=ignore))
    size = sum(path.stat().st_size for path in to_path.iterdir())
    say(f"wrote {to_path}: {scheme}, {size / 1e6:,.1f} MB")


@contextmanager
def _as_hf(source: Source, *, beside: Path, say: Say) -> Iterator[Path]:
    """The folder itself where it is HF's; else, while the block runs, a folder of the checkpoint in bf16."""
    if source.kind == "hf":
        yield source.folder
        return
    plain = beside.with_name(f"{TEMPORARY_PREFIX}{beside.name}.bf16")
    shutil.rmtree(plain, ignore_errors=True)  # of a killed command
    try:
        to_hf(source, plain, dtype="bfloat16", tokenizer=None, say=say)
        yield plain
    finally:
        shutil.rmtree(plain, ignore_errors=True)


def _by_bitsandbytes(origin: Path, folder: Path, *, scheme: str, ignore: list[str]) -> None:
    from transformers import BitsAndBytesConfig

    if scheme == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=ignore)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=ignore,
        )
    model = AutoModelForCausalLM.from_pretrained(
        origin,
        quantization_config=config,
        dtype=torch.bfloat16,
        device_map="auto" if torch.accelerator.is_available() else "cpu",
    )
    model.save_pretrained(folder)


def _by_llm_compressor(
    origin: Path, folder: Path, shape: ModelConfig, *, scheme: str, rows: Calibration, ignore: list[str], say: Say
) -> None:
    """GPTQ, layer after layer: one layer's activations are held at a time."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    group = preset_name_to_scheme(CALIBRATED[scheme], ["Linear"])
    if group.weights.group_size:
        group.weights.group_size = _group_size(shape)
        say(f"{CALIBRATED[scheme]}: {group.weights.group_size} columns share a scale")
    model = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.bfloat16)
    samples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows.rows]
    oneshot(
        model=model,
        dataset=Dataset.from_list(samples),
        recipe=GPTQModifier(config_groups={"group_0": group}, ignore=ignore),
        tokenizer=AutoTokenizer.from_pretrained(origin),
        max_seq_length=max(map(len, rows.rows)),
        num_calibration_samples=len(samples),
        pipeline="sequential",
    )
    model.save_pretrained(folder, save_compressed=True)


def _calibration(path: Path, origin: Path, model: ModelConfig, *, number: int) -> Calibration:
    longest = min(LONGEST_ROW, model.max_position_embeddings)
    return read_calibration(
        path, model=origin, vocab_size=model.vocab_size or 0, longest=longest, number=number, seed=SEED
    )


def _group_size(model: ModelConfig) -> int:
    assert model.hidden_size and model.ffn_hidden_size, "a folder's config has a whole shape"
    columns = (model.hidden_size, model.ffn_hidden_size)
    sizes = [size for size in GROUP_SIZES if not any(width % size for width in columns)]
    if not sizes:
        raise DataError(
            f"W4A16 needs layers of a multiple of {GROUP_SIZES[-1]} columns; these have {columns}; take w8a16"
        )
    return sizes[0]


def _model_card(name: str, scheme: str, *, calibration: str, ignore: list[str]) -> str:
    rows: dict[str, Any] = {
        "quantised from": name, "scheme": scheme, "calibration": calibration, "left as they are": ", ".join(ignore),
    }  # fmt: skip
    table = "\n".join(f"| {what} | {value} |" for what, value in rows.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# Model card\n\n"
        f"Quantised with megatron_xy {__version__}.\n\n| | |\n|---|---|\n{table}\n"
    )
