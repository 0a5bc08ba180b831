"""`megatron-xy plan`: from RUN.yaml and a cluster to what is printed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_xy.config import load_config
from megatron_xy.errors import ConfigError
from megatron_xy.plan.assumptions import device, efficiencies
from megatron_xy.plan.calibrate import calibrate
from megatron_xy.plan.overview import Plan, make_plan
from megatron_xy.plan.search import nearest_fits, search
from megatron_xy.plan.told import calibrated, layouts, remedies, tables

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
    as_json: bool,
) -> Plan:
    """Plans a run, prints the plan, returns it. Raises ConfigError: as `check` does; where GPU or shape are not known.

    calibrate_by: a run's folder, whose speeds set the efficiencies.
    """
    config = load_config(path, overrides=overrides, world_size=num_nodes * gpus_per_node)
    chosen, rates = device(gpu), efficiencies()
    calibration = None
    if calibrate_by is not None:
        calibration = calibrate(calibrate_by, gpu=chosen, rates=rates, gpus_per_node=gpus_per_node)
        rates = calibration.rates
    made = make_plan(
        config,
        num_nodes=num_nodes,
        gpus_per_node=gpus_per_node,
        gpu=chosen,
        rates=rates,
        num_tokens=None if tokens is None else parsed_tokens(tokens),
    )
    if do_search and config.task == "ppo":
        raise ConfigError("--search: task ppo has several models; plan each one's layout by its roles' sections")
    looked = do_search or (not made.fits and config.task != "ppo")
    found = search(config, num_nodes=num_nodes, gpus_per_node=gpus_per_node, gpu=chosen, rates=rates) if looked else []
    if as_json:
        result = made.to_json()
        if looked:
            result["layouts"] = [other.to_json() for other in found[:20]]
        if calibration is not None:
            result["calibration"] = dataclasses.asdict(calibration)
        print(json.dumps(result))
        return made
    console = Console(width=max(Console().width, 150), highlight=False)
    if calibration is not None:
        console.print(calibrated(calibration))
    for table in tables(made):
        console.print(table)
    if do_search:
        console.print(layouts(made, found))
    elif looked:
        console.print(remedies(made, nearest_fits(made, found)))
    return made


def parsed_tokens(text: str) -> float:
    """366e9 of 366B. Raises ConfigError."""
    unit = UNITS.get(text[-1:].upper())
    try:
        number = float(text[:-1] if unit else text) * (unit or 1.0)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ConfigError(f"--tokens ({text}) must be a number above 0, such as 366B or 1.5T")
    return number
