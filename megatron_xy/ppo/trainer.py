"""The loop of a PPO run: prompts, answers, experience, updates, record, checkpoint.

Every rank of the world runs it; ranks outside a role take part in the exchanges alone.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_xy import device
from megatron_xy.checkpoint import course
from megatron_xy.checkpoint.files import TrainingState
from megatron_xy.config import RunConfig
from megatron_xy.log import RunLog
from megatron_xy.parallel import max_over, sum_over
from megatron_xy.peak import peak_rate
from megatron_xy.ppo.alarms import SkippedUpdates, check_finite, ratio_alarm
from megatron_xy.ppo.checkpoints import PPOCheckpoints
from megatron_xy.ppo.dumps import cut_rollouts, dump_rollout
from megatron_xy.ppo.engine import PPO
from megatron_xy.ppo.experience import Experience, Rollout
from megatron_xy.ppo.material import Material
from megatron_xy.ppo.record import step_record, step_work
from megatron_xy.ppo.rollouts import AnswerSource, as_rollout
from megatron_xy.ppo.samples import sample_line, samples
from megatron_xy.ppo.worker import TRAINED, Cast
from megatron_xy.runtime.signals import StopRequest
from megatron_xy.runtime.watchdog import Watchdog
from megatron_xy.training.schedule import learning_rate
from megatron_xy.training.step_record import Spent


class PPOTrainer:
    """Runs PPO to `train_iters`. source: of the answers."""

    def __init__(
        self,
        config: RunConfig,
        material: Material,
        *,
        cast: Cast,
        engine: PPO,
        source: AnswerSource,
        log: RunLog,
        watchdog: Watchdog,
        stop: StopRequest,
    ) -> None:
        self.config, self.ppo, self.cast, self.engine, self.source = config, config.ppo_section, cast, engine, source
        self.prompts, self.renderers = material.prompts, material.renderers
        self.log, self.watchdog, self.stop = log, watchdog, stop
        self.checkpoints = PPOCheckpoints(config, material, cast=cast, log=log)
        self.states = {name: TrainingState() for name in TRAINED}
        self._skipped = SkippedUpdates(limit=config.training.max_skipped_in_a_row)
        self._peak_rate = peak_rate()
        for worker in cast.trained:
            worker.before_update = partial(self._before_update, worker.name)

    @property
    def state(self) -> TrainingState:
        """Where the run stands; the roles differ in their updates alone."""
        return self.states["actor"]

    def restore(self) -> None:
        """Goes on from the checkpoint that the config asks for, else from what each role's `model.load` names."""
        self.states = self.checkpoints.restore(self.engine, self._skipped)

    def train(self) -> None:
        """Runs to `train_iters`. Raises Stopped once the state is saved after a request to stop."""
        train_iters = self.config.training.train_iters
        self.log.open_metrics(iteration=self.state.iteration)
        if self.cast.world.role_rank == 0:
            cut_rollouts(self.config.run_dir / "rollouts", iteration=self.state.iteration)
        for iteration in range(self.state.iteration + 1, train_iters + 1):
            stopping = self._step(iteration)
            if self.checkpoints.is_due(iteration) or stopping:
                self._save(iteration)
            if stopping and iteration < train_iters:
                self._finish()
                raise course.stopped_after(iteration, self.config)
        self._finish()
        self.log.say(f"done: {self.state.iteration} iterations")

    def _before_update(self, name: str) -> None:
        self.checkpoints.before_update(name, iteration=self.states[name].iteration + 1)

    def _step(self, iteration: int) -> bool:
        """One PPO step, recorded; returns whether any rank was asked to stop."""
        began = time.perf_counter()
        phases = _Phases(self.watchdog, iteration, roles=self.cast.roles_here)
        phases.enter("generate")
        rollout, waited = self._rollout()
        phases.enter("score")
        check = partial(check_finite, prompts=self.prompts, iteration=iteration)
        experience = self.engine.collect(rollout, check=check)
        if self.ppo.dump_rollouts and self.cast.world.role_rank == 0:
            dump_rollout(experience, self.config.run_dir / "rollouts", iteration=iteration)
        phases.enter("update")
        rates = self._rates(iteration, consumed_tokens=self.state.consumed_tokens + rollout.num_tokens)
        is_warmup = iteration <= self.ppo.critic_warmup_iters
        metrics = self.engine.learn(experience, self._mini_batches(iteration), rates, is_warmup=is_warmup)
        phases.enter("record")
        seconds = time.perf_counter() - began
        for name, before in self.states.items():
            self.states[name] = before.after_step(
                num_samples=len(rollout.drawn),
                num_tokens=rollout.num_tokens,
                num_updates=int(metrics[f"{name}_updates"]),
            )
        spent, by_role, stopping = self._spent(rollout, seconds=seconds, waited=waited, is_warmup=is_warmup)
        record = step_record(
            self.state,
            experience,
            metrics,
            rates,
            spent,
            by_phase=phases.seconds,
            by_role=by_role,
            is_warmup=is_warmup,
            ppo_epochs=self.ppo.ppo_epochs,
            micro_batch_tokens=self.cast.workers["actor"].placed.micro_batch_tokens,
        )
        self._tell(record, experience, metrics, is_warmup=is_warmup)
        return stopping

    def _rollout(self) -> tuple[Rollout, float]:
        """The step's prompts with an answer each; the seconds for the prompts."""
        began = time.perf_counter()
        first = self.state.consumed_samples
        drawn = self.prompts.draw(first, self.ppo.rollout_batch_size)
        rendered = {
            renderer: [self.prompts.tokens(draw.row, renderer) for draw in drawn]
            for renderer in set(self.renderers.values())  # roles of one template share one
        }
        prompts = {name: rendered[renderer] for name, renderer in self.renderers.items()}
        waited = time.perf_counter() - began
        return as_rollout(drawn, prompts, self.source.answers(drawn, prompts["actor"], first=first)), waited

    def _tell(
        self, record: dict[str, Any], experience: Experience, metrics: dict[str, float], *, is_warmup: bool
    ) -> None:
        """Logs a step: its record, answers to look at, what is wrong with it."""
        iteration = self.state.iteration
        num_updates = self.ppo.ppo_epochs * self.ppo.rollout_batch_size // self.ppo.mini_batch_size
        wanted = {"actor": 0 if is_warmup else num_updates, "critic": num_updates}
        skipped = {name: count - int(metrics[f"{name}_updates"]) for name, count in wanted.items()}
        record["skipped"] = any(skipped.values())
        self.log.ppo_step(record, train_iters=self.config.training.train_iters)
        chosen = samples(experience, self.prompts, self.renderers["actor"])
        self.log.samples(chosen, iteration=iteration)
        if iteration == 1 or self.checkpoints.is_due(iteration):
            for sample in chosen:
                self.log.say(sample_line(sample))
        self._skipped.add(skipped, wanted=wanted, metrics=metrics, iteration=iteration, say=self.log.say)
        dtype = self.cast.workers["actor"].placed.model.params_dtype
        alarm = ratio_alarm(metrics["ratio_first_max"], params_dtype=dtype) if wanted["actor"] else None
        if alarm:
            self.log.say(alarm)

    def _mini_batches(self, iteration: int) -> list[list[int]]:
        """Indices of answers, shuffled anew for every epoch of every step; the same on all ranks."""
        size = self.ppo.rollout_batch_size
        batches: list[list[int]] = []
        for epoch in range(self.ppo.ppo_epochs):
            order = np.random.Generator(np.random.Philox(key=[self.config.seed, iteration * 1000 + epoch]))
            shuffled = order.permutation(size).tolist()
            batches += [
                sorted(shuffled[place : place + self.ppo.mini_batch_size])
                for place in range(0, size, self.ppo.mini_batch_size)
            ]
        return batches

    def _rates(self, iteration: int, *, consumed_tokens: int) -> dict[str, float]:
        """By role."""
        rates = {}
        for worker in self.cast.trained:
            assert worker.placed.optimizer is not None, "a trained role has one"
            rates[worker.name] = learning_rate(
                worker.placed.optimizer,
                iteration=iteration,
                consumed_tokens=consumed_tokens,
                train_iters=self.config.training.train_iters,
            )
        return rates

    def _spent(
        self, rollout: Rollout, *, seconds: float, waited: float, is_warmup: bool
    ) -> tuple[Spent, dict[str, float], bool]:
        """What the step took; the seconds that each role has worked, mean of its ranks; whether any rank was asked to
        stop. Collective, for the counts."""
        workers, world = self.cast.workers, self.cast.world
        busy = [worker.take_busy_seconds() for worker in workers.values()]
        paddings, rooms = zip(*(worker.take_padding() for worker in workers.values()), strict=True)
        local = [int(self.stop.requested), device.peak_memory_bytes(), sum(paddings), sum(rooms), *busy]
        mine = torch.tensor(local, dtype=torch.float64, device=device.current())
        largest, sums = max_over(mine[:2], world.all_ranks), sum_over(mine[2:], world.all_ranks)
        stopping, peak_memory, padding, room, *total = torch.cat([largest, sums]).tolist()
        epochs = self.ppo.ppo_epochs
        flops, recomputed = step_work(
            {name: worker.placed.model for name, worker in workers.items()},
            rollout,
            is_generated=self.ppo.responses is None,
            epochs={"actor": 0 if is_warmup else epochs, "critic": epochs},
        )
        spent = Spent(
            seconds,
            waited,
            int(padding),
            int(room),
            flops=flops,
            recomputed_flops=recomputed,
            peak_rate=len(world.ranks) * self._peak_rate if self._peak_rate else None,
            peak_memory_bytes=int(peak_memory),
        )
        by_role = {
            name: worked / len(worker.placed.ranks)
            for (name, worker), worked in zip(workers.items(), total, strict=True)
        }
        return spent, by_role, bool(stopping)

    def _save(self, iteration: int) -> None:
        self.watchdog.beat(iteration=iteration, phase="save")
        self.checkpoints.save(self.states, self.engine.state, self._skipped)

    def _finish(self) -> None:
        self.watchdog.beat(iteration=self.state.iteration, phase="finish")
        self.checkpoints.finish()


class _Phases:
    """The seconds of a step by phase; the watchdog is told each."""

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
