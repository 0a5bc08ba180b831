"""Document lengths and fixed-length alternatives against definitions written out; the pictures of a data folder."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xy.data.alternatives import BIN_STARTS, fixed_length_alternatives, profile_lengths
from megatron_xy.data.build import build_dataset
from megatron_xy.data.manifest import read_manifest, write_manifest
from megatron_xy.data.pictures import draw_statistics
from megatron_xy.errors import ConfigError
from tests.unit.small_corpus import texts, train_tokenizer, write_rows

BUCKETS = (16, 64)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40), cut=st.integers(0, 40))
def test_profile_is_the_definition_token_by_token(lengths, cut):
    blocks = [np.array(part, dtype=np.int32) for part in (lengths[:cut], lengths[cut:])]
    profile = profile_lengths(blocks, sizes=[1, 7, 64])
    owners = np.repeat(np.arange(len(lengths)), lengths)
    for size in (1, 7, 64):
        samples = [owners[start : start + size] for start in range(0, len(owners), size)]
        pieces = np.bincount([owner for sample in samples for owner in np.unique(sample)], minlength=len(lengths))
        entry = profile.fixed_length[str(size)]
        assert (entry.samples, entry.truncated_documents) == (len(samples), int((pieces > 1).sum()))
    assert profile.longest == max(lengths)
    bins = {}
    for length in lengths:
        start = max(int(start) for start in BIN_STARTS if start <= length)
        bins[str(start)] = bins.get(str(start), 0) + 1
    assert profile.histogram == bins


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics")
    rows = [{"text": text, "src": "ab"[n % 2]} for n, text in enumerate(texts(200))]
    corpus = write_rows(folder / "a.jsonl", rows)
    tokenizer = train_tokenizer(folder / "fox.model")
    build_dataset([corpus], tokenizer=tokenizer, output=folder / "out", buckets=BUCKETS, source_field="src")
    return folder / "out"


def test_alternatives_cover_the_same_tokens_and_documents(output):
    manifest = read_manifest(output)
    alternatives = fixed_length_alternatives(manifest)
    assert list(alternatives) == ["16", "64"]
    for size, entry in alternatives.items():
        assert entry["samples"] * int(size) * (1 - entry["padding_ratio"]) == pytest.approx(manifest.statistics.tokens)
        assert entry["samples"] * entry["concatenation_ratio"] == pytest.approx(manifest.statistics.documents)
    assert alternatives["64"]["truncation_ratio"] > manifest.statistics.truncation_ratio > 0


def test_pictures_are_drawn_or_refused(output, tmp_path):
    paths = draw_statistics(output, tmp_path / "pictures")
    assert [path.name for path in paths] == ["document_lengths.png", "buckets.png", "ratios.png"]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == sorted(path.name for path in paths)
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    manifest = read_manifest(output)
    sources = {name: source.model_copy(update={"lengths": None}) for name, source in manifest.sources.items()}
    (tmp_path / "old").mkdir()
    write_manifest(tmp_path / "old", manifest.model_copy(update={"sources": sources}))
    assert fixed_length_alternatives(read_manifest(tmp_path / "old")) == {}
    with pytest.raises(ConfigError, match="built without its documents' lengths"):
        draw_statistics(tmp_path / "old", tmp_path / "pictures")
