"""Tasks of a build -> tasks of the Ray cluster that is running: one CPU each, on any of its machines.

The package must be installed on them all, and the corpus and the output lie on file systems that they share.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, TypeVar

from megatron_xy.errors import ConfigError, PeerLost

Result = TypeVar("Result")


class RayExecutor(Executor):
    """As concurrent.futures has them, over Ray's tasks; it leaves the cluster running."""

    def __init__(self) -> None:
        """Raises ConfigError where Ray is not installed, or no cluster is running."""
        try:
            import ray
        except ImportError as error:
            raise ConfigError("executor (ray): Ray is not installed; pip install 'megatron-xy[ray]'") from error
        if not ray.is_initialized():
            try:
                ray.init(address="auto", log_to_driver=False)
            except ConnectionError as error:
                raise ConfigError(
                    "executor (ray): no Ray cluster is running; start one with `ray start --head`, or name it in "
                    "RAY_ADDRESS"
                ) from error
        self._ray = ray
        self._remote = ray.remote(_call_in_folder)
        self._unfinished: set[Any] = set()

    def submit(self, function: Callable[..., Result], /, *arguments: Any, **keywords: Any) -> Future[Result]:
        """The result of function(*arguments, **keywords), called in this process's working folder."""
        reference = self._remote.remote(Path.cwd(), function, arguments, keywords)
        self._unfinished.add(reference)
        result: Future[Result] = Future()

        def finish(answer: Future[Any]) -> None:
            self._unfinished.discard(reference)
            if (error := answer.exception()) is None:
                result.set_result(answer.result())
            elif isinstance(error, self._ray.exceptions.RayTaskError):
                result.set_exception(error.cause)  # as it was raised, without Ray's words around it
            else:
                result.set_exception(PeerLost(f"a Ray worker was lost ({error}); run the same command again"))

        reference.future().add_done_callback(finish)
        return result

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes back what has not begun and, with `wait`, waits for what has."""
        unfinished = list(self._unfinished)
        if cancel_futures:
            for reference in unfinished:
                self._ray.cancel(reference, force=False)
        if wait and unfinished:
            self._ray.wait(unfinished, num_returns=len(unfinished))


def _call_in_folder(
    folder: Path, function: Callable[..., Result], arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> Result:
    """Runs in a worker of Ray's: paths mean there what they mean here."""
    os.chdir(folder)
    return function(*arguments, **keywords)
