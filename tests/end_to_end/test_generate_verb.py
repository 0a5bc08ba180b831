"""`megatron-xy generate` as a user starts it: answers in order, the same in every layout, resumable, clear refusals."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from megatron_xy.checkpoint.files import amend_state
from megatron_xy.cli import app
from megatron_xy.config import ModelConfig
from megatron_xy.data.encoding.tokenizer import load_tokenizer
from megatron_xy.errors import MegatronXYError
from megatron_xy.hf.config import hf_config
from megatron_xy.hf.convert import to_checkpoint
from megatron_xy.hf.names import global_names, hf_shards
from megatron_xy.hf.source import open_source
from megatron_xy.hf.tokenizer import write_hf_tokenizer
from megatron_xy.inference.answers import prepare
from megatron_xy.inference.model_job import ModelJob
from tests.end_to_end.tiny_run import flip_bit, processes_naming, run_to_end, started, wait_until
from tools.train_tokenizer import train

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, vocab_size=400,
    max_position_embeddings=128,
)  # fmt: skip
PROMPTS = ["abc abd", "a", "", "hij klm abc abd efg nop", "abc abd", "hij"]
TWO_BY_TWO = ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2")
SHORT = ("-n", "2", "--temperature", "0.9", "--max-response-length", "20", "--stop", "21", "--stop", "305")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with hf/, a small model and its tokenizer, ckpt/, the same as a checkpoint, and prompts.jsonl."""
    root = tmp_path_factory.mktemp("generate")
    hf = root / "hf"
    hf.mkdir()
    source = random.Random(0)
    words = ["".join(source.choices("abcdefghijklmnop", k=source.randint(2, 7))) for _ in range(300)]
    (root / "tokenizer.model").write_bytes(
        train([" ".join(source.choices(words, k=40)) for _ in range(300)], vocab_size=400)
    )
    write_hf_tokenizer(root / "tokenizer.model", hf, model_max_length=128)
    generator = torch.Generator().manual_seed(0)
    shapes = {
        hf_name: shard.local_shape for name in global_names(MODEL) for hf_name, shard in hf_shards(name, MODEL).items()
    }
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.3 if len(shape) > 1 else torch.ones(shape)
        for name, shape in shapes.items()
    }
    save_file(tensors, hf / "model.safetensors")
    (hf / "config.json").write_text(json.dumps(hf_config(MODEL, dtype="float32", token_ids={"eos_token_id": 2})))
    (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 77]}))
    to_checkpoint(open_source("hf", hf), root / "ckpt", dtype=None, say=lambda text: None)
    write_rows(root / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    return root


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(model: str, prompts: Path, output: Path, *options: str) -> list[str]:
    files = ["--prompts", str(prompts), "--output", str(output)]
    return [sys.executable, "-m", "megatron_xy", "generate", model, *files, *options]


def generate(model: str, prompts: Path, output: Path, *options: str) -> list[dict[str, Any]]:
    """The rows of a run that ends well and leaves nothing but its output."""
    ended = run_to_end(command(model, prompts, output, *options))
    assert ended.code == 0, ended.err
    assert not list(output.parent.glob(f"*{output.name}?*"))
    return [json.loads(line) for line in output.read_text().splitlines()]


def assert_same(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for row, other in zip(rows, expected, strict=True):
        assert row["logprobs_sum"] == pytest.approx(other["logprobs_sum"], abs=1e-4)
        assert row | {"logprobs_sum": None} == other | {"logprobs_sum": None}


def test_answers_in_order_and_the_same_in_every_layout(folder: Path, tmp_path: Path) -> None:
    rows = generate(f"hf:{folder / 'hf'}", folder / "prompts.jsonl", tmp_path / "one.jsonl", *SHORT)
    assert [(row["prompt"], row["index"]) for row in rows] == [
        (prompt, index) for prompt in PROMPTS for index in (0, 1)
    ]
    tokenizer = load_tokenizer(folder / "hf")
    for row in rows:
        assert set(row) == {"prompt", "index", "response", "response_tokens", "logprobs_sum", "finish_reason"}
        stops = [token for token in row["response_tokens"] if token in (2, 77, 21, 305)]
        assert row["finish_reason"] == ("stop" if stops else "length")
        assert stops == ([row["response_tokens"][-1]] if stops else [])
        assert len(row["response_tokens"]) == 20 or stops
        assert row["response"] == tokenizer.decode(row["response_tokens"])
        assert row["logprobs_sum"] < 0
    assert len({tuple(row["response_tokens"]) for row in rows}) == len(rows)
    four = ("--nproc-per-node", "4", *TWO_BY_TWO)
    assert_same(generate(f"ckpt:{folder / 'ckpt'}", folder / "prompts.jsonl", tmp_path / "four", *SHORT, *four), rows)
    two = ("--nproc-per-node", "2", "--max-sequences", "2")
    assert_same(generate(f"hf:{folder / 'hf'}", folder / "prompts.jsonl", tmp_path / "two", *SHORT, *two), rows)


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> list[dict[str, Any]]:
    """300 answers of a run that nobody killed; its prompts are in many.jsonl."""
    prompts = write_rows(folder / "many.jsonl", [{"prompt": f"abc {number}"} for number in range(300)])
    return generate(f"hf:{folder / 'hf'}", prompts, folder / "unbroken.jsonl", "--max-response-length", "60")


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_run_goes_on(folder: Path, tmp_path: Path, unbroken: list[dict[str, Any]], ranks: int) -> None:
    prompts, output, model = folder / "many.jsonl", tmp_path / "answers.jsonl", f"hf:{folder / 'hf'}"
    options = ("--max-sequences", "4", "--max-response-length", "60", "--nproc-per-node", str(ranks))
    partial = output.with_name("answers.jsonl.partial")

    def num_done() -> int:
        return sum(path.read_bytes().count(b"\n") for path in partial.glob("results-*"))

    with started(command(model, prompts, output, *options)) as process:
        wait_until(lambda: num_done() > 5, process=process)
        process.send_signal(signal.SIGTERM if ranks == 1 else signal.SIGKILL)
        process.wait(timeout=60)
    if ranks == 1:
        assert process.returncode == 75
    assert not output.exists()
    assert 5 < num_done() < 300, "not one, and not all"
    deadline = time.monotonic() + 60
    while processes_naming(str(tmp_path)):  # the ranks end with what started them
        assert time.monotonic() < deadline
        time.sleep(0.1)
    victim = next(partial.glob("results-*"))
    victim.write_bytes(victim.read_bytes() + b'299\t00000000\t{"prompt": "cut in ha')  # as a kill may leave it
    code, told = refused(model, prompts, output, *options[:4], "--temperature", "0.5")
    assert code == 78 and "temperature" in told
    resumed = run_to_end(command(model, prompts, output, *options[:4]))  # in another layout
    assert resumed.code == 0, resumed.err
    assert "of 300 answers are there" in resumed.err
    assert not partial.exists()
    assert_same([json.loads(line) for line in output.read_text().splitlines()], unbroken)
    assert processes_naming(str(tmp_path)) == []


def refused(model: str, prompts: Path, output: Path, *options: str) -> tuple[int, str]:
    """Exit code and message of a command that is to be refused before it starts its two ranks."""
    arguments = [*command(model, prompts, output, *options, "--nproc-per-node", "2")[3:]]
    result = CliRunner().invoke(app, arguments)
    error = result.exception
    return (error.exit_code, str(error)) if isinstance(error, MegatronXYError) else (result.exit_code, result.output)


def refusal(folder: Path, prompts: Path, *options: str, model: str | None = None) -> tuple[int, str]:
    output = prompts.with_name("never.jsonl")
    answer = refused(model or f"hf:{folder / 'hf'}", prompts, output, *options)
    assert not list(output.parent.glob("never*"))
    return answer


def test_bad_rows_are_named_with_their_lines(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "good"}, {"text": "no prompt"}, ["no", "object"], {"prompt": 3}, {"prompt": "abc " * 200}]
    prompts = write_rows(tmp_path / "bad.jsonl", [*rows, {"prompt": [{"role": "nobody", "content": "a"}]}])
    with prompts.open("a") as stream:
        stream.write('\n{"prompt": "cut of\n{"prompt": "\\ud800"}\n')
        stream.write('{"prompt": [{"role": "user", "content": "a", "n": 1e400}]}\n')
    ended = run_to_end(command(f"hf:{folder / 'hf'}", prompts, tmp_path / "never", "--chat-template", "llama-2"))
    assert ended.code == 65 and not list(tmp_path.glob("never*"))
    for line in (2, 3, 4, 5, 6, 8, 9, 10):
        assert f"{prompts}:{line}: " in ended.err
    assert f"{prompts}:1:" not in ended.err


def test_what_is_not_there_or_does_not_fit(folder: Path, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    cases = [
        (refusal(folder, prompts, model=f"hf:{tmp_path / 'nowhere'}"), 78, "nowhere"),
        (refusal(folder, prompts, model=f"ckpt:{tmp_path / 'nowhere'}"), 78, "nowhere"),
        (refusal(folder, tmp_path / "none.jsonl"), 78, "none.jsonl"),
        (refusal(folder, prompts, "parallel.tensor_model_parallel_size=4"), 78, "--nproc-per-node"),
        (refusal(folder, prompts, "training.train_iters=2"), 78, "training"),
        (refusal(folder, prompts, "--stop", "<nothing>"), 78, "--stop"),
        (refusal(folder, write_rows(tmp_path / "empty.jsonl", [])), 65, "empty.jsonl"),
        (refusal(folder, prompts, "--stop", "99999"), 78, "--stop 99999: must be a token id from 0 to"),
        (refusal(folder, prompts, "--stop", "²"), 78, "--stop ²: must be a token id from 0 to"),
        (refusal(folder, prompts, "--top-p", "0"), 2, "--top-p"),
        (refusal(folder, prompts, "--temperature", "1e-40"), 2, "--temperature"),
        (refusal(folder, prompts, "--min-response-length", "9", "--max-response-length", "8"), 2, "more than"),
        (refusal(folder, prompts, "-n", "0"), 2, "-n"),
    ]
    for (code, message), wanted, told in cases:
        assert code == wanted, message
        assert told in message


def test_what_ends_an_answer_is_the_same_in_both_kinds_of_folder(folder: Path, tmp_path: Path) -> None:
    """The tokenizer's end token, generation_config.json's; to a string, too, that of the template learned, here <s>."""
    template = (
        "{% for turn in messages %}{% generation %}{{ turn['content'] + bos_token }}{% endgeneration %}{% endfor %}"
    )
    trained = tmp_path / "trained"
    shutil.copytree(folder / "ckpt", trained)
    amend_state(trained, {"chat_template": template})
    arguments = {
        "prompts": str(folder / "prompts.jsonl"), "output": "never", "num_answers": 1, "temperature": 1.0, "top_p": 1.0,
        "top_k": 0, "min_response_length": 0, "max_response_length": 8, "max_sequences": 4, "seed": 1, "stop": [],
        "tokenizer": None, "chat_template": None,
    }  # fmt: skip
    for origin, expected in (
        (f"hf:{folder / 'hf'}", (2, 77)),
        (f"ckpt:{folder / 'ckpt'}", (2, 77)),
        (f"ckpt:{trained}", (1, 2, 77)),
    ):
        job = ModelJob("generate", origin, 1, [], str(tmp_path / "work"), arguments)
        assert prepare(job).options.stop_ids == expected, origin


def test_damaged_weights_end_it_and_leave_nothing(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "ckpt"
    shutil.copytree(folder / "ckpt", damaged)
    (shard,) = damaged.glob("*.safetensors")
    flip_bit(shard, offset=-5)
    ended = run_to_end(command(f"ckpt:{damaged}", folder / "prompts.jsonl", tmp_path / "never"))
    assert ended.code == 65 and shard.name in ended.err
    assert not list(tmp_path.glob("never*"))


def test_messages_are_rendered_by_the_chat_template(folder: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "abc"}]
    asked = {"prompt": messages, "system": "Be brief.", "tools": [{"name": "look"}]}
    prompts = write_rows(tmp_path / "chat.jsonl", [{"prompt": messages}, {"prompt": "abc"}, asked])
    options = ("--chat-template", "llama-2", "--temperature", "0", "--max-response-length", "8")
    rows = generate(f"hf:{folder / 'hf'}", prompts, tmp_path / "answers.jsonl", *options)
    texts = ["[INST] abc [/INST]", "abc", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nabc [/INST]"]
    plain = write_rows(tmp_path / "plain.jsonl", [{"prompt": text} for text in texts])
    expected = generate(f"hf:{folder / 'hf'}", plain, tmp_path / "plain-answers.jsonl", *options[2:])
    assert rows[0]["prompt"] == messages and "system" not in rows[0]
    assert {name: rows[2][name] for name in asked} == asked, "score reads the same prompt in it"
    assert [row["response_tokens"] for row in rows] == [row["response_tokens"] for row in expected]
    code, told = refusal(folder, prompts)
    assert code == 78 and "chat_template" in told
