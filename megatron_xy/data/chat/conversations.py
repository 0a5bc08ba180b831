"""A row of jsonl -> the conversation in it: OpenAI messages, ShareGPT, or instruction/input/output.

    {"messages": [{"role", "content"}, ...], "system"?, "tools"?}
    {"conversations": [{"from", "value"}, ...], "system"?}
    {"instruction", "input"?, "output", "system"?, "history"?: [[question, answer], ...]}

What comes out are messages as OpenAI has them. What is no conversation is refused with the reason.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLES = {  # ShareGPT's words
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
CONVERSATION_FIELDS = ("messages", "conversations", "instruction")
MARKS = "\ufdd0\ufdd1\ufdd2"  # noncharacters of Unicode, which encode.py uses for itself

Message = dict[str, Any]


class BadConversation(Exception):
    """Why something is no conversation, or none that can be learned from."""


@dataclass(frozen=True)
class Conversation:
    """Messages of the roles in ROLES, and the tools that the assistant may call, as a template takes them."""

    messages: list[Message]
    tools: list[Any] | None = None

    @property
    def text(self) -> str:
        """The same for the same conversation, however its row is laid out: what is hashed to tell it from others."""
        return json.dumps([self.messages, self.tools], ensure_ascii=False, sort_keys=True)


def holds_conversation(row: dict[str, Any]) -> bool:
    """Whether a row has a field that a conversation stands in."""
    return any(name in row for name in CONVERSATION_FIELDS)


def parse_conversation(row: dict[str, Any]) -> Conversation:
    """The conversation of a row that holds one, with something in it to learn. Raises BadConversation."""
    turns = _instruction_turns(row) if "instruction" in row else row.get("messages", row.get("conversations"))
    messages = _with_system(parse_messages(turns), row)
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadConversation("no turn of the assistant: there is nothing to learn")
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant" and not (message["content"] or "").strip() and not message.get("tool_calls"):
            raise BadConversation(f"message {number} is an empty answer")
    if all(message.get("weight") == 0 for message in answers):
        raise BadConversation("every answer has weight 0: there is nothing to learn")
    return Conversation(messages, _tools(row.get("tools")))


def parse_prompt(row: dict[str, Any]) -> Conversation:
    """The messages in `prompt`, with the `system` and the `tools` beside them, if any. Raises BadConversation."""
    return Conversation(_with_system(parse_messages(row.get("prompt")), row), _tools(row.get("tools")))


def parse_messages(turns: Any) -> list[Message]:
    """Messages as OpenAI has them, from these or ShareGPT's; what else one holds stays. Raises BadConversation."""
    if not isinstance(turns, list):
        raise BadConversation(f"the messages are {_kind(turns)}, not a list")
    if not turns:
        raise BadConversation("there are no messages")
    messages = [_message(turn, number) for number, turn in enumerate(turns, start=1)]
    text = json.dumps(messages, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadConversation("a message has a lone surrogate") from error
    if any(mark in text for mark in MARKS):
        raise BadConversation("a message holds U+FDD0, U+FDD1 or U+FDD2, which are no characters")
    return messages


def _with_system(messages: list[Message], row: dict[str, Any]) -> list[Message]:
    """The messages behind the `system` of their row, if it has one."""
    system = row.get("system")
    if not system:
        return messages
    if messages[0]["role"] == "system":
        raise BadConversation("the messages begin with a system turn, and there is a system beside them; keep one")
    return [{"role": "system", "content": _text(system, "system")}, *messages]


def _message(turn: Any, number: int) -> Message:
    where = f"message {number}"
    if not isinstance(turn, dict):
        raise BadConversation(f"{where} is {_kind(turn)}, not an object")
    given = turn.get("role", turn.get("from"))
    if not isinstance(given, str):
        raise BadConversation(f"{where}: its role is {_kind(given)}, not a string")
    role = OTHER_ROLES.get(given, given)
    if role not in ROLES:
        raise BadConversation(f"{where}: unknown role {given[:50]!r}; known are {', '.join((*ROLES, *OTHER_ROLES))}")
    content = turn.get("content", turn.get("value"))
    if not (content is None and role == "assistant" and turn.get("tool_calls")):
        content = _text(content, where)
    if turn.get("weight", 1) not in (0, 1):
        raise BadConversation(f"{where}: its weight must be 0 or 1")
    rest = {name: value for name, value in turn.items() if name not in ("role", "from", "content", "value")}
    return {"role": role, "content": content, **rest}


def _text(content: Any, where: str) -> str:
    """A string as it is; of a list of parts, their texts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if len(texts) == len(content):
            return "".join(texts)
        raise BadConversation(f"{where} has parts that are no text")
    raise BadConversation(f"{where}: its content is {_kind(content)}, not a string")


def _instruction_turns(row: dict[str, Any]) -> list[Message]:
    turns: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadConversation("history must be a list of pairs of a question and an answer")
    for question, answer in history:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    asked = [_text(row["instruction"], "instruction"), _text(row.get("input") or "", "input")]
    answer = {"role": "assistant", "content": _text(row.get("output"), "output")}
    return [*turns, {"role": "user", "content": "\n".join(part for part in asked if part)}, answer]


def _tools(tools: Any) -> list[Any] | None:
    """The tools of a row: a list, or the JSON of one."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadConversation(f"tools is no JSON: {error}") from error
    if not tools:
        return None
    if not isinstance(tools, list):
        raise BadConversation(f"tools is {_kind(tools)}, not a list")
    return tools


def _kind(value: object) -> str:
    return "missing" if value is None else json_kind(value)


def json_kind(value: object) -> str:
    """What a JSON value is, in the words of messages: "an object", "a list", "a string", "a boolean", "null" or "a
    number"."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
