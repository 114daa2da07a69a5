"""What the commands share: options, tables, the progress bar."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from canopy_store.analysis.likeness import SETTINGS
from canopy_store.errors import UsageError
from canopy_store.terminal import printable

if TYPE_CHECKING:
    import polars as pl

FORMATS = ("table", "csv", "json", "parquet")
_TYPES_NOT_READ = {"interval", "union", "uhugeint"}
_TYPES_NOT_WRITTEN = {"blob", "bit", "bignum"}  # as csv or json
_WIDEST = 60_000  # of a table, in columns of a terminal: polars takes 16 bits
_MOST_DAYS = 90_000_000  # before and after 1970: a calendar of 262,000 years has some more
STORE = click.option(
    "--store",
    "root",
    required=True,
    metavar="DIR",
    envvar="CANOPY_STORE",
    help="Folder, or s3://BUCKET/PREFIX (or set CANOPY_STORE).",
)
RUNS = click.option(
    "--run", "--runs", "runs", multiple=True, metavar="RUN", help="Only this run; repeatable."
)


GRADER = click.option(
    "--grader", metavar="NAME", help="Of accuracy and its like; needed where the store has several."
)


def _seeds(_context: click.Context, _option: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    """Return the pattern of each NAME=PATTERN by its name."""
    patterns: dict[str, str] = {}
    for text in texts:
        name, equals, pattern = (part.strip() for part in text.partition("="))
        if not (name and equals and pattern):
            raise UsageError(f"--seeds {text}: needs NAME=PATTERN, as in 'sft=sft-*'")
        if name in patterns:
            raise UsageError(f"--seeds {name}: given twice; separate its patterns by commas")
        patterns[name] = pattern
    return patterns


SEEDS = click.option(
    "--seeds",
    multiple=True,
    metavar="NAME=PATTERN",
    callback=_seeds,
    help="Variants that match are checkpoints of the variant NAME: 'sft=sft-*', or sft=sft-1,sft-2; "
    "repeatable.",
)


ALLOW = click.option(
    "--allow",
    multiple=True,
    type=click.Choice(list(SETTINGS)),
    help="Compare runs all the same that differ in this; repeatable.",
)


CLUSTERS = click.option(
    "--clusters",
    metavar="NAME",
    help="Clusters by meaning, for rse, semantic_entropy, …; needed where the store has several.",
)


def _formatted(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with --format and --spreadsheet; it gets both as ``form``, for `print_rows`."""

    @functools.wraps(command)
    def formatted(*args: Any, form: str, spreadsheet: bool, **options: Any) -> Any:
        if spreadsheet and form != "csv":
            raise UsageError(f"--spreadsheet: not for --format {form}; it goes with --format csv")
        return command(*args, form="spreadsheet" if spreadsheet else form, **options)

    safe = click.option(
        "--spreadsheet",
        is_flag=True,
        help="With --format csv: an apostrophe before texts that a spreadsheet would take as formulas.",
    )
    form = click.option(
        "--format",
        "form",
        type=click.Choice(FORMATS),
        default="table",
        show_default=True,
        help="How the rows are printed.",
    )
    return form(safe(formatted))


FORMAT = _formatted


def echo(line: object, err: bool = False) -> None:
    """Prints a line in which nothing steers the terminal: texts and names in it may be anyone's."""
    click.echo(printable(str(line)), err=err)


def require_ingest() -> None:
    """Raises UsageError where the extra is not installed."""
    for name in ("torch", "transformers", "sentence_transformers"):
        if find_spec(name) is None:
            raise UsageError(f"ingest needs {name}: install it with: pip install 'canopy-store[ingest]'")


def print_rows(relation: Any, form: str) -> None:
    """Writes rows to stdout in one of FORMATS, or as csv for a spreadsheet.

    Into a file or a pipe all but a table is exact; on a terminal nothing is printed that steers it.

    Raises
    ------
    UsageError
        A column that cannot be printed in this form.
    """
    import polars as pl

    _require_types(relation, form)
    try:
        frame = relation.pl()
        if form != "parquet":  # which holds them as they are
            _require_dates(frame)
        _print_frame(frame, form)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        reason = " ".join(str(error).split())[:150]
        raise UsageError(
            f"--format {form}: a column cannot be printed ({reason}); cast it to varchar, or choose "
            "another --format"
        ) from None


