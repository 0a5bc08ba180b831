"""`megatron-xy plan`: from RUN.yaml and a cluster to what is printed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from megatron_xy.config import InvalidConfig, check_world, load_config
from megatron_xy.errors import ConfigError, UsageError
from megatron_xy.model.source import with_shapes
from megatron_xy.plan.assumptions import device, efficiencies
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
    """Plans a run, prints the plan, returns it. Raises ConfigError: as `check` does; where GPU or shape are not known.

    do_search: ranks layouts too; a config whose own does not go with so many ranks is planned in the fastest of them.
    calibrate_by: a run's folder, whose speeds set the efficiencies. picture: a file to draw ranks and memory into.
    """
    chosen, rates = device(gpu), efficiencies()
    refused = None
    try:
        given = with_shapes(load_config(path, overrides=overrides, world_size=num_nodes * gpus_per_node))
        check_world(given, world_size=num_nodes * gpus_per_node)
    except InvalidConfig as error:
        if not do_search:
            raise
        given, refused = with_shapes(load_config(path, overrides=overrides)), error
    calibration = None
    if calibrate_by is not None:
        calibration = calibrate(calibrate_by, gpu=chosen, rates=rates, gpus_per_node=gpus_per_node)
        rates = calibration.rates
    find = partial(search, given, num_nodes=num_nodes, gpus_per_node=gpus_per_node, gpu=chosen, rates=rates)
    found = find() if do_search else []
    if refused and not found:
        why = refusal(given, world_size=num_nodes * gpus_per_node, gpus_per_node=gpus_per_node)
        raise ConfigError(f"{refused}\n{why or NO_LAYOUT}")
    made = make_plan(
        found[0].config if refused else given,
        num_nodes=num_nodes,
        gpus_per_node=gpus_per_node,
        gpu=chosen,
        rates=rates,
        num_tokens=None if tokens is None else parsed_tokens(tokens),
    )
    looked = do_search or not made.fits
    if looked and not do_search:
        found = find()
    if picture is not None:
        from megatron_xy.plan.picture import save_picture  # and with it matplotlib, a good part of a second

        save_picture(made, picture)
    if as_json:
        result = made.to_json() | {"overrides": changes(given, made.config)}
        if looked:
            result["layouts"] = [other.to_json() | {"overrides": changes(given, other.config)} for other in found[:20]]
        if calibration is not None:
            result["calibration"] = dataclasses.asdict(calibration)
        print(json.dumps(result))
        return made
    console = Console(width=max(Console().width, 150), highlight=False)
    if calibration is not None:
        console.print(calibrated(calibration))
    if refused:
        console.print(f"{refused}\nPlanned in the fastest layout that the search below finds.")
    for table in tables(made):
        console.print(table)
    if do_search:
        for part in layouts(given, found) if given.ppo is None else placements(given, found):
            console.print(part)
    elif looked:
        console.print(remedies(made, nearest_fits(made, found)))
    return made


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
