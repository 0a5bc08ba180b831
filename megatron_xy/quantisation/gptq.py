"""W4A16, W8A8 and W8A16 by llm-compressor's GPTQ: a model and calibration text -> the files of an HF folder.

ckpt: or hf: -> bf16 in HF format -> layer after layer from disk -> compressed-tensors
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.offload import load_offloaded_model
from compressed_tensors.quantization import preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from megatron_xy.config import ModelConfig
from megatron_xy.data.chat.template import ChatTemplate, load_chat_template, template_of_run
from megatron_xy.data.encoding.tokenizer import Tokenizer, load_tokenizer
from megatron_xy.errors import DataError
from megatron_xy.hf.config import CONFIG
from megatron_xy.hf.convert import to_hf, write_index
from megatron_xy.hf.release import tokenizer_place
from megatron_xy.hf.source import Source
from megatron_xy.quantisation.calibration import read_calibration
from megatron_xy.storage import TEMPORARY_PREFIX, file_sha256, storage_errors

PRESETS = {"gptq-w4a16": "W4A16", "w8a8": "W8A8", "w8a16": "W8A16"}
GROUP_SIZES = (128, 64, 32)  # columns that share a scale in W4A16 and W8A16; the first that divides all of a model's
LONGEST_ROW = 2048  # tokens of a calibration sample
MAX_SHARD_BYTES = 10**9  # of a file that is written: memory holds it several times
SEED = 0
_ON_DISK = {
    "model.embed_tokens": "disk", "model.layers": "disk", "lm_head": "disk",
    "model.norm": "cpu", "model.rotary_emb": "cpu",
}  # fmt: skip
Say = Callable[[str], None]


def write_gptq(
    folder: Path,
    source: Source,
    *,
    scheme: str,
    calibration: Path,
    num_samples: int,
    chat_template: str | None = None,
    ignore: list[str],
    beside: Path,
    say: Say,
    max_shard_bytes: int | None = None,
) -> str:
    """Writes config.json and the weights; returns what calibrated them, for the model card.

    beside: the target, beside which lies meanwhile what it takes. Raises ConfigError, DataError, StorageError.
    """
    group = preset_name_to_scheme(PRESETS[scheme], ["Linear"])
    if group.weights.group_size:
        group.weights.group_size = _group_size(source.model)
        say(f"{PRESETS[scheme]}: {group.weights.group_size} columns share a scale")
    tokenizer = load_tokenizer(tokenizer_place(source) or source.folder)
    rows = read_calibration(
        calibration,
        tokenizer=tokenizer,
        chat_template=_template(chat_template, source, tokenizer),
        vocab_size=source.model.vocab_size or 0,
        longest=min(LONGEST_ROW, source.model.max_position_embeddings),
        number=num_samples,
        seed=SEED,
        say=say,
    )
    with _as_hf(source, beside=beside, say=say) as origin, _empty_folder(beside, "offload") as offload:
        model = _on_disk(origin, offload)
        samples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows.rows]
        oneshot(
            model=model,
            dataset=Dataset.from_list(samples),
            recipe=[
                GPTQModifier(config_groups={"group_0": group}, ignore=ignore),
                _Progress(num_layers=source.model.num_layers or 0, say=say),
            ],
            tokenizer=AutoTokenizer.from_pretrained(origin),
            max_seq_length=max(map(len, rows.rows)),
            num_calibration_samples=len(samples),
            pipeline="sequential",
        )
        model.save_pretrained(folder, save_compressed=True, max_shard_size=max_shard_bytes or MAX_SHARD_BYTES)
    (folder / "recipe.yaml").unlink()  # has YAML tags that make objects; the model card says what was done
    weights = list(folder.glob("*.safetensors"))
    for path in weights:
        path.chmod((folder / CONFIG).stat().st_mode)  # safetensors' own are its owner's alone, whatever the umask
    write_index(folder, {path.name: {"sha256": file_sha256(path)} for path in weights})
    return rows.told


class _Progress(Modifier):  # type: ignore[misc]
    """Says how far the calibration is, at each tenth of the layers."""

    num_layers: int
    say: Say
    done: int = 0

    def on_initialize(self, state: State, **_: Any) -> bool:
        """Nothing is to be made ready."""
        return True

    def on_sequential_epoch_end(self, state: State, event: Event, modules: list[torch.nn.Module], **_: Any) -> None:
        """After a part of the model: a layer, or what stands before and behind them."""
        if not any(isinstance(module, GradientCheckpointingLayer) for module in modules):
            return
        self.done += 1
        if 10 * self.done // self.num_layers > 10 * (self.done - 1) // self.num_layers:
            self.say(f"{self.done} of {self.num_layers} layers quantised")


def _template(given: str | None, source: Source, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The one given, or else that of the conversations that the checkpoint has learned, if any."""
    if given is not None:
        return load_chat_template(given, tokenizer)
    return template_of_run(source.manifest.state, tokenizer)


@contextmanager
def _as_hf(source: Source, *, beside: Path, say: Say) -> Iterator[Path]:
    """The folder itself where it is HF's; else, while the block runs, a folder of the checkpoint in bf16."""
    if source.kind == "hf":
        yield source.folder
        return
    with _empty_folder(beside, "bf16") as folder:
        folder.rmdir()  # a conversion makes it
        to_hf(source, folder, dtype="bfloat16", tokenizer=None, say=lambda text: say(f"for the calibration: {text}"))
        yield folder


@contextmanager
def _empty_folder(beside: Path, kind: str) -> Iterator[Path]:
    """A folder beside the target while the block runs; what a killed command left in it is gone."""
    folder = beside.with_name(f"{TEMPORARY_PREFIX}{beside.name}.{kind}")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with storage_errors(folder):
            folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _on_disk(origin: Path, offload: Path) -> Any:
    """The model in bf16, each layer in memory only while it is used; those that change lie in `offload`."""
    with load_offloaded_model():
        return AutoModelForCausalLM.from_pretrained(
            origin, dtype=torch.bfloat16, device_map=_ON_DISK, offload_folder=str(offload)
        )


def _group_size(model: ModelConfig) -> int:
    assert model.hidden_size and model.ffn_hidden_size, "a folder's config has a whole shape"
    columns = (model.hidden_size, model.ffn_hidden_size)
    sizes = [size for size in GROUP_SIZES if not any(width % size for width in columns)]
    if not sizes:
        raise DataError(
            f"gptq-w4a16 and w8a16 need layers of a multiple of {GROUP_SIZES[-1]} columns; these have {columns}; "
            f"take w8a8"
        )
    return sizes[0]
