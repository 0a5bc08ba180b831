"""A profile of some steps: torch's profiler over a window of iterations, as Chrome traces in RUN/profile."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from megatron_xy import device
from megatron_xy.config import RuntimeConfig
from megatron_xy.storage import replace, storage_errors


class ProfileWindow:
    """Records the iterations of `runtime.profile` on the ranks that it names; does nothing on others."""

    def __init__(self, config: RuntimeConfig, *, run_dir: Path, rank: int) -> None:
        self._window = config.profiled_iterations
        self._iterations = self._window if rank in config.profile_ranks else range(0)
        self._path = run_dir / "profile" / f"rank-{rank:05d}.json"
        self._profile: profile | None = None

    def before_step(self, iteration: int) -> None:
        """Starts recording at the window's first iteration, or at the first one after a resume within it."""
        if iteration in self._iterations and self._profile is None:
            activities = [ProfilerActivity.CPU, *([] if device.is_cpu() else [ProfilerActivity.CUDA])]
            self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profile.start()

    def ends_with(self, iteration: int) -> bool:
        """Whether the ranks that are profiled write their traces after this iteration: the same answer on all ranks."""
        return iteration in self._window and iteration + 1 not in self._window

    def after_step(self, iteration: int) -> Path | None:
        """Ends at the window's last iteration; returns the trace that was written then."""
        return self.close() if self._profile is not None and iteration + 1 not in self._iterations else None

    def close(self) -> Path | None:
        """Writes what was recorded so far, if anything is being recorded; returns the trace."""
        if self._profile is None:
            return None
        self._profile.stop()
        temporary = self._path.with_name(f".tmp-{self._path.name}")
        with storage_errors(self._path):
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            self._profile.export_chrome_trace(str(temporary))
        self._profile = None
        replace(temporary, self._path)
        return self._path
