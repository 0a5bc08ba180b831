"""The checkpoints of a PPO run: actor and critic in one folder, each in its own format, under one name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from megatron_xy.checkpoint import course
from megatron_xy.checkpoint.files import Manifest, TrainingState, read_manifest
from megatron_xy.checkpoint.replicas import check_replicas, check_unplanned_save
from megatron_xy.checkpoint.state import load_state
from megatron_xy.checkpoint.writer import CheckpointWriter
from megatron_xy.config import TRAINED_ROLES, RunConfig
from megatron_xy.hf.convert import Exports
from megatron_xy.log import RunLog
from megatron_xy.model.weights import load_initial_weights
from megatron_xy.parallel import barrier
from megatron_xy.ppo.alarms import SkippedUpdates
from megatron_xy.ppo.controllers import RunningMoments
from megatron_xy.ppo.engine import PPO, PPOState
from megatron_xy.ppo.facts import facts, fingerprints
from megatron_xy.ppo.material import Material
from megatron_xy.ppo.worker import TRAINED, Cast
from megatron_xy.runtime.liveness import went_forward
from megatron_xy.training.run_checkpoints import release_facts

SEED_OFFSETS = {"actor": 0, "reference": 0, "critic": 1, "reward": 2}  # fresh weights of the first two are the same


class PPOCheckpoints:
    """What a PPO run goes on from, and what it leaves. Every rank of the world calls all but `before_update`."""

    def __init__(self, config: RunConfig, material: Material, *, cast: Cast, log: RunLog) -> None:
        self._config, self._cast, self._log = config, cast, log
        prints = fingerprints(config, material)
        self._facts: dict[str, dict[str, Any]] = {
            name: facts(config, material.roles, of=name, fingerprints=prints) for name in TRAINED_ROLES
        }
        self._folder = config.run_dir / "checkpoints"
        # What becomes of a checkpoint the critic's leader knows, which need not be the one that speaks for the run. Of
        # the roles only the actor is released, once the whole is there: by the same rank.
        self._say_aloud = partial(log.say, aloud=True)
        self._exports = Exports(config.run_dir, config.checkpoint.hf_interval, self._say_aloud, part="actor")
        self._writers = {name: self._writer(name) for name in TRAINED}
        self._compared = dict.fromkeys(TRAINED, 0)  # the step in which a role's replicas were
        self._release_facts: dict[str, dict[str, Any]] = {
            name: release_facts(
                material.roles[name].model,
                task="ppo",
                tokenizer=material.tokenizer.path,
                chat_template=material.renderers[name].template,
            )
            for name in TRAINED_ROLES
        }

    def restore(self, engine: PPO, skipped: SkippedUpdates) -> dict[str, TrainingState]:
        """Goes on from the checkpoint that the config asks for, else from what each role's `model.load` names; returns
        the trained roles' states, and sets those of the engine and of what counts skipped updates."""
        config, ppo, world = self._config, self._config.ppo_section, self._cast.world
        found = course.find_start(config, world, current=self._facts, say=self._log.say)
        for worker in self._cast.workers.values():
            if worker.role is not None and (found is None or worker.name not in TRAINED):
                load_initial_weights(worker.role, seed=config.seed + SEED_OFFSETS[worker.name])
        states = {name: TrainingState() for name in TRAINED}
        origin = "starting from the weights that the roles name"
        if found is not None:
            folder, manifest = found
            kept = manifest.state["ppo"]
            coefficient = kept["kl_coef"] if self._goes_on_adapting(manifest) else ppo.kl_coef
            engine.state = PPOState(coefficient, RunningMoments(**kept["moments"]))
            skipped.in_a_row |= kept.get("skipped_in_a_row", {})  # older manifests keep none
            for worker in self._cast.trained:
                part = read_manifest(folder / worker.name)
                states[worker.name] = part.training_state
                if worker.role is not None:
                    load_state(worker.role, folder / worker.name, part)
            origin = f"resuming from {folder} ({states['actor'].iteration} iterations done)"
        iteration, train_iters = states["actor"].iteration, config.training.train_iters
        for worker in self._cast.trained:
            if worker.role is not None:
                self._writers[worker.name].begin(worker.role, iteration=iteration, train_iters=train_iters)
        course.begin(config, world, iteration=iteration)
        self._log.say(origin)
        critic = self._cast.workers["critic"].role
        if found is not None and critic is not None and self._exports.is_missing(iteration, found[0]):
            self._writers["critic"].publish_again(iteration, critic.groups)
        return states

    def is_due(self, iteration: int) -> bool:
        """Whether a checkpoint is written after an iteration, stop or not."""
        is_last = iteration == self._config.training.train_iters
        return is_last or iteration % self._config.checkpoint.save_interval == 0 or self._is_snapshot(iteration)

    def before_update(self, name: str, *, iteration: int) -> None:
        """Before each mini-batch's update of a role within an iteration, on the role's ranks."""
        self._writers[name].before_update()
        role = self._cast.workers[name].role
        if self.is_due(iteration) and self._compared[name] != iteration and role is not None:
            self._compared[name] = iteration
            check_replicas(role, seen=f"before the update of step {iteration}")

    def save(self, states: Mapping[str, TrainingState], engine: PPOState, skipped: SkippedUpdates) -> None:
        """Actor first, then the critic, whose leader gives the whole its name once both are there."""
        kept = {
            "kl_coef": engine.kl_coef,
            "moments": asdict(engine.moments),
            "skipped_in_a_row": dict(skipped.in_a_row),
        }
        for worker in self._cast.trained:
            if worker.role is not None:
                facts = {**self._facts[worker.name], **self._release_facts[worker.name], "ppo": kept}
                state = states[worker.name]
                if not self.is_due(state.iteration):
                    check_unplanned_save(worker.role, iteration=state.iteration)
                before = state.iteration - skipped.longest if skipped.longest else None  # as RunCheckpoints has it
                self._writers[worker.name].save(worker.role, state, facts=facts, wanted_before=before)

    def finish(self) -> None:
        """Waits until the last checkpoint is whole on disk. Collective over the world."""
        for worker in self._cast.trained:
            if worker.role is not None:
                self._writers[worker.name].wait()
        barrier(self._cast.world)

    def _goes_on_adapting(self, manifest: Manifest) -> bool:
        """Whether the KL coefficient is the one that was reached; one that is fixed, or new in the config, is that."""
        ppo = self._config.ppo_section
        return ppo.kl_target is not None and manifest.state.get("settings", {}).get("ppo.kl_coef") == ppo.kl_coef

    def _writer(self, name: str) -> CheckpointWriter:
        checkpoint = self._config.checkpoint
        return CheckpointWriter(
            self._folder,
            keep_latest=checkpoint.keep_latest,
            asynchronous=checkpoint.async_save,
            timeout_seconds=self._config.runtime.timeout_seconds,
            on_progress=lambda num_bytes: went_forward(),
            on_written=self._say_aloud if name == "critic" else self._log.say,
            part=name,
            publishes=[other for other in TRAINED if other != name] if name == "critic" else (),
            is_kept=self._is_snapshot,
            on_published=self._exports.make,
        )

    def _is_snapshot(self, iteration: int) -> bool:
        """Whether the checkpoint of an iteration is never let go of."""
        interval = self._config.ppo_section.snapshot_interval
        return interval > 0 and iteration % interval == 0
