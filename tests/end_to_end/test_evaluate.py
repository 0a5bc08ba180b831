"""`evaluate`: lm-eval's own hf backend and ours agree under every layout, and what is missing is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.small_benchmark import evaluate, needs_lm_eval, write_financeiq, write_model, write_questions
from tests.unit.small_corpus import WORDS

LAYOUT = ("--nproc-per-node", "4", "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2")
REQUESTS: list[tuple[str, list[Any]]] = [
    ("loglikelihood", [["the quick", " brown fox"], ["the quick ", "dog"], ["", "the lazy dog"], ["</s>the", " a"]]),
    ("loglikelihood_rolling", [["the quick brown fox"], [" ".join(WORDS * 90)]]),
    ("generate_until", [["the quick brown", {"until": ["e", "\n\n"], "max_gen_toks": 24}], ["dog", {"until": []}]]),
]

# In a process of its own: the stand-in for CUDA is not made for transformers. argv: whose, folder, requests or tasks.
ASK = """
import json, sys, tempfile
from pathlib import Path
whose, folder, what = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from megatron_xy.benchmarks.tasks import load_tasks
if whose == "theirs":
    from lm_eval.models.huggingface import HFLM
    model = HFLM(pretrained=folder, dtype="float32", device="cpu")
else:
    from megatron_xy import device
    device.start(num_threads=1)
    from megatron_xy.benchmarks.backend import MegatronXYLM
    model = MegatronXYLM(f"hf:{folder}", folder=Path(tempfile.mkdtemp(dir=Path(folder).parent)))
