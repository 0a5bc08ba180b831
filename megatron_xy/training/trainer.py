"""The loop of a training job: batch, step, log, save; from the newest valid checkpoint on, until done or asked to stop.

The data's way ends here: a loader gives the micro-batches of a data step, `train_step` learns from them. The tasks
differ in their loader, objective and evaluator.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch

from megatron_xy import device
from megatron_xy.checkpoint import course
from megatron_xy.config import RunConfig
from megatron_xy.data.loader import PreparedStep
from megatron_xy.errors import DataError
from megatron_xy.flops import recomputed_flops, step_flops
from megatron_xy.log import EVENTS, RunLog, why_skipped
from megatron_xy.model.parts import trained_parts
from megatron_xy.parallel import any_over, barrier, max_over, sum_over
from megatron_xy.peak import peak_rate
from megatron_xy.role import Role
from megatron_xy.runtime import waits
from megatron_xy.runtime.signals import StopRequest
from megatron_xy.runtime.watchdog import Watchdog
from megatron_xy.training.profiling import ProfileWindow
from megatron_xy.training.run_checkpoints import RunCheckpoints, RunState
from megatron_xy.training.schedule import learning_rate
from megatron_xy.training.step_record import Spent, step_record
from megatron_xy.training.stragglers import StragglerWatch
from megatron_xy.training.train_step import Objective, StepResult, train_step


class Loader(Protocol):
    """A task's data: data steps as micro-batches."""

    sources: list[str]
    data_fingerprints: dict[str, Any]
    chat_template: str | None

    def get(self, data_step: int) -> tuple[PreparedStep, float]:
        """The step's micro-batches for this data parallel rank and the seconds waited for them."""

    def consumed_shares(self, data_step: int) -> dict[str, float]:
        """{source: its part of the tokens of all steps before `data_step`}."""

    def epochs_by_source(self, data_step: int) -> dict[str, dict[str, float]]:
        """{source: {bucket: how often its samples were drawn in all steps before `data_step`}}; {} where untold."""

    def begun_epochs(self, data_step: int) -> list[tuple[str, int, int]]:
        """(source, bucket, number) of every epoch but the first that `data_step` begins."""

    def ends_epoch(self, iteration: int) -> bool:
        """Whether an iteration is the last of an epoch that leaves a checkpoint."""

    def close(self) -> None:
        """Ends what prepares steps."""


class Evaluator(Protocol):
    """A task's evaluations during training."""

    def is_due(self, iteration: int) -> bool:
        """Whether one follows on this iteration, and on its checkpoint."""

    def evaluate(self, role: Role, *, iteration: int, goes_on: Callable[[], bool]) -> dict[str, Any] | None:
        """Its record, whose `scores`, if there are some, the checkpoint keeps, too; None where `goes_on`, asked now and
        then, said no. Collective over the role."""

    def tell(self, log: RunLog, record: dict[str, Any], *, seconds: float) -> None:
        """Logs its record."""


