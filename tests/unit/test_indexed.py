"""Megatron's .bin/.idx: byte-equal to megatron-core's builder, read by its reader, and every damage refused by name."""

import errno
import os
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xy.data import indexed
from megatron_xy.data.indexed import IndexedReader, IndexedWriter, bin_path, dtype_for, idx_path
from megatron_xy.errors import ConfigError, DataError, StorageError
from tests.building import add_document, pieces_of

DOCUMENTS = [[[1, 2, 3]], [[4], [5, 6]], [[7, 8, 9, 10], [11]], [[12]]]


def write(prefix, documents, vocab_size=1000):
    with IndexedWriter(prefix, dtype=dtype_for(vocab_size)) as writer:
        for pieces in documents:
            add_document(writer, [np.array(piece, dtype=np.int64) for piece in pieces])
    return prefix


def read(prefix):
    reader = IndexedReader(prefix)
    return [[piece.tolist() for piece in pieces_of(reader, index)] for index in range(reader.num_documents)]


@pytest.mark.parametrize("vocab_size", [1000, 65499, 65500, 200_000])
def test_byte_equal_to_megatron_core_and_read_by_it(tmp_path, vocab_size):
    import torch  # a few seconds
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    documents = [[[vocab_size - 1, 0, 7]], *DOCUMENTS]
    ours = write(tmp_path / "ours", documents, vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for pieces in documents:
        builder.add_document(torch.tensor([token for piece in pieces for token in piece]), [len(p) for p in pieces])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert bin_path(ours).read_bytes() == (tmp_path / "theirs.bin").read_bytes()
    assert idx_path(ours).read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    theirs = IndexedDataset(str(ours))
    assert [theirs[index].tolist() for index in range(len(theirs))] == [
        piece for pieces in documents for piece in pieces
    ]
    assert theirs.document_indices.tolist() == IndexedReader(ours).document_indices.tolist()
    assert read(tmp_path / "theirs") == documents


@settings(deadline=None, derandomize=True, max_examples=30)
@given(documents=st.lists(st.lists(st.lists(st.integers(0, 999), max_size=5), max_size=4), max_size=8))
def test_round_trip_and_bulk_writing_agree(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("indexed")
    assert read(write(folder / "one", documents)) == documents
    IndexedReader(folder / "one").verify(vocab_size=1000)
    pieces = [piece for document in documents for piece in document]
    with IndexedWriter(folder / "bulk", dtype=np.uint16) as writer:
        writer.add_documents(
            np.array([token for piece in pieces for token in piece], dtype=np.int64),
            lengths=np.array([len(piece) for piece in pieces], dtype=np.int64),
            num_pieces=np.array([len(document) for document in documents], dtype=np.int64),
        )
    assert bin_path(folder / "bulk").read_bytes() == bin_path(folder / "one").read_bytes()
    assert idx_path(folder / "bulk").read_bytes() == idx_path(folder / "one").read_bytes()


def test_document_tokens_are_flat_with_piece_lengths(tmp_path):
    tokens, lengths = IndexedReader(write(tmp_path / "a", DOCUMENTS)).document_tokens(2)
    assert tokens.tolist() == [7, 8, 9, 10, 11] and lengths.tolist() == [4, 1]
    assert tokens.dtype == np.uint16
    with pytest.raises(IndexError):
        IndexedReader(tmp_path / "a").document_tokens(4)


def test_an_exception_leaves_nothing_and_the_older_files_whole(tmp_path):
    write(tmp_path / "a", DOCUMENTS)
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "a", dtype=np.uint16) as writer:
        add_document(writer, [np.array([1])])
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
    assert read(tmp_path / "a") == DOCUMENTS


def test_a_disk_that_is_full_at_the_last_byte_leaves_the_older_files_whole(tmp_path):
    write(tmp_path / "a", DOCUMENTS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # for .bin of 2,000 bytes, not for .idx of 20,000
    try:
        with pytest.raises(StorageError, match=r"a\.idx"):
            write(tmp_path / "a", [[[1]]] * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
    assert read(tmp_path / "a") == DOCUMENTS


def test_a_writer_killed_between_its_two_files_leaves_no_old_index_beside_new_tokens(tmp_path, monkeypatch):
    write(tmp_path / "a", DOCUMENTS)

    def kill(temporary, path):
        if path.suffix == ".idx":
            raise KeyboardInterrupt
        temporary.replace(path)

    monkeypatch.setattr(indexed, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", DOCUMENTS[::-1])  # as many tokens in as many documents
    assert (tmp_path / "a.bin").exists() and not (tmp_path / "a.idx").exists()


def test_ids_that_do_not_fit_are_never_wrapped(tmp_path):
    for token in (65536, -1):
        with pytest.raises(AssertionError, match="must fit"), IndexedWriter(tmp_path / "a", dtype=np.uint16) as writer:
            add_document(writer, [np.array([token])])
    assert not list(tmp_path.iterdir())


def overwrite(path, offset, data):
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda b, i: b.write_bytes(b.read_bytes()[:10]), "a.bin has 10 bytes.*cut or grown"),
        (lambda b, i: b.write_bytes(b.read_bytes() + b"\0\0"), "a.bin has 26 bytes.*cut or grown"),
        (lambda b, i: b.write_bytes(b""), "a.bin has 0 bytes"),
        (lambda b, i: i.write_bytes(i.read_bytes()[:-8]), "a.idx has .*cut or grown"),
        (lambda b, i: i.write_bytes(i.read_bytes() + bytes(3)), "a.idx has .*cut or grown"),
        (lambda b, i: i.write_bytes(i.read_bytes() + bytes(6)), "multimodal"),
        (lambda b, i: i.write_bytes(i.read_bytes()[:20]), "less than its header"),
        (lambda b, i: i.write_bytes(b""), "no Megatron index"),
        (lambda b, i: i.write_bytes(bytes(range(200))), "no Megatron index"),
        (lambda b, i: overwrite(i, 9, b"\x02"), "version 2"),
        (lambda b, i: overwrite(i, 17, b"\x07"), "dtype code 7"),
        (lambda b, i: overwrite(i, 18, (2**40).to_bytes(8, "little")), "counts"),
        (lambda b, i: overwrite(i, -8 % i.stat().st_size, (3).to_bytes(8, "little")), "must run 0..6"),
        (lambda b, i: overwrite(i, 34 + 12 * 6, (1).to_bytes(8, "little")), "must run 0..6"),
    ],
)
def test_damage_is_refused_at_open(tmp_path, damage, reason):
    write(tmp_path / "a", DOCUMENTS)
    damage(tmp_path / "a.bin", tmp_path / "a.idx")
    with pytest.raises(DataError, match=reason):
        IndexedReader(tmp_path / "a")


@pytest.mark.parametrize(
    ("offset", "value", "size"),
    [
        (34 + 4 * 2, 3, 4),  # a length in document 1
        (34 + 4 * 2, -2, 4),
        (34 + 24 + 8 * 1, 8, 8),  # an offset of document 1
        (34 + 24 + 8 * 1, -6, 8),
        (34 + 24 + 8 * 1, 2**40, 8),
        (34 + 24 + 48 + 8 * 2, 9, 8),  # the document index after document 1
        (34 + 24 + 48 + 8 * 2, 0, 8),
        (34 + 24 + 48 + 8 * 2, -1, 8),
    ],
)
def test_damage_inside_is_refused_at_open_or_on_access_and_by_verify(tmp_path, monkeypatch, offset, value, size):
    write(tmp_path / "a", DOCUMENTS)
    overwrite(tmp_path / "a.idx", offset, value.to_bytes(size, "little", signed=True))
    with pytest.raises(DataError, match=r"a.idx is damaged"):
        IndexedReader(tmp_path / "a")
    monkeypatch.setattr(IndexedReader, "_check_places", lambda reader: None)  # as in an index too large to see it all
    reader = IndexedReader(tmp_path / "a")
    with pytest.raises(DataError, match=r"a.idx is damaged"):
        reader.document_tokens(1)
    with pytest.raises(DataError, match=r"a.idx is damaged"):
        reader.verify()


def test_a_file_that_is_cut_while_it_is_read_is_bad_data_and_no_signal(tmp_path):
    reader = IndexedReader(write(tmp_path / "a", [[[1, 2]]] * 10_000))
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.bin ends before byte 40000: it was cut"):
        reader.document_tokens(9_999)


def test_a_disk_that_does_not_answer_is_named_with_the_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    reader = IndexedReader(write(tmp_path / "a", DOCUMENTS))
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(StorageError, match=r"a\.bin cannot be read: Input/output error"):
        reader.document_tokens(0)


def test_damage_of_a_large_part_of_a_large_index_is_seen_at_open(tmp_path):
    write(tmp_path / "a", [[[1, 2]]] * 1000)
    whole = (tmp_path / "a.idx").read_bytes()
    for first in range(34, len(whole) - 1000, 1000):
        overwrite(tmp_path / "a.idx", first, np.random.default_rng(first).bytes(1000))
        with pytest.raises(DataError, match=r"a.idx is damaged|asks for"):
            IndexedReader(tmp_path / "a")
        (tmp_path / "a.idx").write_bytes(whole)
    IndexedReader(tmp_path / "a")


def test_verify_names_the_first_id_outside_the_vocabulary(tmp_path):
    reader = IndexedReader(write(tmp_path / "a", DOCUMENTS))
    reader.verify(vocab_size=13)
    with pytest.raises(DataError, match=r"token 10 has id 11, outside 0\.\.11"):
        reader.verify(vocab_size=11)
    with pytest.raises(DataError, match=r"token 11 has id 12, outside 0\.\.12"):
        reader.verify(vocab_size=12)


def test_missing_files_are_a_wrong_path(tmp_path):
    write(tmp_path / "a", DOCUMENTS)
    with pytest.raises(ConfigError, match=r"b.idx does not exist"):
        IndexedReader(tmp_path / "b")
    (tmp_path / "a.bin").unlink()
    with pytest.raises(ConfigError, match=r"a.bin does not exist"):
        IndexedReader(tmp_path / "a")
