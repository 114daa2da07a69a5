"""Files as they stand: what is there, and whether what is inside is what its record and path say."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from canopy_store import store
from canopy_store.errors import CanopyError
from canopy_store.schema import FORMAT_VERSION, METADATA_KEY, TABLES, added_columns, arrow_schema
from canopy_store.upkeep.verify_report import AGAIN, Report, short
from canopy_store.upkeep.verify_rows import problems

# What a record says of a file; nothing in format 1, nor of a file that none names.
UNSAID: Mapping[str, Any] = {"rows": None, "bytes": None, "sha256": None}


@dataclass(frozen=True)
class File:
    """A Parquet file of the store.

    Parameters
    ----------
    name : its path in the store
    table : the table that it is of
    keys : the values of its path, by hive key; of scores also their policy's id
    said : its rows, bytes and sha256, as its record has them
    """

    name: str
    table: str
    keys: Mapping[str, str]
    said: Mapping[str, Any] = field(default_factory=lambda: UNSAID)


# ---------------------------------------------------------------- what is there


def standing(report: Report) -> dict[str, str]:
    """What stands at each path of tables, records and plans: a file, folder, link, or odd."""
    tops = (*TABLES, "commits", "plans")
    if store.remote(report.root):  # nothing there but objects
        paths = (path for top in tops for path in (report.root / top).rglob("*"))
        files = {p.relative_to(report.root).as_posix(): "file" for p in paths if p.is_file()}
        return dict(sorted(files.items()))
    return dict(sorted(each for top in tops for each in _walk(report, top)))


def _walk(report: Report, top: str) -> Iterator[tuple[str, str]]:
    path = report.root / top
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        yield top, "link" if path.is_symlink() else "odd"
        return
    folders = [top] if path.exists() else []
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(report.root / folder) as entries:
                for each in entries:
                    name = f"{folder}/{each.name}"
                    if each.is_symlink():
                        yield name, "link"
                    elif each.is_dir():
                        folders.append(name)
                        yield name, "folder"
                    else:
                        yield name, "file" if each.is_file() else "odd"
        except OSError as error:
            report.add(folder, "", f"cannot be read: {error.strerror}", "mend its permissions")


# ---------------------------------------------------------------- what is inside


def checked_rows(report: Report, file: File, run: Mapping[str, Any] | None) -> Iterator[pa.Table]:
    """The row groups of a file; reports what is wrong in the file, and in its rows by themselves.

    ``run`` is the row in ``runs`` of its run, where that is known.
    """
    for number, rows in row_groups(report, file):
        where = f" (row group {number})" if number else ""
        try:
            for what in problems(file.table, rows, run):
                report.add(file.name, file.table, what + where, AGAIN)
        except Exception as error:  # rows that no job writes, such as lists of no values at all
            what = f"its rows cannot be checked: {' '.join(str(error).split())[:100]}"
            report.add(file.name, file.table, what + where, AGAIN)
        yield rows


def row_groups(report: Report, file: File) -> Iterator[tuple[int, pa.Table]]:
    """Number and rows of each row group, while record, schema, checksums, statistics and path agree."""
    stands = report.standing.get(file.name)
    if stands is None:
        report.add(file.name, file.table, "named by its record, not there", AGAIN)
    if stands != "file":
        return  # what else stands there is reported where it was found
    path = report.root / file.name
    try:
        with _opened(path) as stream:
            for what in _bytes_differ(stream, file.said):
                report.add(path, file.table, what, AGAIN)
            metadata = store.check_file(path, file.table)
            if file.said["rows"] not in (None, metadata.num_rows):
                what = f"{metadata.num_rows} rows, its record says {file.said['rows']}"
                report.add(path, file.table, what, AGAIN)
            parquet = pq.ParquetFile(stream, page_checksum_verification=True)
            wanted = _schema(report, file.table, parquet, metadata)
            if not parquet.schema_arrow.equals(wanted, check_metadata=True):
                what = f"schema differs: {_differing(parquet.schema_arrow, wanted)}"
                report.add(path, file.table, what, AGAIN)
                return
            for number in range(metadata.num_row_groups):
                rows = parquet.read_row_group(number)
                rows.validate(full=True)
                group = metadata.row_group(number)
                wrong = _missing(rows, wanted) or _statistics(group, rows) or _path_differs(rows, file)
                if wrong:
                    report.add(path, file.table, wrong, AGAIN)
                    return
                yield number, rows
        _scan(report, path)
    except CanopyError as error:
        report.add_error(path, file.table, error, AGAIN)
    except Exception as error:  # whatever a damaged file makes the reader say, it is one row here
        report.add(path, file.table, f"cannot be read: {short(error, path)[:150]}", AGAIN)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file, of which hash and rows are then read; from object storage it comes in one piece."""
    if store.remote(path):
        yield io.BytesIO(store.read_bytes(path))
    else:
        with path.open("rb") as stream:
            yield stream


