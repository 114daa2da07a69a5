"""Names and places: which file of a store holds what.

    STORE/canopy.json                                       format version
    STORE/commits/<kind>/…/run=….json                       one record a finished job: the files it made
    STORE/models/family=…/variant=…/part-00000.parquet      one row a file
    STORE/prompts/task=…/<content hash>.parquet
    STORE/rollouts/family=…/variant=…/task=…/run=…/part-00000.parquet
    STORE/embeddings/embedder=…/run=…/part-00000.parquet    likewise scores, rewards, grades, selections,
                                                            judgments, clusters
    STORE/embedding_spectra/embedder=…/selection=…/run=…/part-00000.parquet
    STORE/runs/run=…/part-00000.parquet, STORE/work/kind=…/name=…/run=…/part-00000.parquet
    STORE/plans/<kind>=<name>.json                          settings that a resumed job must repeat
    STORE/canopy.duckdb                                     views only, rebuilt at will
    STORE/.work/                                            locks, and notes for the table work

A shard's name follows from what it holds, so writing it again replaces it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from canopy_store.errors import UsageError
from canopy_store.schema import TABLES

_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"  # what readers of hive paths take for NULL
_SHARD = re.compile(r"part-\d{5,}(\.[\w-]+)?\.parquet")


def quoted(value: str) -> str:
    """``value`` as one path component that cannot leave its folder (percent-encoded)."""
    name = quote(value, safe=" ")
    if name == _HIVE_NULL:
        return "%5F" + name[1:]
    return name.replace(".", "%2E") if set(name) <= {"."} else name


def unquoted(name: str) -> str:
    """The value that `quoted` made a path component of."""
    return unquote(name)


def canonical(value: Any) -> str:
    """A JSON value as text that follows from it alone."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def content_id(value: Any) -> str:
    """Sixteen hex digits that follow from a JSON value alone."""
    return hashlib.sha256(canonical(value).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def now() -> datetime.datetime:
    """The present time in UTC, without a zone, as the tables keep it."""
    return datetime.datetime.now(datetime.UTC).replace(tzinfo=None)


def folder(root: Path, table: str, **keys: str) -> Path:
    """The folder of a table's partition: every hive key must be given, in the table's order."""
    parts = [f"{key}={quoted(keys[key])}" for key in TABLES[table].partitions]
    return root.joinpath(table, *parts)


def shard_path(folder: Path, shard: int) -> Path:
    """The path of a partition's shard of this number."""
    return folder / f"part-{shard:05d}.parquet"


def shard_number(path: Path) -> int:
    """The number in a shard's name; -1 of a file that is named after its content."""
    stem, _, rest = path.name.removeprefix("part-").partition(".")
    return int(stem) if path.name.startswith("part-") and stem.isdecimal() and rest else -1


def path_keys(table: str, name: str) -> dict[str, str] | None:
    """The hive values of a file's path in the store, None where no file of the table can stand."""
    top, *middle, last = name.split("/")
    keys = TABLES[table].partitions
    if top != table or len(middle) != len(keys) or "\0" in name:
        return None
    stem = last.removesuffix(".parquet")
    whole = last != stem != "" and quoted(unquoted(stem)) == stem
    numbered = "run" in keys or bool(TABLES[table].commit)  # the others are named after their content
    if not (_SHARD.fullmatch(last) if numbered else whole):
        return None
    values = {}
    for key, part in zip(keys, middle, strict=True):
        given, _, value = part.partition("=")
        if given != key or quoted(unquoted(value)) != value or not value:
            return None
        values[key] = unquoted(value)
    return values


def commit_path(root: Path, kind: str, keys: Mapping[str, str]) -> Path:
    """Where a job's record stands; its keys are those that the table names for its commits."""
    parts = [f"{key}={quoted(keys[key])}" for key in TABLES[kind].commit]
    return root.joinpath("commits", kind, *parts[:-1], f"{parts[-1]}.json")


def plan_path(root: Path, kind: str, name: str) -> Path:
    """Where the settings of a job stand; ``kind`` is run or embedder."""
    return root / "plans" / f"{kind}={quoted(name)}.json"


def check_name(option: str, value: str) -> str:
    """``value`` if it can name a partition.

    Raises
    ------
    UsageError
        It is empty, too long for a file system, or holds a control or bidirectional character.
    """
    shown = "".join(c if c.isprintable() else "?" for c in value[:40])
    for c in value:
        if not c.isprintable():  # control, bidirectional, invisible, half a surrogate pair
            raise UsageError(f"{option} {shown!r}: holds the character U+{ord(c):04X}; leave it out")
    if not value.strip() or len(quoted(value)) > 200:
        raise UsageError(f"{option} {shown!r}: needs 1 to 200 printable characters, percent-encoded")
    return value


def same_but_case(one: str, other: str) -> bool:
    """Whether two names differ, but not on a disk that ignores case or Unicode composition."""

    def folded(name: str) -> str:
        return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())

    return one != other and folded(one) == folded(other)
