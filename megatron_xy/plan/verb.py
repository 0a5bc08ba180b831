"""`megatron-xy plan`: from RUN.yaml and a cluster to what is printed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from megatron_xy.config import InvalidConfig, RunConfig, check_world, load_config
from megatron_xy.errors import ConfigError, UsageError
from megatron_xy.model.source import with_shapes
from megatron_xy.plan.assumptions import Cluster, device
from megatron_xy.plan.calibrate import calibrate
from megatron_xy.plan.overview import Plan, make_plan
from megatron_xy.plan.search import changes, nearest_fits, refusal, search
from megatron_xy.plan.told import NO_LAYOUT, calibrated, layouts, placements, remedies, tables

UNITS = {"M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


def plan(
    path: Path,
    *,
    overrides: Sequence[str],
    num_nodes: int,
    gpus_per_node: int,
    gpu: str,
    tokens: str | None,
    do_search: bool,
    calibrate_by: Path | None,
    picture: Path | None = None,
    as_json: bool,
) -> Plan:
    """Plans a run, prints the plan, returns it. Raises ConfigError: as `check` does; where GPU or shape are not known;
    UsageError for a bad number of tokens, before anything is looked at.

    do_search: ranks layouts too; a config whose own does not go with so many ranks is planned in the fastest of them.
    calibrate_by: a run's folder, whose speeds set the efficiencies. picture: a file to draw ranks and memory into.
    """
    num_tokens = None if tokens is None else parsed_tokens(tokens)
    cluster = Cluster(device(gpu), gpus_per_node=gpus_per_node, num_nodes=num_nodes)
    refused = None
    try:
        given = with_shapes(load_config(path, overrides=overrides, world_size=cluster.world_size))
        check_world(given, world_size=cluster.world_size)
    except InvalidConfig as error:
        if not do_search:
            raise
        given, refused = with_shapes(load_config(path, overrides=overrides)), error
    calibration = None
    if calibrate_by is not None:
        calibration = calibrate(calibrate_by, cluster)
        cluster = dataclasses.replace(cluster, rates=calibration.rates)
    found = search(given, cluster) if do_search else None
    if refused and not found:
        raise ConfigError(f"{refused}\n{refusal(given, cluster) or NO_LAYOUT}")
    made = make_plan(
        found[0].config if refused and found else given,
        cluster,
        num_tokens=num_tokens,
    )
    if found is None and not made.fits:
        found = search(given, cluster)
    if picture is not None:
        from megatron_xy.plan.picture import save_picture  # and with it matplotlib, a good part of a second

        save_picture(made, picture)
    if as_json:
        result = _document(made, given)
        if found is not None:
            result["layouts"] = [_document(other, given) for other in found[:20]]
        if calibration is not None:
            result["calibration"] = dataclasses.asdict(calibration)
        print(json.dumps(result))
        return made
    shown: list[RenderableType] = [] if calibration is None else [calibrated(calibration)]
    if refused:
        shown.append(f"{refused}\nPlanned in the fastest layout that the search below finds.")
    shown += tables(made)
    if do_search:
        shown += (layouts if given.ppo is None else placements)(given, found or [])
    elif found is not None:
        shown.append(remedies(made, nearest_fits(made, found)))
    console = Console(width=max(Console().width, 150), highlight=False)
    for part in shown:
        console.print(part)
    return made


def _document(made: Plan, given: RunConfig) -> dict[str, Any]:
    """With what differs from the config that was given."""
    return made.to_json() | {"overrides": changes(given, made.config)}


def parsed_tokens(text: str) -> float:
    """366e9 of 366B. Raises UsageError."""
    unit = UNITS.get(text[-1:].upper())
    try:
        number = float(text[:-1] if unit else text) * (unit or 1.0)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise UsageError(f"--tokens ({text}) must be a number above 0, such as 366B or 1.5T")
    return number
