"""Token shards: what each holds, receipts, and fastokens giving the same bytes as the tokenizer's own library."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megatron_xy.data.building import engine_choice, tokenize
from megatron_xy.data.building.engine_choice import choose_engine, with_checked
from megatron_xy.data.building.token_shards import make_token_shard
from megatron_xy.data.building.tokenize import TokenizeTask, TokenShard, read_receipt
from megatron_xy.data.building.workers import Workers
from megatron_xy.data.corpus.documents import LineReport, Part
from megatron_xy.data.corpus.row_contents import RowFields
from megatron_xy.data.encoding.fast_engine import FastTokenizer, awkward_texts, chosen_texts
from megatron_xy.data.encoding.sentencepiece_json import NORMAL, parse_model
from megatron_xy.data.encoding.tokenizer import load_tokenizer
from megatron_xy.data.indexed import IndexedReader
from megatron_xy.errors import ConfigError, DataError, PeerLost
from tests.building import each_text, pieces_of
from tests.unit.small_corpus import content, texts, train_tokenizer, write_rows
from tests.unit.test_tokenizer import trained


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "fox.model")


@pytest.fixture
def rows():
    """Two sources in turn; four texts are compared, one is empty, one is what the tokenizer knows nothing of."""
    sources = ["prose", "code", "prose"]
    rows = [{"text": text, "src": sources[number % 3]} for number, text in enumerate(texts(300, seed=2))]
    return [*rows, {"text": "", "src": "code"}, {"text": "狐狸 <s></s>", "src": "prose"}]


def task_for(folder, rows, tokenizer, **options):
    path = write_rows(folder / "corpus.jsonl", rows)
    task = TokenizeTask(
        folder=folder / "tokens" / "000000",
        parts=(Part(str(path), 0, path.stat().st_size, 1),),
        tokenizer=tokenizer,
        fields=RowFields("text", "src"),
        append_eod=False,
        bad_lines="skip",
    )
    return replace(task, **options)


def run(task):
    return make_token_shard(task, lambda size: None)


def documents(folder):
    reader = IndexedReader(folder)
    return [np.concatenate(pieces_of(reader, index)).tolist() for index in range(reader.num_documents)]


needs_fastokens = pytest.mark.parametrize("fast", [False, pytest.param(True, id="fastokens")])


@needs_fastokens
@pytest.mark.parametrize("append_eod", [False, True])
def test_a_shard_holds_each_source_s_documents_in_order(tmp_path, rows, tokenizer, monkeypatch, append_eod, fast):
    if fast:
        pytest.importorskip("fastokens")
    monkeypatch.setattr(tokenize, "BATCH_CHARACTERS", 500)  # several batches
    shard = run(task_for(tmp_path, rows, tokenizer, append_eod=append_eod, fast=fast))
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    end = [plain.eos_id()] if append_eod else []
    for source in ("code", "prose"):
        expected = [plain.encode(row["text"]) + end for row in rows if row["src"] == source and row["text"]]
        assert documents(shard.folder / source) == expected
        assert shard.documents[source] == len(expected)
    assert (shard.report.skipped_empty, shard.report.bad_lines, shard.report.lines) == (1, 0, len(rows))


def test_fastokens_writes_the_same_bytes_and_says_what_it_was(tmp_path, rows, tokenizer):
    pytest.importorskip("fastokens")
    plain = run(task_for(tmp_path / "plain", rows, tokenizer, append_eod=True))
    fast = run(task_for(tmp_path / "fast", rows, tokenizer, append_eod=True, fast=True))
    assert content(plain.folder) == content(fast.folder)
    assert plain.engine.startswith("sentencepiece ") and fast.engine.startswith("fastokens ")
    chosen = len(chosen_texts([row["text"] for row in rows if row["text"]]))
    assert chosen > 0 and (plain.checked_documents, fast.checked_documents) == (0, chosen)


def test_a_shard_with_a_receipt_is_not_done_again_unless_fastokens_is_no_longer_trusted(tmp_path, rows, tokenizer):
    pytest.importorskip("fastokens")
    task = task_for(tmp_path, rows, tokenizer, fast=True)
    shard = run(task)
    assert read_receipt(task.folder) == shard
    tokens = task.folder / "code.bin"
    tokens.write_bytes(b"")
    assert run(task) == shard and not tokens.read_bytes()
    again = run(replace(task, fast=False))
    assert again.engine.startswith("sentencepiece ") and not tokens.read_bytes(), "another build may be reading it"
    assert again.folder != shard.folder and (again.folder / "code.bin").read_bytes()
    assert run(replace(task, fast=False)) == again and run(task) == shard


def test_a_shard_that_another_build_makes_meanwhile_is_left_as_it_is(tmp_path, rows, tokenizer):
    """On a file system whose locks do not reach the other machine."""
    task = task_for(tmp_path, rows, tokenizer)
    made = []

    def other(_size):
        if not made:
            made.extend([run(task), (task.folder / "code.idx").stat().st_ino])

    assert [make_token_shard(task, other), (task.folder / "code.idx").stat().st_ino] == made
    assert not list(task.folder.glob(".tmp-*"))


def test_a_receipt_that_names_no_engine_counts(tmp_path, rows, tokenizer):
    task = task_for(tmp_path, rows, tokenizer)
    run(task)
    TokenShard.receipt(task.folder).write_text(json.dumps({"documents": {"code": 3}, "report": {"lines": 3}}))
    assert run(task) == TokenShard(task.folder, {"code": 3}, LineReport(lines=3))


@pytest.mark.parametrize(
    "content", [b"", b'{"documents": {"co', b"\xff", b"null", b"{}", b'{"report": {"lines": "?", "x": 1}}']
)
def test_a_shard_whose_receipt_cannot_be_read_is_done_again(tmp_path, rows, tokenizer, content):
    task = task_for(tmp_path, rows, tokenizer)
    shard = run(task)
    receipt = TokenShard.receipt(task.folder)
    receipt.write_bytes(content)
    assert run(task) == shard == read_receipt(task.folder)


@pytest.mark.parametrize("ending", ["bin", "idx", "trace"])
def test_a_shard_that_misses_a_file_is_done_again(tmp_path, rows, tokenizer, ending):
    task = task_for(tmp_path, rows, tokenizer)
    shard = run(task)
    missing = task.folder / f"code.{ending}"
    content = missing.read_bytes()
    missing.unlink()
    assert read_receipt(task.folder) is None and run(task) == shard and missing.read_bytes() == content


def test_lone_surrogates_are_bad_lines_and_the_other_documents_are_encoded(tmp_path, tokenizer):
    pytest.importorskip("fastokens")
    surrogate = rb'{"text": "the \ud800 fox", "src": "prose"}'
    rows = [{"text": "the fox", "src": "prose"}, surrogate, {"text": "a dog", "src": "prose"}]
    shard = run(task_for(tmp_path, rows, tokenizer, fast=True))
    assert (shard.documents, shard.report.bad_lines) == ({"prose": 2}, 1)
    assert "corpus.jsonl:2: " in shard.report.listed[0] and "lone surrogate" in shard.report.listed[0]


def test_under_fail_nothing_is_encoded_after_a_bad_line_and_there_is_no_receipt(tmp_path, rows, tokenizer):
    task = task_for(tmp_path, [b"{", *rows, b"["], tokenizer, bad_lines="fail")
    shard = run(task)
    assert (shard.documents, shard.report.bad_lines) == ({}, 2)
    assert read_receipt(task.folder) is None


def test_too_many_sources_are_refused_and_leave_nothing(tmp_path, tokenizer):
    rows = [{"text": "fox", "src": f"id-{number}"} for number in range(tokenize.MOST_SOURCES + 1)]
    task = task_for(tmp_path, rows, tokenizer)
    with pytest.raises(ConfigError, match=r"source_field \(src\) names more than 256 sources"):
        run(task)
    assert not any(task.folder.glob("*")) and read_receipt(task.folder) is None


def test_a_difference_while_fastokens_runs_stops_the_build_and_names_the_document(tmp_path):
    """With equal scores sentencepiece joins what is leftmost, a list of merges what is first in it."""
    pytest.importorskip("fastokens")
    model = parse_model(trained(tmp_path / "tied.model").read_bytes())
    for piece in model.pieces:
        piece.score = -1.0 if piece.type == NORMAL else piece.score
    (tmp_path / "tied.model").write_bytes(model.SerializeToString())
    reference = load_tokenizer(tmp_path / "tied.model")
    fast = FastTokenizer(reference)
    normal = [piece.piece for piece in model.pieces if piece.type == NORMAL]
    awkward = awkward_texts(normal, normal)
    expected, found = each_text(reference.encode_flat(awkward)), each_text(fast.encode_flat(awkward))
    different = next(text for text, a, b in zip(awkward, expected, found, strict=True) if a.tolist() != b.tolist())
    checked = next(text for number in range(5000) if chosen_texts([text := f"{different} {number}"]))
    task = task_for(tmp_path, [{"text": text, "src": "prose"} for text in ("the", checked)], reference.path, fast=True)
    with pytest.raises(
        DataError, match=r"corpus\.jsonl:2: fastokens .* encodes this document otherwise than sentencep"
    ):
        run(task)
    assert not any(task.folder.glob("*")) and read_receipt(task.folder) is None


# Which engine.


def world_model(folder):
    """A model with pieces for all of ASCII, as those of the world have."""
    return load_tokenizer(trained(folder / "world.model"))


def test_fastokens_is_chosen_where_it_agrees_and_the_entry_says_so(tmp_path, rows):
    pytest.importorskip("fastokens")
    model = world_model(tmp_path)
    task = task_for(tmp_path, rows, model.path)
    said = []
    choice = choose_engine(model, [task], say=said.append)
    assert choice.is_fast and said == []
    shard = run(replace(task, fast=True))
    entry = with_checked(choice, [shard, shard])
    assert entry.name == shard.engine and entry.reference == model.engine.name
    assert entry.checked_documents == 2 * shard.checked_documents > 0
    assert len(entry.conversion_sha256) == 64


def test_without_fastokens_one_clear_line_and_sentencepiece(tmp_path, rows, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "fastokens", None)
    model = world_model(tmp_path)
    choice = choose_engine(model, [task_for(tmp_path, rows, model.path)])
    assert not choice.is_fast and choice.name == choice.reference == model.engine.name
    assert choice.conversion_sha256 is None
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and "sentencepiece" in said[0] and "pip install 'megatron-xy[fast]'" in said[0]


def test_the_corpus_s_first_documents_decide(tmp_path, rows, monkeypatch, tokenizer):
    """As many as GATE_DOCUMENTS, whatever the parts, also where lines are bad; of long ones the beginning."""
    read = []
    monkeypatch.setattr(engine_choice, "GATE_DOCUMENTS", 150)
    monkeypatch.setattr(engine_choice, "BATCH_CHARACTERS", 700)
    monkeypatch.setattr(engine_choice, "disagreement", lambda fast, batches: read.extend(batches) or "not today")
    monkeypatch.setattr(engine_choice, "unsuitable", lambda tokenizer: None)
    task = task_for(tmp_path, [b"{", *rows[:100]], tokenizer)
    more = task_for(tmp_path / "more", rows[100:], tokenizer)
    said = []
    choose_engine(load_tokenizer(tokenizer), [task, more], say=said.append)
    assert len(read) > 2 and "not today" in said[0]
    assert [text for batch in read for text in batch] == [row["text"][:700] for row in rows if row["text"]][:150]


# Workers.


def square_or_die(task, advance):
    if task < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    advance(1)
    return task * task


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks_and_progress_reaches_the_total(workers):
    seen = []
    with Workers(workers, progress=lambda *report: seen.append(report)) as pool:
        assert list(pool.run("square", square_or_die, range(20), total=20, unit="tasks")) == [n * n for n in range(20)]
    assert seen[0] == ("square", 0, 20, "tasks") and seen[-1] == ("square", 20, 20, "tasks")


def test_a_killed_worker_ends_the_build_with_what_to_do():
    with Workers(2, progress=None) as pool, pytest.raises(PeerLost, match="run the same command again"):
        list(pool.run("square", square_or_die, [1, -1, 2], total=3, unit="tasks"))


def test_a_script_that_does_not_guard_its_code_is_told_so(tmp_path):
    script = tmp_path / "builds.py"
    script.write_text(
        "import threading, time\n"
        "from megatron_xy.data.building.workers import Workers\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()  # so that workers are spawned\n"
        "with Workers(2, progress=None) as pool:\n"
        "    list(pool.run('round', round, [1, 2], total=2, unit='tasks'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=60)
    assert answer.returncode and "PeerLost" in answer.stderr
    assert "must guard its own code by if __name__ == '__main__'" in answer.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only there a process can tell its threads")
@pytest.mark.parametrize(("beside", "found"), [("alone", ["by the build"]), ("with_thread", [])])
def test_workers_are_forked_with_what_the_build_loaded_where_that_is_safe(beside, found):
    command = [sys.executable, Path(__file__).with_name("look_from_workers.py"), beside]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout
    assert printed == f"{[found, found]}\n"
