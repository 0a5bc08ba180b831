"""`check --paths`: the files of a run looked at before anything starts, without torch."""

from __future__ import annotations

import ast
import importlib.util
import re
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_xy.checkpoint import continuation
from megatron_xy.config import (
    TRAINED_ROLES,
    InvalidConfig,
    ModelConfig,
    Problem,
    RunConfig,
    RuntimeConfig,
    check_buckets,
    check_shape,
    placed_roles,
    role_names,
    role_sections,
)
from megatron_xy.data.dataset import PackedDataset
from megatron_xy.data.draws.phases import check_epochs, run_sampler, with_epochs
from megatron_xy.data.draws.sampler import BucketSampler
from megatron_xy.data.encoding.tokenizer import load_tokenizer
from megatron_xy.data.run_data import data_folders
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.hf.tokenizer import check_export
from megatron_xy.model.source import check_head, resolve_model
from megatron_xy.ppo.facts import facts, fingerprints
from megatron_xy.ppo.material import look_at, reward_file
from megatron_xy.ppo.prompts import GivenResponses, PromptFile
from megatron_xy.reward.pairs import PairData, load_pairs
from megatron_xy.rows_files import is_file_of_rows
from megatron_xy.run_dir import check_resume, check_space, check_weights_to_load
from megatron_xy.run_folder import check_place
from megatron_xy.runtime import environment
from megatron_xy.runtime.signals import cleaned_up_on_signals
from megatron_xy.storage import file_sha256

BUILT_DATA = "data"  # in a run folder: what was built of files of rows


def check_paths(config: RunConfig, *, build_into: Path | None = None) -> None:
    """The files that the config names: there, whole at a glance, and fitting. Files of rows are read whole.

    build_into: where the data folders built of these stay; None: they go. Raises InvalidConfig with all that is
    missing, bad or does not fit; DataError where all that is wrong is bad data; StorageError where there is no room.
    """
    if config.task == "ppo":
        _check_ppo_paths(config)
        return
    if config.task == "reward":
        _check_reward_paths(config)
        return
    if build_into is None:
        with cleaned_up_on_signals("; nothing is kept"), tempfile.TemporaryDirectory() as folder:
            return check_paths(config, build_into=Path(folder))
    findings = _Findings()
    completed = _completed(config, findings)
    dataset = _look_at_data(completed, findings, build_into=build_into)
    findings.of("data.eval_path", lambda: _held_out(completed, dataset, build_into=build_into))
    findings.of("runtime.wandb_project", lambda: check_boards(config.runtime))
    _look_at_run_dir(completed, findings, data_fingerprints=dataset.fingerprints if dataset else None)
    findings.end()
    check_space(completed, [completed.model])


def _check_reward_paths(config: RunConfig) -> None:
    findings = _Findings()
    completed = _completed(config, findings)
    pairs: PairData | None = findings.of("data.path", lambda: open_pairs(completed))
    findings.of("runtime.wandb_project", lambda: check_boards(config.runtime))
    _look_at_run_dir(completed, findings, data_fingerprints=pairs.fingerprints if pairs else None)
    findings.end()
    check_space(completed, [completed.model])


def _completed(config: RunConfig, findings: _Findings) -> RunConfig:
    """The config with its model completed from what it loads, checked as far as that can be."""
    model = findings.of("model.load", lambda: _loaded(config, config.model)) or config.model
    findings.of("model.layer_spec", lambda: _check_layer_spec(model))
    completed = config.model_copy(update={"model": model})
    if model is not config.model:
        findings.of("model", lambda: check_shape(completed))
    return completed


def _loaded(config: RunConfig, model: ModelConfig, *, key: str = "model.load", is_trained: bool = True) -> ModelConfig:
    """`model` completed from what it loads, which is whole at a glance, unless the run goes on from a checkpoint."""
    completed = resolve_model(model)
    check_head(completed, key=key)
    check_weights_to_load(config, completed, is_trained=is_trained)
    return completed


def open_pairs(config: RunConfig) -> PairData:
    """A reward run's pairs, checked against its model. Raises ConfigError or DataError."""
    tokenizer = load_tokenizer(config.data.tokenizer or "")
    if config.model.vocab_size is not None and tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size ({config.model.vocab_size}) is smaller than data.tokenizer's ({tokenizer.vocab_size} in "
            f"{tokenizer.path}); name the tokenizer that the model was trained with"
        )
    check_export(tokenizer.path, hf_interval=config.checkpoint.hf_interval)
    return load_pairs(config)


