"""`check --paths` and what `check` prints: a run's files looked at, its derived sizes told, without torch."""

from __future__ import annotations

from pathlib import Path

from megatron_xy.config import RunConfig, check_buckets, data_parallel_size
from megatron_xy.data.manifest import read_manifest
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.flops import num_parameters
from megatron_xy.storage import file_sha256


def check_paths(config: RunConfig) -> None:
    """The files that the config names: there, whole at a glance, and fitting. Raises ConfigError or DataError."""
    for path in config.data.paths:
        manifest = read_manifest(path)
        check_buckets(config.training, buckets=manifest.buckets)
        vocab_size = config.model.vocab_size
        if vocab_size is not None and manifest.tokenizer.vocab_size > vocab_size:
            raise ConfigError(
                f"model.vocab_size ({vocab_size}) is smaller than the vocabulary of the data "
                f"({manifest.tokenizer.vocab_size} in {path}); give at least {manifest.tokenizer.vocab_size}"
            )
        if config.data.tokenizer is not None and file_sha256(config.data.tokenizer) != manifest.tokenizer.sha256:
            raise DataError(f"data.tokenizer ({config.data.tokenizer}) is not the one that {path} was built with")
    if config.model.load is not None:
        kind, _, folder = config.model.load.partition(":")
        needed = Path(folder) / ("manifest.json" if kind == "ckpt" else "config.json")
        if not Path(folder).is_dir():
            raise ConfigError(f"model.load ({config.model.load}): there is no such folder")
        if not needed.is_file():
            raise DataError(f"model.load ({config.model.load}): the folder holds no {needed.name}")


def describe(config: RunConfig, *, path: Path, world_size: int | None) -> str:
    """What the config comes to, in a few lines."""
    model, training, layout = config.model, config.training, config.parallel
    lines = [f"{path}: valid, task {config.task}, run folder {config.run_dir}"]
    if model.load is None:
        lines.append(
            f"  model: {num_parameters(model) / 1e6:,.1f} M parameters, "
            f"{model.num_layers} layers of {model.hidden_size}, vocabulary {model.vocab_size}, {model.params_dtype}"
        )
    else:
        lines.append(f"  model: {model.load}")
    sizes = (
        f"tp {layout.tensor_model_parallel_size} x pp {layout.pipeline_model_parallel_size} x "
        f"cp {layout.context_parallel_size}"
    )
    if world_size is None:
        lines.append(f"  layout: {sizes}; give --world-size for the data parallel size")
    else:
        replicas = data_parallel_size(layout, world_size=world_size)
        micro_batches = training.global_batch_tokens // (training.micro_batch_tokens * replicas)
        lines.append(f"  layout: {sizes} x dp {replicas} on {world_size} ranks, {micro_batches} micro-batches a step")
    lines.append(
        f"  training: {training.train_iters} steps of {training.global_batch_tokens} tokens "
        f"({training.train_iters * training.global_batch_tokens / 1e6:,.1f} M in all)"
    )
    return "\n".join(lines)
