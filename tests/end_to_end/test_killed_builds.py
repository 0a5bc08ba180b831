"""Builds as real processes: killed at random moments and started again, or several at once; always the same bytes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from megatron_xy.data.building.work_folder import WORK_FOLDER
from tests.unit.small_corpus import content, texts, train_tokenizer, write_rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(folder of texts, tokenizer, what a build that nothing disturbs makes of them, the seconds it takes with one
    worker and with two)."""
    base = tmp_path_factory.mktemp("killed")
    for number in range(4):
        rows = [{"text": text, "src": "ab"[n % 2]} for n, text in enumerate(texts(1500, seed=number // 2))]
        write_rows(base / f"corpus/{number}.jsonl", [*rows, b"{"])
    made = base / "corpus", train_tokenizer(base / "tokenizer.model")
    whole, seconds = undisturbed(made, base)
    return *made, whole, seconds


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """As `corpus`, of conversations and texts in sources of their own."""
    base = tmp_path_factory.mktemp("killed_chat")
    for number in range(2):
        words = [" ".join(text.split()[:12]) for text in texts(3000, seed=number)]
        asked = [{"role": "user", "content": text} for text in words[::2]]
        answered = [{"role": "assistant", "content": text} for text in words[1::2]]
        rows = [{"messages": pair, "src": "c"} for pair in zip(asked, answered, strict=True)]
        write_rows(
            base / f"corpus/{number}.jsonl", [*rows, *({"text": text, "src": "t"} for text in words[:300]), b"{"]
        )
    made = base / "corpus", train_tokenizer(base / "tokenizer.model")
    whole, seconds = undisturbed(made, base, "--chat")
    assert sum(name.endswith(".mask") for name in whole) > 4
    return *made, whole, seconds


def undisturbed(made, base, *options):
    """What a build that nothing disturbs makes, and the seconds that it takes with one worker and with two."""
    seconds = []
    for workers in (1, 2):
        process = start(made, base / f"whole-{workers}", "--deduplicate", *options, "--workers", str(workers))
        began = time.monotonic()
        assert process.wait() == 0
        seconds.append(time.monotonic() - began)
    whole = content(base / "whole-1")
    assert content(base / "whole-2") == whole
    return whole, seconds


def start(made, output, *options):
    """A build in a session of its own, when it has begun."""
    command = [sys.executable, "-m", "tests.end_to_end.build_process", *map(str, (*made[:2], output)), *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "begins\n"
    return process


def kill_and_resume(corpus, output, *options, kills, seed):
    """Kills a build `kills` times at random moments, all its processes or the first alone, then lets it end.

    One that is through before it is killed begins anew.
    """
    choose, killed, starts = random.Random(seed), 0, 0
    alone, together = corpus[3]
    while killed < kills:
        starts += 1
        assert starts <= 20 * kills, "builds are through before they can be killed"
        workers = 1 + killed % 2
        process = start(corpus, output, "--deduplicate", *options, "--workers", str(workers))
        starting = max(0.0, together - alone) if workers == 2 else 0.0  # what two workers take to start
        time.sleep(starting + choose.uniform(0, 1.4 * alone / kills))
        if process.poll() is None:
            (os.killpg if choose.random() < 0.5 else os.kill)(process.pid, signal.SIGKILL)
            killed += 1
        elif process.returncode == 0:
            assert content(output) == corpus[2]
            shutil.rmtree(output)
        assert process.wait() in (0, -signal.SIGKILL)
    assert start(corpus, output, "--deduplicate", *options).wait() == 0
    assert content(output) == corpus[2]


def test_conversations_killed_three_times_and_started_again_are_the_same(conversations, tmp_path):
    kill_and_resume(conversations, tmp_path / "out", "--chat", kills=3, seed=2)


def test_killed_three_times_and_started_again_is_the_same(corpus, tmp_path):
    kill_and_resume(corpus, tmp_path / "out", kills=3, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_ten_times_and_started_again_is_the_same(corpus, tmp_path, seed):
    kill_and_resume(corpus, tmp_path / "out", kills=10, seed=seed)


def test_builds_at_once_share_the_work_and_take_over_from_a_dead_one(corpus, tmp_path):
    output = tmp_path / "out"
    killed, *others = (start(corpus, output, "--deduplicate") for _ in range(3))
    time.sleep(corpus[3][0] / 4)
    killed.kill()
    assert [process.communicate()[0].split("\n")[0] for process in others] == ["finished"] * 2
    assert [process.returncode for process in others] == [0, 0]
    assert content(output) == corpus[2]


def test_what_a_stopped_build_has_claimed_waits_for_it(corpus, tmp_path):
    output = tmp_path / "out"
    first = start(corpus, output, "--deduplicate")
    while not list(output.glob(f"{WORK_FOLDER}/claims/*")):
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)
    second = start(corpus, output, "--deduplicate")
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(1.5)
        first.kill()
        assert second.wait() == 0
    finally:
        first.kill()
        second.kill()
    assert content(output) == corpus[2]


def test_shares_at_once_leave_it_to_the_last_or_finish_together(corpus, tmp_path):
    shares = [start(corpus, tmp_path / "out", "--deduplicate", "--shard", f"{index}/3") for index in range(3)]
    said = [process.communicate()[0].split("\n")[0] for process in shares]
    assert "finished" in said and set(said) <= {"finished", "left to others"}
    assert content(tmp_path / "out") == corpus[2]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(corpus, tmp_path):
    peaks = {}
    for copies in (1, 24):
        rows = [{"text": " ".join(texts(50, seed=seed)), "src": "a"} for seed in range(100)] * copies
        write_rows(tmp_path / f"{copies}/a.jsonl", rows)
        process = start((tmp_path / f"{copies}", corpus[1]), tmp_path / f"out-{copies}")
        peaks[copies] = int(process.communicate()[0].split()[-1])
    more = (tmp_path / "24/a.jsonl").stat().st_size - (tmp_path / "1/a.jsonl").stat().st_size
    assert more > 5e6, "otherwise this shows nothing"
    assert peaks[24] - peaks[1] < more
