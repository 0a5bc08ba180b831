"""What tests build and read: `build_dataset` with the fields of BuildOptions by name, and documents one by one."""

from dataclasses import fields

import numpy as np

from megatron_xy.data.building import build
from megatron_xy.data.building.options import BuildOptions


def build_dataset(inputs, **arguments):
    options = {field.name: arguments.pop(field.name) for field in fields(BuildOptions) if field.name in arguments}
    return build.build_dataset(inputs, options=BuildOptions(**options), **arguments)


def add_document(writer, pieces):
    """One document whose sequences are `pieces`."""
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    tokens = np.concatenate([np.zeros(0, dtype=np.int64), *pieces])
    writer.add_documents(tokens, lengths=lengths, num_pieces=np.array([len(pieces)]))


def pieces_of(reader, index):
    """The sequences of one document."""
    tokens, lengths = reader.document_tokens(index)
    return np.split(tokens, np.cumsum(lengths[:-1])) if len(lengths) else []


def each_text(batch):
    """The ids of each text of a TokenBatch."""
    return np.split(batch.ids, np.cumsum(batch.lengths)[:-1]) if len(batch.lengths) else []
