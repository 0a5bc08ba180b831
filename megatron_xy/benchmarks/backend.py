"""Our model as a backend of lm-eval: its texts -> token ids -> the model's ranks -> likelihoods and answers.

Tokens are those that transformers gives for an exported folder: behind the begin token, control tokens by their
spelling.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_xy.benchmarks.answering import Model, Prompt
from megatron_xy.data.chat.template import ANSWER_BEGINS, ANSWER_ENDS
from megatron_xy.errors import ConfigError
from megatron_xy.inference.answers import Chats, find_tokenizer
from megatron_xy.inference.model_job import ModelJob
from megatron_xy.inference.model_ranks import complete_options
from megatron_xy.model.likelihood import Question
from megatron_xy.model.sampling import SamplingOptions

MAX_RESPONSE_LENGTH = 256  # tokens, where a task says nothing: lm-eval's own
_SAMPLING = {"temperature", "top_p", "top_k"}
_PASSED_OVER = {"do_sample"}  # temperature says it


class MegatronXYLM(TemplateLM):  # type: ignore[misc]
    """A model in `ckpt:DIR` or `hf:DIR` on `nproc_per_node` ranks in the layout of `overrides`."""

    def __init__(
        self,
        origin: str,
        *,
        folder: Path,
        nproc_per_node: int = 1,
        overrides: Sequence[str] = (),
        tokenizer: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        """folder: where work in progress lies. Raises ConfigError, DataError for what is not there or does not fit."""
        super().__init__()
        self.model = Model(origin, nproc_per_node, list(overrides), folder, tokenizer)
        options = ModelJob("evaluate", origin, nproc_per_node, list(overrides), str(folder), {}).options()
        shape = complete_options(options).model
        self.max_length, self._vocab_size = shape.max_position_embeddings, shape.vocab_size or 0
        self._tokenizer = find_tokenizer(origin, given=tokenizer)
        if self._tokenizer.eos_id is None:
            raise ConfigError(f"{self._tokenizer.path} has no end token, so no answer could end; name another one")
        self._chats = Chats(origin, self._tokenizer, given=chat_template)
        spelt = sorted(self._tokenizer.control_tokens, key=len, reverse=True)
        self._controls = re.compile(f"({'|'.join(map(re.escape, spelt))})")
        self._encoded = lru_cache(maxsize=64)(self._encode)  # a context comes once for each of its choices

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return int(self._tokenizer.eos_id or 0)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self.eot_token_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's fingerprints."""
        return f"{self._tokenizer.path.name}-{self._tokenizer.sha256[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; behind the begin token, unless the text spells it out or add_special_tokens is False."""
        return list(self._encoded(string, add_special_tokens is not False))

    def _encode(self, text: str, with_begin: bool) -> list[int]:
        parts = [(part, place % 2 == 1) for place, part in enumerate(self._controls.split(text)) if part]
        if len(parts) == 1 and not parts[0][1]:
            ids = self._tokenizer.encode(text).tolist()
        else:
            ids = self._tokenizer.encode_parts(parts).ids.tolist()
        begin = self._tokenizer.bos_id
        return [begin, *ids] if with_begin and begin is not None and ids[:1] != [begin] else ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is the greedy one) of each continuation; contexts are cut on the left."""
        places: dict[tuple[int, ...], int] = {}
        questions: list[Question] = []
        asked: list[tuple[int, int]] = []
        self._say_of_cut_ones(
            sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests),
            len(requests),
        )
        for _texts, context, continuation in requests:
            known = tuple(context[-(self.max_length + 1 - len(continuation)) :])
            place = places.setdefault(known, len(questions))
            if place == len(questions):
                questions.append(Question(list(known), []))
            continuations = questions[place].continuations
            assert isinstance(continuations, list), "made above"
            continuations.append(continuation)
            asked.append((place, len(continuations) - 1))
        found = self.model.likelihoods(questions, say=_say)
        answers = [found[place][number] for place, number in asked]
        return [(answer.logprob, answer.is_greedy) for answer in answers]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of continuations, without lm-eval's bar of texts that are made tokens."""
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the model's longest sequence, each token once."""
        windows: list[tuple[tuple[str, str], list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((("", ""), list(context), list(continuation)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += logprob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to the first of each request's stop texts, which is cut off."""
        prompts, num_cut = [], 0
        for request in requests:
            context, options = request.args
            prompt, is_cut = self._prompt(context, normalize_gen_kwargs(options, MAX_RESPONSE_LENGTH))
            prompts.append(prompt)
            num_cut += is_cut
        self._say_of_cut_ones(num_cut, len(requests))
        texts = self.model.responses(prompts, say=_say)
        return [
            postprocess_generated_text(text, stop=prompt.until, think_end_token=None)
            for text, prompt in zip(texts, prompts, strict=True)
        ]

    def _say_of_cut_ones(self, num_cut: int, num_requests: int) -> None:
        if num_cut:
            _say(
                f"warning: {num_cut:,} of {num_requests:,} requests are longer than the model's "
                f"max_position_embeddings ({self.max_length}): the beginnings of their contexts are cut off"
            )

    def _prompt(self, context: str, options: dict[str, Any]) -> tuple[Prompt, bool]:
        """(what is asked, whether its context was cut on the left)."""
        until = [text for text in handle_stop_sequences(options.pop("until", None), eos=None) if text]
        length = int(options.pop("max_gen_toks"))
        if unknown := sorted(options.keys() - _SAMPLING - _PASSED_OVER):
            raise ConfigError(f"generation_kwargs: {', '.join(unknown)} are not known here; leave them out of the task")
        if not 0 < length < self.max_length:
            raise ConfigError(
                f"max_gen_toks ({length}) must be below the model's max_position_embeddings ({self.max_length})"
            )
        given = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
        chosen = SamplingOptions(
            **{"temperature": 0.0, **given}, max_response_length=length, stop_ids=(self.eot_token_id,)
        )
        tokens, room = self.tok_encode(context), self.max_length - length
        return Prompt(tokens[-room:], chosen, until), len(tokens) > room

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's chat template has it."""
        template = self._chats.needed().template
        text = template.render(chat_history, add_generation_prompt=add_generation_prompt)
        return text.replace(ANSWER_BEGINS, "").replace(ANSWER_ENDS, "")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text."""
        return self._chats.needed().template.source if chat_template else None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
