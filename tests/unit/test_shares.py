"""One data set built in shares: byte for byte what one build makes, whoever comes last finishes."""

import fcntl
import importlib.util
import json

import pytest

from megatron_xy.data.building.options import Share
from megatron_xy.data.building.work_folder import WORK_FOLDER
from megatron_xy.errors import ConfigError, UsageError
from tests.building import build_dataset
from tests.unit.small_corpus import content, texts, train_tokenizer

BUCKETS = [64, 128]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    base = tmp_path_factory.mktemp("shares")
    for name in ("a", "b"):  # two files of their own parts, so that there are several token shards
        rows = [json.dumps({"text": text}) for text in texts(40, seed=len(name) + ord(name))]
        (base / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return base, train_tokenizer(base / "tokenizer.model")


def build(corpus, output, monkeypatch, **options):
    base, tokenizer = corpus
    monkeypatch.setattr("megatron_xy.data.corpus.inputs.PART_BYTES", 1000)  # several shards of a small corpus
    inputs = [base / "a.jsonl", base / "b.jsonl"]
    return build_dataset(inputs, tokenizer=tokenizer, output=output, buckets=BUCKETS, **options)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shares_in_any_order_make_the_same_bytes(corpus, tmp_path, monkeypatch, order):
    whole = build(corpus, tmp_path / "whole", monkeypatch)
    results = [build(corpus, tmp_path / "shared", monkeypatch, shard=Share(index, 3)) for index in order]
    assert [result["finished"] for result in results] == [False, False, True]
    assert 0 < results[1]["missing"] < results[0]["missing"]
    assert results[2]["documents"] == whole["documents"]
    assert content(tmp_path / "shared") == content(tmp_path / "whole")
    again = build(corpus, tmp_path / "shared", monkeypatch, shard=Share(0, 3))
    assert again["finished"] and again["reused"]


def test_shares_of_another_data_set_are_refused_while_one_is_at_work(corpus, tmp_path, monkeypatch):
    build(corpus, tmp_path / "data", monkeypatch, shard=Share(0, 2))
    with (tmp_path / "data" / WORK_FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with pytest.raises(ConfigError, match="other inputs or options"):
            build(corpus, tmp_path / "data", monkeypatch, shard=Share(1, 2), append_eod=True)


@pytest.mark.parametrize(("text", "share"), [("0/4", (0, 4)), ("3/4", (3, 4)), ("4/4", (0, 4)), ("1/1", (0, 1))])
def test_a_share_is_named_counting_from_0_or_from_1(text, share):
    assert Share.parse(text) == Share(*share)


@pytest.mark.parametrize("text", ["5/4", "a/4", "1", "1/0", "-1/4", "²/4", ""])
def test_a_share_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="must be I/N"):
        Share.parse(text)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_it_is_said_what_to_install(corpus, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"Ray is not installed; pip install 'megatron-xy\[ray\]'"):
        build(corpus, tmp_path / "data", monkeypatch, executor="ray")
