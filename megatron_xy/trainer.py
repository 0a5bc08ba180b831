"""The loop of a training job: batch, step, log, save; from the newest valid checkpoint on, until done or asked to stop.

The data's way ends here: sampler and dataset give the micro-batches of a data step, `train_step` learns from them.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_xy import course, device, mcore
from megatron_xy.checkpoint import CheckpointWriter, find_resumable, load_state, sweep
from megatron_xy.checkpoint_files import TrainingState
from megatron_xy.config import RunConfig
from megatron_xy.data.dataset import MicroBatch, PackedDataset, Prefetcher, collate, samples_of_rank
from megatron_xy.data.sampler import BucketSampler, SamplerPhase
from megatron_xy.errors import Stopped
from megatron_xy.flops import peak_flops, step_flops
from megatron_xy.log import RunLog
from megatron_xy.optimizer import learning_rate
from megatron_xy.parallel import barrier, max_over, sum_over
from megatron_xy.role import Role
from megatron_xy.signals import StopRequest
from megatron_xy.train_step import StepResult, train_step
from megatron_xy.watchdog import Watchdog
from megatron_xy.weights import load_initial_weights


@dataclass(frozen=True)
class PreparedStep:
    """The micro-batches of one data step for this data parallel rank, and what the whole step's batch is."""

    bucket: int
    micro_batches: list[MicroBatch]
    num_samples: int  # of all ranks


class StepLoader:
    """Prepares this data parallel rank's micro-batches of any data step, the next ones in the background."""

    def __init__(self, config: RunConfig, *, dataset: PackedDataset, dp_size: int, dp_rank: int) -> None:
        phase = SamplerPhase(0, config.data.weights, config.training.global_batch_tokens)
        self.sampler = BucketSampler(dataset.streams, seed=config.seed, phases=[phase])
        self.sources = dataset.sources
        self.data_fingerprints = dataset.fingerprints
        self._dataset, self._config = dataset, config
        self._dp_size, self._dp_rank = dp_size, dp_rank
        self._prefetcher = Prefetcher(self._micro_batches)

    def get(self, data_step: int) -> tuple[PreparedStep, float]:
        """The step's micro-batches and the seconds waited for them."""
        micro_batches, waited = self._prefetcher.get(data_step)
        batch = self.sampler.batch(data_step)
        return PreparedStep(batch.bucket, micro_batches, len(batch.samples)), waited

    def close(self) -> None:
        """Ends the background thread."""
        self._prefetcher.close()

    def _micro_batches(self, data_step: int) -> list[MicroBatch]:
        batch, mine = samples_of_rank(
            self._dataset,
            self.sampler,
            data_step,
            data_parallel_size=self._dp_size,
            data_parallel_rank=self._dp_rank,
            split_documents=self._config.data.split_documents,
        )
        micro_batch_tokens = self._config.training.micro_batch_tokens
        per_micro_batch = micro_batch_tokens // batch.bucket
        return [
            collate(
                [self._dataset.sample(sample) for sample in mine[first : first + per_micro_batch]],
                source_indices=[self.sources.index(sample.source) for sample in mine[first : first + per_micro_batch]],
                num_sources=len(self.sources),
                bucket=batch.bucket,
                micro_batch_tokens=micro_batch_tokens,
                split_documents=self._config.data.split_documents,
            )
            for first in range(0, len(mine), per_micro_batch)
        ]


