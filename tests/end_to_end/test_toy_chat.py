"""The shipped toy conversations: a tiny model learns to answer questions that it has never seen, as transformers'
greedy generate on the exported folder shows."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_xy.data.chat.encode import Chat
from megatron_xy.data.chat.template import load_chat_template
from megatron_xy.data.encoding.tokenizer import load_tokenizer
from tests.end_to_end.tiny_run import run_command, started, wait_for_end

ROOT = Path(__file__).resolve().parents[2]
NUM_ASKED = 60
STEPS = 150  # as in the example


def python(*arguments):
    made = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-3000:]


def exact_matches(folder, rows):
    """The share of conversations whose last answer greedy generation gives, word for word."""
    tokenizer = load_tokenizer(folder)
    chat = Chat(tokenizer, load_chat_template("xuanyuan", tokenizer))
    prompts = [chat.prompt(row["messages"][:-1]).tolist() for row in rows]
    case = json.dumps({"folder": str(folder), "prompts": prompts, "stop_ids": chat.stop_ids})
    command = [sys.executable, "-m", "tests.end_to_end.ask_with_transformers"]
    made = subprocess.run(command, input=case, capture_output=True, text=True, check=True)
    answers = [tokenizer.decode(ids).strip() for ids in json.loads(made.stdout)]
    return sum(answer == row["messages"][-1]["content"] for answer, row in zip(answers, rows, strict=True)) / len(rows)


@pytest.mark.slow
def test_a_tiny_model_learns_to_answer_questions_it_has_never_seen(tmp_path):
    python(ROOT / "tools/toy_conversations.py", "--output", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    (tmp_path / "texts").mkdir()
    texts = [message["content"] for row in rows[:2000] for message in row["messages"]]
    words = [f"{text} Human: {text} Assistant: {text}" for text in texts]
    (tmp_path / "texts/a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    tokenizer = tmp_path / "tokenizer.model"
    python(ROOT / "tools/train_tokenizer.py", "--input", tmp_path / "texts", "--output", tokenizer, "--vocab-size", 512)
    shape = "num_layers: 4, hidden_size: 128, ffn_hidden_size: 352, num_attention_heads: 4, init_method_std: 0.05"
    model = f"{{{shape}, vocab_size: 512}}"
    command = run_command(
        ROOT / "examples/tiny/sft.yaml", f"model={model}", f"run_dir={tmp_path}/run", f"data.tokenizer={tokenizer}",
        f"data.path={tmp_path}/train.jsonl", f"data.eval_path={tmp_path}/held_out.jsonl",
        "data.weights={general: 4, finance: 1}", ranks=4,
    )  # fmt: skip
    with started(command) as process:
        ended = wait_for_end(process, seconds=400)
    assert ended.code == 0, f"{shlex.join(command)}\n{ended.err[-3000:]}"
    last = f"ckpt:{tmp_path}/run/checkpoints/iter_{STEPS:07d}"
    options = ["--tokenizer", tokenizer]
    python("-m", "megatron_xy", "convert", "--from", last, "--to", f"hf:{tmp_path}/hf", *options)
    held_out = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert not {json.dumps(row) for row in held_out} & {json.dumps(row) for row in rows}
    assert exact_matches(tmp_path / "hf", held_out[:NUM_ASKED]) > 0.95
