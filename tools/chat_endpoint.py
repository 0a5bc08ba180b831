"""A language model behind an OpenAI-compatible endpoint: one question in, its answer out; many, kept as they come."""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_xy.errors import DataError, StorageError, UsageError
from megatron_xy.inference.partial_results import PartialResults

Question = TypeVar("Question")
SECONDS = 120
CUT = ("length", "content_filter")  # the finish reasons of answers that did not come to their end


@dataclass(frozen=True)
class Reply:
    """What a model says, and whether it came to its end."""

    text: str
    has_ended: bool


@dataclass(frozen=True)
class ChatEndpoint:
    """url: such as http://localhost:8000/v1. key_variable: the environment variable with its key, if it wants one."""

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"

    def ask(self, text: str, *, max_tokens: int) -> Reply:
        """What the model says at temperature 0; without content (null) it says nothing.

        Raises StorageError where no answer comes, DataError for nonsense.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        messages = [{"role": "user", "content": text}]
        question = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        address = f"{self.url.rstrip('/')}/chat/completions"
        try:
            request = urllib.request.Request(address, json.dumps(question).encode(), headers)
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return _reply(json.load(answer)["choices"][0])
        except (OSError, urllib.error.URLError) as error:
            raise StorageError(
                f"--endpoint ({self.url}) gave no answer: {error}; the same command goes on once it does"
            ) from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"--endpoint ({self.url}) answered what no chat completion looks like: {error!r}"
            ) from error


def _reply(choice: dict[str, Any]) -> Reply:
    content = choice["message"]["content"]
    if not isinstance(content, str | None):
        raise TypeError(f"content is {type(content).__name__}")
    return Reply(content or "", choice.get("finish_reason") not in CUT)


def endpoint_of(url: str, model: str | None, *, key_variable: str) -> ChatEndpoint:
    """What the options name. Raises UsageError."""
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"--endpoint ({url}) must begin with http:// or https://, such as http://localhost:8000/v1")
    if model is None:
        raise UsageError("--endpoint goes with --model NAME, the model that is to be asked there")
    return ChatEndpoint(url, model, key_variable)


def keep_results(
    output: Path,
    questions: Sequence[Question],
    result_of: Callable[[Question], dict[str, Any]],
    *,
    facts: dict[str, Any],
    what: str,
) -> None:
    """Writes the result of each question to `output`, a row each; a killed command with the same `facts` goes on."""
    results = PartialResults(output)

    def work() -> int:
        done, writer = results.done(), results.writer(0)
        try:
            for number, question in enumerate(questions):
                if number not in done:
                    writer.add(number, result_of(question))
                    _say(f"  {what}: {number + 1:,} of {len(questions):,}")
        finally:
            writer.close()
        return 0

    results.complete(facts, wanted=len(questions), what=what, work=work, say=_say)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