class Trainer:
    """Trains one role over its data. Every rank of the role runs the same loop."""

    def __init__(
        self, config: RunConfig, *, role: Role, loader: StepLoader, log: RunLog, watchdog: Watchdog, stop: StopRequest
    ) -> None:
        self.config, self.role, self.loader = config, role, loader
        self.log, self.watchdog, self.stop = log, watchdog, stop
        self.state = TrainingState()
        self.checkpoints = config.run_dir / "checkpoints"
        self.writer = CheckpointWriter(
            self.checkpoints,
            keep_latest=config.checkpoint.keep_latest,
            asynchronous=config.checkpoint.async_save,
            timeout_seconds=config.runtime.timeout_seconds,
        )
        self._peak_flops = _device_peak_flops()

    def restore(self) -> None:
        """Goes on from the checkpoint that the config asks for; else from `model.load`, else from fresh weights."""
        role = self.role
        if role.groups.is_leader:  # whose words reach the terminal
            for name in sweep(self.checkpoints):
                self.log.say(f"swept {name}, which a killed save left half-written")
        barrier(role.groups)
        resume = course.wanted_resume(self.config, role.groups)
        found = find_resumable(self.checkpoints, role.groups, resume=resume, say=self.log.say)
        if found is None:
            load_initial_weights(role)
            origin = f"starting from {role.model.load or 'fresh weights'}"
        else:
            folder, manifest = found
            course.check_continuation(
                manifest.state,
                self._facts(),
                allow_changes=self.config.checkpoint.allow_changes,
                origin=folder,
                say=self.log.say,
            )
            self.state = load_state(role, folder, manifest)
            origin = f"resuming from {folder} ({self.state.iteration} iterations done)"
        if role.groups.role_rank == 0:
            course.begin(self.config.run_dir, iteration=None if resume == "auto" else self.state.iteration, say=print)
        barrier(role.groups)  # from here on a request to stop finds all ranks with something to save
        self.log.say(origin)

    def train(self) -> None:
        """Runs to `train_iters`. Raises Stopped once the state is saved after a request to stop."""
        training, checkpoint = self.config.training, self.config.checkpoint
        self.log.open_metrics(iteration=self.state.iteration)
        saved = self.state.iteration
        first = self.state.iteration + 1
        for iteration in range(first, training.train_iters + 1):
            with self.log.phase("first step") if iteration == first else contextlib.nullcontext():
                self._step(iteration)
            stopping = self._agreed_to_stop()
            if iteration % checkpoint.save_interval == 0 or iteration == training.train_iters or stopping:
                self._save(iteration)
                saved = iteration
            if stopping and iteration < training.train_iters:
                self.writer.finish(self.role.groups)
                raise Stopped(
                    f"stopped on request after step {iteration}, state saved; the same command goes on from there"
                )
        self._beat("finish", self.state.iteration)
        self.writer.finish(self.role.groups)
        self.log.say(f"done: {self.state.iteration} iterations, last checkpoint at iteration {saved}")

    def _step(self, iteration: int) -> None:
        self._beat("data", iteration)
        began = time.perf_counter()
        prepared, waited = self.loader.get(self.state.data_step)
        self._beat("step", iteration)
        lr = learning_rate(self.config.optimizer, iteration=iteration, train_iters=self.config.training.train_iters)
        with self.role.active():
            result = train_step(
                self.role,
                prepared.micro_batches,
                num_sources=len(self.loader.sources),
                lr=lr,
                clip_grad=self.config.optimizer.clip_grad,
            )
        device.synchronize()
        seconds = time.perf_counter() - began
        data_step = self.state.data_step
        self.state = replace(
            self.state,
            iteration=iteration,
            data_step=data_step + 1,
            consumed_samples=self.state.consumed_samples + prepared.num_samples,
            consumed_tokens=self.state.consumed_tokens + self.config.training.global_batch_tokens,
            optimizer_steps=self.state.optimizer_steps + int(result.updated),
        )
        record = self._record(prepared, result, data_step=data_step, lr=lr, seconds=seconds, waited=waited)
        self.log.step(record, train_iters=self.config.training.train_iters)

    def _record(
        self, prepared: PreparedStep, result: StepResult, *, data_step: int, lr: float, seconds: float, waited: float
    ) -> dict[str, Any]:
        """The step's object in metrics.jsonl. Collective over data parallel ranks, for the counts."""
        local = [
            sum(batch.num_padding_tokens for batch in prepared.micro_batches),
            sum(batch.sum_squared_lengths for batch in prepared.micro_batches),
        ]
        counts = torch.tensor(local, dtype=torch.float64, device=device.current())
        padding, squares = sum_over(counts, self.role.groups.collection.dp).tolist()
        batch_tokens = self.config.training.global_batch_tokens
        flops = step_flops(self.role.model, num_tokens=batch_tokens - int(padding), sum_squared_lengths=int(squares))
        peak = self._peak_flops
        utilisation = flops / (seconds * len(self.role.groups.ranks) * peak) if peak else None
        recomputed = self.role.model.recompute_granularity != "none"
        return {
            "iteration": self.state.iteration,
            "data_step": data_step,
            "bucket": prepared.bucket,
            "loss": result.loss,
            "loss_by_source": {self.loader.sources[index]: loss for index, loss in result.source_losses.items()},
            "num_loss_tokens": result.num_loss_tokens,
            "num_loss_tokens_by_source": {
                self.loader.sources[index]: count for index, count in result.source_tokens.items()
            },
            "grad_norm": result.grad_norm,
            "lr": lr,
            "consumed_samples": self.state.consumed_samples,
            "consumed_tokens": self.state.consumed_tokens,
            "padding_ratio": padding / batch_tokens,
            "step_seconds": seconds,
            "data_wait_seconds": waited,
            "tokens_per_second": batch_tokens / seconds,
            "mfu": utilisation,
            # What recomputation adds is not counted yet: no number rather than a wrong one.
            "hfu": None if recomputed else utilisation,
            "skipped": not result.updated,
        }

    def _agreed_to_stop(self) -> bool:
        """Whether any rank was asked to stop: all ranks come to the same answer at the same step."""
        asked = torch.tensor([int(self.stop.requested)], device=device.current())
        return bool(max_over(asked, self.role.groups.all_ranks).item())

    def _save(self, iteration: int) -> None:
        self._beat("save", iteration)
        facts = {
            "task": self.config.task,
            **self._facts(),
            "tokenizer": str(self.config.data.tokenizer) if self.config.data.tokenizer else None,
            "megatron_core": mcore.VERSION,
            "torch": torch.__version__,
        }
        held = self.writer.save(self.role, self.state, facts=facts)
        how = "being written" if self.config.checkpoint.async_save else "written"
        self.log.say(f"checkpoint of step {iteration} {how} (training held for {held:.2f} s)")

    def _facts(self) -> dict[str, Any]:
        return course.facts(self.config, model=self.role.model, data_fingerprints=self.loader.data_fingerprints)

    def _beat(self, phase: str, iteration: int) -> None:
        self.watchdog.beat(iteration=iteration, phase=phase)


def timed(log: RunLog, watchdog: Watchdog, name: str, work: Callable[[], Any]) -> Any:
    """Runs one phase of the start-up under its name, with its seconds said which the watchdog is told."""
    watchdog.beat(iteration=0, phase=name)
    with log.phase(name):
        return work()


def _device_peak_flops() -> float | None:
    """Peak FLOP/s of one rank's device: from the makers' tables, on a CPU from a short matrix product."""
    if not device.is_cpu():
        return peak_flops(device.name())
    size = 384
    matrix = torch.ones(size, size)
    best = math.inf
    for _ in range(8):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
