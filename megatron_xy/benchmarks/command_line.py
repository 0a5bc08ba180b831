"""Our backend as lm-eval's command line makes it: from the words of --model_args."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from megatron_xy.benchmarks.backend import MegatronXYLM
from megatron_xy.errors import ConfigError

_OF_LM_EVAL = ("batch_size", "max_batch_size", "device")  # batches are by tokens, devices the ranks' own


class CommandLineModel(MegatronXYLM):
    """The model `origin`; a name with a point is a key of the layout."""

    def __init__(self, origin: str = "", **arguments: Any) -> None:
        if not origin:
            raise ConfigError("--model_args must name origin=ckpt:DIR or origin=hf:DIR")
        for name in _OF_LM_EVAL:
            arguments.pop(name, None)
        overrides = [f"{name}={arguments.pop(name)}" for name in list(arguments) if "." in name]
        self._temporary = tempfile.TemporaryDirectory(prefix="megatron-xy-evaluate-")
        super().__init__(origin, folder=Path(self._temporary.name), overrides=overrides, **arguments)
