"""Settles the device of the test process, as every verb does first: the CPU with the stand-in, or a GPU."""

import os
import signal
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from megatron_xy import device

device.start(num_threads=1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would all tests


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A verb that a test runs in this process may hold stop signals back: only until that test ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
