"""Which checkpoints a run follows after a new beginning."""

from __future__ import annotations

import pytest

from megatron_xy.checkpoint import course
from megatron_xy.config import RunConfig


def test_later_checkpoints_are_set_aside_and_never_deleted(tmp_path):
    for iteration in (2, 4, 6):
        (tmp_path / "checkpoints" / f"iter_{iteration:07d}").mkdir(parents=True)
    for name in ("iter_0000002", "iter_0000003", "iter_0000006"):
        (tmp_path / "hf" / name).mkdir(parents=True)
    said: list[str] = []
    course.set_aside(tmp_path, iteration=2, say=said.append)
    assert all((tmp_path / parent / "iter_0000002").is_dir() for parent in ("checkpoints", "hf"))
    (tmp_path / "checkpoints" / "iter_0000004").mkdir()
    course.set_aside(tmp_path, iteration=0, say=said.append)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [
        "abandoned_1_iter_0000002",
        "abandoned_1_iter_0000004",
        "abandoned_1_iter_0000006",
        "abandoned_2_iter_0000004",
    ]
    names = sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert names == ["abandoned_1_iter_0000002", "abandoned_1_iter_0000003", "abandoned_1_iter_0000006"]
    told = "iter_0000006 (checkpoints, hf) lies behind iteration 2, from which this run starts: set aside as"
    assert len(said) == 5 and f"{told} abandoned_1_iter_0000006" in said


@pytest.mark.parametrize(
    ("resume", "goes_on"),
    [
        ("auto", "the same command goes on from there"),
        ("never", "with checkpoint.resume=auto in place of never it goes on from there"),
        (40, "with checkpoint.resume=auto in place of 40 it goes on from there"),
    ],
)
def test_a_stopped_run_says_what_goes_on(resume, goes_on):
    config = RunConfig.model_validate({"checkpoint": {"resume": resume}})
    assert str(course.stopped_after(7, config)) == f"stopped on request after step 7, state saved; {goes_on}"
