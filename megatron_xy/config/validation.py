"""From a file's plain values to a `RunConfig`, key by key, and a sentence for every key whose value is refused.

pydantic finds what is wrong; the words for it are ours.
"""

from __future__ import annotations

import copy
from typing import Any

from pydantic import ValidationError

from megatron_xy.config.problems import as_written
from megatron_xy.config.sections import RunConfig
from megatron_xy.config.unknown_keys import UNKNOWN_KEY, unknown_key

PAIR = "must be two numbers, such as [-1, 1]"
RULES_BY_KIND = {  # by the beginning of pydantic's name for what is wrong
    "int_": "must be a whole number",
    "float_": "must be a number",
    "bool_": "must be true or false",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "string_type": "must be text; put it in quotes",
    "list_type": "must be a list",
    "tuple_": PAIR,
    "too_long": PAIR,
    "dict_type": "must be a section: `key: value` lines below it",
    "model_type": "must be a section: `key: value` lines below it",
}


def validate(values: dict[str, Any]) -> tuple[RunConfig, dict[str, str]]:
    """The config of `values`, and a sentence for every key that is refused: those have their defaults in the config."""
    try:
        return RunConfig.model_validate(values), {}
    except ValidationError as error:
        details = [detail for detail in error.errors() if detail["type"] != "default_factory_not_called"]
    refused: dict[str, str] = {}
    kept = copy.deepcopy(values)
    for detail in details:
        location, value = _given_part(detail["loc"], values)
        name = ".".join(map(str, location))
        message = _message(detail, location)
        if name not in refused:
            shown = "" if message.startswith(UNKNOWN_KEY) else f" ({as_written(value)})"
            refused[name] = f"{name}{shown}: {message}"
        elif message not in refused[name]:  # a key of several types has one record for each
            refused[name] += f", or {message}"
        section = kept.get(location[0])
        if len(location) > 1 and isinstance(section, dict):
            section.pop(location[1], None)
        else:
            kept.pop(location[0], None)
    return RunConfig.model_validate(kept), refused


def _given_part(location: tuple[Any, ...], values: Any) -> tuple[tuple[Any, ...], Any]:
    """The leading part of pydantic's location that stands in the file, and its value; types it tried come after."""
    for depth, part in enumerate(location):
        is_item = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if not is_item and not (isinstance(values, dict) and part in values):
            return location[:depth], values
        values = values[part]
    return location, values


def _message(detail: Any, location: tuple[Any, ...]) -> str:
    """The rule that pydantic's record tells of, in this file's words."""
    kind = detail["type"]
    if kind == "extra_forbidden":
        return unknown_key([str(part) for part in location])
    if kind == "missing":
        return PAIR if isinstance(detail["loc"][-1], int) else f"{detail['loc'][-1]} is missing"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    for start, rule in RULES_BY_KIND.items():
        if kind.startswith(start):
            return rule
    message = str(detail["msg"]).replace("Input should", "must", 1)
    return message[0].lower() + message[1:]
