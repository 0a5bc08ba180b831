"""The report of a run that stands still: who files the request for it."""

import time
from dataclasses import replace

from megatron_xy.run_folder import prepare
from megatron_xy.runtime.hang_report import Answer, claim, new_request, tell


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
