"""The profiling window: which ranks record it, and when all know that it ends."""

from megatron_xy.config import RuntimeConfig
from megatron_xy.training.profiling import ProfileWindow


def test_all_ranks_know_when_traces_are_written_and_those_named_write_them(tmp_path):
    config = RuntimeConfig(profile="2:4", profile_ranks=[1])
    for rank, names in [(0, []), (1, ["rank-00001.json"])]:
        window = ProfileWindow(config, run_dir=tmp_path, rank=rank)
        assert [iteration for iteration in range(6) if window.ends_with(iteration)] == [3]
        window.before_step(1)
        assert not window.is_open
        window.before_step(3)
        assert window.is_open
        window.close()
        assert not window.is_open
        assert [path.name for path in tmp_path.glob("profile/*")] == names
