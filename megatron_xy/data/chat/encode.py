"""Conversations and prompts -> token ids, and which of them are learned: the answers, each with its end token.

    messages -> (template) text -> its control tokens and the texts between them -> (tokenizer) ids

The ids are those of transformers' apply_chat_template, with two exceptions: a control token that a message spells out
stays text, and templates have no clock. Answers are what the template marks with {% generation %}; where it marks
nothing, what stands behind the generation prompt of each of the assistant's turns, up to and including the control
token that ends it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_xy.data.chat.conversations import BadConversation, Message
from megatron_xy.data.chat.template import ANSWER_BEGINS, ANSWER_ENDS, ChatTemplate
from megatron_xy.data.encoding.tokenizer import Tokenizer

# What becomes of a conversation longer than the largest bucket. refuse: its line is a bad one; truncate_left: its last
# tokens fill one sample; split: samples of it one after another, as of a text.
ChatOverflow = Literal["refuse", "truncate_left", "split"]

_SPELT = "\ufdd2"  # behind the first character of a control token that a message spells out


@dataclass(frozen=True)
class ChatOptions:
    """How a build takes conversations."""

    name: str  # of the template
    template: str  # its text
    overflow: ChatOverflow
    last_turn_only: bool
    longest: int  # tokens, of the largest bucket


@dataclass(frozen=True)
class ChatTokens:
    """A conversation's ids [tokens] i32, and which of them are learned [tokens] bool."""

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]


class Chat:
    """A tokenizer and a chat template: everything that has conversations or prompts goes through here.

    Attributes: tokenizer, template.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.tokenizer, self.template = tokenizer, template
        spellings = sorted(tokenizer.control_tokens, key=len, reverse=True)
        controls = "|".join(map(re.escape, spellings)) or "(?!)"
        self._control = re.compile(controls)
        self._tokens = re.compile(f"([{ANSWER_BEGINS}{ANSWER_ENDS}{_SPELT}])|({controls})")

    def conversation(
        self, messages: list[Message], *, tools: list[Any] | None = None, last_turn_only: bool = False
    ) -> ChatTokens:
        """A whole conversation; of its answers (or the last one) those are learned whose `weight` is not 0.

        An id that holds text from both sides of an answer's border counts as transformers has it where the template
        marks answers, else as prompt. Raises BadConversation.
        """
        guarded, guarded_tools = self._guarded(messages), self._guarded(tools)
        if self.template.marks_answers:
            text = self.template.render(guarded, tools=guarded_tools)
        else:
            text = self._mark_answers(guarded, guarded_tools)
        parts, answers = self._parts(text)
        chosen = _chosen(answers, messages, last_turn_only=last_turn_only)
        placed = self.tokenizer.encode_parts(parts)
        learned = np.zeros(len(placed.ids), dtype=np.bool_)
        for first, last in chosen:
            is_inside = placed.begins >= first
            if self.template.marks_answers:
                is_inside |= placed.ends > first
            learned |= is_inside & (placed.begins < last)
        return ChatTokens(placed.ids, learned)

    def prompt(self, messages: list[Message] | str, *, tools: list[Any] | None = None) -> NDArray[np.int32]:
        """Ids of what the model answers: messages with the generation prompt behind them, or a string as it stands
        behind bos. Raises BadConversation.
        """
        if isinstance(messages, str):
            return np.array(self.tokenizer.text_prompt(messages), dtype=np.int32)
        text = self.template.render(self._guarded(messages), tools=self._guarded(tools), add_generation_prompt=True)
        parts, _ = self._parts(text)
        return self.tokenizer.encode_parts(parts).ids

    @cached_property
    def stop_ids(self) -> list[int]:
        """The ids that end an answer: the tokenizer's own, and last that of the template's end token."""
        ids = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            tokens = self.conversation(example)
        except BadConversation:  # a template for other conversations than this simplest one tells nothing
            return ids
        last = tokens.ids[tokens.learned][-1:].tolist()
        return ids + [index for index in last if index in self.tokenizer.control_tokens.values() and index not in ids]

    def _guarded(self, value: Any) -> Any:
        """A copy in which no text spells a control token."""
        if isinstance(value, str):
            return self._control.sub(lambda found: f"{found[0][0]}{_SPELT}{found[0][1:]}", value)
        if isinstance(value, dict):
            return {name: self._guarded(part) for name, part in value.items()}
        return [self._guarded(part) for part in value] if isinstance(value, list) else value

    def _mark_answers(self, messages: list[Message], tools: list[Any] | None) -> str:
        """The conversation's text, each answer between marks: from the end of its prompt on."""
        whole = self.template.render(messages, tools=tools)
        pieces, position = [], 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.template.render(messages[:number], tools=tools, add_generation_prompt=True)
            until = self.template.render(messages[: number + 1], tools=tools)
            if not (whole.startswith(prompt) and until.startswith(prompt) and len(prompt) >= position):
                raise BadConversation(
                    f"the chat template {self.template.name} renders what comes before message {number + 1} otherwise "
                    f"than as its prompt; mark the answers in the template with {{% generation %}}"
                )
            end = self._end_of_answer(whole, start=len(prompt), until=until)
            pieces += [whole[position : len(prompt)], ANSWER_BEGINS, whole[len(prompt) : end], ANSWER_ENDS]
            position = end
        return "".join([*pieces, whole[position:]])

    def _end_of_answer(self, whole: str, *, start: int, until: str) -> int:
        """Where in `whole` the answer that begins at `start` ends; `until`: the conversation up to it."""
        controls = [found[0] for found in self._control.finditer(until, start)]
        if controls:  # the same one may stand in the answer too; what follows the turn may differ from `until`
            ends = [found.end() for found in self._control.finditer(whole, start) if found[0] == controls[-1]]
            wanted = controls.count(controls[-1])
            if wanted <= len(ends):
                return ends[wanted - 1]
        elif whole.startswith(until):
            return len(until)
        raise BadConversation(
            f"the chat template {self.template.name} does not show where an answer ends; mark the answers in it with "
            f"{{% generation %}}"
        )

    def _parts(self, text: str) -> tuple[list[tuple[str, bool]], list[tuple[int, int]]]:
        """A marked text without its marks: (text, whether it is a control token) in order; and where its answers are,
        [first, last) in characters of all of it."""
        parts: list[tuple[str, bool]] = []
        answers: list[tuple[int, int]] = []
        plain: list[str] = []
        length = position = begun = 0
        for found in self._tokens.finditer(text):
            plain.append(text[position : found.start()])
            length += found.start() - position
            position = found.end()
            if found[0] == ANSWER_BEGINS:
                begun = length
            elif found[0] == ANSWER_ENDS:
                answers.append((begun, length))
            elif found[2] is not None:
                parts += [("".join(plain), False), (found[0], True)]
                plain = []
                length += len(found[0])
        parts.append(("".join([*plain, text[position:]]), False))
        return [part for part in parts if part[0]], answers


