"""`data build` end to end on small corpora: nothing lost, the same for any number of workers, resumed after a stop."""

import errno
import fcntl
import json
import os
import shutil
import signal

import numpy as np
import pytest
import sentencepiece
from typer.testing import CliRunner

from megatron_xy.cli import app
from megatron_xy.data.building import build, build_folder, workers
from megatron_xy.data.encoding.tokenizer import load_tokenizer
from megatron_xy.data.indexed import IndexedReader, IndexedWriter
from megatron_xy.data.inspection.examine import dataset_stats, verify_dataset
from megatron_xy.data.manifest import read_manifest
from megatron_xy.errors import EXIT_STOPPED, ConfigError, DataError, UsageError
from megatron_xy.runtime.signals import STOP_SIGNALS, cleaned_up_on_signals
from tests.building import add_document, build_dataset, pieces_of
from tests.unit.small_corpus import content, train_tokenizer, write_rows

BUCKETS = (16, 32, 64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "fox.model")


@pytest.fixture
def corpus(tmp_path):
    """Three files, two sources, lengths from 1 token to several times the largest bucket; one empty text."""
    random = np.random.default_rng(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        with (folder / name).open("w") as stream:
            for _ in range(60):
                text = " ".join(random.choice(words, size=int(random.lognormal(2, 1.2)) + 1))
                stream.write(json.dumps({"text": text, "src": str(random.choice(["code", "prose"]))}) + "\n")
            stream.write(json.dumps({"text": "", "src": "prose"}) + "\n" if name == "b.jsonl" else "")
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Many shards and windows from a small corpus."""
    monkeypatch.setattr("megatron_xy.data.corpus.inputs.PART_BYTES", 2000)
    monkeypatch.setattr("megatron_xy.data.building.build_folder.WINDOW_DOCUMENTS", 30)


def run(corpus, tokenizer, output, **options):
    return build_dataset([corpus], tokenizer=tokenizer, output=output, buckets=BUCKETS, source_field="src", **options)


def pieces_by_source(output):
    """{source: the tokens of every piece}, sorted."""
    manifest = read_manifest(output)
    return {
        name: sorted(
            piece.tolist()
            for bucket in source.buckets.values()
            for shard in bucket.shards
            for reader in [IndexedReader(output / shard.name)]
            for index in range(reader.num_documents)
            for piece in pieces_of(reader, index)
        )
        for name, source in manifest.sources.items()
    }


def expected_pieces(corpus, tokenizer, end):
    """The same from the corpus, by the definition: only what is longer than the largest bucket is cut."""
    encoder = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    pieces = {"code": [], "prose": []}
    for path in sorted(corpus.iterdir()):
        for row in map(json.loads, path.read_text().splitlines()):
            tokens = encoder.encode(row["text"]) + end if row["text"] else []
            pieces[row["src"]] += [tokens[i : i + BUCKETS[-1]] for i in range(0, len(tokens), BUCKETS[-1])]
    return {name: sorted(of_source) for name, of_source in pieces.items()}


@pytest.mark.parametrize("append_eod", [False, True])
def test_every_token_of_the_corpus_is_there_once_in_its_source(corpus, tokenizer, tmp_path, append_eod):
    output = tmp_path / "out"
    stats = run(corpus, tokenizer, output, append_eod=append_eod)
    end = [load_tokenizer(tokenizer).eos_id] if append_eod else []
    expected = expected_pieces(corpus, tokenizer, end)
    assert pieces_by_source(output) == expected
    verify_dataset(output)
    assert {path.name for path in output.iterdir()} == {"manifest.json", "tokenizer.model", "code", "prose"}
    assert (output / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    tokens = sum(len(piece) for pieces in expected.values() for piece in pieces)
    assert (stats["documents"], stats["tokens"], stats["skipped_empty"], stats["bad_lines"]) == (180, tokens, 1, 0)
    capacity = sum(int(size) * b["samples"] for s in stats["sources"].values() for size, b in s["buckets"].items())
    assert stats["padding_ratio"] == pytest.approx(1 - tokens / capacity)
    assert stats["concatenation_ratio"] == pytest.approx(180 / stats["samples"])
    assert sum(b["share"] for s in stats["sources"].values() for b in s["buckets"].values()) == pytest.approx(1)
    assert dataset_stats(output) == {key: value for key, value in stats.items() if key not in ("reused", "finished")}


def test_what_has_no_field_of_a_source_has_the_one_that_is_given(corpus, tokenizer, tmp_path):
    (tmp_path / "plain.txt").write_text("the quick brown fox")
    with IndexedWriter(tmp_path / "tokens", dtype=np.dtype(np.uint16)) as writer:
        add_document(writer, [np.array([3, 4, 5])])
    inputs = [corpus / "a.jsonl", tmp_path / "plain.txt", tmp_path / "tokens"]
    options = {"tokenizer": tokenizer, "buckets": BUCKETS, "source_field": "src"}
    build_dataset(inputs, output=tmp_path / "out", source="books", **options)
    assert set(pieces_by_source(tmp_path / "out")) == {"code", "prose", "books"}
    books = pieces_by_source(tmp_path / "out")["books"]
    assert [3, 4, 5] in books and len(books) == 2
    with pytest.raises(ConfigError, match="of other inputs or options"):
        build_dataset(inputs, output=tmp_path / "out", **options)
    with pytest.raises(UsageError, match=r"source \(a/b\) must be 1 to 100 letters"):
        build_dataset(inputs, output=tmp_path / "other", source="a/b", **options)


def test_a_tokenizer_json_keeps_its_name_in_the_data_folder(corpus, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "fox": 1, "dog": 2}, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "words.json"))
    looked_for = r"has no end token: it is looked for in tokenizer_config\.json beside it, which "
    for config, reason in ((None, "is not there"), ("{}", "has none")):
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(config)
        with pytest.raises(ConfigError, match=looked_for + reason):
            run(corpus, tmp_path / "words.json", tmp_path / "out", append_eod=True)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "dog"}')
    run(corpus, tmp_path / "words.json", tmp_path / "out")
    verify_dataset(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").eos_id == 2, "tokenizer_config.json goes along"
    (tmp_path / "out" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer_config\.json has 2 bytes"):
        verify_dataset(tmp_path / "out")
    assert read_manifest(tmp_path / "out").tokenizer.file == "tokenizer.json"
    assert load_tokenizer(tmp_path / "out").encode("fox dog").tolist() == [1, 2]


def test_no_source_has_the_name_of_another_s_receipt(tokenizer, tmp_path):
    names = ["a", "a.00000.json", "a.00000"]
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "fox", "src": name} for name in names])
    run(rows, tokenizer, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, "manifest.json", "tokenizer.model"}
    verify_dataset(tmp_path / "out")


def test_verify_says_how_far_it_is(corpus, tokenizer, tmp_path):
    run(corpus, tokenizer, tmp_path / "out")
    verified = CliRunner().invoke(app, ["data", "verify", str(tmp_path / "out"), "--json"])
    assert json.loads(verified.stdout) and "  verify: 0/" in verified.stderr and "(100%)" in verified.stderr


def test_a_file_system_without_locks_is_refused_by_name(tmp_path, tokenizer, corpus, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with pytest.raises(ConfigError, match=r"out must be on a file system that has locks"):
        build_dataset([corpus], tokenizer=tokenizer, output=tmp_path / "out", buckets=(16,))


def test_two_workers_give_the_same_bytes(corpus, tokenizer, tmp_path):
    run(corpus, tokenizer, tmp_path / "one")
    run(corpus, tokenizer, tmp_path / "two", workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


class Stop(Exception):
    """Stands for a kill: nothing in the build catches it."""


@pytest.mark.parametrize("phase", ["tokenize", "pack"])
def test_a_stopped_build_goes_on_without_redoing_shards(corpus, tokenizer, tmp_path, monkeypatch, phase):
    monkeypatch.setattr(workers, "PROGRESS_SECONDS", 0)
    run(corpus, tokenizer, tmp_path / "unbroken")
    output, done_so_far = tmp_path / "out", []

    def stop(now, done, total, unit):
        if now == phase and done:
            done_so_far.append(done)
            if len(done_so_far) > 3:
                raise Stop

    with pytest.raises(Stop):
        run(corpus, tokenizer, output, progress=stop)
    work = output / build.WORK_FOLDER
    finished = {"tokenize": "tokens/*.json", "pack": "packed/.receipts/*.json"}[phase]
    receipts = {path: path.stat().st_mtime_ns for path in work.glob(finished)}
    assert receipts and not (output / "manifest.json").exists()
    kept = {}

    def look(now, done, total, unit):
        if work.exists():
            kept.update({path: path.stat().st_mtime_ns for path in receipts if path.exists()})

    assert run(corpus, tokenizer, output, progress=look)["reused"] is False
    assert kept == receipts
    assert content(output) == content(tmp_path / "unbroken")


def test_a_stopped_build_makes_anew_what_a_cut_receipt_stands_for(corpus, tokenizer, tmp_path, monkeypatch):
    run(corpus, tokenizer, tmp_path / "unbroken")

    def stop(*args, **options):
        raise Stop

    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(build_folder, "_publish", stop)
        run(corpus, tokenizer, tmp_path / "out")
    receipts = list((tmp_path / "out" / build.WORK_FOLDER).rglob("*.json"))
    assert {path.parent.name for path in receipts} == {"tokens", ".receipts"}
    for path in receipts:
        path.write_bytes(path.read_bytes()[:20])
    assert run(corpus, tokenizer, tmp_path / "out")["reused"] is False
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_build_that_is_asked_to_stop_says_that_it_goes_on(corpus, tokenizer, tmp_path, number, capsys):
    def stop(phase, done, total, unit):
        if phase == "pack":
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, cleaned_up_on_signals("; the same command goes on where it was"):
        run(corpus, tokenizer, tmp_path / "out", workers=2, progress=stop)
    assert ended.value.code == EXIT_STOPPED and "; the same command goes on where it was" in capsys.readouterr().err
    assert signal.getsignal(number) == before and not (tmp_path / "out/manifest.json").exists()
    run(corpus, tokenizer, tmp_path / "out")
    verify_dataset(tmp_path / "out")


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_build_stopped_while_it_publishes_goes_on(corpus, tokenizer, tmp_path, monkeypatch, moved):
    run(corpus, tokenizer, tmp_path / "unbroken")
    output = tmp_path / "out"

    def stop(*paths):
        raise Stop

    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(shutil, "copyfile", stop)  # what publishing does once the sources are moved
        run(corpus, tokenizer, output)
    for name in ["code", "prose"][moved:]:  # as if stopped before these were moved
        (output / name).rename(output / build.WORK_FOLDER / "packed" / name)
    if moved == 1:  # another build takes the folder over: nothing of this one may stay
        build_dataset([corpus], tokenizer=tokenizer, output=output, buckets=BUCKETS)
        assert {path.name for path in output.iterdir()} == {"manifest.json", "tokenizer.model", "default"}
        return
    run(corpus, tokenizer, output)
    assert content(output) == content(tmp_path / "unbroken")


def test_a_finished_folder_is_reused_and_never_overwritten(corpus, tokenizer, tmp_path):
    output = tmp_path / "out"
    stats = run(corpus, tokenizer, output)
    before = content(output)
    assert run(corpus, tokenizer, output) == {**stats, "reused": True}
    with pytest.raises(ConfigError, match="finished data set of other inputs or options"):
        run(corpus, tokenizer, output, append_eod=True)
    (corpus / "c.jsonl").unlink()
    with pytest.raises(ConfigError, match="finished data set of other inputs or options"):
        run(corpus, tokenizer, output)
    assert content(output) == before


@pytest.mark.parametrize("options", [{}, {"append_eod": True}], ids=["the same", "another"])
def test_a_build_that_comes_while_another_clears_away_takes_nothing(corpus, tokenizer, tmp_path, monkeypatch, options):
    """It looked before the manifest was there, and opens the work folder when its lock and mark are gone already."""
    output = tmp_path / "out"
    run(corpus, tokenizer, output)
    before = content(output)
    work = output / build.WORK_FOLDER
    (work / "packed").mkdir(parents=True)
    (work / "publish.json").write_text('["code", "prose"]')
    looks = iter([False])
    monkeypatch.setattr(build_folder, "_is_finished", lambda folder: next(looks, True))
    if options:
        with pytest.raises(ConfigError, match="finished data set of other inputs or options"):
            run(corpus, tokenizer, output, **options)
    else:
        assert run(corpus, tokenizer, output)["reused"] is True
    assert content(output) == before and not work.exists()


def test_a_manifest_half_written_when_the_build_was_killed_goes(corpus, tokenizer, tmp_path, monkeypatch):
    output = tmp_path / "out"

    def stop(*arguments):
        (output / ".tmp-1-manifest.json").write_text("{")
        raise Stop

    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(build_folder, "write_manifest", stop)
        run(corpus, tokenizer, output)
    run(corpus, tokenizer, output)
    run(corpus, tokenizer, tmp_path / "unbroken")
    assert content(output) == content(tmp_path / "unbroken")


def test_arguments_and_places_are_checked_before_anything_is_written(corpus, tokenizer, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.doc").write_text("keep")
    with pytest.raises(ConfigError, match="holds other files"):
        run(corpus, tokenizer, other)
    with pytest.raises(ConfigError, match="is a file"):
        run(corpus, tokenizer, other / "mine.doc")
    with pytest.raises(ConfigError, match="lies inside the input"):
        run(corpus, tokenizer, corpus / "out")
    with pytest.raises(ConfigError, match=r"workers \(0\)"):
        run(corpus, tokenizer, tmp_path / "out", workers=0)
    with pytest.raises(ConfigError, match="does not exist"):
        run(tmp_path / "nowhere", tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (corpus / "out").exists()
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="no document with text"):
        build_dataset([tmp_path / "empty.txt"], tokenizer=tokenizer, output=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"source_field \(src\) names a field of rows, and no input has rows"):
        run(tmp_path / "empty.txt", tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_seq_length_and_buckets_do_not_go_together(corpus, tokenizer, tmp_path):
    given = ["data", "build", "--input", corpus, "--tokenizer", tokenizer, "--output", tmp_path / "out"]
    fixed = ["--packing", "concatenate", "--seq-length", "32"]
    refused = CliRunner().invoke(app, [*map(str, given), *fixed, "--buckets", "16,32"])
    assert isinstance(refused.exception, UsageError) and not (tmp_path / "out").exists()
    for buckets in ("16,x", "²", ""):
        refused = CliRunner().invoke(app, [*map(str, given), "--buckets", buckets])
        assert isinstance(refused.exception, UsageError) and "must be numbers with commas" in str(refused.exception)
    assert CliRunner().invoke(app, [*map(str, given), *fixed]).exit_code == 0
    assert read_manifest(tmp_path / "out").buckets == [32]


def test_too_many_sources_are_refused(tokenizer, tmp_path):
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps({"text": "fox", "src": f"id-{n}"}) + "\n" for n in range(300)))
    with pytest.raises(ConfigError, match="sources"):
        run(path, tokenizer, tmp_path / "out")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda out, shard: flip(out / f"{shard}.bin"), r"\.bin is damaged: its checksum"),
        (lambda out, shard: flip(out / f"{shard}.idx"), r"\.idx is damaged: its checksum"),
        (lambda out, shard: os.truncate(out / f"{shard}.bin", 4), r"\.bin has 4 bytes"),
        (lambda out, shard: (out / f"{shard}.idx").unlink(), r"\.idx is missing"),
        (lambda out, shard: flip(out / "tokenizer.model"), "not the tokenizer of the manifest"),
        (lambda out, shard: os.truncate(out / "manifest.json", 100), r"manifest\.json is damaged"),
        (lambda out, shard: (out / "manifest.json").unlink(), r"holds no manifest\.json"),
        (
            lambda out, shard: shutil.copy(out / f"{shard}.bin", out / "code/extra.bin"),
            r"not list: code/extra\.bin; rem",
        ),
        (lambda out, shard: shutil.copytree(out / "code", out / "more"), r"not list: more, .* and \d+ more; remove it"),
        (lambda out, shard: (out / ".tmp-1-manifest.json").touch(), r"\.tmp-1-manifest\.json \(left by a build that"),
        (lambda out, shard: (out / "code" / ".tmp-x").touch(), r"does not list: code/\.tmp-x"),
    ],
)
def test_verify_names_what_is_wrong(corpus, tokenizer, tmp_path, damage, reason):
    output = tmp_path / "out"
    run(corpus, tokenizer, output)
    shard = next(iter(read_manifest(output).sources["code"].buckets.values())).shards[0].name
    damage(output, shard)
    with pytest.raises(DataError, match=reason):
        verify_dataset(output)


def test_a_manifest_that_contradicts_itself_is_refused(corpus, tokenizer, tmp_path):
    output = tmp_path / "out"
    run(corpus, tokenizer, output)
    manifest = json.loads((output / "manifest.json").read_text())
    for change in (
        lambda m: m["statistics"].update(samples=1),
        lambda m: m["statistics"].update(documents=m["statistics"]["documents"] + 5),
        lambda m: m["statistics"].update(tokens=m["statistics"]["tokens"] + 5),
        lambda m: m["sources"]["code"].update(tokens=m["sources"]["code"]["tokens"] + 5),
        lambda m: (
            m["sources"]["code"].update(documents=m["sources"]["code"]["documents"] + 5),
            m["statistics"].update(documents=m["statistics"]["documents"] + 5),
        ),
        lambda m: m.update(format_version=2),
        lambda m: m["sources"].update({"..": m["sources"]["code"]}),
        lambda m: m["sources"]["code"]["buckets"]["16"]["shards"][0].update(name="../../etc/bucket_00016/shard_00000"),
        lambda m: m.update(surprise=1),
    ):
        changed = json.loads(json.dumps(manifest))
        change(changed)
        (output / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(DataError, match="damaged or of another version"):
            read_manifest(output)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file, no folder"):
        read_manifest(tmp_path / "file")
    with pytest.raises(ConfigError, match="is not there"):
        read_manifest(tmp_path / "nowhere")
