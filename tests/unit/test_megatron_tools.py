"""The tools under Megatron's names write what Megatron's builder writes."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from megatron_xy.data.indexed import IndexedReader, IndexedWriter
from megatron_xy.data.inspection.examine import verify_dataset
from tests.building import add_document, build_dataset, pieces_of
from tests.unit.small_corpus import texts, train_tokenizer, write_rows

TOOLS = Path(__file__).parents[2] / "tools"


def run(tool, *arguments):
    command = [sys.executable, TOOLS / f"{tool}.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    base = tmp_path_factory.mktemp("megatron")
    rows = [{"text": text, "title": text[:5]} for text in texts(50, seed=3)]
    return write_rows(base / "corpus.jsonl", rows), train_tokenizer(base / "tokenizer.model"), rows


@pytest.mark.parametrize("append_eod", [False, True])
def test_preprocess_data_writes_megatrons_bytes(corpus, tmp_path, append_eod):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    file, tokenizer, rows = corpus
    flags = ["--input", file, "--output-prefix", tmp_path / "ours", "--tokenizer-model", tokenizer]
    flags += ["--json-keys", "text", "--tokenizer-type", "SentencePieceTokenizer", "--workers", 1, "--partitions", 1]
    answer = run("preprocess_data", *flags, *(["--append-eod"] if append_eod else []))
    assert answer.returncode == 0, answer.stderr
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for row in rows:
        ids = processor.encode(row["text"]) + ([processor.eos_id()] if append_eod else [])
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        ours, theirs = tmp_path / f"ours_text_document.{suffix}", tmp_path / f"theirs.{suffix}"
        assert ours.read_bytes() == theirs.read_bytes()
    assert not list(tmp_path.glob(".tmp-*"))


def test_what_it_wrote_goes_into_data_build(corpus, tmp_path):
    file, tokenizer, rows = corpus
    flags = ["--input", file, "--output-prefix", tmp_path / "plain", "--tokenizer-model", tokenizer]
    assert run("preprocess_data", *flags).returncode == 0
    prefix = tmp_path / "plain_text_document.bin"
    stats = build_dataset([prefix], tokenizer=tokenizer, output=tmp_path / "data", buckets=[64, 128])
    assert stats["documents"] == len(rows)
    verify_dataset(tmp_path / "data")


def test_a_bad_line_leaves_nothing_behind(corpus, tmp_path):
    _, tokenizer, rows = corpus
    file = write_rows(tmp_path / "bad.jsonl", [rows[0], b"{", rows[1]])
    flags = ["--input", file, "--output-prefix", tmp_path / "out" / "ours", "--tokenizer-model", tokenizer]
    answer = run("preprocess_data", *flags)
    assert answer.returncode == 65 and "bad.jsonl:2" in answer.stderr
    assert not list((tmp_path / "out").iterdir())


def test_preprocess_data_takes_no_tokens_for_text(corpus, tmp_path):
    file, tokenizer, _ = corpus
    (tmp_path / "in").mkdir()
    shutil.copy(file, tmp_path / "in")
    flags = ["--input", tmp_path / "in", "--output-prefix", tmp_path / "in" / "out", "--tokenizer-model", tokenizer]
    assert run("preprocess_data", *flags).returncode == 0
    written = (tmp_path / "in" / "out_text_document.bin").read_bytes()
    again = run("preprocess_data", *flags)  # now its own output lies among what it is to read
    assert again.returncode == 78 and "out_text_document.bin) holds tokens, not text" in again.stderr
    assert (tmp_path / "in" / "out_text_document.bin").read_bytes() == written


def test_merge_datasets_joins_pairs_in_the_order_of_their_names(tmp_path):
    documents = {"b": [[[1, 2], [3]], [[4]]], "a": [[[5, 6, 7]], [[8], [9, 10]]]}
    for name, contents in documents.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        with IndexedWriter(tmp_path / "in" / name, dtype=np.uint16) as writer:
            for pieces in contents:
                add_document(writer, [np.array(piece) for piece in pieces])
    answer = run("merge_datasets", "--input", tmp_path / "in", "--output-prefix", tmp_path / "merged")
    assert answer.returncode == 0, answer.stderr
    reader = IndexedReader(tmp_path / "merged")
    merged = [[piece.tolist() for piece in pieces_of(reader, index)] for index in range(reader.num_documents)]
    assert merged == documents["a"] + documents["b"]
    assert run("merge_datasets", "--input", tmp_path / "none", "--output-prefix", tmp_path / "x").returncode == 78


def test_an_output_that_cannot_be_made_is_an_error_of_storage(corpus, tmp_path):
    file, tokenizer, _ = corpus
    (tmp_path / "in").mkdir()
    with IndexedWriter(tmp_path / "in" / "a", dtype=np.uint16) as writer:
        add_document(writer, [np.array([1, 2])])
    prompts, below = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "hello"}]), file / "below" / "x"
    for tool, *flags in (
        ("preprocess_data", "--input", file, "--output-prefix", below, "--tokenizer-model", tokenizer),
        ("merge_datasets", "--input", tmp_path / "in", "--output-prefix", below),
        ("build_prompts", "--new", prompts, "--output", below),
    ):
        answer = run(tool, *flags)
        assert answer.returncode == 74 and answer.stderr.splitlines()[-1].startswith("error (74): "), answer
        assert "Traceback" not in answer.stderr and str(below.parent) in answer.stderr


def test_build_dataset_is_data_build(corpus, tmp_path):
    file, tokenizer, rows = corpus
    flags = ["--input", file, "--tokenizer", tokenizer, "--output", tmp_path / "data", "--buckets", "64,128", "--json"]
    answer = run("build_dataset", *flags)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["documents"] == len(rows)


def test_preprocess_data_names_bad_lines_and_no_option_that_it_has_not(tmp_path, corpus):
    file = write_rows(tmp_path / "bad.jsonl", [{"text": "fox"}, b"{"])
    answer = run(
        "preprocess_data", "--input", file, "--output-prefix", tmp_path / "out", "--tokenizer-model", corpus[1]
    )
    assert answer.returncode == 65 and f"{file}:2: invalid JSON" in answer.stderr
    assert answer.stderr.endswith("1 bad line(s); mend them: nothing of this data set was written\n")
    assert not list(tmp_path.glob("out*"))


def test_the_comparison_with_datatrove_says_what_it_takes_and_needs():
    helped = run("datatrove_tokenize", "--help")
    assert helped.returncode == 0 and "inputs tokenizer output workers" in helped.stdout
    ended = run("datatrove_tokenize", "none", "none", "none", 1)
    assert find_spec("datatrove") or (ended.returncode == 78 and "has no datatrove; pip install" in ended.stderr)
