"""Items from a file: a question with options a line.

    {"item_id": "q1", "prompt": "The capital of France is", "options": [" Paris", " Rome"], "answer": 0}

or a Parquet file with columns of these names. ``messages`` may stand in place of ``prompt``; ``split``,
``cluster``, ``source`` and ``license`` are optional.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from canopy_store import store
from canopy_store.errors import DataError
from canopy_store.ingest.prompts import jsonl_records
from canopy_store.store.items import option_rows

_GIVEN = (
    "item_id",
    "prompt",
    "messages",
    "options",
    "answer",
    "split",
    "cluster",
    "source",
    "license",
)
_FORM = 'write {"item_id": "…", "prompt": "…", "options": [" …", " …"], "answer": 0}'


def read_items(path: str | Path) -> list[list[dict[str, Any]]]:
    """The items of a file, in order: of each the rows of its options, as ``items`` has them.

    A row's further key ``where`` says its place. An ``item_id`` is kept, as text; where a line has
    none, it is a hash of the question and its options.

    Raises
    ------
    StoreError
        No such file.
    DataError
        A line that is no item, such as one without one right option, or one id twice; names file and
        line.
    """
    path = Path(path)
    content = store.read_input(path)
    if path.suffix.lower() == ".parquet":
        records = _parquet_records(path, content)
    else:
        records = ((where, record) for _, where, record in jsonl_records(path, content))
    items: list[list[dict[str, Any]]] = []
    first: dict[str, str] = {}
    for where, record in records:
        item = _item(record, where)
        item_id = item[0]["item_id"]
        if item_id in first:
            earlier = first[item_id].removeprefix(f"{path}: ")
            raise DataError(
                f"{where}: item_id {item_id} is that of {earlier} too; remove one, or give it another id"
            )
        first[item_id] = where
        items.append([{**row, "where": where} for row in item])
    if not items:
        raise DataError(f"{path}: holds no items; {_FORM}")
    return items


def _parquet_records(path: Path, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and values of each row."""
    import polars as pl

    try:
        frame = pl.read_parquet(io.BytesIO(content))
    except pl.exceptions.PolarsError as error:
        reason = " ".join(str(error).split())[:150]
        raise DataError(f"{path}: not a readable Parquet file ({reason})") from None
    lacking = [name for name in ("options", "answer") if name not in frame.columns]
    if lacking:
        shown = ", ".join(name[:30] for name in frame.columns[:8]) or "none"
        raise DataError(f"{path}: needs a column {lacking[0]}, and its columns are {shown}")
    columns = [name for name in _GIVEN if name in frame.columns]
    for number, row in enumerate(frame.select(columns).iter_rows(named=True), 1):
        where = f"{path}: row {number}"
        if isinstance(row.get("messages"), str):
            try:
                row["messages"] = json.loads(row["messages"])
            except (ValueError, RecursionError):
                raise DataError(
                    f"{where}: messages is not JSON; write a list of {{role, content}}"
                ) from None
        yield where, {name: value for name, value in row.items() if value is not None}


def _item(record: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(record, dict):
        raise DataError(f"{where}: not an object; {_FORM}")
    prompt, messages = _question(record, where)
    options = _options(record, where)
    named = {key: _text(record, key, where) for key in ("item_id", "split", "cluster")}
    named |= {key: _text(record, key, where) for key in ("source", "license")}
    question = {"prompt": prompt} if messages is None else {"messages": record["messages"]}
    try:
        item_id = named.pop("item_id") or store.content_id({**question, "options": options})
        json.dumps([question, options, named, item_id], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: holds half a surrogate pair, which is no text") from None
    return option_rows(
        item_id,
        options,
        _answer(record, len(options), where),
        prompts=None if prompt is None else [prompt] * len(options),
        messages=messages,
        **named,
    )


def _question(record: dict[str, Any], where: str) -> tuple[str | None, str | None]:
    """The prompt, or the messages as JSON; the other None."""
    messages, prompt = record.get("messages"), record.get("prompt")
    if (messages is None) == (prompt is None):
        what = "neither" if prompt is None else "both"
        raise DataError(f"{where}: has {what} prompt and messages, needs one of them; {_FORM}")
    if messages is None:
        if not isinstance(prompt, str):
            raise DataError(f"{where}: prompt needs text")
        return prompt, None
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not good or not messages:
        raise DataError(f"{where}: messages needs a list of {{role, content}} with text in both")
    return None, store.canonical(messages)


def _options(record: dict[str, Any], where: str) -> list[str]:
    options = record.get("options")
    if not isinstance(options, list) or not all(isinstance(text, str) for text in options):
        raise DataError(f"{where}: options needs a list of texts; {_FORM}")
    if len(options) < 2:
        raise DataError(f"{where}: {len(options)} options, needs two or more to choose from")
    for number, text in enumerate(options):
        if not text:
            raise DataError(f"{where}: option {number} is empty; write the text that is scored")
        if text in options[:number]:
            raise DataError(
                f"{where}: options {options.index(text)} and {number} are the same; remove one"
            )
    return options


def _answer(record: dict[str, Any], n_options: int, where: str) -> int:
    answer = record.get("answer")
    if isinstance(answer, list) and len(answer) > 1:
        raise DataError(f"{where}: {len(answer)} right options; an item has one, so name one in answer")
    if answer is None or answer == []:
        raise DataError(f"{where}: no right option; give its number, from 0, in answer")
    number = answer[0] if isinstance(answer, list) else answer
    if isinstance(number, bool) or not isinstance(number, int):
        raise DataError(f"{where}: answer needs the number of the right option, from 0")
    if not 0 <= number < n_options:
        raise DataError(
            f"{where}: no right option: answer {number}, and options are 0 to {n_options - 1}"
        )
    return number


def _text(record: dict[str, Any], key: str, where: str) -> str | None:
    """A value as text: a whole number counts as it is written."""
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise DataError(f"{where}: {key} needs text or a whole number")
    return str(value)
