"""Imported once by the fork server: what every rank needs, on the CPU.

One thread, and no parallel region run before the fork.
"""

import torch

from megatron_xy import device

device.start(num_threads=1)

import megatron_xy.checkpoint.writer  # noqa: E402
import megatron_xy.training.train_step  # noqa: E402, F401

assert torch.get_num_threads() == 1, "a fork after a parallel region would hang"
