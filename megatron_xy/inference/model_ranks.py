"""The ranks of a verb over a model: they join, build the model in the layout asked for and fill it with its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

from megatron_xy import device, parallel
from megatron_xy.config import Head, RunConfig, check_shape
from megatron_xy.errors import DataError
from megatron_xy.hf.source import manifest_of
from megatron_xy.model.source import resolve_model, split_origin
from megatron_xy.model.weights import load_initial_weights
from megatron_xy.role import Role, build_role
from megatron_xy.runtime import environment, waits
from megatron_xy.runtime.watchdog import backend_timeout
from megatron_xy.tensors.names import EMBEDDING


def complete_options(config: RunConfig, *, head: Head = "language_model") -> RunConfig:
    """`config` with its model's shape from `model.load`, in the dtype to compute in. Raises as `resolve_model` does."""
    assert config.model.load is not None, "a verb over a model names one"
    dtype = "fp32" if device.is_cpu() else stored_dtype(config.model.load)
    wanted = config.model.model_copy(update={"head": head, "params_dtype": dtype})
    completed = config.model_copy(update={"model": resolve_model(wanted)})
    check_shape(completed)
    return completed


def stored_dtype(origin: str) -> Literal["fp32", "bf16"]:
    """That of the embedding in `ckpt:DIR` or `hf:DIR`; fp16, which nothing computes in here, counts as bf16."""
    kind, folder = split_origin(origin)
    manifest = manifest_of(kind, folder)
    if EMBEDDING not in manifest.tensors:
        raise DataError(f"{folder} holds no {EMBEDDING}; was it written by another kind of model?")
    return "fp32" if manifest.tensors[EMBEDDING].dtype == "float32" else "bf16"


def replica_writer(groups: parallel.Groups) -> int | None:
    """The number under which this rank writes its replica's results; None where another rank does."""
    return groups.dp_rank if groups.is_last_stage and groups.tp_rank == 0 else None


@contextlib.contextmanager
def joined(config: RunConfig) -> Iterator[Role]:
    """Inside, this process is a rank of the model's world; a world of its own where no launcher started it.

    config: of `complete_options`. Raises DataError for damaged weights, PeerLost, ConfigError where memory runs out.
    """
    timeout = backend_timeout(config.runtime.timeout_seconds)
    is_alone = not environment.is_set()
    told = parallel.errors_told(when_memory_runs_out="split the model further, or take fewer sequences at a time")
    with contextlib.ExitStack() as stack, told:
        if is_alone:
            parallel.start_alone()
            stack.callback(parallel.stop_distributed)  # behind an error, too: the process may go on to another model
        else:
            waits.install()
            parallel.start_distributed(timeout_seconds=timeout)
        groups = parallel.build_groups(
            "model", ranks=range(environment.world_size()), parallel=config.parallel, timeout_seconds=timeout
        )
        assert groups is not None, "the role has all ranks"
        role = build_role(
            groups, model=config.model, parallel=config.parallel, optimizer=None, seed=config.seed, draw=False
        )
        load_initial_weights(role, seed=config.seed, as_released=True)
        yield role
        if not is_alone:
            parallel.stop_distributed()
