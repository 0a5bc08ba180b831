"""The copy of a state that training may not change before it is made."""

import threading

import pytest
import torch

from megatron_xy import device
from megatron_xy.checkpoint.host_copy import HostCopy

device.start(num_threads=1)


def test_an_update_waits_for_the_copy_that_another_thread_makes():
    tensors = {"weight": torch.arange(6.0).reshape(2, 3), "moment": torch.ones(4, dtype=torch.bfloat16)}
    copy, may_start, seen = HostCopy(), threading.Event(), []

    def write():
        may_start.wait()
        seen.append(copy.run(tensors))

    copy.mark()
    thread = threading.Thread(target=write)
    thread.start()
    threading.Timer(0.05, may_start.set).start()
    assert copy.wait() > 0.02
    for tensor in tensors.values():
        tensor.add_(100)
    thread.join()
    assert torch.equal(seen[0]["weight"], torch.arange(6.0).reshape(2, 3))
    assert seen[0]["moment"].dtype == torch.bfloat16 and (seen[0]["moment"] == 1).all()


def test_buffers_are_kept_where_shapes_stay_and_nothing_waits_without_a_copy():
    copy = HostCopy()
    assert copy.wait() < 1
    pointers = []
    for shape in ((2, 3), (2, 3), (4, 3)):
        copy.mark()
        copies = copy.run({"weight": torch.full(shape, float(len(pointers)))})
        assert copies["weight"].shape == shape and (copies["weight"] == len(pointers)).all()
        pointers.append(copies["weight"].data_ptr())
    assert pointers[0] == pointers[1] != pointers[2]


def test_the_room_of_all_copies_is_made_before_the_first_one():
    told, copy = [], HostCopy()
    tensors = {"weight": torch.ones(2, 3), "moment": torch.ones(4, dtype=torch.bfloat16)}
    copy.prepare(tensors, on_progress=told.append)
    assert told == [24, 8]
    pointers = {name: buffer.data_ptr() for name, buffer in copy._buffers.items()}
    copy.mark()
    assert {name: made.data_ptr() for name, made in copy.run(tensors).items()} == pointers


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_that_begins_has_the_room_of_its_first_checkpoint(tmp_path, dtype):
    from megatron_xy.bench.measure import full_samples
    from megatron_xy.checkpoint.state import TrainingState
    from megatron_xy.checkpoint.writer import CheckpointWriter
    from megatron_xy.config import ModelConfig, OptimizerConfig
    from megatron_xy.role import build_role_alone
    from megatron_xy.training.train_step import train_step

    shape = {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 2, "vocab_size": 64}
    model = ModelConfig(**shape, max_position_embeddings=32, params_dtype=dtype)
    role = build_role_alone(model, optimizer=OptimizerConfig(), seed=1)
    writer = CheckpointWriter(tmp_path, keep_latest=1, asynchronous=True, timeout_seconds=60)
    writer.begin(role, iteration=0, train_iters=1)
    before = {name: buffer.data_ptr() for name, buffer in writer._copy._buffers.items()}
    batch = full_samples(bucket=16, micro_batch_tokens=32, vocab_size=64, seed=0)
    train_step(role, [batch], num_sources=1, lr=1e-3, clip_grad=1.0)
    writer.save(role, TrainingState(), facts={})
    writer.finish(role.groups)
    assert {name: buffer.data_ptr() for name, buffer in writer._copy._buffers.items()} == before
    assert any("exp_avg_sq" in name for name in before)


def test_a_run_that_has_nothing_left_to_do_makes_no_room(tmp_path):
    from megatron_xy.checkpoint.writer import CheckpointWriter

    writer = CheckpointWriter(tmp_path, keep_latest=1, asynchronous=True, timeout_seconds=60)
    writer.begin(None, iteration=4, train_iters=4)
    assert not writer._copy._buffers


def test_a_copy_that_fails_does_not_hold_up_training():
    copy = HostCopy()
    copy.mark()
    try:
        copy.run({"weight": None})
    except AttributeError:
        pass
    else:
        raise AssertionError("there was nothing to copy")
    assert copy.wait() < 1
