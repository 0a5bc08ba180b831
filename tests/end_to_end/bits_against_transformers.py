"""What `quantize` writes layer after layer -> compared with what transformers makes of the whole model in memory.

Run as a process of its own, without the stand-in for CUDA: for 8 and 4 bits, a Llama, and a Qwen2 with biases and tied
embeddings, the same tensors, the same quantization_config, and reloaded the same logits. argv: a folder to work in.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from megatron_xy.quantisation.verb import quantize
from tests.end_to_end.random_model import write_random_model

CONFIGS = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
}


@torch.inference_mode()
def compare(folder: Path, scheme: str, *, model: str, tied: bool) -> None:
    origin, theirs, ours = folder / "hf", folder / "theirs", folder / "ours"
    write_random_model(origin, model=model, tied=tied)
    config = BitsAndBytesConfig(**CONFIGS[scheme], llm_int8_skip_modules=["lm_head"])
    whole = AutoModelForCausalLM.from_pretrained(
        origin, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    whole.save_pretrained(theirs)
    quantize(
        f"hf:{origin}",
        f"hf:{ours}",
        scheme=scheme,
        calibration=None,
        num_samples=1,
        ignore=["lm_head"],
        say=lambda text: None,
    )
    expected, written = (load_file(path / "model.safetensors") for path in (theirs, ours))
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor), name
    configs = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (theirs, ours)]
    assert configs[0] == configs[1]
    tokens = torch.arange(3, 103).view(2, 50)
    reloaded = AutoModelForCausalLM.from_pretrained(ours, dtype=torch.bfloat16, device_map="cpu")
    logits = reloaded(tokens).logits
    assert torch.isfinite(logits).all() and torch.equal(logits, whole(tokens).logits)


if __name__ == "__main__":
    for scheme in CONFIGS:
        compare(Path(sys.argv[1]) / f"{scheme}-llama", scheme, model="llama", tied=False)
        compare(Path(sys.argv[1]) / f"{scheme}-qwen2", scheme, model="qwen2", tied=True)
