"""The loop over real ranks: phases, resumed anywhere, against an unbroken run, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import loop
from tests.distributed.spawn import run_ranks
from tests.end_to_end.tiny_run import hash_of, make_data, metrics_of, without_clock


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


PHASES = [
    {"from_iter": 5, "weights": {"code": 9, "prose": 1}, "global_batch_tokens": 2048},
    {"from_iter": 9, "global_batch_tokens": 1024},
]
BY_TOKENS = {"lr_decay_iters": None, "lr_warmup_tokens": 4096, "lr_decay_tokens": 16384}


def test_phases_are_followed_and_a_run_broken_within_them_equals_the_unbroken_one(data, tmp_path):
    """lr by tokens, batch size, mixture and counters follow the phases; stops lie within and on their borders."""
    changes = {"training": {"phases": PHASES}, "optimizer": BY_TOKENS, "data": {"weights": {"code": 1, "prose": 9}}}
    whole, broken = (loop.config_of(data, tmp_path / name, **changes) for name in ("whole", "broken"))
    parts = [loop.until(broken, iteration) for iteration in (5, 7)]
    run_ranks(loop.train, whole, *parts, broken, world_size=2)
    records = metrics_of(tmp_path / "whole")
    assert without_clock(metrics_of(tmp_path / "broken")) == without_clock(records)
    last = "checkpoints/iter_0000012"
    assert hash_of(tmp_path / "broken" / last) == hash_of(tmp_path / "whole" / last)
    consumed = 0
    for record in records:
        assert record["iteration"] == record["data_step"] + 1
        consumed += 2048 if 5 <= record["data_step"] < 9 else 1024
        assert record["consumed_tokens"] == consumed
        want = 1e-2 * consumed / 4096 if consumed <= 4096 else None
        assert want is None or record["lr"] == pytest.approx(want, rel=1e-12)
    assert records[-1]["lr"] == pytest.approx(1e-3, rel=1e-12) and consumed == 16384
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    code = [record["num_loss_tokens_by_source"].get("code", 0) / record["num_loss_tokens"] for record in records]
    assert sum(code[5:]) / 7 > 0.75 > 0.3 > sum(code[:5]) / 5
