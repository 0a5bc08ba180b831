"""The report of a run that stands still: who files the request for it, whose answers come, and who is named."""

import json
import os
import threading
import time
from dataclasses import asdict, replace

import pytest

from megatron_xy.errors import DataError
from megatron_xy.run_folder import prepare
from megatron_xy.runtime.hang_report import (
    REQUEST,
    Answer,
    answer_seconds,
    claim,
    gather,
    new_request,
    read_request,
    tell,
)
from megatron_xy.storage import write_json


def test_one_process_reports_and_an_earlier_start_on_the_same_address_keeps_none_from_it(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "MASTER_ADDR": "node01", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)  # torchrun's static rendezvous has the same ones every time
    prepare(tmp_path)
    an_hour_ago = time.time() - 3600
    hung_before = replace(new_request(rank=2, stalled_seconds=120.0), time=an_hour_ago)
    assert claim(tmp_path, hung_before, since=an_hour_ago)
    began = time.time() - 300
    assert claim(tmp_path, new_request(rank=0, stalled_seconds=120.0), since=began)
    assert not claim(tmp_path, new_request(rank=1, stalled_seconds=120.1), since=began)


def test_a_damaged_request_is_named(tmp_path):
    prepare(tmp_path)
    path = tmp_path / "heartbeats" / REQUEST
    path.write_text('{"start": "cut')
    with pytest.raises(DataError, match=rf"{path} must be JSON as the run wrote it: .*; remove it"):
        read_request(tmp_path, since=0.0)


def test_ranks_that_have_not_come_as_far_are_named_whatever_a_role_does_on_its_own(tmp_path):
    """Ranks 0 and 1 are at work for the actor, which takes more phases a step than the roles of the others have."""
    prepare(tmp_path)
    request = new_request(rank=None, stalled_seconds=9.0)

    def answer_of(rank, phase, entered_by_all):
        return Answer(request.time, rank, 1, "host", 5, phase, entered_by_all, 9.0, None, {"main thread": phase})

    answers = {rank: answer_of(rank, "actor.update", 23) for rank in (0, 1)}
    answers |= {rank: answer_of(rank, "record", 24) for rank in (2, 3)}
    finding = tell(tmp_path, request, ranks=4, answers=answers, local={})
    assert [rank for rank in range(4) if f"it hangs in: rank {rank} " in finding.text] == [0, 1]


def test_an_answer_is_read_once_and_kept(tmp_path):
    """Reading all of a thousand again at each look took longer than the answers may take."""
    prepare(tmp_path)
    request = new_request(rank=0, stalled_seconds=9.0)
    first, second = (
        Answer(request.time, rank, 1, "host", 5, "step", 23, 9.0, None, {"main thread": ""}) for rank in (0, 1)
    )
    pipe = tmp_path / "heartbeats" / "answer-00000.json"
    os.mkfifo(pipe)

    def answer() -> None:
        with pipe.open("w", encoding="utf-8") as stream:  # once it is being read
            pipe.unlink()
            json.dump(asdict(first), stream)
        write_json(pipe.with_name("answer-00001.json"), asdict(second))

    ranks = threading.Thread(target=answer)
    ranks.start()
    assert gather(tmp_path, request, ranks=2, local={}) == {0: first, 1: second}
    ranks.join()


def test_many_ranks_have_longer_to_answer():
    assert answer_seconds(8) == answer_seconds(256) == 6.0
    assert answer_seconds(1024) > 20
