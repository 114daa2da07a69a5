"""Prompts from a file: JSONL of {"text": …}, {"prompt": …} or {"messages": [{"role", "content"}, …]};
or CSV or Parquet with columns of these names."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from canopy_store import store
from canopy_store.errors import DataError

_COLUMNS = ("text", "prompt", "messages", "prompt_id", "id", "reference", "source", "license")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_Placed = Iterator[tuple[int, str, dict[str, Any]]]


def read_prompts(path: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The prompts of a file, in order: prompt_id, text or messages (JSON), source, license, reference,
    line.

    What the file is follows from its name: .csv, .tsv or .parquet, whose columns are named like the keys
    of a JSONL line (and may say id for prompt_id), else JSONL. A prompt's own ``prompt_id`` is kept, as
    text; otherwise the id is a hash of the content. Blank lines at the end are allowed, elsewhere not: a
    blank line among prompts is a sign of a damaged file.

    Raises
    ------
    StoreError
        No such file.
    DataError
        A line that is no prompt, or one prompt twice; names file and line.
    """
    path = Path(path)
    kind = path.suffix.lower()
    content = store.read_input(path)
    if kind == ".parquet":
        records = _parquet_records(path, content)
    elif kind in _DELIMITERS:
        records = _csv_records(path, content)
    else:
        records = jsonl_records(path, content)
    prompts: list[dict[str, Any]] = []
    seen: dict[str, tuple[int, str]] = {}
    for number, where, record in records:
        prompt = read_prompt(record, where)
        prompt["line"] = number
        earlier, first = seen.setdefault(prompt["prompt_id"], (number, where))
        if earlier != number:
            raise DataError(
                f"{where}: the same prompt as {first.removeprefix(f'{path}: ')}; remove one "
                "(more rollouts of a prompt: --samples)"
            )
        prompts.append(prompt)
    if not prompts:
        table = kind == ".parquet" or kind in _DELIMITERS
        form = "a row each, with a column text" if table else 'one JSON object a line: {"text": "…"}'
        raise DataError(f"{path}: holds no prompts; {form}")
    return prompts[:limit]


def jsonl_records(path: Path, content: bytes) -> _Placed:
    """Number, place and object of each line."""
    lines = content.split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        where = f"{path}: line {number}"
        if not line.strip():
            raise DataError(f"{where}: empty line; remove it")
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8 JSON"
            raise DataError(
                f'{where}: not JSON ({reason}); write {{"text": "…"}}, or name a CSV file .csv'
            ) from None
        yield number, where, record


def _csv_records(path: Path, content: bytes) -> _Placed:
    """Number, place and values of each row after the header; an empty cell is no value."""
    names: list[str] | None = None
    rows = _csv_rows(path, content)
    for number, row in rows:
        where = f"{path}: line {number}"
        if names is None:
            names = [name.strip() for name in row]
            _check_columns(names, where)
        elif not any(cell.strip() for cell in row):
            if any(any(cell.strip() for cell in rest) for _, rest in rows):
                raise DataError(f"{where}: empty line; remove it")
            return
        elif len(row) != len(names):
            raise DataError(
                f"{where}: {len(row)} cells, and the header has {len(names)}; put a cell with a "
                "comma or a line break in double quotes"
            )
        else:
            yield number, where, _record(dict(zip(names, row, strict=True)), where)


def _csv_rows(path: Path, content: bytes) -> Iterator[tuple[int, list[str]]]:
    """Each row and the line that it begins on: a quoted cell may have several."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{path}: line {line}: not UTF-8; save the file as UTF-8") from None
    delimiter = _DELIMITERS[path.suffix.lower()]
    # strict: a quote that is not closed would take all that follows into one cell
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    while True:
        # the longest cell, a limit that every reader of the process shares
        limit = csv.field_size_limit(max(len(text), 1))
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise DataError(
                f"{path}: line {line}: not CSV ({error}); put a cell with a quote in it in double "
                'quotes, and write that quote twice: "he said ""so"""'
            ) from None
        finally:
            csv.field_size_limit(limit)
        if row is None:
            return
        yield line, row
        line = rows.line_num + 1


def _parquet_records(path: Path, content: bytes) -> _Placed:
    """Number, place and values of each row."""
    import polars as pl

    try:
        frame = pl.read_parquet(io.BytesIO(content))
    except pl.exceptions.PolarsError as error:
        reason = " ".join(str(error).split())[:150]
        raise DataError(f"{path}: not a readable Parquet file ({reason})") from None
    _check_columns(frame.columns, str(path))
    for number, row in enumerate(frame.iter_rows(named=True), 1):
        where = f"{path}: row {number}"
        yield number, where, _record(row, where)


def _check_columns(names: list[str], where: str) -> None:
    if not {"text", "prompt", "messages"} & set(names):
        shown = ", ".join(name[:30] for name in names[:8]) or "none"
        raise DataError(
            f"{where}: needs a column text (or prompt, or messages), and its columns are {shown}; "
            "rename the one that holds the prompts"
        )
    twice = next((name for name in _COLUMNS if names.count(name) > 1), None)
    if twice or {"prompt_id", "id"} <= set(names):
        raise DataError(f"{where}: column {twice or 'prompt_id or id'} twice; remove one")


def _record(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The object of a JSONL line that says what a row of a table does."""
    record = {name: row[name] for name in _COLUMNS if row.get(name) not in (None, "")}
    if "id" in record:
        record["prompt_id"] = record.pop("id")
    if isinstance(record.get("messages"), str):
        try:
            record["messages"] = json.loads(record["messages"])
        except (ValueError, RecursionError):
            raise DataError(
                f"{where}: messages is not JSON; write a list of {{role, content}}"
            ) from None
    return record


def read_prompt(record: Any, where: str) -> dict[str, Any]:
    """The prompt that a record is, as of `read_prompts`, its line aside; DataError where it is none."""
    if not isinstance(record, dict):
        raise DataError(f'{where}: needs an object such as {{"text": "…"}}')
    messages = record.get("messages")
    text = record.get("text", record.get("prompt"))
    if messages is not None:
        good = (
            isinstance(messages, list)
            and messages
            and all(
                isinstance(m, dict)
                and isinstance(m.get("role"), str)
                and isinstance(m.get("content"), str)
                for m in messages
            )
        )
        if not good:
            raise DataError(f"{where}: messages needs a list of {{role, content}} with text in both")
        content: Any = {"messages": messages}
    elif isinstance(text, str) and text:
        content = {"text": text}
    else:
        raise DataError(f"{where}: needs text (or prompt, or messages) with something in it")
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: holds half a surrogate pair, which is no text") from None
    given = record.get("prompt_id")
    if given is not None and (not isinstance(given, (str, int)) or given == ""):
        raise DataError(f"{where}: prompt_id needs text or a whole number")
    return {
        "prompt_id": store.content_id(content) if given is None else str(given),
        "text": content.get("text"),
        "messages": store.canonical(messages) if messages is not None else None,
        "source": _optional_text(record, "source", where),
        "license": _optional_text(record, "license", where),
        "reference": _reference(record, where),
    }


def _reference(record: dict[str, Any], where: str) -> str | None:
    """The right answer, as text: a number counts as it is written."""
    value = record.get("reference")
    if isinstance(value, float) and math.isnan(value):
        return None  # as a table of numbers writes what it lacks
    if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int, float))):
        raise DataError(f"{where}: reference needs text or a number")
    return None if value is None else str(value)


def _optional_text(record: dict[str, Any], key: str, where: str) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: {key} needs text")
    return value
