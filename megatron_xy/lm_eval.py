"""lm-eval's own command line with our model as a backend: it discovers no plugins, so this registers it first.

    python -m megatron_xy.lm_eval --model megatron_xy --model_args origin=ckpt:DIR,nproc_per_node=4 --tasks ...

model_args: origin, nproc_per_node, tokenizer, chat_template, and keys of a layout, such as
parallel.tensor_model_parallel_size=2.
"""

from __future__ import annotations

from megatron_xy import device
from megatron_xy.runtime import output


def main() -> None:
    """Registers the backend and hands over."""
    output.escape_what_stdout_lacks()
    device.start(num_threads=1)
    # Megatron-core is imported behind the start of the device, as by every verb.
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model

    from megatron_xy.benchmarks.command_line import CommandLineModel

    register_model("megatron_xy")(CommandLineModel)
    cli_evaluate()


if __name__ == "__main__":
    main()
