"""The command ``canopy sql``: a query, statements from standard input, or a shell."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import click
import duckdb

from canopy_store import sql, store
from canopy_store.commands.shared import FORMAT, STORE, echo, print_rows
from canopy_store.errors import CanopyError, UsageError
from canopy_store.schema import TABLES
from canopy_store.sql.horizon import AT_HORIZON, BY_PATTERNS


def _listed(title: str, names: Iterable[str]) -> str:
    indent = " " * 9
    return textwrap.fill(f"{title:9}" + ", ".join(names), 98, subsequent_indent=indent)


_MACROS = (
    "vendi_score(eigenvalues, q)",
    *(f"{name}_at(horizon)" for name in AT_HORIZON),
    *(f"{name}_by(patterns)" for name in BY_PATTERNS),
)
_SQL_HELP = f"""
Run a DuckDB QUERY over the store's tables and views; nothing else can be read or written.

Without a QUERY, statements are read from standard input; at a terminal a shell opens on the views.

\b
{_listed("Views:", sql.VIEWS)}
{_listed("Tables:", TABLES)}
{_listed("Macros:", _MACROS)}
         NAME_at(horizon) is NAME as if every rollout had been cut at its first `horizon` tokens.

\b
Examples:
  canopy sql "select family, variant, task, ce_star, rho_pearson from model_metrics" --store S
  canopy sql "from panel" --store S --format csv > panel.csv
  canopy sql "select run_id, ce_star from model_metrics_at(64)" --store S
  canopy sql "describe prompt_metrics" --store S
  canopy sql --store S < report.sql
  canopy sql --store S
"""


@click.command("sql", help=_SQL_HELP)
@click.argument("query", required=False)
@STORE
@FORMAT
@click.option("--incomplete", is_flag=True, help="Also show rollouts of incomplete runs.")
@click.option(
    "--shell",
    type=click.Choice(["plain", "duckdb"]),
    help="plain: runs reading statements alone; duckdb: DuckDB's own, from the PATH [default: plain].",
)
def sql_command(query: str | None, root: str, form: str, incomplete: bool, shell: str | None) -> None:
    if query is not None and query != "-":
        if shell:
            raise UsageError("--shell: not with a QUERY; leave one of them out")
        _answer(root, query, form, incomplete)
        return
    if query is None and sys.stdin.isatty() and sys.stdout.isatty():
        if shell == "duckdb":
            _duckdb_shell(root, form, incomplete)
        else:
            _plain_shell(root, form, incomplete)
        return
    if shell:
        raise UsageError("--shell: opens at a terminal only")
    texts = _statements(_input())
    if not texts:
        raise UsageError("standard input holds no statement; give a QUERY, or statements to read")
    if form == "parquet" and len(texts) > 1:
        raise UsageError(f"--format parquet: a file of one statement, and these are {len(texts)}")
    for statement in texts:
        _answer(root, statement, form, incomplete)


def _answer(root: str, query: str, form: str, incomplete: bool) -> None:
    """Prints what a query gives, of the store as it is now."""

    def ask(relations: list[str] | None = None) -> None:
        with sql.connect(root, incomplete=incomplete, relations=relations) as con:
            relation = con.sql(query)
            if relation is not None:
                print_rows(relation, form)

    def ask_of_named() -> None:
        try:
            ask(sql.named(query))
        except duckdb.CatalogException:
            ask()  # which says what names are near

    try:
        sql.again(ask_of_named)
    except duckdb.Error as error:
        raise sql.explain(error) from None


def _input() -> str:
    """All of standard input."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise UsageError("standard input is not UTF-8 text") from None


def _statements(text: str) -> list[str]:
    """The statements of a text, one by one."""
    try:
        with duckdb.connect() as con:
            return [each.query for each in con.extract_statements(text)]
    except duckdb.Error as error:
        raise sql.explain(error) from None


# ---------------------------------------------------------------- shells


