"""A form that transformers has opened, asked by lm-eval's own backend: what whoever downloads it would measure."""

from __future__ import annotations

import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer
from transformers.utils import logging

from megatron_xy.benchmarks.suite import Benchmarks, Metrics
from megatron_xy.errors import ConfigError


class _Opened(HFLM):  # type: ignore[misc]
    """lm-eval's backend; its bars are for terminals."""

    loglikelihood = partialmethod(HFLM.loglikelihood, disable_tqdm=not sys.stderr.isatty())
    loglikelihood_rolling = partialmethod(HFLM.loglikelihood_rolling, disable_tqdm=not sys.stderr.isatty())
    generate_until = partialmethod(HFLM.generate_until, disable_tqdm=not sys.stderr.isatty())


def ask_opened(model: Any, folder: Path, benchmarks: Benchmarks) -> Metrics:
    """What `model`, opened from `folder`, answers to the benchmarks. Raises ConfigError without a tokenizer."""
    logging.set_verbosity_error()  # that windows are cut is lm-eval's to know
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: --tasks needs the form's tokenizer beside it: {error}") from error
    if benchmarks.apply_chat_template and tokenizer.chat_template is None:
        raise ConfigError(f"{folder} has no chat template; ask without --apply-chat-template")
    # Of logits in bf16 the softmax is taken in fp32: choices would tie otherwise.
    return benchmarks.ask(_Opened(pretrained=model, tokenizer=tokenizer, softmax_dtype="float32"))
