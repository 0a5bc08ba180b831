"""The command line as a whole: every verb in the order of `--help`, from arguments to exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from megatron_xy import __version__
from megatron_xy.cli.checkpoints import checkpoint_app
from megatron_xy.cli.data import data_app
from megatron_xy.cli.judging import compare, evaluate, quantize
from megatron_xy.cli.launching import import_args, launch
from megatron_xy.cli.looking import bench, check, doctor, dryrun, plan, report, select
from megatron_xy.cli.models import convert, generate, logprobs, model_rank, score, vocab_app
from megatron_xy.cli.options import failure
from megatron_xy.cli.training import ppo, pretrain, reward, run, sft
from megatron_xy.errors import EXIT_BAD_CONFIG, EXIT_BUG, EXIT_IO, MegatronXYError, memory_error

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Megatron-style 3D-parallel training, from bucketed data to released models.",
    epilog="Exit codes: 0 done, 1 comparison failed, 2 usage, 65 bad data or checkpoint, 70 bug, 74 I/O, "
    "75 stopped and resumable, 76 peer lost or hung, 78 bad config.",
)

VERBS: tuple[Callable[..., None], ...] = (
    pretrain, sft, reward, ppo, run, check, plan, dryrun, launch, import_args, report, select, convert, generate,
    score, logprobs, evaluate, quantize, compare, doctor, bench,
)  # fmt: skip
for verb in VERBS:
    app.command()(verb)
app.command(hidden=True)(model_rank)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(vocab_app, name="vocab")


def main() -> None:
    """Entry point: runs a verb and ends with the documented exit code."""
    try:
        app(standalone_mode=True)
    except MegatronXYError as error:
        fail(error, code=error.exit_code)
    except BrokenPipeError:
        sys.exit(EXIT_IO)
    except OSError as error:
        fail(error, code=EXIT_IO)
    except MemoryError as error:
        fail(memory_error(error), code=EXIT_BAD_CONFIG)
    except Exception as error:
        traceback.print_exc()
        print("this is a bug in megatron_xy", file=sys.stderr)
        _answer_in_json(error, code=EXIT_BUG)
        sys.exit(EXIT_BUG)


def fail(error: Exception, *, code: int) -> None:
    """One calm message on stderr, with --json a document on stdout, and the code."""
    console = Console(stderr=True, soft_wrap=True, emoji=False, highlight=False)
    console.print(f"[red]error[/red] ({code}): {escape(str(error))}")
    _answer_in_json(error, code=code)
    sys.exit(code)


def _answer_in_json(error: Exception, *, code: int) -> None:
    """No verb goes on once it has printed its own document."""
    if "--json" in sys.argv:
        print(failure(error, code=code))


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version and leave")] = False) -> None:
    if version:
        print(f"megatron_xy {__version__}")
        raise typer.Exit
