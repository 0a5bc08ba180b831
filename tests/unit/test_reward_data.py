"""Preference pairs as data: rows and what is wrong with them, the split by prompt, the order of the steps."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xy.config import RewardConfig, RunConfig, RuntimeConfig
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.preflight import check_paths, open_pairs
from megatron_xy.reward.batches import PairOrder, compared_columns, pair_micro_batches
from megatron_xy.reward.pairs import PairData, _asked, load_pairs
from megatron_xy.reward.split import clusters_of, split_by_cluster
from tests.unit.small_corpus import train_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from toy_preferences import make, write_rows

EOS = 66
GOOD = {"prompt": "red bapo", "chosen": "red red", "rejected": "red blue"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    make(folder, num_pairs=200, num_test_pairs=20)
    return folder


def config_of(toy: Path, rows: list[dict[str, Any]] | None = None, **reward: Any) -> RunConfig:
    path = toy / "train.jsonl"
    if rows is not None:
        path = toy / "rows.jsonl"
        write_rows(path, rows)
    return RunConfig.model_validate(
        {
            "task": "reward",
            "model": {"max_position_embeddings": 32, "vocab_size": 67},
            "data": {"path": str(path), "tokenizer": str(toy / "tokenizer.json")},
            "training": {"micro_batch_tokens": 48},
            "reward": {"test_fraction": 0.0, **reward},
        }
    )


def test_a_row_becomes_token_ids_with_the_tokenizers_own_end(toy: Path) -> None:
    row = {**GOOD, "grade": "B3", "source": "s", "model": {"chosen": "m", "rejected": "n"}}
    (pair,) = load_pairs(config_of(toy, [row])).training
    names = json.loads((toy / "tokenizer.json").read_text())
    ids = {**names["model"]["vocab"], **{token["content"]: token["id"] for token in names["added_tokens"]}}
    assert pair.prompt.tolist() == [ids["<s>"], ids["red"], ids["bapo"]]
    assert pair.chosen.tolist() == [ids["red"], ids["red"], ids["</s>"]]
    assert pair.rejected.tolist() == [ids["red"], ids["blue"], ids["</s>"]]
    assert (pair.strength, pair.source, pair.models) == (3, "s", ("m", "n"))
    assert pair.where.endswith("rows.jsonl:1") and pair.num_tokens == 12


def test_pairs_without_a_clear_preference_are_dropped_and_counted(toy: Path) -> None:
    data = load_pairs(config_of(toy, [{**GOOD, "grade": grade} for grade in ("A3", "A0", "B0", "B1")]))
    assert [pair.strength for pair in data.training] == [3, 1]
    assert data.notes == ["2 pairs without a clear preference (A0, B0) are dropped"]
    unfit = {"chosen": "red " * 29, "rejected": "red " * 29, "grade": "A0"}
    assert len(load_pairs(config_of(toy, [GOOD, {**GOOD, **unfit}])).training) == 1
    with pytest.raises(DataError, match="rejected is missing or no string"):
        load_pairs(config_of(toy, [GOOD, {**GOOD, "grade": "A0", "rejected": None}]))


BAD = [
    ({"rejected": "red red"}, "chosen and rejected are the same"),
    ({"chosen": "  "}, "chosen is an empty answer"),
    ({"rejected": None}, "rejected is missing or no string"),
    ({"prompt": ""}, "prompt is missing, empty or neither a string nor messages"),
    ({"prompt": [{"role": "robot", "content": "x"}]}, "prompt: message 1: unknown role 'robot'"),
    ({"prompt": [{"role": "user", "content": "x"}]}, "no chat template renders them"),
    ({"grade": "C1"}, "grade (C1) must be one of"),
    ({"source": 3}, "source is no name"),
    ({"chosen": "red " * 29}, "prompt and answer have 33 tokens, must have at most model.max_position_embeddings (32)"),
    ({"chosen": "red " * 20, "rejected": "blue " * 22}, "the pair has 50 tokens, must have at most"),
]


def test_all_bad_rows_are_named_with_file_and_line(toy: Path) -> None:
    config = config_of(toy, [GOOD, *({**GOOD, **change} for change, _ in BAD)])
    with pytest.raises(DataError) as caught:
        load_pairs(config)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(BAD)
    for number, (line, (_, text)) in enumerate(zip(lines, BAD, strict=True), start=2):
        assert line.startswith(f"{toy / 'rows.jsonl'}:{number}: ") and text in line


def test_pairs_that_just_fit_are_taken(toy: Path) -> None:
    """Of 32 tokens with one answer, and of 48 with both."""
    fit = [{"chosen": "red " * 28}, {"chosen": "red " * 20, "rejected": "blue " * 20}]
    pairs = load_pairs(config_of(toy, [{**GOOD, **change} for change in fit])).training
    assert len(pairs[0].prompt) + len(pairs[0].chosen) == 32 and pairs[1].num_tokens == 48


def test_what_cannot_be_trained_on_is_refused(toy: Path) -> None:
    config = config_of(toy)
    gone = config.model_copy(update={"data": config.data.model_copy(update={"path": toy / "gone.jsonl"})})
    with pytest.raises(ConfigError, match=r"data.path \(.*gone.jsonl\): there is no such file"):
        load_pairs(gone)
    small = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 60})})
    with pytest.raises(ConfigError, match=r"model.vocab_size \(60\) is smaller than data.tokenizer's \(67"):
        open_pairs(small)
    tokenizer = train_tokenizer(toy / "squeezed.model", remove_extra_whitespaces=True)
    changes = {"data": {"tokenizer": tokenizer}, "model": {"vocab_size": 300}, "checkpoint": {"hf_interval": 50}}
    sections = {name: getattr(config, name).model_copy(update=change) for name, change in changes.items()}
    squeezed = config.model_copy(update=sections)
    with pytest.raises(ConfigError, match=r"checkpoint\.hf_interval \(50\): no HF folder can be made"):
        open_pairs(squeezed)
    with pytest.raises(DataError, match="leaves no prompt to hold out"):
        load_pairs(config_of(toy, [GOOD, GOOD], test_fraction=0.5))


def test_check_says_that_a_board_is_not_installed(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = config_of(toy)
    shape = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1}
    config = config.model_copy(update={"model": config.model.model_copy(update=shape), "run_dir": toy / "run"})
    check_paths(config)
    config = config.model_copy(update={"runtime": RuntimeConfig(wandb_project="mine")})
    with pytest.raises(ConfigError, match=r"runtime\.wandb_project \(mine\): wandb is not installed"):
        check_paths(config)


def test_a_tenth_is_held_out_by_prompt(toy: Path) -> None:
    rows = [json.loads(line) for line in (toy / "train.jsonl").read_text().splitlines()]
    twice = [{**row, "chosen": row["chosen"] + " white"} for row in rows[:50]]
    data = load_pairs(config_of(toy, [*rows, *twice], test_fraction=0.1))
    assert 20 <= len(data.held_out) <= 25 and len(data.training) + len(data.held_out) == 250
    assert not {pair.text for pair in data.held_out} & {pair.text for pair in data.training}
    again = load_pairs(config_of(toy, [*reversed(twice), *reversed(rows)], test_fraction=0.1))
    assert {pair.text for pair in again.held_out} == {pair.text for pair in data.held_out}


def test_training_pairs_with_a_held_out_prompt_are_left_out(toy: Path) -> None:
    held_out = [json.loads(line) for line in (toy / "held_out.jsonl").read_text().splitlines()]
    config = config_of(toy, [GOOD, {**GOOD, "prompt": f"  {held_out[3]['prompt'].upper()}!"}])
    data = config.data.model_copy(update={"eval_path": toy / "held_out.jsonl"})
    pairs: PairData = load_pairs(config.model_copy(update={"data": data}))
    assert [pair.text for pair in pairs.training] == [GOOD["prompt"]] and len(pairs.held_out) == 20
    assert pairs.notes == ["1 pairs are left out: their prompt, or one like it, is held out"]


def test_prompts_that_differ_in_little_are_one() -> None:
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnop", k=6)) for _ in range(400)]
    long_ones = [" ".join(chance.choices(words, k=30)) for _ in range(60)]
    nearly = [text.replace(text.split()[7], "other", 1) for text in long_ones]
    again = [f"{text.title()} ?!" for text in long_ones]
    clusters = clusters_of([*long_ones, *nearly, *again])
    assert clusters[:60] == list(range(60))
    assert clusters[60:120] == clusters[120:] == clusters[:60]


def test_prompts_that_differ_are_kept_apart() -> None:
    texts = ["What is 2+3?", "What is 2+4?", "What is 23?", "什么是股票?", "什么是债券?", "?!", "!?", ""]
    assert clusters_of(texts) == list(range(len(texts)))
    assert clusters_of(["什么是股票?", "什么是股票", "2 + 3", "2+3"]) == [0, 0, 2, 2]
    assert clusters_of([]) == []


@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.floats(0, 0.9))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_a_split_keeps_clusters_whole_and_stays_within_its_fraction(numbers: list[int], fraction: float) -> None:
    clusters = [numbers.index(number) for number in numbers]
    is_held_out = split_by_cluster(clusters, [f"text {number}" for number in numbers], fraction=fraction)
    room = round(fraction * len(numbers)) - sum(is_held_out)
    assert room >= 0
    for cluster in set(clusters):
        assert is_held_out[cluster] or clusters.count(cluster) > room, "what would still fit is held out, too"
        assert len({out for out, mine in zip(is_held_out, clusters, strict=True) if mine == cluster}) == 1


@given(st.lists(st.integers(4, 30), min_size=1, max_size=40), st.integers(20, 90), st.integers(0, 5))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_an_epoch_takes_every_pair_once_in_steps_within_the_budget(lengths: list[int], budget: int, seed: int) -> None:
    order = PairOrder(lengths, seed=seed, global_batch_tokens=budget)
    step = epoch = before = 0
    while epoch < 3:
        taken: list[int] = []
        while True:
            now = order.step(step)
            assert now.epoch == epoch and now.pairs
            tokens = sum(lengths[pair] for pair in now.pairs)
            assert tokens <= budget or len(now.pairs) == 1
            if taken:
                assert before + lengths[now.pairs[0]] > budget, "a step takes as many as fit"
            before = tokens
            taken += now.pairs
            step += 1
            if now.ends_epoch:
                break
        assert sorted(taken) == list(range(len(lengths)))
        epoch += 1
        assert order.num_steps(epoch) == step
    fresh = PairOrder(lengths, seed=seed, global_batch_tokens=budget)
    assert [fresh.step(number) for number in reversed(range(step))] == [
        order.step(number) for number in reversed(range(step))
    ], "a function of the step alone"


def test_epochs_differ_in_their_order() -> None:
    order = PairOrder([4] * 50, seed=0, global_batch_tokens=1000)
    assert order.step(0).pairs != order.step(1).pairs != order.step(2).pairs


def test_places_at_which_a_pair_is_compared(toy: Path) -> None:
    row = {"prompt": "red", "chosen": "red red blue red", "rejected": "red red white"}
    (pair,) = load_pairs(config_of(toy, [row])).training
    assert compared_columns(pair, loss="token").tolist() == [2, 3, 4]
    assert compared_columns(pair, loss="sentence").tolist() == [4]
    (batch,) = pair_micro_batches(
        [pair], source_ids=[0], width=32, reward=RewardConfig(margin_scale=0.5), dp_size=1, dp_rank=0
    )
    assert batch.pairs is not None
    # The prompt has 2 tokens, the chosen answer 5, the rejected one 4, whose end stands for what is behind it.
    assert batch.pairs.chosen.tolist() == [4, 5, 6]
    assert batch.pairs.rejected.tolist() == [11, 12, 12]
    assert batch.tokens[6] == batch.tokens[12] == pair.chosen[-1] == pair.rejected[-1]
    assert batch.pairs.weights.tolist() == pytest.approx([1 / 3] * 3) and batch.pairs.margins.tolist() == [0.5]


def test_a_model_whose_scores_are_kept_is_one_of_the_measured_pairs(toy: Path) -> None:
    rows = [{**GOOD, "model": {"chosen": "small", "rejected": "large"}}]
    assert load_pairs(config_of(toy, rows, stored_scores_of="large")).training
    with pytest.raises(
        ConfigError, match=r"_of \(nobody\): no pair has an answer of that model, only of large, small;"
    ):
        load_pairs(config_of(toy, rows, stored_scores_of="nobody"))
    config = config_of(toy, rows, stored_scores_of="large")
    write_rows(toy / "measured.jsonl", [{**GOOD, "prompt": "blue", "model": "small"}])
    data = config.data.model_copy(update={"eval_path": toy / "measured.jsonl"})
    with pytest.raises(ConfigError, match=r"no held-out pair has .* only of small; name one"):
        load_pairs(config.model_copy(update={"data": data}))


def test_a_fingerprint_names_the_key_that_changes_what_is_drawn(toy: Path) -> None:
    def prints(test_fraction: float, **data: Any) -> dict[str, Any]:
        config = config_of(toy, test_fraction=test_fraction)
        config = config.model_copy(update={"data": config.data.model_copy(update=data)})
        return load_pairs(config).fingerprints

    def changed(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
        return {name for name in one.keys() & other.keys() if one[name] != other[name]}

    held_out = {"eval_path": toy / "held_out.jsonl"}
    assert changed(prints(0.1), prints(0.2)) == {"reward.test_fraction"}
    assert prints(0.1, **held_out) == prints(0.2, **held_out), "that key is then not read"
    assert changed(prints(0.1), prints(0.1, **held_out)) == {"data.eval_path"}
    assert changed(prints(0.1), prints(0.1, chat_template="xuanyuan")) == {"data.chat_template"}


def test_a_system_text_that_all_prompts_share_makes_no_two_alike() -> None:
    system = {"role": "system", "content": "You are a careful assistant that answers questions about money. " * 3}
    questions = ["What is a bond?", "How do I pay taxes abroad?", "Name three banks of Peru.", "Why do prices rise?"]
    texts = [_asked([system, {"role": "user", "content": question}]) for question in questions]
    assert clusters_of(texts) == [0, 1, 2, 3]
    assert _asked([system]) == system["content"]
