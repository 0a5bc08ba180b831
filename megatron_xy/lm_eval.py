"""lm-eval's own command line with our model as a backend: it discovers no plugins, so this registers it first.

    python -m megatron_xy.lm_eval --model megatron_xy --model_args origin=ckpt:DIR,nproc_per_node=4 --tasks ...

model_args: origin, nproc_per_node, tokenizer, chat_template, and keys of a layout, such as
parallel.tensor_model_parallel_size=2.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model

from megatron_xy import device
from megatron_xy.benchmarks.backend import MegatronXYLM
from megatron_xy.errors import ConfigError

NAME = "megatron_xy"
_OF_LM_EVAL = ("batch_size", "max_batch_size", "device")  # batches are by tokens, devices the ranks' own


class CommandLineModel(MegatronXYLM):
    """The backend as lm-eval makes it, from the words of --model_args."""

    def __init__(self, origin: str = "", **arguments: Any) -> None:
        if not origin:
            raise ConfigError("--model_args must name origin=ckpt:DIR or origin=hf:DIR")
        for name in _OF_LM_EVAL:
            arguments.pop(name, None)
        overrides = [f"{name}={arguments.pop(name)}" for name in list(arguments) if "." in name]
        self._temporary = tempfile.TemporaryDirectory(prefix="megatron-xy-evaluate-")
        super().__init__(origin, folder=Path(self._temporary.name), overrides=overrides, **arguments)


def main() -> None:
    """Registers the backend and hands over."""
    device.start(num_threads=1)
    register_model(NAME)(CommandLineModel)
    cli_evaluate()


if __name__ == "__main__":
    main()
