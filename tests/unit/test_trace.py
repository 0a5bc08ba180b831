"""Every piece of every sample is traced to the line it stands in, and a data step to its lines."""

import gzip
import json
import os

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_xy.cli import app
from megatron_xy.config import load_config
from megatron_xy.data.dataset import PackedDataset
from megatron_xy.data.draws.phases import run_sampler
from megatron_xy.data.draws.sampler import SampleId
from megatron_xy.data.encoding.tokenizer import load_tokenizer
from megatron_xy.data.indexed import IndexedWriter
from megatron_xy.data.inspection.examine import verify_dataset
from megatron_xy.data.inspection.plan_steps import plan_steps, trace_steps
from megatron_xy.data.manifest import read_manifest
from megatron_xy.data.origins import TracedWriter, document_rows, read_rows, trace_path
from megatron_xy.errors import ConfigError, DataError, UsageError
from tests.building import add_document, build_dataset
from tests.unit.small_corpus import texts, train_tokenizer, write_rows

BUCKETS = (16, 64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "fox.model")


@pytest.fixture
def corpus(tmp_path, tokenizer):
    """({(file, line): text}, folder) of a corpus of every kind but Parquet, with empty texts, blank and bad lines."""
    folder, expected = tmp_path / "corpus", {}
    folder.mkdir()

    def lines(path, seed):
        rows = [{"text": text, "src": "ab"[n % 2]} for n, text in enumerate(texts(80, seed=seed))]
        rows[10:10] = [{"text": "", "src": "a"}, b"", b"{"]
        for line, row in enumerate(rows, start=1):
            if isinstance(row, dict) and row["text"]:
                expected[str(path), line] = row["text"]
        return rows

    write_rows(folder / "a.jsonl", lines(folder / "a.jsonl", 0))
    packed = write_rows(tmp_path / "plain", lines(folder / "b.jsonl.gz", 1)).read_bytes()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(packed))
    (folder / "c.txt").write_text("the lazy dog\nthe quick fox\n" * 20)
    expected[str(folder / "c.txt"), 1] = (folder / "c.txt").read_text()
    with IndexedWriter(folder / "d", dtype="u2") as writer:
        for number, text in enumerate(["", *texts(50, seed=2)], start=1):
            ids = load_tokenizer(tokenizer).encode(text)
            add_document(writer, np.array_split(ids.astype("u2"), 2))
            if text:
                expected[str(folder / "d.bin"), number] = text
    return expected, folder


