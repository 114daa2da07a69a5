"""A folder that came from someone else: checked whole before any of it is used.

Only JSON and Parquet are read; every path stays inside the folder; no file decodes to far more than it
is. Nothing of the folder is executed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from canopy_store import store
from canopy_store.errors import CanopyError, DataError, UsageError
from canopy_store.schema import TABLES
from canopy_store.upkeep.verify import MANIFEST, path_keys, read_manifest, verify

_SMALL = 16 << 20  # bytes: the most a MANIFEST or plan may have
_DECODED = 1 << 30  # bytes a file may always decode to; above, no more than this many times its size:
_RATIO = 100
# The page encodings that stores are written in; others can grow in ways that no header tells.
_ENCODINGS = {
    0: "plain",
    2: "plain dictionary",
    3: "rle",
    4: "bit-packed",
    8: "rle dictionary",
    9: "byte-stream-split",
}
_BESIDE = {"README.md", "croissant.json", "views.sql", "canopy.duckdb", "canopy.json"}


def check_source(folder: Path) -> dict[str, dict[str, Any]]:
    """The MANIFEST's entries, once every path and size in it is one that an export writes.

    Raises
    ------
    DataError
        A path, a link, a size or a file that no export writes; names the file.
    """
    if not (folder / MANIFEST).is_file():
        raise DataError(
            f"{folder}: no {MANIFEST} here; make a folder to share with canopy export, or take a whole "
            "store in with canopy merge"
        )
    if (folder / MANIFEST).stat().st_size > _SMALL:
        raise DataError(f"{folder / MANIFEST}: over {_SMALL:,} bytes; do not trust it")
    entries = read_manifest(folder)
    for name, entry in entries.items():
        if name not in _BESIDE:
            _check_name(folder, name, f"{folder / MANIFEST}: names {name!r}, which no export writes")
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: named in {MANIFEST}, not there; get the folder again")
        _check_file(folder, name, entry["rows"])
    for top in ("plans", *TABLES):
        for path in (folder / top).rglob("*"):
            listed = path.relative_to(folder).as_posix() in entries
            if not listed and (path.is_symlink() or not path.is_dir()):
                raise DataError(f"{path}: not in {MANIFEST}; remove it, or get the folder again")
    return entries


def read_store(folder: Path) -> dict[str, dict[str, Any]]:
    """As `check_source`, of a store that has no MANIFEST: what one would say of its tables and plans."""
    store.require(folder)
    entries: dict[str, dict[str, Any]] = {}
    inside = os.path.realpath(folder)
    plans = sorted((folder / "plans").glob("[!.]*.json"))
    for path in [*plans, *(path for table in TABLES for path in store.files(folder, table))]:
        name = path.relative_to(folder).as_posix()
        if not os.path.realpath(path).startswith(inside + os.sep):
            raise DataError(f"{path}: a link out of the folder; do not trust it")
        _check_name(folder, name, f"{path}: not where or how a store's files are named; move it out")
        rows = store.check_file(path).num_rows if path.suffix == ".parquet" else None
        _check_file(folder, name, rows)
        entries[name] = {"sha256": store.sha256(path), "bytes": path.stat().st_size, "rows": rows}
    return entries


def require_sound(folder: Path, trusted: bool = True) -> None:
    """Raises DataError for the first problem that `verify` finds; canopy.duckdb only where trusted."""
    problems = verify(folder, database=trusted).filter(~pl.col("harmless"))
    if len(problems):
        first = problems.row(0, named=True)
        more = f" (and {len(problems) - 1} more: canopy verify)" if len(problems) > 1 else ""
        raise DataError(f"{folder / first['file']}: {first['what']}{more}; {first['todo']}")


def _check_name(folder: Path, name: str, refusal: str) -> None:
    table = name.partition("/")[0]
    keys = path_keys(table, name) if table in TABLES else None
    if keys is None and not re.fullmatch(r"plans/[^/.][^/]*\.json", name):
        raise DataError(refusal)
    try:
        for key, value in (keys or {}).items():
            store.check_name(key, value)
    except UsageError as error:
        raise DataError(f"{folder / name}: {error}") from None


def _check_file(folder: Path, name: str, rows: int | None) -> None:
    table = name.partition("/")[0]
    if table in TABLES:
        _check_size(folder / name, table, rows)
    elif name.endswith(".json") and (folder / name).stat().st_size > _SMALL:
        raise DataError(f"{folder / name}: over {_SMALL:,} bytes; do not trust it")


def _check_size(path: Path, table: str, rows: int | None) -> None:
    """Refuses a file that would decode to far more than it is: 1 GiB, and 100 times its size."""
    size, decoded = path.stat().st_size, 0
    most = max(_DECODED, _RATIO * size)
    try:
        metadata = store.check_file(path, table)
        with open(path, "rb") as file:
            for group in map(metadata.row_group, range(metadata.num_row_groups)):
                # of a group without rows nothing is read
                for column in map(group.column, range(group.num_columns if group.num_rows else 0)):
                    decoded += max(_column_bytes(file, column), 8 * group.num_rows)
        if decoded <= most and metadata.num_rows == rows:
            decoded += _text_bytes(path, metadata)
    except CanopyError:
        raise
    except Exception as error:  # whatever a forged file makes the reader say, it is one line here
        raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())[:150]}") from None
    if decoded > most or metadata.num_rows != rows:
        raise DataError(
            f"{path}: {size:,} bytes that decode to {metadata.num_rows:,} rows, over {decoded:,} bytes "
            f"({MANIFEST} says {rows} rows); do not trust it"
        )


def _column_bytes(file: BinaryIO, column: pq.ColumnChunkMetaData) -> int:
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


def _text_bytes(path: Path, metadata: pq.FileMetaData) -> int:
    """Bytes that the file's texts decode to: one long text may stand for every row.

    Read as a dictionary and places in it, so that they are counted without being written out.
    """
    texts = [f.name for f in metadata.schema.to_arrow_schema() if pa.types.is_string(f.type)]
    file = pq.ParquetFile(path, read_dictionary=texts)
    found = 0
    for at in range(metadata.num_row_groups if texts else 0):
        for column in file.read_row_group(at, columns=texts).columns:
            for chunk in column.chunks:
                lengths = pc.binary_length(chunk.dictionary).take(chunk.indices)
                found += pc.sum(lengths.cast(pa.int64())).as_py() or 0
    return found