def _bytes_differ(stream: BinaryIO, said: Mapping[str, Any]) -> Iterator[str]:
    if said["bytes"] is None:
        return
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if size != said["bytes"]:
        yield f"{size} bytes, its record says {said['bytes']}"
    elif hashlib.file_digest(stream, "sha256").hexdigest() != said["sha256"]:  # type: ignore[arg-type]
        yield "its sha256 is not the one in its record"
    stream.seek(0)


def _schema(report: Report, table: str, parquet: pq.ParquetFile, metadata: pq.FileMetaData) -> pa.Schema:
    """The schema that a file must have; while a store is upgraded, files of both formats stand in it."""
    label = metadata.metadata[METADATA_KEY].decode()
    version = 1 if report.version == 1 and label == f"{table}:1" else FORMAT_VERSION
    dimension = None
    if "embedding" in parquet.schema_arrow.names:
        kind = parquet.schema_arrow.field("embedding").type
        dimension = kind.list_size if pa.types.is_fixed_size_list(kind) else None
    wanted = arrow_schema(table, dimension, version)
    for name in set(added_columns(table)).difference(parquet.schema_arrow.names):
        if name in wanted.names:  # of format 1 it is not
            wanted = wanted.remove(wanted.get_field_index(name))
    return wanted


def _differing(shown: pa.Schema, wanted: pa.Schema) -> str:
    if shown.names != wanted.names:
        odd = sorted({*shown.names} ^ {*wanted.names}) or ["their order"]
        return f"columns {', '.join(odd)[:100]}"
    odd = [f.name for f in wanted if not shown.field(f.name).equals(f)]
    return ", ".join(odd) or "its label"


def _missing(rows: pa.Table, wanted: pa.Schema) -> str | None:
    for name in (column.name for column in wanted if not column.nullable):
        if rows[name].null_count:
            return f"{name} is missing in {rows[name].null_count} rows"
    return None


def _statistics(group: pq.RowGroupMetaData, rows: pa.Table) -> str | None:
    """What a row group's statistics say wrongly: a reader that prunes by them would lose rows."""
    if group.num_rows != rows.num_rows:
        return f"{rows.num_rows} rows, its footer says {group.num_rows}"
    for at in range(group.num_columns):
        column = group.column(at)
        said = column.statistics
        if said is None or "." in column.path_in_schema:
            continue  # lists: no view prunes by what is in them
        values = rows[column.path_in_schema]
        if said.has_null_count and said.null_count != values.null_count:
            return f"statistics of {column.path_in_schema} are wrong"
        if said.has_min_max:
            ends = pc.min_max(values).as_py()
            # long texts may be cut: then a bound is looser, never tighter; NaN has no order
            if (
                ends["min"] is not None
                and ends["min"] == ends["min"]
                and not (said.min <= ends["min"] and said.max >= ends["max"])
            ):
                return f"statistics of {column.path_in_schema} are wrong"
    return None


def _path_differs(rows: pa.Table, file: File) -> str | None:
    for key, value in file.keys.items():
        name = "run_id" if key == "run" else key
        if name not in rows.column_names:
            continue
        held = pc.unique(rows[name]).to_pylist()
        if name == "policy":  # the path has its id
            held = [store.content_id(json.loads(policy)) for policy in held]
        if any(each != value for each in held):
            return f"{name} is not {value!r}, as its path says"
    return None


def _scan(report: Report, path: Path) -> None:
    """Reads a file as the views do: their reader may stumble where the first one did not."""
    scan = "from parquet_metadata(?)"
    if report.deep:
        scan = "select sum(hash(t)) from read_parquet(?, hive_partitioning = false) t"
    report.con.execute(scan, [glob.escape(str(path))]).fetchall()
