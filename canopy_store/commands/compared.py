"""How the terminal shows a comparison: a line in words, a table that fits, and notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import duckdb
import polars as pl

from canopy_store.analysis.words import headline, label, marks, notes, unit
from canopy_store.commands.shared import echo, print_rows, table_width, terminal_width

_LARGEST = 10  # prompts that the table of --by prompt has for each measure
_PLACES = ("family", "task", "variant", "checkpoint")
# What a table leaves out for a narrower terminal, in this order; what is left out of it stands below it,
# in the first line, or in csv and json.
_NARROWER = ("% [interval]", "M", "each", "baseline", "treated", "unit", "prompts", "clusters")
Row = Mapping[str, Any]


def show_comparison(frame: pl.DataFrame) -> None:
    """Prints what `compare` gives: first in words, then a row a change, then what to read it with."""
    echo(headline(frame))
    # of items and documents it is clusters, each of so many of them
    number, within = ("prompts", "M") if frame["unit"][0] == "prompt" else ("clusters", "each")
    letters: dict[str, str] = {}
    rows = [
        {
            **_place(row, frame),
            "measure": label(row),
            "unit": unit(row["metric"]),
            number: row["n_prompts"],
            within: _pair(row["baseline_n_samples"], row["treated_n_samples"]),
            "baseline": _number(row["baseline"]),
            "treated": _number(row["treated"]),
            "delta [interval]": _with_interval(row, "delta"),
            "%": _number(row["percent_delta"]),
            "% [interval]": _with_interval(row, "percent_delta"),
            "p, Holm": "" if row["p_holm"] is None else f"{row['p_holm']:.2g}",
            **({"equivalent": row["equivalent"]} if frame["margin"].count() else {}),
            "note": _letters(marks(row), letters),
        }
        for row in frame.to_dicts()
    ]
    table = pl.DataFrame(rows, infer_schema_length=None)
    shown = _fitting(table if letters else table.drop("note"))
    print_rows(duckdb.from_arrow(shown.to_arrow()), "table")
    if "unit" not in shown.columns:
        units = dict.fromkeys(f"{r['measure']} {r['unit']}" for r in rows if r["unit"])
        echo(f"units: {', '.join(units)}")
    for mark, letter in letters.items():
        echo(f"{letter}: {mark}")
    for note in notes(frame):
        echo(note)


def _fitting(table: pl.DataFrame) -> pl.DataFrame:
    """The table with as many columns as the terminal has room for."""
    fuller = table.drop("%")
    if table_width(fuller) <= terminal_width():
        return fuller
    for name in _NARROWER:
        table = table.drop(name, strict=False)
        if table_width(table) <= terminal_width():
            break
    return table


def show_prompts(frame: pl.DataFrame) -> None:
    """Prints what `compare` gives by prompt: for each measure the prompts that change most."""
    for (_, variant), rows in frame.group_by(["metric", "variant"], maintain_order=True):
        most = rows.head(_LARGEST)
        echo(
            f"{variant}, {_measure(most.row(0, named=True))}: the largest changes of {len(rows)} prompts"
        )
        shown = [
            {
                **_place(row, frame, ("family", "task")),
                "prompt": _cut_text(row["text"] or row["prompt_id"]),
                "baseline": _number(row["baseline"]),
                "treated": _number(row["treated"]),
                "delta": _number(row["delta"]),
                "%": _number(row["percent_delta"]),
                "cut": _pair(_percent(row["baseline_cut"]), _percent(row["treated_cut"])),
            }
            for row in most.to_dicts()
        ]
        table = pl.DataFrame(shown, infer_schema_length=None)
        print_rows(duckdb.from_arrow(table.to_arrow()), "table")
        for mark in dict.fromkeys(mark for row in rows.to_dicts() for mark in marks(_uncut(row))):
            echo(mark)
    echo("the largest of many changes is large by chance, too; --format csv has every prompt")


def _place(row: Row, frame: pl.DataFrame, names: Sequence[str] = _PLACES) -> dict[str, str]:
    """Where the row is, as far as the rows differ in it."""
    several = [name for name in names if name in frame.columns and frame[name].n_unique() > 1]
    return {name: row[name] or "" for name in several}


def _measure(row: Row) -> str:
    return ", ".join(part for part in (label(row), unit(row["metric"])) if part)


def _pair(one: object, other: object) -> str:
    if one is None and other is None:
        return ""
    return str(one) if one == other else f"{one} / {other}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _with_interval(row: Row, part: str) -> str:
    low, high = row[f"{part}_ci_low"], row[f"{part}_ci_high"]
    text = _number(row[part])
    return text if low is None else f"{text} [{_number(low)}, {_number(high)}]"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _uncut(row: Row) -> Row:
    """The row without its shares of cut rollouts, which have a column of their own."""
    return {**row, "baseline_cut": None, "treated_cut": None}


def _letters(read_with: Sequence[str], letters: dict[str, str]) -> str:
    """A letter for each mark; equal marks share theirs."""
    return " ".join(letters.setdefault(mark, _name(len(letters))) for mark in read_with)


def _name(number: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return letters[number % 26] + (str(number // 26) if number >= 26 else "")


def _cut_text(text: str) -> str:
    """The start of a prompt, on one line, as long as the terminal has room."""
    room = max(12, min(60, terminal_width() - 60))
    line = " ".join(text.split())
    return line if len(line) <= room else line[: room - 1] + "…"
