"""Document lengths and fixed-length alternatives against definitions written out; the pictures of a data folder."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xy.cli.data import _show_stats, data_stats
from megatron_xy.data.inspection import progress
from megatron_xy.data.inspection.alternatives import BIN_STARTS, fixed_length_alternatives, profile_lengths
from megatron_xy.data.inspection.examine import dataset_stats, verify_dataset
from megatron_xy.data.inspection.pictures import draw_statistics
from megatron_xy.data.inspection.progress import left_out
from megatron_xy.data.inspection.show import shown_samples
from megatron_xy.data.manifest import read_manifest, write_manifest
from megatron_xy.errors import ConfigError
from tests.building import build_dataset
from tests.unit.small_corpus import texts, train_tokenizer, write_rows

BUCKETS = (16, 64)
NAME = "\u91d1\u878d-\u00e9.2"


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
    rows = [{"text": text, "src": ("a", NAME)[n % 2]} for n, text in enumerate(texts(200))]
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


def test_a_source_has_a_name_of_any_script(output, tmp_path):
    assert list(read_manifest(output).sources) == ["a", NAME] and (output / NAME).is_dir()
    verify_dataset(output)
    (sample,) = shown_samples(output, source=NAME, bucket=16, index=0, count=1)
    assert f"source {NAME}, " in sample.heading
    longest = "\u91d1" * 66 + "ab"  # of 200 bytes
    corpus = write_rows(tmp_path / "a.jsonl", [{"text": "the fox", "src": longest}])
    tokenizer = output / "tokenizer.model"
    build_dataset([corpus], tokenizer=tokenizer, output=tmp_path / "out", buckets=BUCKETS, source_field="src")
    verify_dataset(tmp_path / "out")


@pytest.mark.filterwarnings("error")  # of a name that no font can spell
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


def test_a_phase_that_comes_again_has_a_clock_of_its_own(monkeypatch, capsys):
    now = iter([0, 10, 100, 110])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.showing_progress() as show:
        for done in (0, 100, 0, 50):
            show("tokenize", done, 100, "bytes")
    lines = capsys.readouterr().err.splitlines()
    assert "100/100 bytes (100%), 10 bytes/s" in lines[1] and "50/100 bytes (50%), 5 bytes/s, ETA 10 s" in lines[3]


def test_nothing_that_is_left_out_goes_untold(tmp_path, output, capsys):
    some = texts(200)
    rows = [{"text": text} for text in ["", *some, *some[:9]]]
    corpus = write_rows(tmp_path / "a.jsonl", [*rows, b"{", {"text": 1}])
    tokenizer, out = output.parent / "fox.model", tmp_path / "out"
    options = {"bad_lines": "skip", "overflow": "drop", "deduplicate": True, "held_out": 0.1, "buckets": (16, 64)}
    stats = build_dataset([corpus], tokenizer=tokenizer, output=out, **options)
    counts = ("documents", "dropped_documents", "held_out_documents", "duplicates", "skipped_empty")
    of_held_out = read_manifest(out / "held_out").statistics.duplicates
    assert all(stats[key] for key in counts) and sum(stats[key] for key in counts) + of_held_out == len(rows)
    told = [
        f"2 bad lines left out, of 212; listed in {out}/bad_lines.txt",
        "1 documents without text left out",
        f"{stats['duplicates']} duplicate documents left out",
        f"{stats['held_out_documents']} documents held out, in {out}/held_out",
        f"{stats['dropped_documents']} documents dropped, longer than the largest bucket",
        f"{stats['tokens_lost']:,} tokens lost, of dropped documents and of what was cut off",
    ]
    assert left_out(stats, directory=out) == told
    data_stats(out, as_json=False)
    assert capsys.readouterr().out.splitlines()[-6:] == told
    data_stats(out, as_json=True)
    printed = capsys.readouterr()
    assert json.loads(printed.out)["bad_lines"] == 2 and printed.err.splitlines() == ["; ".join(told)]
    cut = dataset_stats(output)
    count = sum(source.truncated_documents for source in read_manifest(output).sources.values())
    assert left_out(cut, directory=output) == [f"{count} documents truncated: cut into pieces, or cut short"]


def test_stats_show_sources_shares_and_the_ratios_of_fixed_lengths(output, capsys):
    stats = dataset_stats(output)
    assert stats["fixed_length"] == fixed_length_alternatives(read_manifest(output))
    data_stats(output, as_json=False)
    lines = [line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    rows = [[cell.strip() for cell in line] for line in lines]
    for name, entry in stats["sources"].items():
        documents, samples, tokens = (f"{entry[key]:,}" for key in ("documents", "samples", "tokens"))
        shares = [f"{entry['share']:.2%}", f"{entry['padding_ratio']:.3%}"]
        assert [name, "all", documents, samples, tokens, *shares] in rows
    for size, entry in stats["fixed_length"].items():
        ratios = [f"{entry[key]:.3%}" for key in ("padding_ratio", "truncation_ratio")]
        assert [f"fixed length {size}", f"{entry['samples']:,}", *ratios, f"{entry['concatenation_ratio']:.2f}"] in rows


def test_large_figures_and_long_names_are_whole_in_a_pipe(output, capsys):
    stats, name, count = dataset_stats(output), "a_source_with_a_long_name_" * 3, 123_456_789_012
    row = {"samples": count, "tokens": 10 * count, "share": 1.0, "padding_ratio": 0.5}
    sources = {name: {**row, "documents": count, "buckets": {"16384": row}}}
    _show_stats({**stats, "sources": sources}, output, as_json=False)
    printed = capsys.readouterr().out
    assert printed.count(f"{10 * count:,}") == 2 and "…" not in printed
