"""Which transformer layers lie on which pipeline stage, and how far the vocabulary is padded: arithmetic, no torch.

A stage holds one chunk of consecutive layers, or several under a virtual (interleaved) pipeline: chunk c of stage s is
number c * stages + s in the order of the forward pass.
"""

from __future__ import annotations

import math

VOCABULARY_MULTIPLE = 128  # rows of the padded vocabulary a tensor parallel rank, as Megatron's default


def layers_per_chunk(num_layers: int, *, num_chunks: int) -> list[int]:
    """Layers of each chunk, in the order of the forward pass; they differ by one at most.

    The larger ones stand in the middle, then at the beginning: the first chunk has the embedding besides, the last one
    the head, which costs most. num_layers: at least num_chunks, so that no chunk is empty.
    """
    assert num_layers >= num_chunks, "the config refuses more chunks than layers"
    smaller, num_larger = divmod(num_layers, num_chunks)
    by_preference = [*range(1, num_chunks - 1), 0, num_chunks - 1]
    larger = set(by_preference[:num_larger])
    return [smaller + (chunk in larger) for chunk in range(num_chunks)]


def padded_vocab_size(vocab_size: int, *, tensor_model_parallel_size: int) -> int:
    """Rows of embedding and output layer over all tensor parallel ranks."""
    unit = VOCABULARY_MULTIPLE * tensor_model_parallel_size
    return math.ceil(vocab_size / unit) * unit
