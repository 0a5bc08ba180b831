"""The boards of a run: W&B, offline, holds one run over all resumes; nothing that it does ends a training."""

import contextlib
import importlib.util
import json
import struct
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_xy import preflight
from megatron_xy.boards import WeightsAndBiases
from megatron_xy.config import RuntimeConfig
from megatron_xy.errors import ConfigError, PeerLost, Stopped
from megatron_xy.log import METRICS, RunLog
from tests.unit.test_log import record

BLOCK = 32768  # bytes of a .wandb file: a log of records in blocks, as LevelDB's
with_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb, an extra, is not installed")


def history_of(run_file: Path) -> list[dict[str, object]]:
    """The points that an offline run has kept for `wandb sync`."""
    from wandb.proto import wandb_internal_pb2

    content, offset, whole, points = run_file.read_bytes(), 7, b"", []
    while offset < len(content):
        if BLOCK - offset % BLOCK < 7:
            offset += BLOCK - offset % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, offset)
        whole += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            kept = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            if kept.WhichOneof("record_type") == "history":
                names = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in kept.history.item
                }
                points.append({name: value for name, value in names.items() if not name.startswith("_")})
    return points


def run_files(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)


@with_wandb
def test_an_offline_run_keeps_all_scalars_under_one_id_over_a_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for iteration in (0, 2):  # written to 3, then resumed from 2
        with RunLog(tmp_path, rank=0, is_leader=True, wandb_project="project") as log:
            log.open_metrics(iteration=iteration)
            log.step(record(iteration + 1, loss=5.0 - iteration), train_iters=4)
        time.sleep(1 - time.time() % 1)  # wandb names its folders by the second
    first, second = run_files(tmp_path)
    assert first.name == second.name == f"run-{(tmp_path / 'wandb' / 'run_id').read_text().strip()}.wandb"
    (point,), (resumed,) = history_of(first), history_of(second)
    expected = {"iteration": 1, "loss": 5.0, "lr": 3e-4, "loss_by_bucket/128": 5.0, "loss_by_source/code": 0.1}
    assert {name: point[name] for name in expected} == expected
    assert (resumed["iteration"], resumed["loss"]) == (3, 3.0)
    assert (tmp_path / "tensorboard").is_dir()
    out, err = capsys.readouterr()
    assert "W&B" not in out + err, "neither a failure nor a word of wandb's own"


def test_a_course_begun_anew_is_another_run(tmp_path):
    ids = []
    for iteration in (0, 8, 0):
        board = WeightsAndBiases(tmp_path, iteration=iteration, project="project", say=lambda line: None)
        board.close(at_once=True)
        ids.append((tmp_path / "wandb" / "run_id").read_text())
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    "broken", ["raise RuntimeError('no such service')", "def init(**options): raise OSError('full')"]
)
def test_a_failure_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys, broken):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "wandb.py").write_text(broken + "\nSettings = dict\n")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    run_dir = tmp_path / "run"
    with RunLog(run_dir, rank=0, is_leader=True, wandb_project="project") as log:
        log.open_metrics(iteration=0)
        for iteration in (1, 2, 3):
            log.step(record(iteration), train_iters=3)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    told = [line for line in capsys.readouterr().out.splitlines() if "W&B" in line]
    assert len(told) == 1 and told[0].endswith("; the run goes on without it"), told
    assert [json.loads(line)["iteration"] for line in (run_dir / METRICS).read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("error", [None, Stopped("stopped"), PeerLost("lost")])
def test_a_board_that_hangs_is_left_after_its_time_and_at_once_where_the_run_fails(
    tmp_path, monkeypatch, capsys, error
):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "wandb.py").write_text(
        "import pathlib, time\nSettings = dict\n"
        f"def init(**options): time.sleep(0.7); pathlib.Path({str(tmp_path / 'over')!r}).touch(); raise OSError\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr("megatron_xy.boards.FINISH_SECONDS", 0.3)

    def run() -> None:
        with RunLog(tmp_path / "run", rank=0, is_leader=True, wandb_project="project") as log:
            log.open_metrics(iteration=0)
            log.step(record(1), train_iters=1)
            assert not (tmp_path / "over").exists(), "a step does not wait for W&B"
            if error:
                raise error

    with pytest.raises(type(error)) if error else contextlib.nullcontext():
        run()
    waited = "W&B is not done after 0.3 s" in capsys.readouterr().out
    assert waited == (not isinstance(error, PeerLost))
    for thread in threading.enumerate():
        if thread.name == "wandb":
            thread.join(5)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


def test_wandb_asked_for_and_not_installed_is_a_config_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    preflight.check_boards(RuntimeConfig())
    with pytest.raises(ConfigError, match=r"runtime\.wandb_project \(mine\): wandb is not installed; pip install"):
        preflight.check_boards(RuntimeConfig(wandb_project="mine"))
