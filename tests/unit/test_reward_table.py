"""The table of an epoch and the choice among epochs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_xy.cli import app
from megatron_xy.reward.pairs import Pair
from megatron_xy.reward.table import lines_of, stored_scores, table_of


def pair(source: str, models: tuple[str, str], *, lengths: tuple[int, int]) -> Pair:
    prompt, chosen, rejected = (np.ones(length, dtype=np.int32) for length in (3, *lengths))
    return Pair("", "", prompt, chosen, rejected, 1, source, models)


PAIRS = [
    pair("a", ("m", "m"), lengths=(2, 3)),
    pair("a", ("m", "n"), lengths=(5, 1)),
    pair("b", ("n", "m"), lengths=(4, 4)),
    pair("b", ("n", "n"), lengths=(2, 6)),
]
CHOSEN, REJECTED = np.array([1.0, 0.5, 2.0, -1.0]), np.array([0.0, 0.5, 1.0, 1.0])


def test_the_numbers_of_an_epoch() -> None:
    table = table_of(PAIRS, CHOSEN, REJECTED)
    assert table is not None
    assert table["accuracy"] == 0.5, "a tie counts as lost"
    assert table["accuracy_by_source"] == {"a": 0.5, "b": 0.5}
    assert table["accuracy_by_model"] == {"m": 1.0, "m + n": 0.5, "n": 0.0}
    assert (table["chosen_mean"], table["rejected_mean"], table["margin"]) == (0.625, 0.625, 0.0)
    scores = [*CHOSEN, *REJECTED]
    assert table["score_std"] == pytest.approx(np.std(scores)) and table["score_min"] == -1.0
    assert table["length_correlation"] == pytest.approx(np.corrcoef(scores, [2, 5, 4, 2, 3, 1, 4, 6])[0, 1])
    assert table["loss"] == pytest.approx(np.mean(-np.log(1 / (1 + np.exp(REJECTED - CHOSEN)))))
    losses = np.logaddexp(0, REJECTED - CHOSEN)
    assert table["loss_by_source"] == {"a": pytest.approx(losses[:2].mean()), "b": pytest.approx(losses[2:].mean())}
    assert table_of([], np.zeros(0), np.zeros(0)) is None
    lines = lines_of({"iteration": 3, "epoch": 1, "held_out": None, "training": table}, seconds=0.5)
    assert "epoch 1, step 3" in lines[0] and "50.00%" in lines[2] and "by model: m 100.00%" in lines[-1]


def test_scores_that_ppo_normalises_by_are_those_of_one_models_answers() -> None:
    stored = stored_scores(PAIRS, CHOSEN, REJECTED, model="m")
    assert stored == {"mean": pytest.approx(2.5 / 4), "std": pytest.approx(np.std([1.0, 0.5, 0.0, 1.0])),
                      "num_answers": 4, "model": "m"}  # fmt: skip
    assert stored_scores(PAIRS, CHOSEN, REJECTED, model=None)["num_answers"] == 8
    assert stored_scores(PAIRS, CHOSEN, REJECTED, model="other") == {}


def run_of(folder: Path, *epochs: dict[str, Any], band: str = "[-1, 1]") -> Path:
    """A reward run's folder with an evaluation and a checkpoint an epoch."""
    (folder / "run.yaml").write_text(
        "task: reward\nmodel: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, "
        f"vocab_size: 100}}\ndata: {{path: p.jsonl, tokenizer: t.model}}\nreward: {{score_band: {band}}}\n"
    )
    with (folder / "eval.jsonl").open("w") as stream:
        for number, epoch in enumerate(epochs, start=1):
            held_out = {"accuracy": 0.6, "loss": 0.6, "margin": 0.5, "score_mean": 0.1, "score_std": 0.5, **epoch}
            training = {"accuracy": held_out.pop("training", 0.65)}
            record = {"iteration": 10 * number, "epoch": number, "ends_epoch": True}
            stream.write(json.dumps({**record, "held_out": held_out, "training": training}) + "\n")
            checkpoint = folder / "checkpoints" / f"iter_{10 * number:07d}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "manifest.json").write_text("{}")
        stream.write('{"iteration": 1, "half')
    return folder


def selected(folder: Path) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, ["select", str(folder), "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_select_names_the_best_epoch_that_meets_the_criteria(tmp_path: Path) -> None:
    folder = run_of(
        tmp_path,
        {"accuracy": 0.55},
        {"accuracy": 0.63},
        {"accuracy": 0.66, "score_std": 1.2},
        {"accuracy": 0.64, "training": 0.9},
        {"accuracy": 0.65, "margin": -0.1},
        {"accuracy": 0.63, "margin": 0.6},
    )
    code, told = selected(folder)
    assert code == 0 and told["epoch"] == 6 and told["iteration"] == 60
    assert told["checkpoint"] == str(folder / "checkpoints" / "iter_0000060")
    problems = [" ".join(epoch["problems"]) for epoch in told["epochs"]]
    assert problems[0] == problems[1] == problems[5] == ""
    assert problems[2] == "scores from -1.100 to 1.300 (mean +- std) leave score_band [-1, 1]"
    assert problems[3].startswith("overfitted: 26.00% more accurate on training pairs")
    assert problems[4] == "margin -0.100 must exceed min_margin (0)"
    table = CliRunner().invoke(app, ["select", str(folder)])
    assert "<- selected" in table.stdout and table.stdout.splitlines()[-1] == f"ckpt:{told['checkpoint']}"


def test_of_epochs_that_are_alike_select_names_the_first(tmp_path: Path) -> None:
    assert selected(run_of(tmp_path, {"accuracy": 0.55}, {}, {}))[1]["epoch"] == 2


def test_select_takes_none_rather_than_a_bad_one(tmp_path: Path) -> None:
    code, told = selected(run_of(tmp_path, {"accuracy": 0.5}, {"loss": None}))
    assert code == 1 and told["epoch"] is None and len(told["epochs"]) == 2
    (tmp_path / "checkpoints" / "iter_0000010" / "manifest.json").unlink()
    assert "its checkpoint iter_0000010 is gone" in selected(tmp_path)[1]["epochs"][0]["problems"]


def test_a_wider_band_lets_a_toy_pass(tmp_path: Path) -> None:
    assert selected(run_of(tmp_path, {"score_std": 4.0}, band="[-6, 6]"))[0] == 0


def test_select_refuses_what_is_no_reward_run(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["select", str(tmp_path)]).exception.exit_code == 78  # type: ignore[union-attr]
    folder = run_of(tmp_path)
    assert "has no epoch yet" in str(CliRunner().invoke(app, ["select", str(folder)]).exception)


def test_select_writes_scores_that_are_not_finite_as_dashes(tmp_path: Path) -> None:
    nothing = {"loss": None, "margin": None, "score_mean": None, "score_std": None}
    result = CliRunner().invoke(app, ["select", str(run_of(tmp_path, nothing))])
    assert result.exit_code == 1 and "its scores are not finite" in result.output
    assert any(line.split() == ["1", "10", "60.00%", "65.00%", "-", "-", "-"] for line in result.output.splitlines())
