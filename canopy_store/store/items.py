"""The items of a task: questions with options, stored once under its name and never changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from canopy_store.errors import ConflictError, DataError, StoreError
from canopy_store.schema import TABLES
from canopy_store.store.commits import Record, commit, record, records
from canopy_store.store.files import exists
from canopy_store.store.layout import canonical, folder, shard_path
from canopy_store.store.locks import waiting
from canopy_store.store.parquet import read_rows, write_rows
from canopy_store.store.plans import require_own_name

# What a shard of items holds, and a job that is stopped can lose, at most.
_ITEMS = 128

COLUMNS = tuple(column.name for column in TABLES["items"].columns)

# An item: the rows of its options, in order, each with the columns of ``items``.
Item = Sequence[Mapping[str, Any]]


def option_rows(
    item_id: str,
    options: Sequence[str],
    answer: int,
    *,
    prompts: Sequence[str] | None = None,
    messages: str | None = None,
    split: str | None = None,
    cluster: str | None = None,
    source: str | None = None,
    license: str | None = None,
) -> list[dict[str, Any]]:
    """An item: a row for each option, with what stands before it.

    Parameters
    ----------
    prompts : a text for each option, or None where ``messages`` (JSON) stand before them
    answer : number of the right option
    split, cluster : by default all, and the item's own id
    """
    return [
        {
            "item_id": item_id,
            "option": number,
            "prompt": None if prompts is None else prompts[number],
            "messages": messages,
            "text": text,
            # of " Paris" five: the space says how it follows, and is no part of the answer
            "n_chars": len(text.removeprefix(" ")),
            "correct": number == answer,
            "split": split or "all",
            "cluster": cluster or item_id,
            "source": source,
            "license": license,
        }
        for number, text in enumerate(options)
    ]


def stored_items(root: Path, task: str) -> list[list[dict[str, Any]]]:
    """The items of a task that is stored, in order; their texts None where an export left them out.

    Raises
    ------
    StoreError
        No items of this task are stored.
    """
    done = record(root, "items", task=task) if exists(root / "canopy.json") else None
    if done is None:
        raise StoreError(f"--task {task}: no items of this task are stored; give its file with --items")
    return list(_read(root, done))


def _read(root: Path, done: Record) -> Iterator[list[dict[str, Any]]]:
    for name in done.of("items"):
        yield from by_item(read_rows(root / name, list(COLUMNS)).to_pylist())


def by_item(rows: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of options, which stand item after item, as items."""
    items: list[list[dict[str, Any]]] = []
    for row in rows:
        if not items or items[-1][0]["item_id"] != row["item_id"]:
            items.append([])
        items[-1].append(row)
    return items


def store_items(root: Path, task: str, items: Sequence[Item]) -> Record:
    """The record of a task's items, which are now stored; the same again changes nothing.

    Raises
    ------
    ConflictError
        The task is stored with other items, or its name differs by case alone from one that is.
    DataError
        A file of it is gone.
    """
    with waiting(root, "commit"):  # of two that begin at once, one writes
        stored = record(root, "items", task=task)
        digest = _sha256(items)
        if stored is None:
            require_own_name("task", task, (each.keys["task"] for each in records(root, "items")))
            return _write(root, task, items, digest)
        if not all(exists(root / name) for name in stored.files):
            raise DataError(f"task {task}: a file of its items is gone; see: canopy verify")
        if stored.settings.get("items_sha256") != digest:
            what = _difference(list(_read(root, stored)), items)
            raise ConflictError(
                f"task {task} is stored with other items: {what}; give it another name with --task"
            )
        return stored


def _write(root: Path, task: str, items: Sequence[Item], digest: str) -> Record:
    paths = []
    for start in range(0, len(items), _ITEMS):
        rows = [row for item in items[start : start + _ITEMS] for row in item]
        paths.append(shard_path(folder(root, "items", task=task), start // _ITEMS))
        write_rows(paths[-1], "items", {name: [row[name] for row in rows] for name in COLUMNS})
    settings = {"items_sha256": digest, "n_items": len(items)}
    return commit(root, "items", {"task": task}, paths, settings)


def _sha256(items: Sequence[Item]) -> str:
    """A hash that two lists of items share where each row is the same, in one order."""
    digest = hashlib.sha256()
    for item in items:
        for row in item:
            digest.update(canonical([row[name] for name in COLUMNS]).encode() + b"\n")
    return digest.hexdigest()


def _difference(stored: Sequence[Item], given: Sequence[Item]) -> str:
    """What is other in the items given."""
    here = {item[0]["item_id"]: item for item in stored}
    there = {item[0]["item_id"]: item for item in given}
    new, lost = there.keys() - here.keys(), here.keys() - there.keys()
    if new or lost:
        first = min(new or lost)
        return f"{len(new)} of these are not stored, {len(lost)} stored ones are not here, first {first}"
    for item_id, item in there.items():
        if len(here[item_id]) != len(item):
            return f"item {item_id} has {len(here[item_id])} options there, {len(item)} here"
        for mine, row in zip(here[item_id], item, strict=True):
            for name in COLUMNS:
                left_out = mine[name] is None and name in TABLES["items"].texts
                if mine[name] != row[name] and not left_out:
                    return f"item {item_id} has another {name} of option {row['option']}"
    return "they stand in another order, or their texts were left out"
