"""How a run goes on: which course of checkpoints it follows, and what may differ from the run that wrote them.

A run that starts anew, or from a number, leaves the checkpoints behind that point: they are set aside under another
name, so that neither `auto` nor retention ever mixes two courses. Nothing is deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_xy import device
from megatron_xy.checkpoint_folders import iteration_folder, saved_iterations
from megatron_xy.config import InvalidConfig, ModelConfig, Problem, RunConfig
from megatron_xy.hf.config import SHAPE_KEYS
from megatron_xy.parallel import Groups, sum_over
from megatron_xy.run_folder import current_attempt, read_start, this_start, write_start
from megatron_xy.storage import storage_errors, sync_folder

FIXED_MODEL_KEYS = (*SHAPE_KEYS, "rotary_base", "rope_scaling", "norm_epsilon")


def wanted_resume(config: RunConfig, groups: Groups) -> str | int:
    """`checkpoint.resume`, but `auto` in a restart of a run that has begun its course: it follows its own checkpoints.

    Collective: the first rank's view of the folder decides.
    """
    own = groups.role_rank == 0 and current_attempt() > 0 and read_start(config.run_dir) == this_start()
    agreed = sum_over(torch.tensor([int(own)], device=device.current()), groups.all_ranks)
    return "auto" if agreed.item() else config.checkpoint.resume


def begin(run_dir: Path, *, iteration: int | None, say: Callable[[str], None]) -> None:
    """Sets later checkpoints than `iteration` aside and notes that this start's course has begun. One rank calls it.

    iteration: None where the run follows the newest: what `auto` passed over there is damaged, and stays to be looked
    at until a new one takes its name.
    """
    checkpoints = run_dir / "checkpoints"
    later_ones = [found for found in saved_iterations(checkpoints) if iteration is not None and found > iteration]
    for later in later_ones:
        folder = iteration_folder(checkpoints, later)
        number = 1
        while (aside := folder.with_name(f"abandoned_{number}_{folder.name}")).exists():
            number += 1
        with storage_errors(aside):
            folder.rename(aside)
        say(f"{folder.name} lies behind iteration {iteration}, from which this run starts: set aside as {aside.name}")
    sync_folder(checkpoints)
    write_start(run_dir)


def facts(config: RunConfig, *, model: ModelConfig, data_fingerprints: Sequence[str]) -> dict[str, Any]:
    """What a manifest keeps of the config, for `check_continuation`. data_fingerprints: of the folders' contents."""
    order = {
        "seed": config.seed,
        "data.path": list(data_fingerprints),
        "data.weights": config.data.weights,
        "training.global_batch_tokens": config.training.global_batch_tokens,
        "training.phases": [phase.model_dump(mode="json") for phase in config.training.phases],
    }
    settings: dict[str, Any] = {"data.split_documents": config.data.split_documents}
    for section in ("training", "optimizer", "parallel"):
        values = getattr(config, section).model_dump(mode="json")
        settings |= {f"{section}.{name}": value for name, value in values.items() if f"{section}.{name}" not in order}
    settings["model.params_dtype"] = model.params_dtype
    return {"model": model.model_dump(mode="json"), "data_order": order, "settings": settings}


def check_continuation(
    stored: dict[str, Any], current: dict[str, Any], *, allow_changes: bool, origin: Path, say: Callable[[str], None]
) -> None:
    """Compares what `facts` said then and says now. Differences that change nothing learned or drawn so far are said.

    Raises InvalidConfig where the model differs, and, unless allow_changes, where the order of the data would. Phases
    that have not begun are free to change: a mixture is steered by what the losses say.
    """
    models = [_fixed(side["model"]) for side in (stored, current)]
    problems = [
        Problem(f"model.{name}", f"model.{name} ({now}) is {then} in {origin}: a run goes on with the model it has")
        for name, then, now in _differences(*models)
    ]
    then_order, now_order = stored.get("data_order", {}), current["data_order"]
    changes = _differences(*(_until(order, stored["data_step"]) for order in (then_order, now_order)))
    if not allow_changes:
        problems += [
            Problem(
                name,
                f"{name} ({_short(now)}) is {_short(then)} in {origin}: samples would be drawn twice or never; put it "
                f"back, or accept that with checkpoint.allow_changes=true",
            )
            for name, then, now in changes
        ]
    if problems:
        raise InvalidConfig(problems)
    orders = _differences(then_order, now_order)  # of phases to come, too
    for name, then, now in [*orders, *_differences(stored.get("settings", {}), current["settings"])]:
        say(f"  changed since the checkpoint: {name} {_short(then)} -> {_short(now)}")


def _fixed(section: dict[str, Any]) -> dict[str, Any]:
    """The keys that a model keeps; one that a checkpoint was written before has its default there."""
    values = {name: section.get(name, ModelConfig.model_fields[name].default) for name in FIXED_MODEL_KEYS}
    values["num_query_groups"] = values["num_query_groups"] or values["num_attention_heads"]
    return values


def _until(order: dict[str, Any], data_step: int) -> dict[str, Any]:
    """What of the data's order has a bearing on the steps before `data_step`."""
    if "training.phases" not in order:  # written before there were any
        return order
    begun = [phase for phase in order["training.phases"] if phase["from_iter"] < data_step]
    return {**order, "training.phases": begun}


def _differences(stored: dict[str, Any], current: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, then, now) of what both have and is not the same."""
    return [(name, stored[name], now) for name, now in current.items() if name in stored and stored[name] != now]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {part}" for name, part in value.items() if part is not None) + "}"
    if isinstance(value, list):
        return ", ".join(part[:12] if isinstance(part, str) else _short(part) for part in value) or "none"
    return str(value)
