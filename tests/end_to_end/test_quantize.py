"""`quantize` and `compare`: forms in fewer bits, whole or not at all, that transformers opens, close to the model."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_xy.hf.tokenizer import write_hf_tokenizer
from tests.end_to_end.random_model import write_random_model
from tests.end_to_end.tiny_run import run_to_end, started, trained, wait_for_end, wait_until
from tools.train_tokenizer import train

HAS_BITSANDBYTES = all(find_spec(name) for name in ("bitsandbytes", "accelerate"))
HAS_LLM_COMPRESSOR = bool(find_spec("llmcompressor"))
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="the extra int8 is not installed")
needs_llm_compressor = pytest.mark.skipif(not HAS_LLM_COMPRESSOR, reason="the extra quantize is not installed")
# vLLM and llm-compressor hold different versions of torch: it may live in an environment of its own.
VLLM_PYTHON = os.environ.get("VLLM_PYTHON", sys.executable if find_spec("vllm") else None)

# Round to nearest at the scheme of gptq-w4a16, on the same model. argv: from, to.
ROUND_TO_NEAREST = """
import sys
from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM
scheme = preset_name_to_scheme("W4A16", ["Linear"])
scheme.weights.group_size = 32
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="bfloat16")
oneshot(model=model, recipe=QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]))
model.save_pretrained(sys.argv[2], save_compressed=True)
"""


def verb(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_xy", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)


def checked(*arguments: str) -> str:
    answer = verb(*arguments)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, run/ with a checkpoint of 60 steps, and hf/, the same in bf16."""
    path = tmp_path_factory.mktemp("quantize")
    checkpoint = trained(path, "training.train_iters=60", "checkpoint.save_interval=60") / "checkpoints/iter_0000060"
    checked("convert", "--from", f"ckpt:{checkpoint}", "--to", f"hf:{path / 'hf'}", "--dtype", "bf16")
    return path


@pytest.mark.slow
@needs_bitsandbytes
@needs_llm_compressor
def test_forms_are_close_to_the_trained_model_and_gptq_is_closer_than_rounding(folder: Path) -> None:
    calibration = ("--calibration", str(folder / "data"), "--num-samples", "64")
    checkpoint = f"ckpt:{folder / 'run' / 'checkpoints' / 'iter_0000060'}"
    checked("quantize", "--from", checkpoint, "--to", f"hf:{folder / 'int8'}", "--scheme", "int8")
    for scheme in ("gptq-w4a16", "w8a8"):
        source = f"hf:{folder / 'hf'}"
        checked("quantize", "--from", source, "--to", f"hf:{folder / scheme}", "--scheme", scheme, *calibration)
    command = [sys.executable, "-c", ROUND_TO_NEAREST, str(folder / "hf"), str(folder / "rtn")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    forms = [f"hf:{folder / name}" for name in ("hf", "int8", "gptq-w4a16", "w8a8", "rtn")]
    table: dict[str, dict[str, Any]] = json.loads(checked("compare", *forms, "--data", str(folder / "data"), "--json"))
    plain, int8, gptq, w8a8, rounded = (table[form] for form in forms)
    assert plain["kl"] == 0
    for form in (int8, w8a8):
        assert form["perplexity"] == pytest.approx(plain["perplexity"], rel=0.01)
    assert 0 < gptq["kl"] < rounded["kl"]
    assert set(plain["perplexity_by_bucket"]) == {"128", "256"}
    assert set(plain["perplexity_by_source"]) == {"code", "prose"}
    for name in ("int8", "gptq-w4a16", "w8a8"):
        assert json.loads((folder / name / "config.json").read_text())["quantization_config"]
        assert {"tokenizer.json", "generation_config.json", "README.md"} <= {
            it.name for it in (folder / name).iterdir()
        }
    assert "64 samples" in (folder / "w8a8" / "README.md").read_text()
    assert not list(folder.glob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "until"),
    [
        pytest.param("nf4", ".tmp-{}", marks=needs_bitsandbytes),
        pytest.param("gptq-w4a16", ".tmp-{}.offload", marks=needs_llm_compressor),
    ],
)
def test_a_killed_quantisation_leaves_no_target_and_the_same_command_makes_it_whole(
    folder: Path, scheme: str, until: str
) -> None:
    target = folder / f"killed-{scheme}"
    checkpoint = f"ckpt:{folder / 'run' / 'checkpoints' / 'iter_0000060'}"
    command = [sys.executable, "-m", "megatron_xy", "quantize", "--from", checkpoint, "--to", f"hf:{target}"]
    command += ["--scheme", scheme]
    if scheme != "nf4":
        command += ["--calibration", str(folder / "data"), "--num-samples", "16"]
    with started(command) as process:
        wait_until((folder / until.format(target.name)).exists, process=process)
        process.send_signal(signal.SIGKILL)
        wait_for_end(process)
    assert not target.exists()
    assert run_to_end(command).code == 0
    assert (target / "model.safetensors").is_file() and not list(folder.glob(".tmp-*"))
    again = run_to_end(command)
    assert again.code == 78 and "exists" in again.err


