"""The checkpoints of a training run: what it goes on from, and what it leaves of itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_xy import mcore
from megatron_xy.checkpoint import continuation, course
from megatron_xy.checkpoint.files import TrainingState, amend_state
from megatron_xy.checkpoint.folders import iteration_folder
from megatron_xy.checkpoint.replicas import check_replicas, check_unplanned_save
from megatron_xy.checkpoint.state import FROZEN_UPDATES, load_state
from megatron_xy.checkpoint.writer import CheckpointWriter
from megatron_xy.config import ModelConfig, RunConfig
from megatron_xy.data.loader import PreparedStep
from megatron_xy.hf.convert import Exports
from megatron_xy.hf.kept import kept_facts
from megatron_xy.log import RunLog
from megatron_xy.model.parts import MODEL_PARTS
from megatron_xy.model.source import changes_to_source, split_origin
from megatron_xy.model.weights import load_initial_weights
from megatron_xy.role import Role
from megatron_xy.runtime.liveness import went_forward
from megatron_xy.training.spikes import StepHistory
from megatron_xy.training.train_step import StepResult


@dataclass
class RunState:
    """What a run carries from step to step, beside weights and optimizer."""

    training: TrainingState = field(default_factory=TrainingState)
    history: StepHistory = field(default_factory=StepHistory)
    frozen_updates: dict[str, int] = field(default_factory=dict)  # by part of the model: made while it stayed as it was
    continued_from: dict[str, Any] | None = None  # the weights loaded at the beginning, and what is new

    def add(self, step: PreparedStep, result: StepResult, *, trained: Collection[str]) -> None:
        """One step on; trained: the parts of the model that it was to change."""
        self.training = self.training.after_step(
            num_samples=step.num_samples, num_tokens=step.num_tokens, num_updates=int(result.updated)
        )
        self.history.add(bucket=step.bucket, loss=result.loss, grad_norm=result.grad_norm, updated=result.updated)
        for part in set(MODEL_PARTS) - set(trained) if result.updated else ():
            self.frozen_updates[part] = self.frozen_updates.get(part, 0) + 1


def release_facts(
    model: ModelConfig, *, task: str, tokenizer: Path | None, chat_template: str | None
) -> dict[str, Any]:
    """What a manifest says for who makes a release of it, or looks at it later; chat_template: its text."""
    kept = {} if model.load is None else kept_facts(*split_origin(model.load))
    return {
        "task": task,
        **kept,
        "tokenizer": str(tokenizer) if tokenizer else None,
        "chat_template": chat_template,
        "megatron_core": mcore.VERSION,
        "torch": torch.__version__,
    }


class RunCheckpoints:
    """Restores a run's state and saves it. Every rank of the role calls each method."""

    def __init__(
        self,
        config: RunConfig,
        *,
        role: Role,
        data_fingerprints: Mapping[str, Any],
        chat_template: str | None,
        ends_epoch: Callable[[int], bool],
        keeps_epochs: bool,
        log: RunLog,
    ) -> None:
        """ends_epoch: whether an iteration ends an epoch that leaves a checkpoint; keeps_epochs: these are not let go
        of."""
        self._config, self._role, self._log = config, role, log
        self._data_fingerprints, self._ends_epoch = data_fingerprints, ends_epoch
        self._folder = config.run_dir / "checkpoints"
        self._exports = Exports(config.run_dir, config.checkpoint.hf_interval, log.say)
        self._writer = CheckpointWriter(
            self._folder,
            keep_latest=config.checkpoint.keep_latest,
            asynchronous=config.checkpoint.async_save,
            timeout_seconds=config.runtime.timeout_seconds,
            on_progress=lambda num_bytes: went_forward(),
            on_written=log.say,
            is_kept=ends_epoch if keeps_epochs else lambda iteration: False,
            on_published=self._exports.make,
        )
        self._release_facts = release_facts(
            role.model, task=config.task, tokenizer=config.data.tokenizer, chat_template=chat_template
        )

    def restore(self) -> RunState:
        """Goes on from the checkpoint that the config asks for; else from `model.load`, else from fresh weights."""
        config, role = self._config, self._role
        found = course.find_start(config, role.groups, current={"": self._facts()}, say=self._log.say)
        state = RunState()
        if found is None:
            load_initial_weights(role, seed=config.seed)
            state.continued_from = self._what_is_new()
            origin = f"starting from {role.model.load or 'fresh weights'}"
        else:
            folder, manifest = found
            state.training = load_state(role, folder, manifest)
            if "history" in manifest.state:
                state.history = StepHistory.from_json(manifest.state["history"])
            state.frozen_updates = dict(manifest.state.get(FROZEN_UPDATES, {}))
            state.continued_from = manifest.state.get("continued_from")
            origin = f"resuming from {folder} ({state.training.iteration} iterations done)"
        self._writer.begin(role, iteration=state.training.iteration, train_iters=config.training.train_iters)
        course.begin(config, role.groups, iteration=state.training.iteration)
        self._log.say(origin)
        if found is not None and self._exports.is_missing(state.training.iteration, found[0]):
            self._writer.publish_again(state.training.iteration, role.groups)
        return state

    def is_due(self, iteration: int) -> bool:
        """Whether a checkpoint is written after an iteration, stop or not."""
        is_due = iteration % self._config.checkpoint.save_interval == 0 or self._ends_epoch(iteration)
        return is_due or iteration == self._config.training.train_iters

    def before_update(self, *, iteration: int) -> None:
        """Before an iteration changes weights: waits for the copy of a save under way; compares what will be saved."""
        self._writer.before_update()
        if self.is_due(iteration):  # what one bad memory cell has spoilt is not to be kept
            check_replicas(self._role, seen=f"before the update of step {iteration}")

    def save(self, state: RunState) -> float:
        """Saves the state after an iteration; returns the seconds for which training was held up."""
        iteration = state.training.iteration
        if not self.is_due(iteration):
            check_unplanned_save(self._role, iteration=iteration)
        facts = {
            **self._facts(),
            **self._release_facts,
            "history": state.history.to_json(),
            FROZEN_UPDATES: dict(state.frozen_updates),  # written later, while the next steps count on
            "continued_from": state.continued_from,
        }
        # What made the first of a row of skipped updates not finite is in the weights that the update before it left.
        skipped = state.history.skipped_in_a_row
        held = self._writer.save(
            self._role, state.training, facts=facts, wanted_before=iteration - skipped if skipped else None
        )
        if self._config.checkpoint.async_save:
            self._log.say(f"checkpoint of step {iteration} scheduled")
        return held

    def amend(self, iteration: int, facts: dict[str, Any]) -> None:
        """Adds facts to an iteration's manifest, if it has one."""
        self.finish()
        folder = iteration_folder(self._folder, iteration)
        if self._role.groups.is_leader and folder.is_dir():
            amend_state(folder, facts)

    def finish(self) -> None:
        """Waits until the save under way is whole on disk."""
        self._writer.finish(self._role.groups)

    def _what_is_new(self) -> dict[str, Any] | None:
        """What the run changes in the model that it loads, also said; None where it loads none."""
        model = self._role.model
        if model.load is None:
            return None
        changes = changes_to_source(model)
        for name, (then, now) in changes.items():
            self._log.say(f"  model.{name} is {now} from here on; it was {then} in {model.load}")
        return {"load": model.load, "changes": changes}

    def _facts(self) -> dict[str, Any]:
        """What a manifest keeps of the config, for `check_continuation`."""
        return continuation.facts(self._config, model=self._role.model, data_fingerprints=self._data_fingerprints)
