"""Commands that only check or tell: the right exit code, everything wrong at once with its line, and never torch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.building import build_dataset
from tests.unit.small_corpus import train_tokenizer

ROOT = Path(__file__).parents[2]
VERBS = (
    "pretrain", "sft", "reward", "run", "check", "dryrun", "launch", "import-args", "select", "report", "convert",
    "generate", "logprobs", "score", "evaluate", "quantize", "compare",
    "doctor", "data", "checkpoint", "vocab",
)  # fmt: skip

# `python -m megatron_xy`, and at its very end one line on stderr: which heavy packages it has imported.
PROGRAM = """
import atexit, runpy, sys
heavy = ("torch", "megatron", "transformers")
atexit.register(lambda: print("imported:", *(name for name in heavy if name in sys.modules), file=sys.stderr))
runpy.run_module("megatron_xy", run_name="__main__", alter_sys=True)
"""

GOOD = """\
run_dir: RUN_DIR
model:
  num_layers: 4
  hidden_size: 128
  ffn_hidden_size: 352
  num_attention_heads: 4
  vocab_size: 4096
parallel:
  tensor_model_parallel_size: 2
  pipeline_model_parallel_size: 2
data:
  path: DATA
training:
  global_batch_tokens: 8192
  micro_batch_tokens: 2048
"""


def command(*arguments: str | Path, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `megatron-xy ARGUMENTS` and makes sure that it has not imported torch, megatron or transformers."""
    environment = os.environ | {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)} | variables
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    *errors, imported = result.stderr.splitlines()
    assert imported == "imported:", f"{arguments}: {result.stderr}"
    result.stderr = "\n".join(errors)
    return result


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    """A valid config in a folder of its own."""
    path = tmp_path / "run.yaml"
    path.write_text(GOOD.replace("RUN_DIR", str(tmp_path / "run")).replace("DATA", str(tmp_path / "data")))
    return path


