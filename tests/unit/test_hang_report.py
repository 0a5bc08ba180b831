"""The report of a run that stands still: who files the request for it."""

import time
from dataclasses import replace

from megatron_xy.run_folder import prepare
from megatron_xy.runtime.hang_report import claim, new_request


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
