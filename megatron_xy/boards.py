"""Where a run's scalars are drawn while it goes on: TensorBoard always, Weights & Biases where the config asks for it.

From the leader's log to RUN/tensorboard and RUN/wandb; what is exact lies in metrics.jsonl, whatever happens here.
"""

from __future__ import annotations

import importlib
import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml
from torch.utils.tensorboard import SummaryWriter

from megatron_xy.storage import write_text

TENSORBOARD_FOLDER = "tensorboard"
WANDB_FOLDER = "wandb"
WANDB_RUN_ID = "run_id"
FINISH_SECONDS = 30.0  # for what W&B still has to send when a run ends


class Board(Protocol):
    """What draws scalars over the iterations."""

    def add(self, scalars: Mapping[str, float], *, iteration: int) -> None:
        """Draws {name: value} of one iteration."""

    def close(self, *, at_once: bool) -> None:
        """Ends the drawing; `at_once` where the run fails and nobody may be kept waiting."""


def open_boards(run_dir: Path, *, iteration: int, wandb_project: str | None, say: Callable[[str], None]) -> list[Board]:
    """The boards of a run that goes on after `iteration`. `say` takes a line about what a board cannot do."""
    boards: list[Board] = [TensorBoard(run_dir, iteration=iteration)]
    if wandb_project is not None:
        boards.append(WeightsAndBiases(run_dir, iteration=iteration, project=wandb_project, say=say))
    return boards


class TensorBoard:
    """RUN/tensorboard; what an abandoned course drew beyond `iteration` is hidden."""

    def __init__(self, run_dir: Path, *, iteration: int) -> None:
        self._writer = SummaryWriter(str(run_dir / TENSORBOARD_FOLDER), purge_step=iteration + 1)

    def add(self, scalars: Mapping[str, float], *, iteration: int) -> None:
        """Draws {name: value} of one iteration."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self, *, at_once: bool) -> None:
        """Flushes and closes the file."""
        self._writer.close()


class WeightsAndBiases:
    """One W&B run for the course of a run folder, the same after every resume: its id lies in RUN/wandb/run_id.

    wandb lives in a thread of its own, so that neither its failure nor its waiting for a network holds the training up.
    A failure is said once, and the board is silent from then on.
    """

    def __init__(self, run_dir: Path, *, iteration: int, project: str, say: Callable[[str], None]) -> None:
        self._run_dir, self._project, self._say = run_dir, project, say
        self._id = _run_id(run_dir / WANDB_FOLDER / WANDB_RUN_ID, is_new_course=iteration == 0)
        self._scalars: queue.SimpleQueue[dict[str, float] | None] = queue.SimpleQueue()  # None: the end
        self._is_left = False  # nobody listens any more
        self._thread = threading.Thread(target=self._live, name="wandb", daemon=True)
        self._thread.start()

    def add(self, scalars: Mapping[str, float], *, iteration: int) -> None:
        """Hands {name: value} of one iteration over to the thread."""
        if self._thread.is_alive():
            self._scalars.put({"iteration": iteration, **scalars})

    def close(self, *, at_once: bool) -> None:
        """Waits for what is still to be sent, FINISH_SECONDS at most, or not at all."""
        self._scalars.put(None)
        self._thread.join(0 if at_once else FINISH_SECONDS)
        self._is_left = self._thread.is_alive()
        if self._is_left and not at_once:
            self._say(
                f"W&B is not done after {FINISH_SECONDS:g} s and is left; `wandb sync` sends what lies in "
                f"{self._run_dir / WANDB_FOLDER}"
            )

    def _live(self) -> None:
        try:
            self._log_all()
        except BaseException as error:  # whatever it raises, an abandoned login prompt too: the run is worth more
            if not self._is_left:
                self._say(f"W&B failed ({type(error).__name__}: {error}); the run goes on without it")

    def _log_all(self) -> None:
        """From wandb.init to its finish. Points carry their iteration: W&B's own step could not go back in a resume."""
        wandb = importlib.import_module("wandb")  # an extra, and a second to import: only where it is asked for
        run = wandb.init(
            project=self._project,
            name=self._run_dir.name,
            id=self._id,
            resume="allow",
            dir=str(self._run_dir),
            config=_config(self._run_dir / "run.yaml"),
            settings=wandb.Settings(silent=True, console="off", finish_timeout=FINISH_SECONDS),
        )
        run.define_metric("iteration")
        run.define_metric("*", step_metric="iteration")
        while (scalars := self._scalars.get()) is not None:
            run.log(scalars)
        run.finish()


def _run_id(path: Path, *, is_new_course: bool) -> str:
    """The W&B run that the folder's course belongs to; a course that begins anew is a new one."""
    if is_new_course or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()


def _config(path: Path) -> dict[str, Any]:
    """The run's configuration as it stands in its folder."""
    values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    return dict(values)
