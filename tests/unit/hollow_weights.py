"""HF folders of any size that take no room: the header of their weights lies before a hole."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_xy.hf.config import read_hf_config
from megatron_xy.hf.names import global_names, hf_shards

SHAPE = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


def hf_folder(folder: Path, *, architecture: str, vocab_size: int = 20, **shape: int) -> str:
    """Makes the folder; returns what `model.load` says of it."""
    folder.mkdir()
    labels = {"num_labels": 1} if architecture == "LlamaForSequenceClassification" else {}
    config = {**SHAPE, "architectures": [architecture], "vocab_size": vocab_size, **labels, **shape}
    (folder / "config.json").write_text(json.dumps(config))
    model = read_hf_config(folder)
    header, end = {}, 0
    for global_name in global_names(model):
        for name, shard in hf_shards(global_name, model).items():
            start, end = end, end + 2 * shard.numel
            header[name] = {"dtype": "BF16", "shape": shard.local_shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return f"hf:{folder}"
