"""int8 and NF4 by bitsandbytes: a model's weights -> the files of an HF folder, one after the other, never all at once.

Which layers are quantised is what transformers makes of the folder's config when it opens it; what is written of one is
what bitsandbytes' layer says of itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations import replace_with_bnb_linear

from megatron_xy.hf.config import CONFIG, hf_config
from megatron_xy.hf.convert import Say, plan_hf_files, write_index
from megatron_xy.hf.source import Source
from megatron_xy.hf.target import Output, finish_files
from megatron_xy.quantisation import nf4
from megatron_xy.storage import write_json
from megatron_xy.tensors.files import TensorReader, torch_dtype, write_tensors

MAX_SHARD_BYTES = 10**9  # in bf16; a file's tensors are in memory while it is made


def write_bits(
    folder: Path,
    source: Source,
    *,
    scheme: str,
    ignore: list[str],
    token_ids: dict[str, Any],
    say: Say,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes config.json, the weights, their index and checksums; files that a killed command has done stay.

    Memory holds a file's tensors and what the quantisation of one takes. Raises DataError for a damaged source,
    StorageError.
    """
    values = hf_config(source.model, dtype="bfloat16", token_ids=token_ids, model_type=source.kept.get("model_type"))
    wanted = _wanted(scheme, ignore=ignore)
    layers = _layers(values, wanted)
    uneven = [name for name, layer in layers.items() if nf4.is_uneven(layer)]
    if scheme == "nf4" and uneven:
        layer = layers[uneven[0]]
        say(
            f"warning: {uneven[0]} has {layer.out_features} rows and {layer.in_features} columns, no multiples of "
            f"{nf4.ROWS} and {nf4.COLUMNS}: transformers opens the folder, but on a CPU with AVX512-BF16 it may fail "
            f"to compute such layers, by bitsandbytes 0.50; take int8 there, or --ignore them"
        )

    def write(path: Path, outputs: list[Output]) -> dict[str, Any]:
        tensors: dict[str, torch.Tensor] = {}
        with TensorReader(source.folder, source.manifest) as reader:
            for output in outputs:
                tensor = torch.empty(output.shard.local_shape, dtype=torch_dtype(output.dtype))
                reader.read_into(output.tensor, tensor, output.shard)
                name, _, kind = output.name.rpartition(".")
                if name in layers and kind == "weight":
                    tensors |= _quantised(layers.pop(name), tensor, name=name)
                else:
                    tensors[output.name] = tensor
        return write_tensors(path, tensors, metadata={"format": "pt"})

    files = plan_hf_files(source, dtype="bfloat16", max_bytes=max_shard_bytes or MAX_SHARD_BYTES)
    write_index(folder, finish_files(folder, files, write=write, num_writers=1, say=say))
    write_json(folder / CONFIG, {**values, "quantization_config": wanted.to_dict()})


def _wanted(scheme: str, *, ignore: list[str]) -> Any:
    if scheme == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=ignore)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=ignore,
    )


def _layers(config: dict[str, Any], wanted: Any) -> dict[str, Any]:
    """{name: bitsandbytes' layer, yet without memory} of all that are quantised."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    replace_with_bnb_linear(model, modules_to_not_convert=wanted.llm_int8_skip_modules, quantization_config=wanted)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear8bitLt | Linear4bit)}


def _quantised(layer: Any, weight: torch.Tensor, *, name: str) -> dict[str, torch.Tensor]:
    """The tensors that stand for the layer's `weight` [out, in] in a file, by their names."""
    given = layer.weight
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    facts = {**given.__dict__, "module": None}  # the layer itself: a cycle would keep the weights for the collector
    layer.weight = type(given)(weight, requires_grad=False, **facts).to(device)
    state = layer.state_dict(prefix=f"{name}.")
    state.pop(f"{name}.bias", None)  # not quantised, and written by itself
    return {key: value.cpu().contiguous() for key, value in state.items()}
