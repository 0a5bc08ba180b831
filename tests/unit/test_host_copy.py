"""The copy of a state that training may not change before it is made."""

import threading

import torch

from megatron_xy.checkpoint.host_copy import HostCopy


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
