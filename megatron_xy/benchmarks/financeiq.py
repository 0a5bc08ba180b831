"""FinanceIQ as tasks of lm-eval: DIR/dev/*.csv and DIR/test/*.csv, or a flat folder of CSV files, one a category.

Questions of four choices in 10 categories, as published: columns Question, A, B, C, D, Answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask

from megatron_xy.benchmarks.questions import CHOICES, read_questions
from megatron_xy.errors import ConfigError

NAME = "financeiq"
EXAMPLES = 5  # unless told otherwise
HOW_TO_GET = (
    "its folders dev and test come from the FinanceIQ data set of Duxiaoman-DI: "
    "`hf download --repo-type dataset Duxiaoman-DI/FinanceIQ --local-dir DIR`, then --data-dir DIR/data"
)


def financeiq(data_dir: Path | None, *, num_fewshot: int | None, say: Callable[[str], None]) -> Group:
    """The group of a task a category. Raises ConfigError where there is no data, DataError for bad rows."""
    if data_dir is None:
        raise ConfigError(f"task {NAME} needs --data-dir; {HOW_TO_GET}")
    wanted = EXAMPLES if num_fewshot is None else num_fewshot
    is_flat = not (data_dir / "test").is_dir()
    questions = data_dir if is_flat else data_dir / "test"
    files = sorted(questions.glob("*.csv"))
    if not files:
        raise ConfigError(f"--data-dir ({data_dir}): holds no test/*.csv and no *.csv; {HOW_TO_GET}")
    group = Group(name=NAME)
    short: list[int] = []
    for path in files:
        test = _rows(path)
        examples = test if is_flat else _rows(data_dir / "dev" / path.name) if wanted else []
        # lm-eval leaves the question itself out of its examples, with all that are equal to it.
        others = len(examples) - (max(Counter(map(repr, examples)).values()) if is_flat else 0)
        group.add(_task(path.stem, test, examples, num_fewshot=min(wanted, others), is_flat=is_flat))
        if wanted > others:
            short.append(others)
    fewer = f"fewer than {wanted} in {len(short)} of {len(files)} categories, {min(short, default=0)} at the least"
    if is_flat and wanted:
        also = f", {fewer}" if short else ""
        others_of = "a question's examples are the other questions of its category"
        say(f"warning: {data_dir} has no dev and test; {others_of}{also}")
    elif short:
        say(f"warning: {data_dir / 'dev'}: questions for examples are {fewer}; takes as many")
    return group


def metrics_of(results: dict[str, Any], num_questions: dict[str, int]) -> dict[str, float]:
    """{"acc": mean over all questions, "acc_CATEGORY": ...} of lm-eval's results of the tasks in `num_questions`."""
    accuracies = {name: float(results[name]["acc,none"]) for name in num_questions}
    total = sum(num_questions.values())
    mean = sum(accuracies[name] * number for name, number in num_questions.items()) / total
    return {"acc": mean, **{f"acc_{name.removeprefix(f'{NAME}_')}": value for name, value in accuracies.items()}}


def _task(
    category: str, test: list[dict[str, str]], examples: list[dict[str, str]], *, num_fewshot: int, is_flat: bool
) -> ConfigurableTask:
    splits = {"test": Dataset.from_list(test)}
    if not is_flat and examples:
        splits["dev"] = Dataset.from_list(examples)
    return ConfigurableTask(
        config={
            "task": f"{NAME}_{category}",
            "custom_dataset": lambda **_: splits,
            "test_split": "test",
            "fewshot_split": "dev" if "dev" in splits else "test",
            "fewshot_config": {"sampler": "first_n"},
            "num_fewshot": num_fewshot,
            "output_type": "multiple_choice",
            "description": f"以下是关于{category}的单项选择题，请直接给出正确答案的选项。\n\n",  # noqa: RUF001
            "doc_to_text": "{{Question.strip()}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\n答案：",  # noqa: RUF001
            "doc_to_choice": list(CHOICES),
            "doc_to_target": "{{['A', 'B', 'C', 'D'].index(Answer)}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
    )


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise ConfigError(f"--data-dir: {path} is not there, which has the examples of its category; {HOW_TO_GET}")
    return read_questions(path, question="Question", answer="Answer")
