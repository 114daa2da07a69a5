"""Writes docs/dictionary.md from the schema in code and the views in sql/: python docs/dictionary.py"""

from __future__ import annotations

import tempfile
import textwrap
from pathlib import Path

import canopy_store
from canopy_store import sql
from canopy_store.schema import TABLES, Column, view_columns
from canopy_store.sql.columns import column_of
from canopy_store.sql.horizon import AT_HORIZON

INTRO = """# Data dictionary

Made by `python docs/dictionary.py` from `canopy_store/schema.py`, `sql/columns.py` and the views in
`sql/`; a test compares the two. Definitions and sources of the measures: [measures.md](measures.md). A
store says the same of itself: `select table_name, column_name, comment from duckdb_columns()` in
`canopy.duckdb`.

Path columns are hive partitions (`family=…/`) and columns of the files, too. An optional column stands
only in files that have a value of it ([format.md](format.md)).
"""

CUT_VIEWS = """`NAME_at(horizon)`, a table macro, has the columns of NAME as if every rollout had been
cut at its first `horizon` tokens ([measures.md](measures.md#a-common-cap)). There is one beside each of
{cut}.
"""


def row(column: Column, note: str) -> str:
    """One line of a Markdown table."""
    doc = column.doc.replace("|", "\\|")
    return f"| `{column.name}` | {column.type} | {column.unit} | {doc}{note} |"


def dictionary() -> str:
    """The page's text."""
    lines = [INTRO, "## Tables\n"]
    header = "| column | type | unit | meaning |\n|---|---|---|---|"
    for table in TABLES.values():
        lines += [f"### {table.name}\n", f"{table.grain}; key: {', '.join(table.keys)}.\n", header]
        for column in view_columns(table.name):
            note = " In the path." if column.name in table.path_columns else ""
            may = " Optional, may be NULL." if column.optional else " May be NULL."
            lines.append(row(column, note or ("" if column.required else may)))
        lines.append("")
    cut = textwrap.fill(", ".join(f"`{name}`" for name in AT_HORIZON), 100)
    lines += ["## Views\n", CUT_VIEWS.format(cut=cut)]
    with tempfile.TemporaryDirectory() as empty:
        con = canopy_store.open(canopy_store.init(Path(empty) / "s"))
        for view in sql.VIEWS:
            grain, keys, _ = sql.source(view).splitlines()[:3]
            lines += [f"### {view}\n", f"{grain[10:]}; key: {keys[9:]}.\n", header]
            described = con.sql(f"describe {view}").fetchall()
            lines += [row(column_of(view, name), "") for name, *_ in described]
            lines.append("")
        con.close()
    return "\n".join(lines)


if __name__ == "__main__":
    page = Path(__file__).with_suffix(".md")
    page.write_text(dictionary(), encoding="utf-8")
    print(page)