def test_help_names_every_verb_and_the_exit_codes() -> None:
    result = command("--help")
    assert result.returncode == 0
    rows = dict(re.findall(r"^│ (\S+) +(\S.*?) *│$", result.stdout, flags=re.MULTILINE))
    for verb in VERBS:
        assert rows[verb].endswith(".") and len(rows[verb].split()) > 3, f"{verb} does not say what it does"
    assert "78 bad config" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--help"),
        ("check", "--help"),
        ("pretrain", "--help"),
        ("generate", "--help"),
        ("launch", "--help"),
        ("data", "build", "--help"),
        ("--version",),
    ],
)
def test_help_of_verbs(arguments: tuple[str, ...]) -> None:
    result = command(*arguments)
    assert result.returncode == 0
    assert result.stdout and not result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("check",),
        ("check", "run.yaml", "--no-such-option"),
        ("check", "run.yaml", "--world-size", "0"),
        ("run", "run.yaml", "--nproc-per-node", "many"),
        ("no-such-verb",),
        ("data", "plan-steps", "DIR", "--config", "run.yaml", "--steps", "3"),
        ("data", "build", "--input", "a", "--tokenizer", "b", "--output", "c", "--buckets", "512,256"),
        ("data", "build", "--input", "a", "--tokenizer", "b", "--output", "c", "--buckets", ""),
        (
            "data",
            "build",
            "--input",
            "a",
            "--tokenizer",
            "b",
            "--output",
            "c",
            "--packing",
            "concatenate",
            "--seq-length",
            "2000000",
        ),
        ("logprobs", "hf6", "--input", "a", "--output", "b"),
        ("generate", "hf:", "--prompts", "a", "--output", "b"),
        ("score", "run", "--input", "a", "--output", "b", "parallel.tensor_model_parallel_size=2"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = command(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert not result.stdout and result.stderr
    assert list(tmp_path.iterdir()) == []


def test_check_of_a_good_config(run_yaml: Path) -> None:
    result = command("check", run_yaml, "--world-size", "8", "training.train_iters=7")
    assert result.returncode == 0 and not result.stderr
    assert "valid" in result.stdout and "dp 2 on 8 ranks, 2 micro-batches a step" in result.stdout
    assert "7 steps" in result.stdout


def test_check_json_of_a_good_config(run_yaml: Path) -> None:
    result = command("check", run_yaml, "--json", "optimizer.lr=1e-3")
    answer = json.loads(result.stdout)
    assert result.returncode == 0 and not result.stderr
    assert (answer["ok"], answer["exit_code"], answer["problems"]) == (True, 0, [])
    assert answer["config"]["optimizer"]["lr"] == 1e-3
    assert answer["config"]["model"]["num_query_groups"] is None


def spoil(run_yaml: Path) -> list[str]:
    """Breaks the config in five ways; the beginnings of the five problems."""
    text = run_yaml.read_text().replace("num_layers: 4", "num_layers: four").replace("8192", "8191")
    text += "  mirco_batch_tokens: 1024\nparalel: {}\noptimizer:\n  lr: -1\n"
    run_yaml.write_text(text)
    return [
        f"{run_yaml}:3: model.num_layers (four): must be a whole number",
        f"{run_yaml}:16: training.mirco_batch_tokens: unknown key; did you mean micro_batch_tokens?",
        f"{run_yaml}:17: paralel: unknown key; did you mean parallel?",
        f"{run_yaml}:19: optimizer.lr (-1): must be greater than or equal to 0",
        f"{run_yaml}:14: training.global_batch_tokens (8191) must be a multiple of micro_batch_tokens",
        f"{run_yaml}:8: world size (6) must be a multiple of tensor x pipeline x context parallel size (2 x 2 x 1 = 4)",
    ]


def test_check_tells_all_problems_at_once(run_yaml: Path) -> None:
    expected = spoil(run_yaml)
    result = command("check", run_yaml, "--world-size", "6")
    assert result.returncode == 78
    assert not result.stdout
    told = [line.strip() for line in result.stderr.splitlines()]
    for problem in expected:
        assert any(line.startswith(problem) for line in told), f"{problem}\nis not in\n{result.stderr}"
    assert told[0] == f"error (78): {len(expected)} problems in the configuration:"
    assert len(told) == 1 + len(expected)


def test_check_json_tells_all_problems_at_once(run_yaml: Path) -> None:
    expected = spoil(run_yaml)
    result = command("check", run_yaml, "--world-size", "6", "--json")
    answer = json.loads(result.stdout)
    assert result.returncode == 78 and result.stderr
    assert (answer["ok"], answer["exit_code"]) == (False, 78)
    assert len(answer["problems"]) == len(expected)
    assert all(any(line.startswith(problem) for line in answer["problems"]) for problem in expected)


@pytest.mark.parametrize(
    ("verb", "code"),
    [
        ("check none", 78),
        ("plan none", 78),
        ("plan {run} --tokens many", 2),
        ("plan {run} --picture {run}/plan.png", 78),
        ("select none", 78),
        ("data verify none", 78),
        ("data stats .", 65),
        ("data build --input none --tokenizer none --output {run}", 78),
        ("checkpoint verify .", 65),
        ("checkpoint hash .", 65),
    ],
)
def test_json_has_one_document_whatever_is_wrong(run_yaml: Path, verb: str, code: int) -> None:
    result = command(*verb.format(run=run_yaml).split(), "--json", cwd=run_yaml.parent)
    answer = json.loads(result.stdout)
    assert result.returncode == code
    assert (answer["ok"], answer["exit_code"]) == (False, code)
    assert answer["problems"] and result.stderr.startswith(f"error ({code}): {answer['problem']}")


def test_check_of_what_is_not_there(tmp_path: Path) -> None:
    result = command("check", tmp_path / "none.yaml")
    assert result.returncode == 78
    assert result.stderr == f"error (78): {tmp_path / 'none.yaml'}: there is no such file"


def test_check_paths_looks_at_files(run_yaml: Path) -> None:
    missing = command("check", run_yaml, "--paths", "model.load=hf:nowhere", "model.layer_spec=transformer_engine")
    assert missing.returncode == 78
    assert "nowhere: there is no such folder" in missing.stderr
    assert f"data.path ({run_yaml.parent / 'data'}): there is no such folder" in missing.stderr
    assert "model.layer_spec (transformer_engine): transformer_engine is not installed" in missing.stderr

    (run_yaml.parent / "data").mkdir()
    empty = command("check", run_yaml, "--paths")
    assert empty.returncode == 65
    assert "holds no manifest.json" in empty.stderr


def test_check_paths_reads_conversations_and_leaves_nothing(run_yaml: Path) -> None:
    folder = run_yaml.parent
    train_tokenizer(folder / "tokenizer.model")
    good_row = '{"messages": [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]}\n'
    (folder / "chat.jsonl").write_text(good_row + '{"messages": []}\n')
    options = ["task=sft", f"data.path={folder}/chat.jsonl", "data.chat_template=xuanyuan"]
    missing = command("check", run_yaml, *options)
    assert missing.returncode == 78 and "data.tokenizer is missing" in missing.stderr
    options.append(f"data.tokenizer={folder}/tokenizer.model")
    bad = command("check", run_yaml, "--paths", *options)
    assert bad.returncode == 65 and "chat.jsonl:2: there are no messages" in bad.stderr
    (folder / "chat.jsonl").write_text(good_row)
    good = command("check", run_yaml, "--paths", "training.epochs=3", *options)
    assert good.returncode == 0 and "3 epoch(s) in steps of 8192 tokens" in good.stdout
    assert not (folder / "run").exists()
    refused = command("check", run_yaml, *options, "task=pretrain", "training.epochs=3")
    assert refused.returncode == 78
    assert "task pretrain takes folders" in refused.stderr and "task pretrain counts in train_iters" in refused.stderr


def test_run_of_a_bad_config_starts_nothing_and_leaves_its_code(run_yaml: Path) -> None:
    result = command("run", run_yaml, "--nproc-per-node", "3")
    assert result.returncode == 78
    assert "world size (3)" in result.stderr
    left = json.loads((run_yaml.parent / "run" / "exit.json").read_text())
    assert left["code"] == 78 and "world size (3)" in left["message"]


def test_launch_prints_and_starts_nothing(run_yaml: Path) -> None:
    result = command("launch", run_yaml, "--on", "slurm", "--nodes", "1", "--gpus-per-node", "4", cwd=run_yaml.parent)
    assert result.returncode == 0 and result.stdout.startswith("#!/bin/bash\n") and not result.stderr
    assert [path.name for path in run_yaml.parent.iterdir()] == ["run.yaml"]


def test_report_of_what_is_not_there(tmp_path: Path) -> None:
    assert command("report", tmp_path / "none").returncode == 78


@pytest.mark.parametrize("verb", ["show", "stats"])
def test_what_stdout_cannot_encode_is_escaped(tmp_path: Path, verb: str) -> None:
    tokenizer = train_tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "corpus.jsonl").write_text('{"text": "the fox"}\n')
    data = tmp_path / "数据"
    build_dataset([tmp_path / "corpus.jsonl"], tokenizer=tokenizer, output=data, buckets=[64], source="金融")
    result = command("data", verb, data, PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and not result.stderr
    assert r"\u91d1\u878d" in result.stdout
