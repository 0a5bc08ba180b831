"""What becomes of a run's dumped rollouts."""

from __future__ import annotations

from pathlib import Path

from megatron_xy.ppo.dumps import cut_rollouts


def test_those_of_later_steps_go_and_what_a_user_has_put_there_stays(tmp_path: Path) -> None:
    for name in ("iter_0000002", "iter_0000003", "iter_0000010", "iter_0000010 (copy)", "mine"):
        (tmp_path / f"{name}.safetensors").touch()
    cut_rollouts(tmp_path, iteration=2)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["iter_0000002", "iter_0000010 (copy)", "mine"]
