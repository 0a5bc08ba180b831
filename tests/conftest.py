"""Settles the device of the test process, as every verb does first: the CPU with the stand-in, or a GPU."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from megatron_xy import device

device.start(num_threads=1)
