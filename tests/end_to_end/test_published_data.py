"""CEVAL, CMMLU and MMLU of a folder as published, by lm-eval's own tasks; every form of a model asked."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from tests.building import build_dataset
from tests.end_to_end.small_benchmark import MODEL, evaluate, needs_lm_eval, write_financeiq, write_model
from tests.unit.small_corpus import WORDS

COUNTS = {"ceval-valid": 52, "cmmlu": 67, "mmlu": 57}  # tasks of each


def write_published(folder: Path) -> None:
    """Two questions of every category: C-Eval and MMLU as parquet, CMMLU as a script with its archive."""
    from datasets import ClassLabel, Dataset, Features, List, Value

    draw = random.Random(0)
    of_mmlu = Features(
        {
            "question": Value("string"),
            "subject": Value("string"),
            "choices": List(Value("string")),
            "answer": ClassLabel(names=list("ABCD")),
        }
    )

    def question() -> dict[str, Any]:
        return {"question": " ".join(draw.choices(WORDS, k=5)), **dict(zip("ABCD", draw.sample(WORDS, 4), strict=True))}

    for category in categories_of("mmlu"):
        rows = [
            {"question": it["question"], "subject": category, "choices": [it[letter] for letter in "ABCD"], "answer": 1}
            for it in (question(), question())
        ]
        for split in ("dev", "validation", "test"):
            write_parquet(folder / "cais" / "mmlu", category, split, Dataset.from_list(rows, features=of_mmlu))
    for category in categories_of("ceval-valid"):
        rows = [{"id": place, **question(), "answer": "C", "explanation": ""} for place in range(2)]
        for split in ("dev", "val"):
            write_parquet(folder / "ceval" / "ceval-exam", category, split, Dataset.from_list(rows))
    write_card(folder / "cais" / "mmlu", categories_of("mmlu"), ("dev", "validation", "test"))
    write_card(folder / "ceval" / "ceval-exam", categories_of("ceval-valid"), ("dev", "val"))
    cmmlu = folder / "haonan-li" / "cmmlu"
    cmmlu.mkdir(parents=True)
    (cmmlu / "cmmlu.py").write_text("import datasets\n")
    with zipfile.ZipFile(cmmlu / "cmmlu_v1_0_1.zip", "w") as archive:
        for category in categories_of("cmmlu"):
            for split in ("dev", "test"):
                stream = io.StringIO()
                writer = csv.writer(stream)
                writer.writerow(["", "Question", *"ABCD", "Answer"])
                writer.writerows([place, *question().values(), "D"] for place in range(2))
                archive.writestr(f"{split}/{category}.csv", stream.getvalue())


def categories_of(group: str) -> list[str]:
    """As lm-eval has them."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    from megatron_xy.benchmarks.tasks import tasks_of

    manager = TaskManager()
    paths = [manager.task_index[name].yaml_path for name in sorted(tasks_of(manager, group))]
    return [str(load_yaml(path, resolve_func=False)["dataset_name"]) for path in paths]


def write_parquet(folder: Path, category: str, split: str, rows: Any) -> None:
    (folder / category).mkdir(parents=True, exist_ok=True)
    rows.to_parquet(folder / category / f"{split}-00000-of-00001.parquet")


def write_card(folder: Path, categories: Sequence[str], splits: Sequence[str]) -> None:
    configs = [
        {"config_name": name, "data_files": [{"split": split, "path": f"{name}/{split}-*"} for split in splits]}
        for name in categories
    ]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")


@pytest.mark.slow
@needs_lm_eval
def test_published_data_sets_in_a_folder_are_asked_and_missing_ones_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_model(tmp_path)
    write_published(tmp_path / "data")
    options = ("--data-dir", str(tmp_path / "data"), "--limit", "2", "--json")
    ended = evaluate(f"hf:{tmp_path / 'hf'}", "--tasks", ",".join(COUNTS), "--num-fewshot", "1", *options)
    assert ended.returncode == 0, ended.stderr
    metrics = json.loads(ended.stdout)
    for group, count in COUNTS.items():
        assert 0 <= metrics[group]["acc"] <= 1
        assert len([name for name in metrics if name.startswith(f"{group}_")]) >= count
    shutil.rmtree(tmp_path / "data" / "cais")
    (tmp_path / "data" / "haonan-li" / "cmmlu" / "cmmlu_v1_0_1.zip").unlink()
    for task, data_set in (("mmlu", "cais/mmlu"), ("cmmlu", "haonan-li/cmmlu")):
        ended = evaluate("hf:none", "--tasks", task, *options)
        assert ended.returncode == 78, ended.stderr
        assert f"hf download --repo-type dataset {data_set} --local-dir DIR/{data_set}" in ended.stderr


@pytest.mark.slow
@needs_lm_eval
def test_compare_asks_every_form_that_transformers_opens(tmp_path: Path) -> None:
    write_model(tmp_path)
    write_financeiq(tmp_path / "questions")
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": " ".join(WORDS * 3)}) + "\n" for _ in range(20)))
    data = tmp_path / "data"
    build_dataset([tmp_path / "corpus.jsonl"], tokenizer=tmp_path / "tokenizer.model", output=data, buckets=(128,))
    shutil.copytree(tmp_path / "hf", tmp_path / "gpt2", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    shape = GPT2Config(vocab_size=MODEL.vocab_size, n_positions=512, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "gpt2")
    forms = [f"hf:{tmp_path / name}" for name in ("hf", "gpt2")]
    asked = ("--tasks", "financeiq", "--data-dir", str(tmp_path / "questions"), "--num-fewshot", "2")
    command = [sys.executable, "-m", "megatron_xy", "compare", *forms, "--data", str(data), *asked]
    ended = subprocess.run([*command, "--json", "--write-cards"], capture_output=True, text=True, timeout=180)
    assert ended.returncode == 0, ended.stderr
    table = json.loads(ended.stdout)
    ours = evaluate(forms[0], *asked, "--json")
    assert table[forms[0]]["benchmarks"] == json.loads(ours.stdout)
    for form, row in table.items():
        card = Path(form.removeprefix("hf:"), "README.md").read_text()
        assert f"{row['benchmarks']['financeiq']['acc']:.4f} |" in card and "| financeiq 2-shot acc |" in card
        assert "| form | hf | gpt2 |" in card
