"""A build's tokenizer and fast engine, loaded once a process; workers that are forked begin with those of the build."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from megatron_xy.data.encoding.fast_engine import FastTokenizer, unsuitable
from megatron_xy.data.encoding.tokenizer import Tokenizer, load_tokenizer, tokenizer_file


def load_anew(path: Path | str) -> Tokenizer:
    """The tokenizer in `path` as it is now, for this build. Raises as `load_tokenizer`."""
    loaded_tokenizer.cache_clear()
    loaded_fast_tokenizer.cache_clear()
    return loaded_tokenizer(tokenizer_file(path))


def load_engines(file: Path) -> None:
    """All that may be needed to encode, before workers are forked."""
    if unsuitable(loaded_tokenizer(file)) is None:
        loaded_fast_tokenizer(file)


@lru_cache(maxsize=1)
def loaded_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer of the build that is running."""
    return load_tokenizer(file)


@lru_cache(maxsize=1)
def loaded_fast_tokenizer(file: Path) -> FastTokenizer:
    """What encodes as it does by fastokens, which it is suitable for. Half a CPU second for 32,000 pieces."""
    return FastTokenizer(loaded_tokenizer(file))