def print_object(value: dict[str, Any]) -> None:
    """Writes one JSON object to stdout; a number that is not finite is null, as in JSON of rows.

    On a terminal nothing is printed that steers it.
    """

    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: plain(each) for key, each in part.items()}
        if isinstance(part, list | tuple):
            return [plain(each) for each in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    text = json.dumps(plain(value), ensure_ascii=False)
    (echo if sys.stdout.isatty() else click.echo)(text)


def _require_types(relation: Any, form: str) -> None:
    """Raises UsageError for a column of a type that polars lacks, reads wrongly, or cannot write."""
    refused = _TYPES_NOT_READ | (set() if form in ("table", "parquet") else _TYPES_NOT_WRITTEN)
    for name, kind in zip(relation.columns, relation.types, strict=True):
        if unprintable := refused & set(_type_names(kind)):
            raise UsageError(
                f"column {name}: {min(unprintable)} cannot be printed; cast the column to varchar"
            )


def _type_names(kind: Any) -> Iterator[str]:
    """The name of a DuckDB type, and of those inside it."""
    yield kind.id
    if kind.id in ("struct", "list", "array", "map"):
        for _, inner in kind.children:
            if not isinstance(inner, int):  # an array's size
                yield from _type_names(inner)


def _require_dates(frame: pl.DataFrame) -> None:
    """Raises UsageError for a column with an infinite date or time, or one too far for a calendar."""
    import polars as pl

    per_day = {"ms": 86_400_000, "us": 86_400_000_000, "ns": 86_400_000_000_000}
    for name, kind in frame.schema.items():
        for times in _times(frame[name]) if "Date" in str(kind) else ():
            days = times.to_physical().cast(pl.Int64)
            if isinstance(times.dtype, pl.Datetime):
                days = days // per_day[times.dtype.time_unit]
            if not days.is_between(-_MOST_DAYS, _MOST_DAYS).all():
                raise UsageError(
                    f"column {name}: an infinite or very far date cannot be printed; cast the column "
                    "to varchar"
                )


def _times(values: pl.Series) -> Iterator[pl.Series]:
    """The dates and times of a column, those inside lists and structs too."""
    import polars as pl

    if isinstance(values.dtype, pl.Datetime | pl.Date):
        yield values
    elif isinstance(values.dtype, pl.List | pl.Array):
        yield from _times(values.explode())
    elif isinstance(values.dtype, pl.Struct):
        for field in values.struct.fields:
            yield from _times(values.struct.field(field))


def _print_frame(frame: pl.DataFrame, form: str) -> None:
    if form == "table":
        import polars as pl

        width = terminal_width()
        for name in {"p", "p_holm", "p_bh", "p_equivalence"} & set(frame.columns):
            if not frame.schema[name].is_float():
                continue
            # four decimals would show every small p as 0
            frame = frame.with_columns(pl.col(name).map_elements("{:.2g}".format, pl.String))
        for part in _fitting(frame, width):
            echo(_drawn(part, width))
    elif form in ("csv", "spreadsheet"):
        nested = [name for name, kind in frame.schema.items() if kind.is_nested()]
        if nested:
            raise UsageError(f"--format csv: column {nested[0]} is a list; choose json or parquet")
        if form == "spreadsheet":
            frame = _as_text(frame)
        if sys.stdout.isatty():
            echo(frame.write_csv().rstrip("\n"))
        else:
            frame.write_csv(sys.stdout.buffer)
    elif form == "json":
        (echo if sys.stdout.isatty() else click.echo)(frame.write_json())
    else:
        if sys.stdout.isatty():
            raise UsageError("--format parquet: redirect it to a file: > result.parquet")
        frame.write_parquet(sys.stdout.buffer)


def _drawn(frame: pl.DataFrame, width: int) -> str:
    import polars as pl

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
        return str(frame)


def table_width(frame: pl.DataFrame) -> int:
    """Columns of a terminal that the frame's table takes."""
    return max(len(line) for line in _drawn(frame, _WIDEST).splitlines())


def _fitting(frame: pl.DataFrame, width: int) -> Iterator[pl.DataFrame]:
    """The frame, or its columns in as many tables as fit, each with the numbers of the rows."""
    if not frame.width or table_width(frame) <= width:
        yield frame
        return
    numbered = frame.with_row_index("row", 1) if "row" not in frame.columns else frame
    first, *others = numbered.columns
    kept = [first]
    for name in others:
        if len(kept) > 1 and table_width(numbered.select(*kept, name)) > width:
            yield numbered.select(kept)
            kept = [first]
        kept.append(name)
    yield numbered.select(kept)


def _as_text(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows with an apostrophe before each text, and column name, that would be a formula."""
    import polars as pl

    formula = r"^[=+\-@\t\r]"
    texts = [name for name, kind in frame.schema.items() if kind in (pl.String, pl.Categorical, pl.Enum)]
    for name in texts:
        text = pl.col(name).cast(pl.String)
        marked = pl.when(text.str.contains(formula)).then("'" + text).otherwise(text)
        frame = frame.with_columns(marked.alias(name))
    return frame.rename({name: f"'{name}" for name in frame.columns if re.match(formula, name)})


def terminal_width() -> int:
    """Columns of the terminal that is written to; 400 where that is a file or a pipe."""
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
            echo(f"canopy: {line}", err=True)

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
