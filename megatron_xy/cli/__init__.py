"""The verbs of `megatron-xy`, from command line to exit code.

The one place that imports a verb's code only when it is called: what does not train starts fast.
"""

from megatron_xy.cli.entry import app, main

__all__ = ["app", "main"]
