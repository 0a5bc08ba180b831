"""`quantize`: what is refused, and a killed command that goes on file by file."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_xy.errors import ConfigError, UsageError
from megatron_xy.quantisation.verb import quantize
from megatron_xy.tensors.files import write_tensors
from tests.end_to_end.random_model import write_random_model

HAS_BITSANDBYTES = all(find_spec(name) for name in ("bitsandbytes", "accelerate"))
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="the extra int8 is not installed")


def run(**given: Any) -> None:
    options = {"source": "hf:none", "target": "hf:other", "scheme": "int8", "calibration": None, **given}
    quantize(options.pop("source"), options.pop("target"), num_samples=4, ignore=["lm_head"], say=print, **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target": "ckpt:none"}, "--to ckpt:none: must be hf:DIR"),
        ({"source": "none"}, "--from none: must be ckpt:DIR or hf:DIR"),
        ({"scheme": "w8a8"}, "--scheme w8a8 needs --calibration"),
        ({"calibration": Path("data")}, "--scheme int8 takes no --calibration"),
        ({"chat_template": "chatml"}, "--chat-template goes with --calibration F.jsonl"),
    ],
)
def test_options_that_do_not_go_together_are_bad_usage(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        run(**options)


def test_a_folder_that_is_not_there_and_a_reward_model_are_refused(tmp_path: Path) -> None:
    target = f"hf:{tmp_path / 'out'}"
    with pytest.raises(ConfigError, match="none"):
        run(source=f"hf:{tmp_path / 'none'}", target=target)
    origin = write_random_model(tmp_path / "hf")
    config = json.loads((origin / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    (origin / "config.json").write_text(json.dumps(config))
    tensors = weights(origin)
    tensors["score.weight"] = tensors.pop("lm_head.weight")[:1].clone()
    save_file(tensors, origin / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="is a reward model"):
        run(source=f"hf:{origin}", target=target)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@needs_bitsandbytes
def test_layers_that_a_cpu_may_not_compute_in_four_bits_are_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, shape in enumerate(({}, {"intermediate_size": 208})):
        source = write_random_model(tmp_path / f"hf-{number}", num_hidden_layers=1, **shape)
        run(source=f"hf:{source}", target=f"hf:{tmp_path / str(number)}", scheme="nf4")
        told = "warning: model.layers.0.mlp.gate_proj has 208 rows and 64 columns, no multiples of 32 and 64" in (
            capsys.readouterr().out
        )
        assert told == bool(number)


@needs_bitsandbytes
def test_a_killed_command_goes_on_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_xy.quantisation import bits

    source, target = f"hf:{write_random_model(tmp_path / 'hf')}", tmp_path / "ours"
    run(source=source, target=f"hf:{tmp_path / 'single'}")
    monkeypatch.setattr(bits, "MAX_SHARD_BYTES", 40_000)
    written = []

    def write(*arguments: Any, **options: Any) -> dict[str, Any]:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(arguments)
        return write_tensors(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bits, "write_tensors", write)
        run(source=source, target=f"hf:{target}")
    assert not target.exists()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".tmp-ours").glob("*.safetensors")}
    assert len(before) == 3
    run(source=source, target=f"hf:{target}")
    after = {path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    assert before.items() <= after.items() and len(after) > 3
    expected, ours = weights(tmp_path / "single"), weights(target)
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == ours.keys() and set(index["weight_map"].values()) == after.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in ours.values())
