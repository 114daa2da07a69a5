"""What a Parquet file decodes to, from the headers of its pages: a footer can say anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from canopy_store.errors import DataError

# The page encodings that stores are written in; others can grow in ways that no header tells.
_ENCODINGS = {
    0: "plain",
    2: "plain dictionary",
    3: "rle",
    4: "bit-packed",
    8: "rle dictionary",
    9: "byte-stream-split",
}


def column_bytes(file: BinaryIO, column: pq.ColumnChunkMetaData) -> int:
    """At least the bytes that a column chunk decodes to, by the footer and by its own pages.

    The footer may lie, and encoded values may repeat in no space at all: pages are walked, their
    values counted.
    """
    start = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        start = min(start, column.dictionary_page_offset)
    size = values = 0
    for page in _pages(file, start, column.total_compressed_size):
        size += page[2]
        for header, encoding in ((5, 2), (7, 2), (8, 4)):  # data, dictionary, data of version 2
            if header in page:
                values += page[header][1]
                if page[header][encoding] not in _ENCODINGS:
                    raise DataError(
                        f"{file.name}: {column.path_in_schema} is in an encoding that no export writes"
                    )
    claimed = max(column.total_uncompressed_size, 8 * column.num_values)
    return max(claimed, size, 8 * values)


def _pages(file: BinaryIO, start: int, length: int) -> Iterator[Mapping[int, Any]]:
    """The header of each page in a column chunk, as field number: value (parquet.thrift, PageHeader)."""
    at = start
    while at < start + length:
        file.seek(at)
        header, size = _thrift(file.read(1 << 15), 0)
        if min(header[2], header[3]) < 0:
            raise ValueError("a page of negative size")
        yield header
        at += size + header[3]


def _thrift(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol and where it ends; lists, which pages lack, are errors."""
    found: dict[int, Any] = {}
    field = 0
    while data[at]:
        kind, step = data[at] & 15, data[at] >> 4
        at += 1
        if step:
            field += step
        else:
            field, at = _varint(data, at)
        if kind in (1, 2):  # a bool is its own type
            found[field] = kind == 1
        elif kind in (4, 5, 6):
            found[field], at = _varint(data, at)
        elif kind == 8:
            length, at = _varint(data, at, signed=False)
            at += length
        elif kind == 12 and depth < 4:
            found[field], at = _thrift(data, at, depth + 1)
        else:
            raise ValueError(f"a page header with a field of type {kind}")
    return found, at + 1


def _varint(data: bytes, at: int, signed: bool = True) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return ((value >> 1) ^ -(value & 1) if signed else value), at


def text_bytes(path: Path, metadata: pq.FileMetaData) -> int:
    """Bytes that the file's texts decode to: one long text may stand for every row.

    Read as a dictionary and places in it, so that they are counted without being written out.
    """
    schema = metadata.schema.to_arrow_schema()
    texts = [f.name for f in schema if pa.types.is_string(f.type)]
    lists = [
        f.name for f in schema if pa.types.is_list(f.type) and pa.types.is_string(f.type.value_type)
    ]
    leaves = [*texts, *(f"{name}.list.element" for name in lists)]
    file = pq.ParquetFile(path, read_dictionary=leaves)
    found = 0
    for at in range(metadata.num_row_groups if leaves else 0):
        for column in file.read_row_group(at, columns=leaves).columns:
            for each in column.chunks:
                chunk = each.flatten() if pa.types.is_list(each.type) else each
                lengths = pc.binary_length(chunk.dictionary).take(chunk.indices)
                found += pc.sum(lengths.cast(pa.int64())).as_py() or 0
    return found
