"""`python -m megatron_xy` = `megatron-xy`: from the first moment on a stop signal waits until `run` can record it.

Every verb and every rank begins here.
"""

import sys

from megatron_xy.runtime import output, signals


def main() -> None:
    """Runs a verb and ends with the documented exit code."""
    output.escape_what_stdout_lacks()
    output.outlive_the_terminal()
    if sys.argv[1:2] == ["run"]:
        signals.block_stop_signals()  # `supervise` takes them; until then they would end the process without a record
    from megatron_xy.cli import main as run_verb  # takes a good part of a second

    run_verb()


if __name__ == "__main__":
    main()
