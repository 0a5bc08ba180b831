"""A language model behind an OpenAI-compatible endpoint: one question in, its answer out."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass

from megatron_xy.errors import ConfigError, DataError, StorageError

SECONDS = 120


@dataclass(frozen=True)
class ChatEndpoint:
    """url: such as http://localhost:8000/v1. key_variable: the environment variable with its key, if it wants one."""

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"

    def ask(self, text: str, *, max_tokens: int) -> str:
        """What the model says at temperature 0. Raises StorageError where nothing comes, DataError for nonsense."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        messages = [{"role": "user", "content": text}]
        question = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        address = f"{self.url.rstrip('/')}/chat/completions"
        try:
            request = urllib.request.Request(address, json.dumps(question).encode(), headers)
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return str(json.load(answer)["choices"][0]["message"]["content"])
        except (OSError, urllib.error.URLError) as error:
            raise StorageError(
                f"--endpoint ({self.url}) gave no answer: {error}; the same command goes on once it does"
            ) from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"--endpoint ({self.url}) answered what no chat completion looks like: {error!r}"
            ) from error


def endpoint_of(url: str, model: str | None, *, key_variable: str) -> ChatEndpoint:
    """What the options name. Raises ConfigError."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--endpoint ({url}) must begin with http:// or https://, such as http://localhost:8000/v1")
    if model is None:
        raise ConfigError("--endpoint goes with --model NAME, the model that is to be asked there")
    return ChatEndpoint(url, model, key_variable)