def _check_ppo_paths(config: RunConfig) -> None:
    ppo, findings = config.ppo, _Findings()
    assert ppo is not None and ppo.prompts is not None, "the config's rules ask for it"
    prompts_path, responses_path, reward_function = ppo.prompts, ppo.responses, ppo.reward_function
    for name in role_names(config):
        key, model = f"roles.{name}.model.load", role_sections(config, name)[0]
        findings.of(key, partial(_loaded, config, model, key=key, is_trained=name in TRAINED_ROLES))
    findings.of("data.tokenizer", lambda: load_tokenizer(config.data.tokenizer or ""))
    findings.of("ppo.prompts", lambda: PromptFile(prompts_path, seed=config.seed))
    if responses_path is not None:
        findings.of("ppo.responses", lambda: GivenResponses(responses_path))
    if reward_function is not None:
        findings.of("ppo.reward_function", lambda: _check_reward_function(reward_function))
    findings.of("runtime.wandb_project", lambda: check_boards(config.runtime))
    findings.of("run_dir", lambda: check_place(config.run_dir))
    findings.end()
    # Where roles stand does not matter to what they are given.
    material = findings.of("ppo", lambda: look_at(config, placed_roles(config, world_size=0)))
    findings.end()
    prints = fingerprints(config, material)
    now = {str(name): facts(config, material.roles, of=name, fingerprints=prints) for name in TRAINED_ROLES}
    findings.of("checkpoint.resume", lambda: check_resume(config, now))
    findings.end()
    check_space(config, material.trained_models)


def _check_reward_function(name: str) -> None:
    """That the file is Python and names the function somewhere: the user's code is not run."""
    path, wanted = reward_file(name), name.rpartition(":")[2]
    source = path.read_bytes()
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"ppo.reward_function ({name}): {path} is no Python: {error}; mend it") from None
    if not re.search(rf"(?<!\w){wanted}(?!\w)|import \*|__getattr__", source.decode(errors="replace")):
        raise ConfigError(f"ppo.reward_function ({name}): {path} has no function {wanted}; name one that it has")


def check_boards(runtime: RuntimeConfig) -> None:
    """Raises ConfigError where Weights & Biases is asked for and not installed."""
    if runtime.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"runtime.wandb_project ({runtime.wandb_project}): wandb is not installed; pip install "
            f"'megatron-xy[wandb]', or set it to null"
        )


def open_data(config: RunConfig) -> tuple[PackedDataset, PackedDataset | None]:
    """The run's data, checked against its model, tokenizer, weights and batch sizes, and what is held out, None where
    nothing is evaluated. Raises as `check_paths` does.

    Any number of ranks may call it at once: files of rows are built into the run folder by whichever comes first. Each
    looks at its share of the shards: one rank's end is that of all.
    """
    findings, into = _Findings(), config.run_dir / BUILT_DATA
    share = slice(environment.rank(), None, environment.world_size())
    dataset = _look_at_data(config, findings, build_into=into, looked_at=share)
    findings.end()  # before rows that are held out are built for ranks that are not to come
    held_out: PackedDataset | None = findings.of(
        "data.eval_path", lambda: _held_out(config, dataset, build_into=into, looked_at=share)
    )
    findings.end()
    assert dataset is not None, "what keeps it from being opened was raised"
    return dataset, held_out


def _look_at_run_dir(config: RunConfig, findings: _Findings, *, data_fingerprints: Mapping[str, Any] | None) -> None:
    findings.of("run_dir", lambda: check_place(config.run_dir))
    if data_fingerprints is not None:
        now = continuation.facts(config, model=config.model, data_fingerprints=data_fingerprints)
        findings.of("checkpoint.resume", lambda: check_resume(config, {"": now}))


def _look_at_data(
    config: RunConfig, findings: _Findings, *, build_into: Path, looked_at: slice = slice(None)
) -> PackedDataset | None:
    def opened() -> PackedDataset:
        return PackedDataset(data_folders(config, config.data.paths, into=build_into), looked_at=looked_at)

    dataset: PackedDataset | None = findings.of("data.path", opened)
    if dataset is not None:
        findings.of("data.path", lambda: _check_task(config, dataset))
        findings.of("training.micro_batch_tokens", lambda: check_buckets(config.training, buckets=dataset.buckets))
        findings.of("model.vocab_size", lambda: _check_vocabulary(config.model, dataset))
        findings.of("model.max_position_embeddings", lambda: _check_context(config.model, dataset))
        findings.of("data.tokenizer", lambda: _check_tokenizer(config.data.tokenizer, dataset))
        tokenizer = config.data.tokenizer or dataset.tokenizer_path
        findings.of(
            "checkpoint.hf_interval", lambda: check_export(tokenizer, hf_interval=config.checkpoint.hf_interval)
        )
        sampler = findings.of("data.weights", lambda: run_sampler(config, dataset.streams))
        if sampler is not None:
            findings.of("data.max_epochs", lambda: _check_epochs(config, dataset, sampler))
    return dataset


