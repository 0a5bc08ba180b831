"""llm-compressor's forms in this process: what is said meanwhile, what is left as it is, the files' modes."""

from __future__ import annotations

import json
import os
import random
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_xy.hf.tokenizer import write_hf_tokenizer
from megatron_xy.quantisation.verb import quantize
from tests.end_to_end.random_model import write_random_model
from tools.train_tokenizer import train

pytestmark = pytest.mark.skipif(not find_spec("llmcompressor"), reason="the extra quantize is not installed")


@pytest.mark.slow
def test_layers_are_told_of_by_tenths_and_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    lines = [" ".join(random.Random(row).choices("abcdefghij", k=120)) for row in range(16)]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f"{json.dumps({'text': line})}\n" for line in lines))
    origin = write_random_model(tmp_path / "hf", hidden_size=64, intermediate_size=64, num_hidden_layers=11)
    (tmp_path / "tokenizer.model").write_bytes(train(lines, vocab_size=280))
    write_hf_tokenizer(tmp_path / "tokenizer.model", origin, model_max_length=128)
    said: list[str] = []
    before = os.umask(0o027)
    try:
        quantize(
            f"hf:{origin}",
            f"hf:{tmp_path / 'few'}",
            scheme="w8a8",
            calibration=text,
            num_samples=8,
            ignore=["down_proj", "lm_head"],
            say=said.append,
        )
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "few").iterdir()} == {0o640}
    layers = [line for line in said if line.endswith("of 11 layers quantised")]
    assert len(layers) == 10 and layers[-1] == "11 of 11 layers quantised"
    ignored = json.loads((tmp_path / "few" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == [*(f"model.layers.{layer}.mlp.down_proj" for layer in range(11)), "lm_head"]
    assert "| left as they are | down_proj, lm_head |" in (tmp_path / "few" / "README.md").read_text()
