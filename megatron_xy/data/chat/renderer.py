"""Prompts and given answers as token ids: by a chat template, or as strings behind the begin token."""

from __future__ import annotations

from typing import Any

from megatron_xy.data.chat.conversations import BadConversation, Message
from megatron_xy.data.chat.encode import Chat, answer_tokens
from megatron_xy.data.chat.template import load_chat_template
from megatron_xy.data.encoding.tokenizer import Tokenizer

PROMPT_FIELDS = ("prompt", "system", "tools")  # of a row: what a model is asked


class Renderer:
    """Prompts as one model reads them: by its chat template, where they are messages."""

    def __init__(self, tokenizer: Tokenizer, chat_template: str | None) -> None:
        """Raises ConfigError or DataError where the template is none."""
        self.tokenizer = tokenizer
        self._chat = None if chat_template is None else Chat(tokenizer, load_chat_template(chat_template, tokenizer))

    def prompt(self, prompt: str | list[Message], *, tools: list[Any] | None = None) -> list[int]:
        """Token ids that an answer follows on. Raises BadConversation."""
        if self._chat is not None:
            return [int(token) for token in self._chat.prompt(prompt, tools=tools)]
        if not isinstance(prompt, str):
            raise BadConversation("the prompt is messages, and no chat template renders them; name data.chat_template")
        return self.tokenizer.text_prompt(prompt)

    def answer(self, prompt: str | list[Message], text: str) -> list[int]:
        """Token ids of an answer that is given as text, its end token included. Raises BadConversation."""
        return answer_tokens(self.tokenizer, self._chat, prompt, text)

    @property
    def template(self) -> str | None:
        """The chat template's text."""
        return None if self._chat is None else self._chat.template.source

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer."""
        if self._chat is not None:
            return self._chat.stop_ids
        return [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
