"""The phases of a PPO step: their seconds, and the word of each to the watchdog."""

from __future__ import annotations

import time

from megatron_xy.runtime.watchdog import Watchdog


class Phases:
    """Seconds by phase of one step; the watchdog is told each."""

    def __init__(self, watchdog: Watchdog, iteration: int, *, roles: str) -> None:
        """roles: of this rank, which a hang's report tells where the rank waits for other ones."""
        self._watchdog, self._iteration, self._roles = watchdog, iteration, roles
        self._name, self._began = "", time.perf_counter()
        self.seconds: dict[str, float] = {}

    def enter(self, name: str) -> None:
        """The next phase; the time so far belongs to the one before."""
        now = time.perf_counter()
        if self._name:
            self.seconds[self._name] = now - self._began
        self._name, self._began = name, now
        self._watchdog.beat(iteration=self._iteration, phase=f"{name} (roles: {self._roles})")
