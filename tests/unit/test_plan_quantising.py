"""What the planner says of `quantize`, against the weights' own shapes and against what is written."""

from __future__ import annotations

from importlib.util import find_spec
from math import prod
from pathlib import Path

import pytest

from megatron_xy.config import ModelConfig
from megatron_xy.hf.names import global_names, global_shape
from megatron_xy.plan.assumptions import Cluster, device
from megatron_xy.plan.quantising import WEIGHT_BYTES, quantising
from megatron_xy.quantisation.verb import quantize
from tests.end_to_end.random_model import SHAPE, write_random_model

MODEL = ModelConfig(
    num_layers=3, hidden_size=64, ffn_hidden_size=192, num_attention_heads=4, num_query_groups=2, vocab_size=301
)


def planned(model: ModelConfig = MODEL):
    return {form.scheme: form for form in quantising(model, Cluster(device("h100")))}


def test_a_result_is_the_layers_in_few_bits_and_the_rest_in_bf16():
    sizes = {name: prod(global_shape(name, MODEL)) for name in global_names(MODEL)}
    linear = sum(size for name, size in sizes.items() if ".linear_" in name)
    rest = 2 * (sum(sizes.values()) - linear)
    for scheme, form in planned().items():
        assert form.result_bytes == pytest.approx(linear * WEIGHT_BYTES[scheme] + rest)


@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="the extra int8 is not installed")
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_result_is_as_large_as_planned(tmp_path: Path, scheme: str):
    assert (SHAPE["hidden_size"], SHAPE["intermediate_size"]) == (MODEL.hidden_size, MODEL.ffn_hidden_size)
    source, target = write_random_model(tmp_path / "hf"), tmp_path / "few"
    quantize(
        f"hf:{source}", f"hf:{target}", scheme=scheme, calibration=None, num_samples=1, ignore=["lm_head"], say=print
    )
    written = (target / "model.safetensors").stat().st_size
    assert planned()[scheme].result_bytes == pytest.approx(written, rel=0.15)  # names and row scales of a small model


def test_memory_of_gptq_does_not_grow_with_the_layers_and_time_and_disk_do():
    few, many = planned()["gptq-w4a16"], planned(MODEL.model_copy(update={"num_layers": 30}))["gptq-w4a16"]
    assert (few.host_bytes, few.gpu_bytes) == (many.host_bytes, many.gpu_bytes)
    assert many.hours > 9 * few.hours * 0.9 and many.disk_bytes > 3 * few.disk_bytes