if __name__ == "__main__":
    answers = {}
    for kind, arguments in what["requests"]:
        asked = [Instance(kind, {}, tuple(them), place) for place, them in enumerate(arguments)]
        answers[kind] = getattr(model, kind)(asked)
    loaded = load_tasks(["financeiq"], data_dir=Path(what["data"]), num_fewshot=5, say=print)
    found = evaluate(lm=model, task_dict=loaded, bootstrap_iters=0, log_samples=True)
    answers["likelihoods"] = {
        name: [[float(choice[0]) for choice in row["filtered_resps"]] for row in rows]
        for name, rows in found["samples"].items()
    }
    answers["accuracies"] = {name: it["acc,none"] for name, it in found["results"].items() if "acc,none" in it}
    loaded = load_tasks(["financeiq"], data_dir=Path(what["data"]), num_fewshot=0, say=print)
    asked_in_turns = {"apply_chat_template": True, "fewshot_as_multiturn": True, "log_samples": True}
    found = evaluate(lm=model, task_dict=loaded, bootstrap_iters=0, **asked_in_turns)
    answers["in_a_conversation"] = {
        name: [[float(choice[0]) for choice in row["filtered_resps"]] for row in rows]
        for name, rows in found["samples"].items()
    }
    print("answers:" + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/, a small model with its tokenizer; data/dev and data/test of two categories."""
    path = tmp_path_factory.mktemp("evaluate")
    write_model(path)
    write_financeiq(path / "data")
    return path


def answers_of(whose: str, folder: Path) -> dict[str, Any]:
    what = json.dumps({"requests": REQUESTS, "data": str(folder / "data")})
    command = [sys.executable, "-c", ASK, whose, str(folder / "hf"), what]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert answer.returncode == 0, answer.stderr
    return dict(json.loads(answer.stdout.splitlines()[-1].removeprefix("answers:")))


@needs_lm_eval
def test_lm_evals_own_backend_gives_the_same_likelihoods_answers_and_accuracies(folder: Path) -> None:
    theirs, ours = (answers_of(whose, folder) for whose in ("theirs", "ours"))
    for (logprob, is_greedy), (expected, was_greedy) in zip(
        ours["loglikelihood"], theirs["loglikelihood"], strict=True
    ):
        assert logprob == pytest.approx(expected, abs=1e-4) and is_greedy == was_greedy
    assert ours["loglikelihood_rolling"] == pytest.approx(theirs["loglikelihood_rolling"], rel=1e-6)
    assert ours["generate_until"] == theirs["generate_until"]
    for kind in ("likelihoods", "in_a_conversation"):
        for name, rows in theirs[kind].items():
            assert ours[kind][name] == [pytest.approx(row, abs=1e-4) for row in rows]
    assert ours["likelihoods"] != ours["in_a_conversation"]
    expected_metrics = {name.removeprefix("financeiq_"): value for name, value in theirs["accuracies"].items()}
    for layout in ((), LAYOUT):
        ended = evaluate(
            f"hf:{folder / 'hf'}", "--tasks", "financeiq", "--data-dir", str(folder / "data"), "--json", *layout
        )
        assert ended.returncode == 0, ended.stderr
        found = json.loads(ended.stdout)["financeiq"]
        assert {name.removeprefix("acc_"): value for name, value in found.items() if name != "acc"} == expected_metrics
        assert found["acc"] == pytest.approx(sum(expected_metrics.values()) / 2), "as many questions in both"


@needs_lm_eval
def test_contexts_that_are_cut_are_counted(folder: Path, tmp_path: Path) -> None:
    short = shutil.copytree(folder / "hf", tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    task = ("--tasks", "financeiq", "--data-dir", str(folder / "data"), "--json")
    whole, cut = (evaluate(f"hf:{model}", *task) for model in (folder / "hf", short))
    assert whole.returncode == cut.returncode == 0, cut.stderr
    assert "requests are longer than the model's max_position_embeddings (40)" in cut.stderr
    assert "are longer than" not in whole.stderr


@needs_lm_eval
def test_lm_evals_command_line_has_our_backend(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "words.jsonl").write_text('{"text": "the quick brown fox"}\n{"text": "a lazy dog"}\n')
    (tmp_path / "words.yaml").write_text(
        "task: words\ndataset_path: json\noutput_type: loglikelihood_rolling\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'words.jsonl'}}}}}\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: bits_per_byte}]\n'
    )
    command = [
        sys.executable, "-m", "megatron_xy.lm_eval", "--model", "megatron_xy",
        "--model_args", f"origin=hf:{folder / 'hf'}", "--tasks", str(tmp_path / "words.yaml"),
        "--output_path", str(tmp_path / "out.json"),
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180, env=environment)
    assert answer.returncode == 0, answer.stderr
    assert "bits_per_byte" in answer.stdout


@needs_lm_eval
def test_what_is_missing_is_named_before_a_model_is_loaded(folder: Path) -> None:
    from megatron_xy.benchmarks.financeiq import financeiq
    from megatron_xy.benchmarks.tasks import load_tasks
    from megatron_xy.errors import ConfigError, DataError

    ended = evaluate(f"hf:{folder / 'hf'}", "--tasks", "ceval-valid_law", "--json")
    assert ended.returncode == 78 and not ended.stdout
    assert "hf download --repo-type dataset ceval/ceval-exam --local-dir DIR/ceval/ceval-exam" in ended.stderr
    with pytest.raises(ConfigError, match="task financeiq needs --data-dir"):
        load_tasks(["financeiq"], data_dir=None, num_fewshot=None, say=print)
    with pytest.raises(ConfigError, match="there is no such folder"):
        load_tasks(["financeiq"], data_dir=folder / "none", num_fewshot=None, say=print)
    with pytest.raises(ConfigError, match=r"holds no test/\*.csv"):
        financeiq(folder / "hf", num_fewshot=5, say=print)
    bad = folder / "bad"
    write_questions(bad / "one.csv", number=2, seed=0)
    (bad / "one.csv").write_text((bad / "one.csv").read_text() + "3,what,a,b,c,d,E\n")
    with pytest.raises(DataError, match=r"one.csv:4: must have"):
        financeiq(bad, num_fewshot=5, say=print)


@needs_lm_eval
def test_a_flat_folder_gives_a_question_the_others_of_its_category_for_examples(tmp_path: Path) -> None:
    from megatron_xy.benchmarks.financeiq import financeiq

    write_questions(tmp_path / "one.csv", number=4, seed=0)
    told: list[str] = []
    (task,) = financeiq(tmp_path, num_fewshot=5, say=told.append).get_all_tasks()
    assert task.config.num_fewshot == 3
    assert (
        len(told) == 1
        and "has no dev and test" in told[0]
        and "fewer than 5 in 1 of 1 categories, 3 at the least" in told[0]
    )
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    contexts = [instance.args[0] for instance in task.instances[::4]]
    questions = [doc["Question"] for doc in task.test_docs()]
    for number, context in enumerate(contexts):
        assert [context.count(question) for question in questions] == [1] * 4 and "答案" in context
        assert context.index(questions[number]) == max(map(context.index, questions)), "its own comes last"


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_lm_eval_it_is_said_what_to_install() -> None:
    ended = evaluate("hf:none", "--tasks", "financeiq")
    assert ended.returncode == 78 and "megatron-xy[evaluate]" in ended.stderr
