"""The loop of a PPO run: prompts, answers, experience, updates, record, checkpoint; resumed exactly.

Every rank of the world runs it; ranks outside a role take part in the exchanges alone.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_xy import continuation, course, device, mcore
from megatron_xy.checkpoint import CheckpointWriter
from megatron_xy.checkpoint_choice import find_resumable
from megatron_xy.checkpoint_files import METADATA, TrainingState, read_manifest
from megatron_xy.checkpoint_folders import sweep
from megatron_xy.checkpoint_state import load_state
from megatron_xy.config import RunConfig
from megatron_xy.errors import DataError
from megatron_xy.hf.convert import export
from megatron_xy.hf.kept import kept_facts
from megatron_xy.liveness import went_forward
from megatron_xy.log import RunLog
from megatron_xy.model_source import split_origin
from megatron_xy.parallel import Groups, barrier, max_over, sum_over
from megatron_xy.peak import peak_rate
from megatron_xy.ppo.controllers import RunningMoments
from megatron_xy.ppo.engine import PPO, LearningRates, PPOState
from megatron_xy.ppo.experience import Experience
from megatron_xy.ppo.facts import facts
from megatron_xy.ppo.phases import Phases
from megatron_xy.ppo.prompts import PromptFile, Renderer
from megatron_xy.ppo.record import Spent, step_record, step_work
from megatron_xy.ppo.roles import RoleWorker
from megatron_xy.ppo.rollouts import AnswerSource, as_rollout, dumped
from megatron_xy.ppo.samples import sample_line, samples
from megatron_xy.replicas import check_replicas
from megatron_xy.schedule import learning_rate
from megatron_xy.signals import StopRequest
from megatron_xy.storage import storage_errors
from megatron_xy.tensor_files import write_tensors
from megatron_xy.watchdog import Watchdog
from megatron_xy.weights import load_initial_weights

RATIO_ALARM = {"fp32": 1e-5, "bf16": 5e-2}  # |log ratio| at the first mini-batch beyond which something is wrong
TRAINED = ("actor", "critic")


@dataclass
class Cast:
    """The roles of this run as this rank sees them. `world` has all ranks."""

    world: Groups
    workers: dict[str, RoleWorker]

    @property
    def trained(self) -> list[RoleWorker]:
        """Actor and critic."""
        return [self.workers[name] for name in TRAINED]

    @property
    def roles_here(self) -> str:
        """The roles that this rank has a part in."""
        return ", ".join(name for name, worker in self.workers.items() if worker.role is not None)


class PPOTrainer:
    """Runs PPO to `train_iters`. source: of the answers."""

    def __init__(
        self,
        config: RunConfig,
        *,
        cast: Cast,
        engine: PPO,
        source: AnswerSource,
        prompts: PromptFile,
        renderers: dict[str, Renderer],
        fingerprints: dict[str, str],
        tokenizer: str,
        log: RunLog,
        watchdog: Watchdog,
        stop: StopRequest,
    ) -> None:
        """renderers: of prompts, by role. fingerprints: of the files that the run was given, by their keys."""
        assert config.ppo is not None and config.roles is not None, "the config's rules ask for both"
        self.config, self.ppo, self.cast, self.engine = config, config.ppo, cast, engine
        self.source, self.prompts, self.renderers = source, prompts, renderers
        self.fingerprints, self.tokenizer = fingerprints, tokenizer
        self.log, self.watchdog, self.stop = log, watchdog, stop
        loads = {worker.name: worker.placed.model.load for worker in cast.trained}
        self._kept = {
            name: {} if load is None else kept_facts(*split_origin(load)) for name, load in loads.items()
        }  # for a release
        self.states = {name: TrainingState() for name in TRAINED}
        self._compared: dict[str, int] = {}  # by role, the step in which its replicas were
        self._skipped_in_a_row = dict.fromkeys(TRAINED, 0)  # steps without any update of the role
        self._peak_rate = peak_rate()
        self.checkpoints = config.run_dir / "checkpoints"
        self.writers = {name: self._writer(name) for name in TRAINED}
        for worker in cast.trained:
            worker.before_update = partial(self._before_update, worker)

    @property
    def state(self) -> TrainingState:
        """Where the run stands; the roles differ in their updates alone."""
        return self.states["actor"]

    def restore(self) -> None:
        """Goes on from the checkpoint that the config asks for, else from what each role's `model.load` names."""
        world = self.cast.world
        if world.role_rank == 0:
            for name in sweep(self.checkpoints):
                self.log.say(f"swept {name}, which a killed save left half-written")
        barrier(world)
        resume = course.wanted_resume(self.config, world)
        found = find_resumable(self.checkpoints, world, resume=resume, say=self.log.say, parts=TRAINED)
        for worker in self.cast.workers.values():
            if worker.role is not None and (found is None or worker.name not in TRAINED):
                load_initial_weights(worker.role, seed=self._seed_of(worker.name))
        origin = "starting from the weights that the roles name"
        if found is not None:
            folder, manifest = found
            continuation.check_continuation(
                manifest.state,
                self._facts("actor"),
                allow_changes=self.config.checkpoint.allow_changes,
                origin=folder,
                say=self.log.say,
            )
            kept = manifest.state["ppo"]
            self.engine.state = PPOState(kept["kl_coef"], RunningMoments(**kept["moments"]))
            for worker in self.cast.trained:
                part = read_manifest(folder / worker.name)
                self.states[worker.name] = part.training_state
                if worker.role is not None:
                    load_state(worker.role, folder / worker.name, part)
            origin = f"resuming from {folder} ({self.state.iteration} iterations done)"
        for writer in self.writers.values():
            writer.resumed_from = self.state.iteration
        if world.role_rank == 0:
            course.begin(self.config.run_dir, iteration=None if resume == "auto" else self.state.iteration, say=print)
        barrier(world)
        self.log.say(origin)

    def _seed_of(self, name: str) -> int:
        """Fresh weights of actor and reference are the same; the others have their own."""
        return self.config.seed + {"actor": 0, "reference": 0, "critic": 1, "reward": 2}[name]

    def train(self) -> None:
        """Runs to `train_iters`. Raises Stopped once the state is saved after a request to stop."""
        train_iters = self.config.training.train_iters
        self.log.open_metrics(iteration=self.state.iteration)
        for iteration in range(self.state.iteration + 1, train_iters + 1):
            stopping = self._step(iteration)
            if self._is_due(iteration) or stopping:
                self._save(iteration)
            if stopping and iteration < train_iters:
                self._finish()
                raise course.stopped_after(iteration, self.config)
        self._finish()
        self.log.say(f"done: {self.state.iteration} iterations")

    def _is_due(self, iteration: int) -> bool:
        """Whether a checkpoint is written after an iteration, stop or not."""
        is_last = iteration == self.config.training.train_iters
        return is_last or iteration % self.config.checkpoint.save_interval == 0 or self._is_snapshot(iteration)

    def _is_snapshot(self, iteration: int) -> bool:
        """Whether the checkpoint of an iteration is never let go of."""
        return self.ppo.snapshot_interval > 0 and iteration % self.ppo.snapshot_interval == 0

    def _before_update(self, worker: RoleWorker) -> None:
        """Before each mini-batch's update of a role, on the role's ranks."""
        self.writers[worker.name].before_update()
        iteration = self.states[worker.name].iteration + 1
        if self._is_due(iteration) and self._compared.get(worker.name) != iteration and worker.role is not None:
            self._compared[worker.name] = iteration
            check_replicas(worker.role, iteration=iteration)

    def _step(self, iteration: int) -> bool:
        """One PPO step, recorded; returns whether any rank was asked to stop."""
        began = time.perf_counter()
        spent = Phases(self.watchdog, iteration, roles=self.cast.roles_here)
        first = self.state.consumed_samples
        size = self.ppo.rollout_batch_size
        spent.enter("generate")
        drawn = self.prompts.draw(first, size)
        rendered = {
            renderer: [self.prompts.tokens(draw.row, renderer) for draw in drawn]
            for renderer in set(self.renderers.values())  # roles of one template share one
        }
        prompts = {name: rendered[renderer] for name, renderer in self.renderers.items()}
        waited = time.perf_counter() - began
        answers = self.source.answers(drawn, prompts["actor"], first=first)
        rollout = as_rollout(drawn, prompts, answers)
        spent.enter("score")
        experience = self.engine.collect(rollout, check=self._check)
        if self.ppo.dump_rollouts and self.cast.world.role_rank == 0:
            self._dump(experience, iteration)
        spent.enter("update")
        rates = self._rates(iteration, consumed_tokens=self.state.consumed_tokens + rollout.num_tokens)
        is_warmup = iteration <= self.ppo.critic_warmup_iters
        metrics = self.engine.learn(experience, self._mini_batches(iteration), rates, is_warmup=is_warmup)
        spent.enter("record")
        seconds = time.perf_counter() - began
        for name in TRAINED:
            before = self.states[name]
            self.states[name] = replace(
                before,
                iteration=iteration,
                data_step=before.data_step + 1,
                consumed_samples=before.consumed_samples + size,
                consumed_tokens=before.consumed_tokens + rollout.num_tokens,
                optimizer_steps=before.optimizer_steps + int(metrics[f"{name}_updates"]),
            )
        stopping, busy, (padding, room) = self._gather()
        num_updates = self.ppo.ppo_epochs * size // self.ppo.mini_batch_size
        wanted = {"actor": 0 if is_warmup else num_updates, "critic": num_updates}
        skipped = {name: count - int(metrics[f"{name}_updates"]) for name, count in wanted.items()}
        flops, recomputed = step_work(
            {name: worker.placed.model for name, worker in self.cast.workers.items()},
            rollout,
            is_generated=self.ppo.responses is None,
            epochs={name: self.ppo.ppo_epochs if count else 0 for name, count in wanted.items()},
        )
        peak = self._peak_rate
        available = seconds * len(self.cast.world.ranks) * peak if peak else None
        record = step_record(
            self.state,
            experience,
            metrics,
            rates,
            Spent(seconds, waited, spent.seconds, busy, padding, room, flops, recomputed, available),
            is_warmup=is_warmup,
            ppo_epochs=self.ppo.ppo_epochs,
            micro_batch_tokens=self.cast.workers["actor"].placed.micro_batch_tokens,
        )
        record["skipped"] = any(skipped.values())
        self.log.ppo_step(record, train_iters=self.config.training.train_iters)
        chosen = samples(experience, self.prompts, self.renderers["actor"])
        self.log.samples(chosen, iteration=iteration)
        if iteration == 1 or self._is_due(iteration):
            for sample in chosen:
                self.log.say(sample_line(sample))
        self._note_skipped(skipped, wanted=wanted, metrics=metrics)
        self._watch_ratio(metrics, is_warmup=is_warmup)
        return stopping

    def _note_skipped(self, skipped: dict[str, int], *, wanted: dict[str, int], metrics: dict[str, float]) -> None:
        """Tells updates that were not made, by role; raises DataError, on all ranks alike, after too many steps in a
        row of which a role has learned nothing."""
        limit = self.config.training.max_skipped_in_a_row
        for name, count in skipped.items():
            is_finite = math.isfinite(metrics.get(f"{name}_grad_norm", math.nan))
            reason = "no answer that ended to learn from" if is_finite else "gradient not finite"
            if count:
                self.log.say(f"  SKIPPED {count} of {wanted[name]} updates of the {name}: {reason}")
            self._skipped_in_a_row[name] = self._skipped_in_a_row[name] + 1 if 0 < count == wanted[name] else 0
            if self._skipped_in_a_row[name] >= limit:
                remedy = (
                    "raise ppo.max_response_length, take another ppo.missing_end than mask"
                    if is_finite
                    else "go on from an earlier checkpoint (checkpoint.resume=ITERATION) with a lower optimizer.lr"
                )
                raise DataError(
                    f"all updates of the {name} were skipped in {limit} steps in a row, up to step "
                    f"{self.state.iteration}: {reason}; {remedy}, or raise training.max_skipped_in_a_row"
                )

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

    def _rates(self, iteration: int, *, consumed_tokens: int) -> LearningRates:
        rates = {}
        for worker in self.cast.trained:
            assert worker.placed.optimizer is not None, "a trained role has one"
            rates[worker.name] = learning_rate(
                worker.placed.optimizer,
                iteration=iteration,
                consumed_tokens=consumed_tokens,
                train_iters=self.config.training.train_iters,
            )
        return LearningRates(rates["actor"], rates["critic"])

    def _check(self, experience: Experience) -> None:
        """Raises DataError, on all ranks alike, for scores and log-probabilities that are no numbers."""
        for name in ("scores", "logprobs", "ref_logprobs", "values"):
            tensor = getattr(experience, name)
            if not bool(torch.isfinite(tensor).all()):
                rows = (
                    torch.nonzero(~torch.isfinite(tensor.reshape(tensor.size(0), -1)).all(dim=1)).reshape(-1).tolist()
                )
                lines = [self.prompts.rows[experience.rollout.drawn[row].row].line for row in rows[:5]]
                raise DataError(
                    f"step {self.state.iteration + 1}: {name} of {len(rows)} answer(s) are not finite, the prompts "
                    f"stand in {self.prompts.path} on lines {', '.join(map(str, lines))}; look at the role that gives "
                    f"them, or lower optimizer.lr and go on from an earlier checkpoint"
                )

    def _watch_ratio(self, metrics: dict[str, float], *, is_warmup: bool) -> None:
        limit = RATIO_ALARM[self.cast.workers["actor"].placed.model.params_dtype]
        found = metrics["ratio_first_max"]
        if not is_warmup and found > np.exp(limit):
            self.log.say(
                f"  ALARM: the policy's ratio at the first mini-batch is {found:.6g} and should be 1: the weights that "
                f"gave the old log-probabilities are not those that are updated"
            )

    def _gather(self) -> tuple[bool, dict[str, float], tuple[int, int]]:
        """Whether any rank was asked to stop; the seconds that each role has worked, mean of its ranks; padding and all
        tokens of all roles' micro-batches. Collective."""
        world = self.cast.world
        busy = [worker.take_busy_seconds() for worker in self.cast.workers.values()]
        padding, room = map(sum, zip(*(worker.take_padding() for worker in self.cast.workers.values()), strict=True))
        told = torch.tensor([padding, room, *busy], dtype=torch.float64, device=device.current())
        padding, room, *total = sum_over(told, world.all_ranks).tolist()
        asked = torch.tensor([int(self.stop.requested)], device=device.current())
        stopping = bool(max_over(asked, world.all_ranks).item())
        workers = self.cast.workers.items()
        seconds = {
            name: worked / len(worker.placed.ranks) for (name, worker), worked in zip(workers, total, strict=True)
        }
        return stopping, seconds, (int(padding), int(room))

    def _dump(self, experience: Experience, iteration: int) -> None:
        names = ("logprobs", "ref_logprobs", "values", "scores", "rewards", "advantages", "returns")
        tensors = dumped(experience.rollout, {name: getattr(experience, name) for name in names})
        folder = self.config.run_dir / "rollouts"
        with storage_errors(folder):
            folder.mkdir(exist_ok=True)
        name = f"iter_{iteration:07d}.safetensors"
        write_tensors(folder / f".tmp-{name}", tensors, metadata=METADATA, on_progress=lambda size: went_forward())
        with storage_errors(folder):
            (folder / f".tmp-{name}").replace(folder / name)

    def _writer(self, name: str) -> CheckpointWriter:
        worker = self.cast.workers[name]
        checkpoint = self.config.checkpoint
        return CheckpointWriter(
            self.checkpoints,
            keep_latest=checkpoint.keep_latest,
            asynchronous=checkpoint.async_save,
            timeout_seconds=self.config.runtime.timeout_seconds,
            on_progress=lambda num_bytes: went_forward(),
            on_written=self.log.say,
            part=worker.name,
            publishes=[other for other in TRAINED if other != name] if name == "critic" else (),
            is_kept=self._is_snapshot,
            on_published=self._export,
        )

    def _export(self, iteration: int, checkpoint: Path) -> None:
        """Of the roles only the actor is released. Called where the whole is there: by the critic's leader."""
        interval = self.config.checkpoint.hf_interval
        if interval and iteration % interval == 0:
            export(checkpoint / "actor", self.config.run_dir, name=checkpoint.name, say=self.log.say)

    def _save(self, iteration: int) -> None:
        """Actor first, then the critic, whose leader gives the whole its name once both are there."""
        self.watchdog.beat(iteration=iteration, phase="save")
        skipped = max(self._skipped_in_a_row.values())
        for worker in self.cast.trained:
            if worker.role is not None:
                facts = {
                    "task": "ppo",
                    **self._facts(worker.name),
                    "ppo": {"kl_coef": self.engine.state.kl_coef, "moments": asdict(self.engine.state.moments)},
                    "megatron_core": mcore.VERSION,
                    "torch": torch.__version__,
                    **self._kept[worker.name],
                    "tokenizer": self.tokenizer,
                    "chat_template": self.renderers[worker.name].template,
                }
                self.writers[worker.name].save(
                    worker.role,
                    self.states[worker.name],
                    facts=facts,
                    wanted_before=iteration - skipped if skipped else None,
                )

    def _finish(self) -> None:
        """Waits until the last checkpoint is whole on disk. Collective over the world."""
        self.watchdog.beat(iteration=self.state.iteration, phase="finish")
        for worker in self.cast.trained:
            if worker.role is not None:
                self.writers[worker.name].wait()
        barrier(self.cast.world)

    def _facts(self, name: str) -> dict[str, Any]:
        """What a manifest keeps of the config, for `check_continuation`."""
        roles = {worker.name: worker.placed for worker in self.cast.workers.values()}
        return facts(self.config, roles, of=name, fingerprints=self.fingerprints)
