"""A row of the corpus -> its text, source and conversation, or why it is none."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from megatron_xy.data.chat.conversations import (
    BadConversation,
    Conversation,
    holds_conversation,
    json_kind,
    parse_conversation,
)
from megatron_xy.data.manifest import RESERVED_NAMES, SOURCE_RULE, is_source_name

orjson: Any
try:
    import orjson
except ImportError:  # of the extra `fast`
    orjson = None

DEFAULT_SOURCE = "default"


class RowFields(NamedTuple):
    """Where in a row its text and its source stand.

    source_optional: a row without the source, or with null there, is of `default_source` and no bad line.
    conversations: a row of jsonl that holds one is taken as such, whatever else it holds.
    default_source: of documents of which no field tells it.
    """

    text: str = "text"
    source: str | None = None
    source_optional: bool = False
    conversations: bool = False
    default_source: str = DEFAULT_SOURCE


class BadLine(Exception):
    """Why a line is no document."""


class Contents(NamedTuple):
    """What a row holds."""

    text: str
    source: str
    conversation: Conversation | None = None


RowOrBad = Contents | BadLine


def parse(raw: bytes, fields: RowFields) -> Contents:
    """The contents of one line of JSON. Raises BadLine."""
    try:
        # Of a conversation all that a template may print counts, and orjson makes floats of long integers.
        row = _load_plainly(raw, fields) if fields.conversations else _load_json(raw, fields)
    except UnicodeDecodeError as error:
        raise BadLine(f"invalid UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise BadLine("JSON is nested too deeply") from error
    except ValueError as error:
        raise BadLine(f"invalid JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadLine(f"a JSON object is wanted, not {json_kind(row)}")
    return checked(row, fields)


def _load_json(raw: bytes, fields: RowFields) -> Any:
    """What `json` makes of a line, by orjson where it is there and takes the line: three times as fast.

    orjson refuses some of what `json` takes (NaN, lone surrogates, deep nesting), and never the other way round.
    """
    if orjson is None:
        return _load_plainly(raw, fields)
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return _load_plainly(raw, fields)


def _load_plainly(raw: bytes, fields: RowFields) -> Any:
    """By `json`, which lets lone surrogates pass; no tokenizer does: BadLine where a field has one."""
    row = json.loads(raw.decode("utf-8"))
    for name in (fields.text, fields.source):
        value = row.get(name) if isinstance(row, dict) else None
        try:
            if isinstance(value, str):
                value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadLine(f"field {name!r} has a lone surrogate at character {error.start}") from error
    return row


def checked(row: dict[str, Any], fields: RowFields) -> Contents:
    """The contents of one row. Raises BadLine."""
    conversation = None
    if fields.conversations and holds_conversation(row):
        try:
            conversation = parse_conversation(row)
        except BadConversation as error:
            raise BadLine(str(error)) from error
    elif fields.text not in row and holds_conversation(row):
        raise BadLine(f"no field {fields.text!r}; a conversation needs a chat template: give --chat-template")
    elif fields.text not in row and fields.conversations:
        raise BadLine(f"neither a conversation (messages) nor a field {fields.text!r}")
    text = _string(row, fields.text) if conversation is None else conversation.text
    if fields.source is None or (fields.source_optional and row.get(fields.source) is None):
        return Contents(text, fields.default_source, conversation)
    source = _string(row, fields.source)
    if source in RESERVED_NAMES:
        raise BadLine(f"source {source!r} has the name of something else in a data folder; give it another")
    if not is_source_name(source):
        raise BadLine(f"source {source[:100]!r} cannot name a folder: {SOURCE_RULE}")
    return Contents(text, source, conversation)


def _string(row: dict[str, Any], name: str) -> str:
    """The string in field `name`. Raises BadLine."""
    if name not in row:
        raise BadLine(f"no field {name!r}")
    value = row[name]
    if isinstance(value, UnicodeDecodeError):
        raise BadLine(f"field {name!r}: invalid UTF-8 at byte {value.start}")
    if not isinstance(value, str):
        raise BadLine(f"field {name!r} is {json_kind(value)}, not a string")
    return value