def answer_tokens(tokenizer: Tokenizer, chat: Chat | None, prompt: list[Message] | str, text: str) -> list[int]:
    """Token ids of an answer that is given as text, its end token included. Raises BadConversation.

    The end is the chat template's, where it has one of its own, else the tokenizer's: what an actor ends with.
    """
    stop_ids = [tokenizer.eos_id] if chat is None else chat.stop_ids
    assert stop_ids and stop_ids[-1] is not None, "a tokenizer without an end token is refused before"
    if chat is not None and not isinstance(prompt, str):
        whole = chat.conversation([*prompt, {"role": "assistant", "content": text}], last_turn_only=True)
        ids = [int(token) for token in whole.ids[whole.learned]]
    else:
        ids = [int(token) for token in tokenizer.encode(text)]
    return ids if ids and ids[-1] in stop_ids else [*ids, stop_ids[-1]]


def _chosen(answers: list[tuple[int, int]], messages: list[Message], *, last_turn_only: bool) -> list[tuple[int, int]]:
    """Those of the answers that are learned."""
    given = [message for message in messages if message["role"] == "assistant"]
    left_out = [number for number, message in enumerate(given) if message.get("weight") == 0]
    if left_out and len(answers) != len(given):
        raise BadConversation("some answers have weight 0, and the chat template does not mark each by itself")
    numbers = [number for number in range(len(answers)) if not (last_turn_only and number < len(answers) - 1)]
    return [answers[number] for number in numbers if number not in left_out]
