"""Rows in Parquet files: the encoding, the label, the checks of a footer."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from canopy_store.errors import DataError
from canopy_store.schema import FORMAT_VERSION, METADATA_KEY, TABLES, arrow_schema, late_columns
from canopy_store.store.files import (
    TAIL,
    opened,
    reaching,
    read_bytes,
    remote,
    replacing,
    require_regular,
)
from canopy_store.store.layout import unquoted

# A row group is what a reader holds at once: the hub's viewer refuses more than some 300 MB.
_ROWS_PER_GROUP = 4096
_BYTES_PER_GROUP = 64 << 20


def write_rows(path: Path, table: str, columns: Mapping[str, Any], **schema: Any) -> int:
    """How many rows were written, as one Parquet file, atomically.

    Columns not given are NULL; those of the path (``family=…/``) are filled in from it.
    """
    target = arrow_schema(table, **schema)
    rows = len(next(iter(columns.values())))
    given = {**_path_values(path, table), **columns}
    arrays = []
    for field in target:
        values = given.get(field.name)
        if values is None:
            arrays.append(pa.nulls(rows, field.type))
        elif isinstance(values, str):
            arrays.append(pa.repeat(pa.scalar(values, field.type), rows))
        elif isinstance(values, (pa.Array, pa.ChunkedArray)):
            arrays.append(values.cast(field.type))
        else:
            arrays.append(pa.array(values, field.type))
    write_table(path, table, pa.Table.from_arrays(arrays, schema=target))
    return rows


def _path_values(path: Path, table: str) -> dict[str, str]:
    """The values of a file's path for the columns that stand in it."""
    keys = TABLES[table].partitions
    folders = path.parts[-1 - len(keys) : -1]
    values = dict(folder.split("=", 1) for folder in folders if "=" in folder)
    return {key: unquoted(values[key]) for key in TABLES[table].path_columns if key in values}


def write_table(path: Path, table: str, rows: pa.Table) -> None:
    """Writes rows in the store's encoding, atomically: zstd, float lists byte-stream-split."""
    leaves = []
    for name in rows.schema.names:
        kind = rows.schema.field(name).type
        depth = 0
        while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            kind, depth = kind.value_type, depth + 1
        leaves.append((name, name + ".list.element" * depth, kind))
    with (
        replacing(path) as file,
        pq.ParquetWriter(
            file,
            rows.schema,
            compression="zstd",
            use_dictionary=[leaf for _, leaf, kind in leaves if not pa.types.is_floating(kind)],
            use_byte_stream_split=[leaf for name, leaf, _ in leaves if name in TABLES[table].split],
            store_schema=True,
            write_page_index=True,
            write_page_checksum=True,  # a flipped bit in a page is found, whatever it decodes to
        ) as writer,
    ):
        for start, stop in _groups(rows):
            writer.write_table(rows.slice(start, stop - start), row_group_size=max(1, stop - start))


def _groups(rows: pa.Table) -> Iterator[tuple[int, int]]:
    """Where row groups begin and end, so that none is long in rows or in bytes; one at least."""
    size = np.zeros(len(rows))
    for column in rows.columns:
        share = np.ones(len(rows))
        if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
            share += pc.list_value_length(column).fill_null(0).to_numpy()
        elif pa.types.is_string(column.type):
            share += pc.binary_length(column).fill_null(0).to_numpy()
        size += column.nbytes * share / max(share.sum(), 1)
    start = 0
    bound = np.concatenate([[0.0], np.cumsum(size)])
    while start < len(rows):
        stop = int(np.searchsorted(bound, bound[start] + _BYTES_PER_GROUP, side="right")) - 1
        stop = min(max(stop, start + 1), start + _ROWS_PER_GROUP, len(rows))
        yield start, stop
        start = stop
    if not len(rows):
        yield 0, 0


def read_rows(path: Path, columns: list[str] | None = None) -> pa.Table:
    """The rows of one of the store's Parquet files; of these columns alone, where any is named.

    Columns that the file lacks because it was written before they were are NULL.

    Raises
    ------
    DataError
        The file is truncated, not ours, or of a newer version.
    """
    if remote(path) and columns is None:
        whole = io.BytesIO(read_bytes(path))
        _check_label(path, _metadata(path, whole), None)
        return completed(pq.ParquetFile(whole).read())
    check_file(path)
    with reaching(path):
        return completed(pq.ParquetFile(opened(path)).read(columns), columns)


def completed(rows: pa.Table, wanted: list[str] | None = None) -> pa.Table:
    """Rows of a file with its table's late columns, NULL where the file was written before them."""
    table = (rows.schema.metadata or {}).get(METADATA_KEY, b"").decode().partition(":")[0]
    for name in late_columns(table) if table in TABLES else ():
        if name not in rows.column_names and (wanted is None or name in wanted):
            schema = arrow_schema(table)
            place = sum(
                rows.column_names.count(each) for each in schema.names[: schema.names.index(name)]
            )
            field = schema.field(name)
            rows = rows.add_column(place, field, pa.nulls(len(rows), field.type))
    return rows


def check_file(path: Path, expected: str | None = None) -> pq.FileMetaData:
    """A Parquet file's metadata, once its footer proves readable and ours.

    Raises
    ------
    DataError
        The file is truncated, not Parquet, not written by this package, or of a newer version.
    """
    return _check_label(path, _metadata(path, _footer(path)), expected)


def _footer(path: Path) -> Any:
    """What a file's metadata is read from: the path itself, or the file's end."""
    if not remote(path):
        return path
    with reaching(path):
        tail = path.fs.cat_file(path.path, start=-TAIL)  # type: ignore[attr-defined]
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] == b"PAR1" and length > len(tail):
            tail = path.fs.cat_file(path.path, start=-length)  # type: ignore[attr-defined]
    return io.BytesIO(tail)


def _metadata(path: Path, file: Any) -> pq.FileMetaData:
    try:
        require_regular(path)
        return pq.read_metadata(file)
    except FileNotFoundError:
        raise DataError(
            f"{path}: gone, by a compaction or a removal, or lost; run it again, or see: canopy verify"
        ) from None
    except (pa.ArrowInvalid, OSError):
        raise DataError(
            f"{path}: truncated or not a Parquet file; remove it and run its ingest again"
        ) from None


def _check_label(path: Path, metadata: pq.FileMetaData, expected: str | None) -> pq.FileMetaData:
    label = (metadata.metadata or {}).get(METADATA_KEY, b"").decode(errors="replace")
    table, _, version = label.partition(":")
    if table not in TABLES or not version.isdigit() or (expected and table != expected):
        raise DataError(
            f"{path}: not a canopy_store file of {expected or 'a table'}; move it out of the store"
        )
    if int(version) > FORMAT_VERSION:
        raise DataError(
            f"{path}: schema version {version}, this package reads up to {FORMAT_VERSION}; "
            "upgrade it: pip install -U canopy-store"
        )
    return metadata
