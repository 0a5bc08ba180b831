"""The report of a run: whole, self-contained, and made from damaged or partial metrics too."""

import json
import math
import re
from html.parser import HTMLParser

import numpy
import pytest

from megatron_xy.config import RunConfig
from megatron_xy.errors import ConfigError, DataError, StorageError
from megatron_xy.report.benchmarks import draw_benchmarks
from megatron_xy.report.mixture import wanted_shares
from megatron_xy.report.page import ReportSection
from megatron_xy.report.records import Metrics, read_metrics
from megatron_xy.report.verb import make_report

PICTURES = ("loss.png", "learning_rate_and_grad_norm.png", "throughput.png", "data.png")
EVALUATION_PICTURE = "evaluation.png"
RUN_YAML = """
model:
  num_layers: 2
  hidden_size: 64
  ffn_hidden_size: 128
  num_attention_heads: 4
  vocab_size: 512
parallel: {tensor_model_parallel_size: 2}
data: {path: corpus}
training: {train_iters: 12}
"""


def record(iteration, **changes):
    bucket = (256, 512)[iteration % 2]
    values = {
        "iteration": iteration,
        "data_step": iteration - 1,
        "bucket": bucket,
        "loss": 6.0 - 0.25 * iteration,
        "loss_by_source": {"code": 5.0 - 0.25 * iteration, "prose": 7.0 - 0.25 * iteration},
        "num_loss_tokens": 1000,
        "grad_norm": 1.0 / iteration,
        "lr": 1e-4 * iteration,
        "consumed_tokens": 1000 * iteration,
        "padding_ratio": 0.1,
        "step_seconds": 0.5,
        "data_wait_seconds": 0.05,
        "tokens_per_second": {256: 2000.0, 512: 1000.0}[bucket] + iteration,
        "mfu": 0.25,
        "skipped": False,
    }
    return values | changes