def run(corpus, tokenizer, output, **options):
    return build_dataset(
        [corpus],
        tokenizer=tokenizer,
        output=output,
        buckets=BUCKETS,
        source_field="src",
        bad_lines="skip",
        **options,
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_every_piece_is_the_named_part_of_the_named_line(corpus, tokenizer, tmp_path, monkeypatch, workers):
    if workers == 1:  # many shards and windows
        monkeypatch.setattr("megatron_xy.data.corpus.inputs.PART_BYTES", 2000)
        monkeypatch.setattr("megatron_xy.data.building.build_folder.WINDOW_DOCUMENTS", 30)
    expected, folder = corpus
    run(folder, tokenizer, tmp_path / "out", workers=workers)
    verify_dataset(tmp_path / "out")
    encode = load_tokenizer(tokenizer).encode
    dataset = PackedDataset([tmp_path / "out"])
    covered = dict.fromkeys(expected, 0)
    for stream in dataset.streams:
        for index in range(stream.num_samples):
            sample = dataset.sample(SampleId(stream.source, stream.bucket, index))
            documents = dataset.documents(SampleId(stream.source, stream.bucket, index))
            pieces = np.split(sample.tokens, np.cumsum(sample.piece_lengths)[:-1])
            for document, piece in zip(documents, pieces, strict=True):
                place, start = (document["file"], document["line"]), document["start"]
                assert encode(expected[place])[start : start + document["length"]].tolist() == piece.tolist()
                covered[place] += document["length"]
    assert covered == {place: len(encode(text)) for place, text in expected.items()}
    with pytest.raises(IndexError, match="sample 10000 of"):
        dataset.documents(SampleId("a", 16, 10_000))


def write_config(tmp_path):
    config = tmp_path / "run.yaml"
    text = {
        "task": "pretrain",
        "run_dir": str(tmp_path / "run"),
        "model": {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "vocab_size": 300},
        "data": {"path": str(tmp_path / "out"), "weights": {"a": 1, "b": 2, "default": 1}},
        "training": {"train_iters": 10, "global_batch_tokens": 256, "micro_batch_tokens": 64},
    }
    config.write_text(json.dumps(text))
    return config


@pytest.mark.parametrize("steps", ["²:3", "0:³", "3", "a:b"])
def test_steps_are_numbers(steps):
    with pytest.raises(UsageError, match="must be A:B"):
        CliRunner().invoke(app, ["data", "trace", "x", "--config", "x", "--steps", steps], catch_exceptions=False)


def test_steps_are_traced_as_they_are_planned(corpus, tokenizer, tmp_path):
    _, folder = corpus
    run(folder, tokenizer, tmp_path / "out")
    config = write_config(tmp_path)
    asked = {"config_path": config, "overrides": ["seed=7"], "steps": range(3, 9)}
    rows = list(trace_steps(tmp_path / "out", **asked))
    planned = plan_steps(tmp_path / "out", **asked, data_parallel_size=1, data_parallel_rank=0)
    dataset = PackedDataset([tmp_path / "out"])
    assert rows == [
        {
            **{key: row[key] for key in ("data_step", "bucket", "source")},
            "sample": index,
            "documents": dataset.documents(SampleId(row["source"], row["bucket"], index)),
        }
        for row in planned
        for index in row["samples"]
    ]
    assert {row["data_step"] for row in rows} == set(range(3, 9)) and json.dumps(rows)


def test_steps_of_a_run_over_several_folders_are_those_of_all_joined(corpus, tokenizer, tmp_path, capsys):
    expected, folder = corpus
    out, more = tmp_path / "out", tmp_path / "more"
    run(folder, tokenizer, out)
    rows = [{"text": text, "src": "ab"[number % 2]} for number, text in enumerate(texts(80, seed=3))]
    path = write_rows(tmp_path / "more.jsonl", rows)
    run(path, tokenizer, more)
    expected |= {(str(path), line): row["text"] for line, row in enumerate(rows, start=1)}
    paths = f"data.path=[{out}, {more}]"
    asked = {"config_path": write_config(tmp_path), "overrides": [paths], "steps": range(6)}
    config = load_config(asked["config_path"], overrides=[paths])
    dataset, encode = PackedDataset([out, more]), load_tokenizer(tokenizer).encode
    sampler = run_sampler(config, dataset.streams)
    drawn = {(step, sample) for step in asked["steps"] for sample in sampler.batch(step).samples}
    capsys.readouterr()
    traced = list(trace_steps(more, **asked))
    assert {(r["data_step"], SampleId(r["source"], r["bucket"], r["sample"])) for r in traced} == drawn
    for row in traced:
        sample = dataset.sample(SampleId(row["source"], row["bucket"], row["sample"]))
        pieces = np.split(sample.tokens, np.cumsum(sample.piece_lengths)[:-1])
        for document, piece in zip(row["documents"], pieces, strict=True):
            start, text = document["start"], expected[document["file"], document["line"]]
            assert encode(text)[start : start + document["length"]].tolist() == piece.tolist()
    assert {document["file"] for row in traced for document in row["documents"]} > {str(path)}
    assert capsys.readouterr().err == ""

    alone = asked | {"data_parallel_size": 1, "data_parallel_rank": 0}
    assert list(
        plan_steps(more, **alone | {"overrides": ["data.weights=null"]})
    )  # in place of the one that the config names
    assert f"data.path ({out}) is another folder" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"DIR \(.*corpus\) is none of data.path \(.*out, .*more\)"):
        list(plan_steps(folder, **alone))
    conversations = [f"data.path=[{out}, chat.jsonl]", "task=sft", f"data.tokenizer={tokenizer}"]
    with pytest.raises(ConfigError, match=r"and chat\.jsonl is no folder; put what the run built of it"):
        list(plan_steps(out, **alone | {"overrides": conversations}))


def test_rows_are_mapped_so_that_the_last_one_is_as_near_as_the_first(tmp_path):
    count = 1000
    prefix = tmp_path / "shard"
    with TracedWriter(prefix, dtype="u2") as writer:
        writer.add_documents(np.zeros(count, dtype="u2"), lengths=np.ones(count, dtype="i4"))
        writer.add_rows(document_rows(np.zeros(count, dtype="i4"), np.arange(count)))
    rows = read_rows(prefix, num_sequences=count)
    assert isinstance(rows, np.memmap) and rows[count - 1]["line"] == count - 1


def test_a_damaged_trace_is_refused(corpus, tokenizer, tmp_path):
    _, folder = corpus
    run(folder, tokenizer, tmp_path / "out")
    shard = read_manifest(tmp_path / "out").sources["a"].buckets["16"].shards[0].name
    path = trace_path(tmp_path / "out" / shard)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(DataError, match=r"\.trace is damaged: its checksum"):
        verify_dataset(tmp_path / "out")
    os.truncate(path, len(whole) - 16)
    for refused in (verify_dataset, lambda out: PackedDataset([out]).documents(SampleId("a", 16, 0))):
        with pytest.raises(DataError, match=r"\.trace has \d+ bytes"):
            refused(tmp_path / "out")
    path.unlink()
    with pytest.raises(DataError, match=r"\.trace is missing"):
        PackedDataset([tmp_path / "out"]).documents(SampleId("a", 16, 0))


def test_nothing_stays_of_a_writer_that_fails(tmp_path):
    with pytest.raises(RuntimeError), TracedWriter(tmp_path / "shard", dtype="u2"):
        raise RuntimeError
    unequal = pytest.raises(AssertionError, match="every sequence has its row")
    with unequal, TracedWriter(tmp_path / "shard", dtype="u2") as writer:
        writer.add_documents(np.zeros(3, dtype="u2"), lengths=np.array([3]))
    unequal = pytest.raises(AssertionError, match="every token has its mask")
    with unequal, TracedWriter(tmp_path / "shard", dtype="u2", masked=True) as writer:
        writer.add_documents(np.zeros(3, dtype="u2"), lengths=np.array([3]))
        writer.add_rows(document_rows([0], [1]))
        writer.add_mask(np.ones(2, dtype=bool))
    assert not list(tmp_path.iterdir())
