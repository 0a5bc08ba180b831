"""Layers over pipeline chunks: all of them, in order, as even as can be."""

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xy.stages import layers_per_chunk


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 32), st.integers(0, 100))
def test_every_layer_lies_in_one_chunk_and_chunks_differ_by_one_at_most(num_chunks, more):
    num_layers = num_chunks + more
    layers = layers_per_chunk(num_layers, num_chunks=num_chunks)
    assert len(layers) == num_chunks and sum(layers) == num_layers
    assert max(layers) - min(layers) <= 1 and min(layers) >= 1
    assert layers[-1] == min(layers), "the chunk with the head is never a larger one"


def test_larger_chunks_stand_in_the_middle_first():
    assert layers_per_chunk(10, num_chunks=4) == [2, 3, 3, 2]
    assert layers_per_chunk(11, num_chunks=4) == [3, 3, 3, 2]
    assert layers_per_chunk(80, num_chunks=8) == [10] * 8