def _duckdb_shell(root: str, form: str, incomplete: bool) -> None:
    """DuckDB's own shell on the views of the store as it is now.

    It opens their files and no other; a person can do more by hand there than a query is let do here.
    """
    program = shutil.which("duckdb")
    if program is None:
        raise UsageError(
            "--shell duckdb: no duckdb on the PATH; install it with: pip install duckdb-cli"
        )
    if form != "table":
        raise UsageError("--shell duckdb: not with --format; its own command is .mode")
    path = store.require(root)
    if store.remote(path):
        raise UsageError("--shell duckdb: not on object storage; leave it out for the plain shell")
    path = path.resolve()
    shown = sql.shown_files(path, incomplete)
    with tempfile.TemporaryDirectory(prefix="canopy-") as folder:
        database, start = Path(folder) / "canopy.duckdb", Path(folder) / "start.sql"
        sql.make_database(database, path, shown)
        listed = ", ".join(
            "'" + name.replace("'", "''") + "'" for names in shown.values() for name in names
        )
        start.write_text(f"set allowed_paths = [{listed}];\nset enable_external_access = false;\n")
        echo("DuckDB's own shell: .tables lists the views, .quit or Ctrl-D leaves it")
        # Ctrl-C is the shell's: it ends a query there, and not this process; errors it tells itself
        kept = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            subprocess.run(
                [program, "-readonly", "-init", str(start), str(database)],
                cwd=path,  # which the views are relative to
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        finally:
            signal.signal(signal.SIGINT, kept)


_DOTTED = (".tables", ".help", ".quit")
_SHELL_HELP = """A statement ends with ; and may have several lines. Only reading statements are run.
.tables  the views and tables      .help  these lines
.quit    leave, as does Ctrl-D     describe NAME;  columns of a view"""


def _plain_shell(root: str, form: str, incomplete: bool) -> None:
    """A shell in which each statement is run as `canopy sql` runs a query."""
    store.require(root)
    with suppress(ImportError):
        import readline  # gives input() its history and its keys

        names = [*sql.VIEWS, *TABLES, *_DOTTED]
        readline.set_completer(
            lambda text, at: next(iter([n for n in names if n.startswith(text)][at:]), None)
        )
        readline.set_completer_delims(" \t\n(),;")
        readline.parse_and_bind("tab: complete")
    echo(f"canopy sql on {root}: end a statement with ; and see .help")
    lines: list[str] = []
    while True:
        try:
            line = input("   ...> " if lines else "canopy> ")
        except EOFError:
            echo("")
            return
        except KeyboardInterrupt:
            echo("")
            lines = []
            continue
        if not _is_text(line):
            echo("canopy: this line is not UTF-8 text; write it again", err=True)
            continue
        if not lines and line.strip().rstrip(";") in (".quit", ".exit", ".q"):
            return
        if not lines and line.strip().startswith("."):
            _dot(line.strip())
            continue
        lines += [line] if lines or line.strip() else []
        text = "\n".join(lines)
        if _is_whole(text):
            lines = []
            _run(root, text, form, incomplete)


def _dot(word: str) -> None:
    if word == ".tables":
        echo("\n".join((_listed("Views:", sql.VIEWS), _listed("Tables:", TABLES))))
    elif word == ".help":
        echo(_SHELL_HELP)
    else:
        echo(f"canopy: {word}: no such command; see .help", err=True)


def _is_text(line: str) -> bool:
    """Whether a line is Unicode; bytes typed that are not UTF-8 come as halves of characters."""
    return line == line.encode(errors="ignore").decode()


def _is_whole(text: str) -> bool:
    """Whether a text ends with a semicolon that stands in no quotes."""
    if not text.rstrip().endswith(";"):
        return False
    try:
        with duckdb.connect() as con:
            con.extract_statements(text)
    except duckdb.Error as error:
        return "unterminated" not in str(error)
    return True


def _run(root: str, text: str, form: str, incomplete: bool) -> None:
    """Prints what the statements give, or in one line why not."""
    try:
        for statement in _statements(text):
            _answer(root, statement, form, incomplete)
    except CanopyError as error:
        echo(f"canopy: {' '.join(str(error).split())}", err=True)
    except KeyboardInterrupt:
        echo("canopy: interrupted", err=True)
