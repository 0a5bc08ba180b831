"""What may differ between a run that goes on and the one that wrote its checkpoint.

Plain values of configs and manifests: `check` asks before a run what the run asks once it has found its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_xy.checkpoint.files import read_manifest
from megatron_xy.config import InvalidConfig, ModelConfig, Problem, RunConfig
from megatron_xy.hf.config import SHAPE_KEYS

FIXED_MODEL_KEYS = (*SHAPE_KEYS, "rotary_base", "rope_scaling", "norm_epsilon")


def facts(config: RunConfig, *, model: ModelConfig, data_fingerprints: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest keeps of the config, for `check_continuation`. data_fingerprints: of what is drawn, by key."""
    order = {
        "seed": config.seed,
        **data_fingerprints,
        "data.weights": config.data.weights,
        "training.global_batch_tokens": config.training.global_batch_tokens,
        "training.phases": [phase.model_dump(mode="json") for phase in config.training.phases],
    }
    settings: dict[str, Any] = {"data.split_documents": config.data.split_documents}
    sections = {"training": config.training, "optimizer": config.optimizer, "parallel": config.parallel}
    if config.task == "reward":
        sections["reward"] = config.reward_section
    for section, values in sections.items():
        dumped = {f"{section}.{name}": value for name, value in values.model_dump(mode="json").items()}
        settings |= {name: value for name, value in dumped.items() if name not in order}
    settings.pop("reward.test_fraction", None)  # no order of pairs depends on it, or it is told there
    settings["model.params_dtype"] = model.params_dtype
    return {"model": model.model_dump(mode="json"), "data_order": order, "settings": settings}


def check_parts(
    folder: Path, current: Mapping[str, dict[str, Any]], *, allow_changes: bool, say: Callable[[str], None]
) -> None:
    """`check_continuation` of every part of a checkpoint; current: by its folder in there. What the parts have in
    common is said once. Raises DataError, too, where one is damaged."""
    for number, (part, now) in enumerate(current.items()):
        origin = folder / part
        tell = (lambda line: None) if number else say
        check_continuation(read_manifest(origin).state, now, allow_changes=allow_changes, origin=origin, say=tell)


def check_continuation(
    stored: dict[str, Any], current: dict[str, Any], *, allow_changes: bool, origin: Path, say: Callable[[str], None]
) -> None:
    """Compares what `facts` said then and says now. Differences that change nothing learned or drawn so far are said.

    Raises InvalidConfig where the model differs, and, unless allow_changes, where the order of the data would. Phases
    that have not begun are free to change: a mixture is steered by what the losses say.
    """
    models = [fixed_keys(side["model"]) for side in (stored, current)]
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
                f"{name} ({short(now)}) is {short(then)} in {origin}: {_harm(name)}; put it back, or accept that "
                f"with checkpoint.allow_changes=true",
            )
            for name, then, now in changes
        ]
    if problems:
        raise InvalidConfig(problems)
    orders = _differences(then_order, now_order)  # of phases to come, too
    for name, then, now in [*orders, *_differences(stored.get("settings", {}), current["settings"])]:
        say(f"  changed since the checkpoint: {name} {short(then)} -> {short(now)}")


def fixed_keys(section: dict[str, Any]) -> dict[str, Any]:
    """Of a model's section what a model keeps; a key that a checkpoint was written before has its default there."""
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


def _harm(name: str) -> str:
    """What comes of another order of the data, or, under PPO, of another frozen model."""
    return "another model would judge" if name.startswith("roles.") else "samples would be drawn twice or never"


def short(value: Any) -> str:
    """A value of the facts, for a message."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {part}" for name, part in value.items() if part is not None) + "}"
    if isinstance(value, list):
        return ", ".join(part[:12] if isinstance(part, str) else short(part) for part in value) or "none"
    return str(value)
