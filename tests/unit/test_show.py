"""Samples shown as text: borders, colours, what is masked."""

import json

import pytest

from megatron_xy.data.inspection.show import shown_samples
from megatron_xy.errors import ConfigError
from tests.building import build_dataset
from tests.unit.small_corpus import train_tokenizer

TEXTS = ["the first document is here", "a second one", "and a third"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("show")
    tokenizer = train_tokenizer(base / "tokenizer.model")
    (base / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    build_dataset([base / "corpus.jsonl"], tokenizer=tokenizer, output=base / "data", buckets=[256], append_eod=True)
    return base / "data"


def test_a_sample_shows_its_documents_and_where_they_end(folder):
    (sample,) = shown_samples(folder, source=None, bucket=None, index=0, count=5)
    text = sample.coloured
    assert sample.heading.startswith("source default, bucket 256, sample 0: 3 piece(s)")
    assert sample.plain == text.plain
    pieces = text.plain.split(" ┃ ")
    assert sorted(piece.removesuffix("</s>") for piece in pieces) == sorted(TEXTS)
    masked = [text.plain[span.start : span.end] for span in text.spans if "reverse" in str(span.style)]
    assert masked == ["</s>"] * 3


def test_control_characters_stay_in_the_plain_text_and_keep_out_of_the_terminal(folder, tmp_path):
    strange = "a bell \x07, a backspace \x08 and\x1b[31m red\x0b\r\n"
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": strange}) + "\n")
    tokenizer = folder / "tokenizer.model"
    build_dataset([tmp_path / "corpus.jsonl"], tokenizer=tokenizer, output=tmp_path / "data", buckets=[256])
    (sample,) = shown_samples(tmp_path / "data", source=None, bucket=None, index=0, count=1)
    assert sample.plain == strange
    assert sample.coloured.plain == "a bell , a backspace  and[31m red\n"


def test_what_is_not_there_is_refused_with_what_is(folder):
    with pytest.raises(ConfigError, match="there are sources default and buckets 256"):
        list(shown_samples(folder, source="other", bucket=None, index=0, count=1))
    with pytest.raises(ConfigError, match=r"--index \(7\): source default has 1 sample"):
        list(shown_samples(folder, source=None, bucket=256, index=7, count=1))
