"""What a verification has found so far, a row for each problem."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import polars as pl

SCHEMA = {
    "file": pl.String,
    "table": pl.String,
    "what": pl.String,
    "todo": pl.String,
    "harmless": pl.Boolean,
}
COPY = "take it from a copy"
AGAIN = f"remove it and run its ingest again, or {COPY}"


@dataclass
class Report:
    """The rows of `canopy_store.verify`, and what every check needs to know.

    Parameters
    ----------
    root : path of the store
    deep : whether spectra are to be recomputed
    con : a DuckDB connection that can read the store's files
    version : the store's format
    standing : what stands at each path in the store: a file, a folder, a link, or something odd
    """

    root: Path
    deep: bool
    con: duckdb.DuckDBPyConnection
    version: int
    standing: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, file: Path | str, table: str, what: str, todo: str, harmless: bool = False) -> None:
        """Keeps a row; ``file`` is a path in the store, or the name that it has there."""
        name = file if isinstance(file, str) else file.relative_to(self.root).as_posix()
        texts = (printable(each) for each in (name, table, " ".join(what.split()), todo))
        self.rows.append(dict(zip(SCHEMA, (*texts, harmless), strict=True)))

    def add_error(self, path: Path, table: str, error: BaseException, todo: str = COPY) -> None:
        """Keeps an error as a row; where its line says what to do, that is what to do."""
        what, _, said = short(error, path).partition("; ")
        self.add(path, table, what[:200], said or todo)


def printable(text: str) -> str:
    """The text without what a terminal would act on: names in a foreign file may hold anything."""
    return "".join(c if c.isprintable() else "?" for c in text)


def short(error: BaseException, path: Path) -> str:
    """An error as one line, without the path that the row names already."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.removeprefix(f"{path}: ").removeprefix(f"{path.parent}: ")