class Trainer:
    """Trains one role over its data. Every rank of the role runs the same loop."""

    def __init__(
        self,
        config: RunConfig,
        *,
        role: Role,
        loader: Loader,
        evaluator: Evaluator,
        log: RunLog,
        watchdog: Watchdog,
        stop: StopRequest,
        objective: Objective | None = None,
        keeps_epochs: bool = False,
    ) -> None:
        """objective: next-token prediction unless given; keeps_epochs: checkpoints at their ends are not let go of."""
        self.config, self.role, self.loader = config, role, loader
        self.evaluator, self.objective = evaluator, objective
        self.log, self.watchdog, self.stop = log, watchdog, stop
        self.state = RunState()
        self.checkpoints = RunCheckpoints(
            config,
            role=role,
            data_fingerprints=loader.data_fingerprints,
            chat_template=loader.chat_template,
            ends_epoch=loader.ends_epoch,
            keeps_epochs=keeps_epochs,
            log=log,
        )
        self.profile = ProfileWindow(
            config.runtime, run_dir=config.run_dir, rank=role.groups.ranks[role.groups.role_rank]
        )
        self._seconds_between_steps = {"save": 0.0, "evaluate": 0.0}  # since the last record
        self._peak_rate = peak_rate()
        self.stragglers = StragglerWatch(role)

    def restore(self) -> None:
        """Goes on from the checkpoint that the config asks for; else from `model.load`, else from fresh weights."""
        self.state = self.checkpoints.restore()

    def train(self) -> None:
        """Runs to `train_iters`. Raises Stopped once the state is saved after a request to stop."""
        train_iters = self.config.training.train_iters
        saved = self.state.training.iteration
        self.log.open_metrics(iteration=saved)
        runtime = self.config.runtime
        if runtime.profiled_iterations.start > train_iters:  # of a run in epochs it is known from here on
            self.log.say(
                f"runtime.profile ({runtime.profile}) begins after the last step ({train_iters}): nothing is recorded"
            )
        if saved and self._is_evaluation_missing(saved) and not self._evaluate(saved):
            self._leave_stopped(saved)
        first = saved + 1
        for iteration in range(first, train_iters + 1):
            with self.log.phase("first step") if iteration == first else contextlib.nullcontext():
                stopping = self._step(iteration)
            if self.checkpoints.is_due(iteration) or stopping:
                self._save(iteration)
                saved = iteration
            is_done = iteration == train_iters
            if self.evaluator.is_due(iteration):
                is_evaluated = not stopping and self._evaluate(iteration)
                stopping, is_done = not is_evaluated, is_done and is_evaluated
            if stopping and not is_done:
                if saved != iteration:  # asked to stop during the evaluation, which the resumed run makes up for
                    self._save(iteration)
                self._leave_stopped(iteration)
        self._finish(self.state.training.iteration)
        self.log.say(f"done: {self.state.training.iteration} iterations, last checkpoint at iteration {saved}")

    def _leave_stopped(self, iteration: int) -> None:
        self._finish(iteration)
        raise course.stopped_after(iteration, self.config)

    def _finish(self, iteration: int) -> None:
        """Waits until the last checkpoint is whole, and what a window that outlasts the run has recorded."""
        self._beat("finish", iteration)
        self.checkpoints.finish()
        if self.profile.is_open:
            self._write_profile(iteration)

    def _write_profile(self, iteration: int) -> None:
        """Ends the profile. Collective: a large trace takes minutes, which is no hang while all ranks wait for it."""
        self._beat("profile", iteration)
        self.watchdog.tell()
        self.profile.close()
        barrier(self.role.groups)
        self.log.say(f"profile written to {self.profile.folder}")

    def _step(self, iteration: int) -> bool:
        """One step, recorded; returns whether any rank was asked to stop, the same answer on all."""
        self._beat("data", iteration)
        self.profile.before_step(iteration)
        began = time.perf_counter()
        before = self.state.training
        prepared, waited = self.loader.get(before.data_step)
        self._beat("step", iteration)
        lr = learning_rate(
            self.config.optimizer,
            iteration=iteration,
            consumed_tokens=before.consumed_tokens + prepared.num_tokens,
            train_iters=self.config.training.train_iters,
        )
        train_only = self.config.training.train_only_at(before.data_step)
        waits.begin_timing()
        result = train_step(
            self.role,
            prepared.micro_batches,
            num_sources=len(self.loader.sources),
            lr=lr,
            clip_grad=self.config.optimizer.clip_grad,
            train_only=train_only,
            objective=self.objective,
            judge=partial(self._judge, prepared),
            before_update=partial(self.checkpoints.before_update, iteration=iteration),
        )
        device.synchronize()
        seconds = time.perf_counter() - began
        stragglers = self.stragglers.add(seconds - waited - waits.end_timing())
        reasons = self._reasons(prepared, result.loss, result.grad_norm)
        self.state.add(prepared, result, trained=trained_parts(train_only, model=self.role.model))
        spent, stopping = self._spent(prepared, seconds=seconds, waited=waited)
        record = self._record(prepared, result, spent, lr=lr, is_spike=bool(reasons))
        self.log.step(record, train_iters=self.config.training.train_iters)
        self.log.epochs(self.loader.begun_epochs(before.data_step), data_step=before.data_step)
        for straggler in stragglers:
            self.log.straggler(straggler.rank, straggler.factor, straggler.busy_seconds, iteration=iteration)
        if self.profile.ends_with(iteration):
            self._write_profile(iteration)
        if reasons or not result.updated:
            self._note(record, prepared, reasons=reasons or [why_skipped(record)])
        return stopping

    def _record(
        self, prepared: PreparedStep, result: StepResult, spent: Spent, *, lr: float, is_spike: bool
    ) -> dict[str, Any]:
        state, loader = self.state.training, self.loader
        record = step_record(
            state,
            prepared,
            result,
            spent,
            lr=lr,
            sources=loader.sources,
            shares=loader.consumed_shares(state.data_step),
            epochs=loader.epochs_by_source(state.data_step),
            between_steps=self._seconds_between_steps,
            is_spike=is_spike,
        )
        self._seconds_between_steps = dict.fromkeys(self._seconds_between_steps, 0.0)
        return record

    def _reasons(self, prepared: PreparedStep, loss: float, grad_norm: float) -> list[str]:
        return self.state.history.reasons(
            bucket=prepared.bucket, loss=loss, grad_norm=grad_norm, sigmas=self.config.training.spike_sigmas
        )

    def _judge(self, prepared: PreparedStep, loss: float, grad_norm: float) -> bool:
        """Whether a step's update is made: not without a loss, nor, under the policy `skip`, where it stands out.

        Collective, where the loss is finite: one rank's doubt is enough.
        """
        if not math.isfinite(loss) or self.config.training.spike_policy != "skip":
            return math.isfinite(loss)
        stands_out = bool(self._reasons(prepared, loss, grad_norm))
        return not any_over(stands_out, self.role.groups.all_ranks)

    def _note(self, record: dict[str, Any], prepared: PreparedStep, *, reasons: list[str]) -> None:
        """Records a step that stands out or was skipped with its samples; raises DataError after too many in a row."""
        names = ("iteration", "data_step", "bucket", "loss", "grad_norm", "lr", "skipped", "spike")
        event = {name: record[name] for name in names}
        self.log.event({**event, "reasons": reasons, "samples": prepared.samples})
        limit = self.config.training.max_skipped_in_a_row
        if self.state.history.skipped_in_a_row >= limit:
            raise DataError(
                f"the updates of {limit} steps in a row were skipped ({reasons[0]} at step {record['iteration']}); "
                f"{self.config.run_dir / EVENTS} names their samples: go on from an earlier checkpoint "
                f"(checkpoint.resume=ITERATION) with a lower optimizer.lr or without that data, or raise "
                f"training.max_skipped_in_a_row"
            )

    def _spent(self, prepared: PreparedStep, *, seconds: float, waited: float) -> tuple[Spent, bool]:
        """What the step took, and whether any rank was asked to stop. Collective, for the counts."""
        groups, model = self.role.groups, self.role.model
        local = [
            sum(batch.num_padding_tokens for batch in prepared.micro_batches),
            sum(batch.sum_squared_lengths for batch in prepared.micro_batches),
            int(self.stop.requested),
            device.peak_memory_bytes(),
        ]
        mine = torch.tensor(local, dtype=torch.float64, device=device.current())
        sums, largest = sum_over(mine[:2], groups.collection.dp), max_over(mine[2:], groups.all_ranks)
        padding, squares, stopping, peak_memory = map(int, torch.cat([sums, largest]).tolist())
        room = groups.dp_size * sum(batch.tokens.size for batch in prepared.micro_batches)
        work = {"num_tokens": room - padding, "sum_squared_lengths": squares}
        spent = Spent(
            seconds,
            waited,
            padding,
            room,
            flops=step_flops(model, **work),
            recomputed_flops=recomputed_flops(model, **work),
            peak_rate=len(groups.ranks) * self._peak_rate if self._peak_rate else None,
            peak_memory_bytes=peak_memory,
        )
        return spent, bool(stopping)

    def _is_evaluation_missing(self, iteration: int) -> bool:
        """Whether the run that is resumed ended before it was evaluated here. Collective: the leader has the file."""
        if not self.evaluator.is_due(iteration):
            return False
        return not any_over(self.log.has_evaluation(iteration), self.role.groups.all_ranks)

    def _evaluate(self, iteration: int) -> bool:
        """Evaluates and records it; False where a request to stop came first, the same answer on all ranks."""
        began = time.perf_counter()

        def goes_on() -> bool:
            self._beat("evaluate", iteration)
            return not any_over(self.stop.requested, self.role.groups.all_ranks)

        record = self.evaluator.evaluate(self.role, iteration=iteration, goes_on=goes_on)
        if record is not None and record.get("scores"):
            self._beat("save", iteration)
            self.checkpoints.amend(iteration, {"scores": record["scores"]})
        seconds = time.perf_counter() - began
        self._seconds_between_steps["evaluate"] += seconds
        if record is not None and self.role.groups.is_leader:
            self.evaluator.tell(self.log, record, seconds=seconds)
        return record is not None

    def _save(self, iteration: int) -> None:
        self._beat("save", iteration)
        self._seconds_between_steps["save"] += self.checkpoints.save(self.state)

    def _beat(self, phase: str, iteration: int) -> None:
        self.watchdog.beat(iteration=iteration, phase=phase)


@contextlib.contextmanager
def starting(log: RunLog, watchdog: Watchdog, phase: str) -> Iterator[None]:
    """Around a phase of the start-up: the watchdog is told it, and its seconds are said."""
    watchdog.beat(iteration=0, phase=phase)
    with log.phase(phase):
        yield
