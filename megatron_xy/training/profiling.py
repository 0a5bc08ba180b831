"""A profile of some steps: torch's profiler over a window of iterations, as Chrome traces in RUN/profile."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from megatron_xy import device
from megatron_xy.config import RuntimeConfig
from megatron_xy.storage import replace, storage_errors


class ProfileWindow:
    """Records the iterations of `runtime.profile` on the ranks that it names. Every rank calls each method.

    is_open: from the window's first step until `close`, the same on all ranks. folder: of the traces.
    """

    def __init__(self, config: RuntimeConfig, *, run_dir: Path, rank: int) -> None:
        self._window = config.profiled_iterations
        self._is_recorded = rank in config.profile_ranks
        self.folder = run_dir / "profile"
        self._path = self.folder / f"rank-{rank:05d}.json"
        self.is_open = False
        self._profile: profile | None = None

    def before_step(self, iteration: int) -> None:
        """Starts recording at the window's first iteration, or at the first one after a resume within it."""
        if iteration not in self._window or self.is_open:
            return
        self.is_open = True
        if self._is_recorded:
            activities = [ProfilerActivity.CPU, *([] if device.is_cpu() else [ProfilerActivity.CUDA])]
            self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profile.start()

    def ends_with(self, iteration: int) -> bool:
        """Whether the window ends with this iteration."""
        return iteration in self._window and iteration + 1 not in self._window

    def close(self) -> None:
        """Writes what was recorded so far. torch holds the interpreter meanwhile, for minutes where that is much."""
        self.is_open = False
        if self._profile is None:
            return
        self._profile.stop()
        temporary = self._path.with_name(f".tmp-{self._path.name}")
        with storage_errors(self._path):
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self._profile.export_chrome_trace(str(temporary))
        self._profile = None
        replace(temporary, self._path)
