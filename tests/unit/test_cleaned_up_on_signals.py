"""A stop signal: what a block has to remove is removed, one line, exit code 75."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from megatron_xy.runtime.signals import STOP_SIGNALS, cleaned_up_on_signals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_ends_the_block_cleaned_up_and_the_process_with_75(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(other) for other in STOP_SIGNALS]
    done = []

    def work() -> None:
        try:
            signal.raise_signal(number)
            done.append("went on")
        finally:
            signal.raise_signal(number)  # a second one does not disturb it
            done.append("cleaned up")

    with pytest.raises(SystemExit) as ended, cleaned_up_on_signals("; the same command goes on"):
        work()
    assert ended.value.code == 75 and done == ["cleaned up"]
    assert capsys.readouterr().err == f"stopped by {number.name}; the same command goes on\n"
    assert [signal.getsignal(other) for other in STOP_SIGNALS] == before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with cleaned_up_on_signals("; the same command goes on"):
            signal.raise_signal(signal.SIGUSR1)
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(("before", "is_heeded"), [("SIG_IGN", False), ("SIG_DFL", True)])
def test_a_terminal_that_closes_is_heeded_but_under_nohup(before: str, is_heeded: bool) -> None:
    code = (
        f"import signal; signal.signal(signal.SIGHUP, signal.{before})\n"
        "from megatron_xy.runtime.signals import STOP_SIGNALS; print(signal.SIGHUP in STOP_SIGNALS)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == f"{is_heeded}\n"