def write_run(folder, records, *, tail=""):
    folder.mkdir()
    (folder / "run.yaml").write_text(RUN_YAML)
    (folder / "env.json").write_text(json.dumps({"world_size": 4, "host": "<b>"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records) + tail)
    return folder


def full_record(iteration, **changes):
    """What a run of today notes, the mixture and the time by phase included."""
    share = 0.25 + 0.01 * iteration
    values = {
        "spike": False,
        "peak_memory_bytes": 2**30,
        "consumed_share_by_source": {"code": share, "prose": 1 - share},
        "epochs_by_source": {
            "code": {"256": 0.1 * iteration, "512": 0.2 * iteration},
            "prose": {"512": 0.01 * iteration},
        },
        "seconds_by_phase": {"data": 0.05, "forward_backward": 0.3, "optimizer": 0.15, "save": 0.2, "evaluate": 0.0},
    }
    return record(iteration, **values | changes)


def evaluation(iteration):
    return {
        "iteration": iteration,
        "loss": 5.0 - 0.1 * iteration,
        "perplexity": math.exp(5.0 - 0.1 * iteration),
        "num_loss_tokens": 100,
        "loss_by_bucket": {"256": 4.5, "512": 5.5},
        "loss_by_source": {"code": 4.0, "prose": 6.0},
        "loss_by_position": {"0-2k": 5.0, "2-4k": 4.9},
    }


def write_lines(path, records):
    path.write_text("".join(json.dumps(row) + "\n" for row in records))


class Page(HTMLParser):
    """The text, the tags and the references of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.text = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.text += data


def test_a_whole_run_gives_pictures_summary_and_one_page(tmp_path):
    run = write_run(tmp_path / "run", [record(i) for i in range(1, 13)])
    sections = [
        ReportSection("What was shown", statements=["killed at step 6, equal bit for bit"]),
        ReportSection("Text", text="<script>alert(1)</script> & more", rows=[("<i>", "b"), ("c", "d")]),
    ]
    page_file = make_report(run, timings={"train": 12.34}, sections=sections)

    assert page_file == run / "report" / "index.html"
    assert not list(page_file.parent.glob(".tmp-*"))
    for name in PICTURES:
        assert (page_file.parent / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    text = page_file.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.references) == len(PICTURES)
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r'src="[^"]*"', "", text))
    assert not page.tags & {"script", "link", "i", "b"}
    for expected in ("killed at step 6", "<script>alert(1)</script> & more", "12.3", "tensor 2 x pipeline 1", "data 2"):
        assert expected in page.text

    summary = json.loads((page_file.parent / "summary.json").read_text())
    assert summary["first_loss"] == 5.75
    assert summary["last_loss"] == pytest.approx(sum(6.0 - 0.25 * i for i in range(3, 13)) / 10)
    assert summary["median_tokens_per_second_by_bucket"] == {"256": 2007.0, "512": 1006.0}
    assert summary["data_wait_share"] == pytest.approx(0.1)
    assert summary["num_parameters"] == 2 * (4 * 64 * 64 + 3 * 64 * 128) + 2 * 64 * 512 + 5 * 64
    assert summary["seconds_by_phase"] == {"train": 12.34}


def test_evaluations_odd_steps_stragglers_and_epochs_are_shown(tmp_path):
    records = [full_record(i) for i in range(1, 10)]
    records += [full_record(10, spike=True), full_record(11, spike=True, skipped=True), full_record(12, skipped=True)]
    run = write_run(tmp_path / "run", records)
    write_lines(run / "eval.jsonl", [evaluation(6), evaluation(12)])
    event = {"data_step": 9, "bucket": 256, "spike": True, "skipped": False, "reasons": ["loss 9.0 is <7> sigma above"]}
    straggler = {"iteration": 11, "straggler": 3, "factor": 2.51, "busy_seconds": 0.75}
    write_lines(run / "events.jsonl", [{"iteration": 10, **event}, straggler])
    folder = make_report(run).parent
    assert {path.name for path in folder.glob("*.png")} == {
        *PICTURES, EVALUATION_PICTURE, "time_and_memory.png", "mixture.png"
    }  # fmt: skip
    page = Page((folder / "index.html").read_text())
    for shown in (
        "Evaluation after step 12", "positions 2-4k", "134.29",  # e to 4.9
        "2 skipped, 2 spikes",
        "data step 9, bucket 256: loss 9.0 is <7> sigma above",
        "straggler: rank 3", "busy for 0.750 s a step, 2.5 times",
        "Epochs", "bucket 512", "2.400", "no samples",
    ):  # fmt: skip
        assert shown in page.text, shown
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["last_evaluation"] == evaluation(12)
    assert (summary["skipped_steps"], summary["spike_steps"]) == (2, 2)
    assert summary["epochs_by_source"]["code"]["512"] == pytest.approx(2.4)
    assert summary["peak_memory_bytes"] == 2**30

    (run / "eval.jsonl").unlink()
    (run / "events.jsonl").unlink()
    make_report(run)
    text = Page((folder / "index.html").read_text()).text
    assert not (folder / EVALUATION_PICTURE).exists(), "of the earlier report"
    assert "Evaluation" not in text and "held-out" not in text and "Odd steps and stragglers" not in text


def test_of_a_group_of_benchmarks_only_the_mean_is_drawn():
    results = {"mmlu": {"acc": 0.5}, "mmlu_law": {"acc": 0.25}, "a": {"acc": 0.1}, "b": {"f1": 0.2}}
    rows = [
        {"iteration": place, "tasks": [name], "num_fewshot": 5, "results": results}
        for place, name in enumerate(("mmlu", "a tag"), start=1)
    ]
    shown = [
        [line.get_label() for line in draw_benchmarks(Metrics([]), evaluations=Metrics([row])).axes[0].lines]
        for row in rows
    ]
    assert shown == [
        ["mmlu acc, 5-shot"],
        ["mmlu acc, 5-shot", "mmlu_law acc, 5-shot", "a acc, 5-shot", "b f1, 5-shot"],
    ]


def test_what_was_asked_in_another_way_is_a_curve_of_its_own():
    asked = {"tasks": ["financeiq"], "num_fewshot": 0, "limit": None, "apply_chat_template": False, "data": "aa"}
    rows = [asked, {**asked, "limit": 3}, {**asked, "data": "bb"}, {**asked, "data": "bb", "num_fewshot": None}]
    records = [
        {"iteration": iteration, **row, "results": {"financeiq": {"acc": place / 10}}}
        for iteration in (4, 8)
        for place, row in enumerate(rows)
    ]
    lines = draw_benchmarks(Metrics([]), evaluations=Metrics(records)).axes[0].lines
    assert {line.get_label(): list(line.get_ydata()) for line in lines} == {
        "financeiq acc, 0-shot, all questions, data aa": [0.0, 0.0],
        "financeiq acc, 0-shot, first 3 questions of each, data aa": [0.1, 0.1],
        "financeiq acc, 0-shot, all questions, data bb": [0.2, 0.2],
        "financeiq acc, all questions, data bb": [0.3, 0.3],
    }


def test_of_an_iteration_that_was_saved_again_the_last_line_is_drawn():
    records = [
        {"iteration": iteration, "checkpoint": name, "results": {"financeiq": {"acc": accuracy}}}
        for iteration, name, accuracy in ((4, "a", 0.1), (8, "b", 0.2), (8, "c", 0.3))
    ]
    (line,) = draw_benchmarks(Metrics([]), evaluations=Metrics(records)).axes[0].lines
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == [(4, 0.1), (8, 0.3)]


def test_the_mixture_asked_for_follows_the_phases():
    config = RunConfig.model_validate(
        {
            "data": {"weights": {"code": 1, "prose": 3}},
            "training": {
                "global_batch_tokens": 4096,
                "phases": [{"from_iter": 4, "weights": {"code": 1}}, {"from_iter": 6, "global_batch_tokens": 8192}],
            },
        }
    )
    wanted = wanted_shares(numpy.arange(8.0), config=config)
    drawn = numpy.cumsum([4096] * 6 + [8192] * 2)
    code = numpy.cumsum([1024] * 4 + [4096] * 2 + [8192] * 2)
    assert wanted["code"] == pytest.approx(code / drawn)
    assert wanted["prose"] == pytest.approx(1 - code / drawn)
    assert wanted_shares(numpy.arange(8.0), config=RunConfig()) == {}, "as much as there is of each"


@pytest.mark.parametrize(
    "records",
    [
        [{"iteration": 1}],
        [{"iteration": i, "reward_mean": 1.0} for i in range(1, 4)],
        [record(1, loss=None, grad_norm=None, mfu=None, tokens_per_second=None, loss_by_source={"code": None})],
        [record(i, loss=math.nan, grad_norm=math.inf, loss_by_source=None, skipped=True) for i in range(1, 4)],
        [record(1, step_seconds=90.0), *(record(i) for i in range(2, 5))],
        [full_record(1), record(2), full_record(3, data_step=None, loss=None), {"iteration": 4}],
        [full_record(i) for i in range(1, 400)],
    ],
)
def test_what_is_missing_or_not_finite_is_left_out(tmp_path, records):
    run = write_run(tmp_path / "run", records)
    make_report(run)
    strict = json.loads((run / "report" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert strict["last_iteration"] == records[-1]["iteration"]


def test_a_null_step_does_not_touch_the_means_of_the_others(tmp_path):
    run = write_run(tmp_path / "run", [record(1, loss=4.0), record(2, loss=None), record(3, loss=2.0)])
    make_report(run)
    assert json.loads((run / "report" / "summary.json").read_text())["last_loss"] == 3.0


def test_the_unfinished_last_line_of_a_writing_run_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", [record(1), record(2)], tail='{"iteration": 3, "lo')
    assert [row["iteration"] for row in read_metrics(run / "metrics.jsonl").records] == [1, 2]


@pytest.mark.parametrize("line", ['{"iteration": 3, "lo\n', "[3]\n", '{"loss": 1.0}\n'])
def test_a_damaged_line_is_named(tmp_path, line):
    run = write_run(tmp_path / "run", [record(1)], tail=line)
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: "):
        make_report(run)
    assert not (run / "report").exists()


def test_what_cannot_be_written_is_named(tmp_path):
    run = write_run(tmp_path / "run", [record(1)])
    (run / "report" / "time_and_memory.png").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"time_and_memory\.png cannot be written: Is a directory"):
        make_report(run)


def test_a_folder_without_a_run_and_a_run_without_a_step_say_so(tmp_path):
    with pytest.raises(ConfigError, match="not there"):
        make_report(tmp_path / "nothing")
    with pytest.raises(DataError, match="no step yet"):
        make_report(write_run(tmp_path / "run", []))
