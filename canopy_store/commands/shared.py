"""What the commands share: options, tables, the progress bar."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import click

from canopy_store.errors import UsageError

FORMATS = ("table", "csv", "json", "parquet")
STORE = click.option(
    "--store",
    "root",
    required=True,
    metavar="DIR",
    envvar="CANOPY_STORE",
    help="Folder, or s3://BUCKET/PREFIX (or set CANOPY_STORE).",
)
FORMAT = click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    default="table",
    show_default=True,
    help="How the rows are printed.",
)
RUNS = click.option(
    "--run", "--runs", "runs", multiple=True, metavar="RUN", help="Only this run; repeatable."
)


def require_ingest() -> None:
    """Raises UsageError where the extra is not installed."""
    for name in ("torch", "transformers", "sentence_transformers"):
        if find_spec(name) is None:
            raise UsageError(f"ingest needs {name}: install it with: pip install 'canopy-store[ingest]'")


def print_rows(relation: Any, form: str) -> None:
    """Writes rows to stdout in one of FORMATS."""
    frame = relation.pl()
    if form == "table":
        import polars as pl

        width = _terminal_width()
        for name in {"p", "p_holm", "p_bh", "p_equivalence"} & set(frame.columns):
            # four decimals would show every small p as 0
            frame = frame.with_columns(pl.col(name).map_elements("{:.2g}".format, pl.String))
        with pl.Config(
            tbl_rows=-1,
            tbl_cols=-1,
            tbl_width_chars=width,
            fmt_str_lengths=60,
            tbl_hide_dataframe_shape=True,
            tbl_hide_column_data_types=True,
            tbl_formatting="UTF8_FULL_CONDENSED",
            float_precision=4,
        ):
            click.echo(str(frame))
    elif form == "csv":
        nested = [name for name, kind in frame.schema.items() if kind.is_nested()]
        if nested:
            raise UsageError(f"--format csv: column {nested[0]} is a list; choose json or parquet")
        frame.write_csv(sys.stdout.buffer)
    elif form == "json":
        click.echo(frame.write_json())
    else:
        if sys.stdout.isatty():
            raise UsageError("--format parquet: redirect it to a file: > result.parquet")
        frame.write_parquet(sys.stdout.buffer)


def _terminal_width() -> int:
    return shutil.get_terminal_size((400, 24)).columns if sys.stdout.isatty() else 400


@contextmanager
def bar(what: str) -> Iterator[Any]:
    """Progress on stderr: rollouts done, tokens/s, time left; only where a person looks."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    class Bar:
        """The Progress an ingest reports to."""

        def __init__(self, progress: Progress) -> None:
            self.progress = progress
            self.task = progress.add_task(what, total=None, rate="")
            self.count = 0

        def start(self, rollouts: int, done: int) -> None:
            self.progress.reset(self.task, total=rollouts, completed=done)

        def tokens(self, count: int) -> None:
            self.count += count
            elapsed = self.progress.tasks[0].elapsed
            rate = f"{self.count / elapsed:,.0f} tokens/s" if elapsed else ""
            self.progress.update(self.task, rate=rate)

        def rollouts(self, count: int) -> None:
            self.progress.advance(self.task, count)

        def say(self, line: str) -> None:
            click.echo(f"canopy: {line}", err=True)

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as progress:
        yield Bar(progress)