def _check_task(config: RunConfig, dataset: PackedDataset) -> None:
    if config.task == "sft" and not dataset.conversation_sources:
        raise DataError(
            f"data.path ({', '.join(map(str, config.data.paths))}) holds no conversations, which task sft learns from; "
            f"build them with `megatron-xy data build --chat-template`, or use task pretrain"
        )


def _check_epochs(config: RunConfig, dataset: PackedDataset, sampler: BucketSampler) -> None:
    planned = with_epochs(config, dataset.streams, conversation_sources=dataset.conversation_sources)
    check_epochs(planned, sampler)


def _held_out(
    config: RunConfig, dataset: PackedDataset | None, *, build_into: Path, looked_at: slice = slice(None)
) -> PackedDataset | None:
    if config.data.eval_path is None or not config.training.eval_interval:
        return None
    if dataset is None and is_file_of_rows(config.data.eval_path):  # it would get the buckets of that data
        return None
    if not is_file_of_rows(config.data.eval_path) and not config.data.eval_path.is_dir():
        raise ConfigError(
            f"data.eval_path ({config.data.eval_path}): there is no such folder; name the held_out folder that "
            f"`data build --held-out` wrote, or any other that `data build` wrote"
        )
    held_out = PackedDataset(data_folders(config, [config.data.eval_path], into=build_into), looked_at=looked_at)
    if not any(stream.num_samples for stream in held_out.streams):
        raise DataError(f"data.eval_path ({config.data.eval_path}) holds no samples; build it from more documents")
    if dataset is not None and held_out.tokenizer_sha256 != dataset.tokenizer_sha256:
        raise DataError(
            f"data.eval_path ({config.data.eval_path}) was tokenised with another tokenizer than data.path: its losses "
            f"would mean nothing; build it with {dataset.tokenizer_path}"
        )
    check_buckets(
        config.training, buckets=held_out.buckets, whose=f"the buckets of data.eval_path ({held_out.paths[0]})"
    )
    _check_vocabulary(config.model, held_out)
    _check_context(config.model, held_out)
    return held_out


class _Findings:
    """What is wrong with the files of a config, all of it before anything is raised."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.only_data = True

    def of(self, key: str, look: Callable[[], Any]) -> Any:
        """What `look` returns; None where it finds something wrong."""
        try:
            return look()
        except InvalidConfig as error:
            self.problems += error.problems
            self.only_data = False
        except (ConfigError, DataError) as error:
            self.problems.append(Problem(key, str(error)))
            self.only_data = self.only_data and isinstance(error, DataError)
        return None

    def end(self) -> None:
        """Raises what was found."""
        if self.problems and self.only_data:
            raise DataError("\n".join(str(problem) for problem in self.problems))
        if self.problems:
            raise InvalidConfig(self.problems)


def _check_layer_spec(model: ModelConfig) -> None:
    """That Transformer Engine is there if it is asked for; whether it works shows when the GPU is there."""
    if model.layer_spec == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(
            "model.layer_spec (transformer_engine): transformer_engine is not installed; install "
            "transformer-engine[pytorch], or set layer_spec to auto or torch"
        )


def _check_vocabulary(model: ModelConfig, dataset: PackedDataset) -> None:
    if model.vocab_size is not None and dataset.vocab_size > model.vocab_size:
        raise ConfigError(
            f"model.vocab_size ({model.vocab_size}) is smaller than the vocabulary of the data ({dataset.vocab_size} "
            f"in {dataset.paths[0]}); give at least {dataset.vocab_size}"
        )


def _check_context(model: ModelConfig, dataset: PackedDataset) -> None:
    largest = max(dataset.buckets)
    if largest > model.max_position_embeddings:
        raise ConfigError(
            f"model.max_position_embeddings ({model.max_position_embeddings}) is smaller than the largest bucket "
            f"of {dataset.paths[0]} ({largest}); raise it (and set rope_scaling, where the model knows a shorter "
            f"context), or build the data with smaller buckets"
        )


def _check_tokenizer(path: Path | None, dataset: PackedDataset) -> None:
    if path is None:
        return
    if not path.is_file():
        raise ConfigError(
            f"data.tokenizer ({path}) is not there; name the tokenizer.model that the data was built with"
        )
    if file_sha256(path) != dataset.tokenizer_sha256:
        raise DataError(
            f"data.tokenizer ({path}) is not the one that {dataset.paths[0]} was built with; name that one, or leave "
            f"data.tokenizer out: the data folder holds a copy"
        )