@pytest.mark.slow
@needs_llm_compressor
def test_a_stopped_quantisation_says_so_and_leaves_nothing_large(folder: Path) -> None:
    target = folder / "stopped"
    checkpoint = f"ckpt:{folder / 'run' / 'checkpoints' / 'iter_0000060'}"
    command = [sys.executable, "-m", "megatron_xy", "quantize", "--from", checkpoint, "--to", f"hf:{target}"]
    command += ["--scheme", "w8a8", "--calibration", str(folder / "data"), "--num-samples", "16"]
    with started(command) as process:
        wait_until((folder / ".tmp-stopped.offload").exists, process=process)
        process.send_signal(signal.SIGTERM)
        ended = wait_for_end(process)
    assert ended.code == 75 and "stopped by SIGTERM; the same command begins anew" in ended.err
    assert [path.name for path in folder.glob(".tmp-*")] == [".tmp-stopped"] and not target.exists()
    assert run_to_end(command).code == 0
    assert not list(folder.glob(".tmp-*"))


@pytest.mark.slow
@needs_bitsandbytes
def test_eight_and_four_bits_are_what_transformers_makes_and_reload_to_the_same_logits(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.end_to_end.bits_against_transformers", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "shape", "growth"),
    [  # growth: bytes that 20 layers more take in bf16
        pytest.param("int8", {"hidden_size": 1024, "intermediate_size": 4096}, 600e6, marks=needs_bitsandbytes),
        pytest.param("nf4", {"hidden_size": 1024, "intermediate_size": 4096}, 600e6, marks=needs_bitsandbytes),
        pytest.param("gptq-w4a16", {"hidden_size": 512, "intermediate_size": 1024}, 94e6, marks=needs_llm_compressor),
    ],
)
def test_memory_does_not_grow_with_the_number_of_layers(
    tmp_path: Path, scheme: str, shape: dict[str, int], growth: float
) -> None:
    text, tokenizer = tmp_path / "text.jsonl", tmp_path / "tokenizer.model"
    lines = _calibration_text(text)
    tokenizer.write_bytes(train(lines, vocab_size=280))
    # Blocks of a few MB go back to the system at once, as those of large models do by themselves.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    peaks = []
    for layers in (4, 24):
        origin = write_random_model(tmp_path / f"hf-{layers}", num_hidden_layers=layers, **shape)
        write_hf_tokenizer(tokenizer, origin, model_max_length=128)
        command = [sys.executable, "-m", "tests.end_to_end.quantizing_memory", str(origin), str(tmp_path / str(layers))]
        done = subprocess.run(
            [*command, scheme, str(text)], check=True, capture_output=True, text=True, timeout=600, env=environment
        )
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < peaks[0] + growth / 5, peaks


@pytest.mark.slow
@needs_llm_compressor
@pytest.mark.skipif(VLLM_PYTHON is None, reason="no vLLM: name an interpreter that has it in VLLM_PYTHON")
@pytest.mark.parametrize("scheme", ["gptq-w4a16", "w8a8"])  # for w8a16 vLLM has no kernel on a CPU
def test_vllm_opens_the_folders_and_gives_the_probabilities_that_transformers_gives(
    tmp_path: Path, scheme: str
) -> None:
    lines = _calibration_text(tmp_path / "text.jsonl")
    origin = write_random_model(tmp_path / "hf", hidden_size=256, intermediate_size=512)
    (tmp_path / "tokenizer.model").write_bytes(train(lines, vocab_size=280))
    write_hf_tokenizer(tmp_path / "tokenizer.model", origin, model_max_length=128)
    calibration = ("--calibration", str(tmp_path / "text.jsonl"), "--num-samples", "16")
    few = tmp_path / "few"
    checked("quantize", "--from", f"hf:{origin}", "--to", f"hf:{few}", "--scheme", scheme, *calibration)
    prompt = list(range(3, 67))
    answers = []
    for python, script in ((str(VLLM_PYTHON), "ask_with_vllm.py"), (sys.executable, "prompt_logprobs.py")):
        command = [python, str(Path(__file__).with_name(script))]
        case = json.dumps({"folder": str(few), "prompt": prompt})
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            command, input=case, capture_output=True, text=True, check=False, timeout=300, env=environment
        )
        assert done.returncode == 0, done.stderr[-2000:]
        answers.append(json.loads(done.stdout.splitlines()[-1]))
    assert len(answers[0]) == len(prompt) - 1
    assert answers[0] == pytest.approx(answers[1], abs=0.05)


def _calibration_text(path: Path) -> list[str]:
    lines = [" ".join(random.Random(row).choices("abcdefghij", k=120)) for row in range(16)]
    path.write_text("".join(f"{json.dumps({'text': line})}\n" for line in lines))
    return lines


@pytest.mark.parametrize(
    ("scheme", "extra", "is_there"), [("int8", "int8", HAS_BITSANDBYTES), ("w8a8", "quantize", HAS_LLM_COMPRESSOR)]
)
def test_without_the_extra_it_is_said_what_to_install(scheme: str, extra: str, is_there: bool) -> None:
    if is_there:
        pytest.skip(f"the extra {extra} is installed")
    answer = verb("quantize", "--from", "hf:none", "--to", "hf:other", "--scheme", scheme)
    assert answer.returncode == 78 and f"megatron-xy[{extra}]" in answer.stderr
