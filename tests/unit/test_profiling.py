"""The profiling window: which ranks record it, and when all know that it ends."""

from megatron_xy.config import RuntimeConfig
from megatron_xy.training.profiling import ProfileWindow


def test_all_ranks_know_when_traces_are_written_and_those_named_write_them(tmp_path):
    config = RuntimeConfig(profile="2:4", profile_ranks=[1])
    windows = [ProfileWindow(config, run_dir=tmp_path, rank=rank) for rank in range(2)]
    for window in windows:
        assert [iteration for iteration in range(6) if window.ends_with(iteration)] == [3]
        window.before_step(3)
    traces = [window.after_step(3) for window in windows]
    assert traces[0] is None and traces[1] is not None and traces[1].is_file()
