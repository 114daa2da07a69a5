"""What reaches a terminal does not steer it; what goes into a file is exact."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

import canopy_store
from canopy_store.cli import cli, main
from canopy_store.terminal import printable

STEERING = {
    "clears the screen": "\x1b[2J",
    "sets the title": "\x1b]0;owned\x07",
    "one byte": "\x9b31m",
    "backspaces": "\x08\x08",
    "returns": "\rall is well",
    "deletes": "\x7f",
    "turns round": "\u202egnp.exe",
    "isolates": "\u2066",
    "marks": "\u200f\u061c",
    "other line ends": "\u2028",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("terminal")
    texts = [f"be{text}fore" for text in STEERING.values()]
    rows = {
        "family": "f",
        "variant": "v",
        "task": "t",
        "prompt_id": "p",
        "sample": list(range(len(texts))),
        "text": texts,
        "n_tokens": [3] * len(texts),
        "temperature": 1.0,
    }
    pl.DataFrame(rows).write_parquet(folder / "in.parquet")
    canopy_store.import_rollouts(folder / "s", folder / "in.parquet", max_new_tokens=9)
    return folder / "s"


def steers(text: str) -> set[str]:
    """The characters of a text that steer a terminal, by an independent definition."""
    import unicodedata

    marks = {
        "\u061c",
        "\u200e",
        "\u200f",
        *map(chr, range(0x202A, 0x202F)),
        *map(chr, range(0x2066, 0x206A)),
    }
    return {
        c
        for c in text
        if (unicodedata.category(c) in ("Cc", "Zl", "Zp") and c not in "\t\n") or c in marks
    }


@pytest.mark.parametrize("text", STEERING.values(), ids=STEERING)
def test_what_steers_is_written_out_and_all_else_stays(text):
    assert not steers(printable(text))
    plain = "née 数 a\tb\nc 👩‍💻 «ok»"
    assert printable(plain + text + plain).startswith(plain)
    assert printable(plain + text + plain).endswith(plain)
    assert json.loads(f'"{printable(text)}"') == text  # no two texts look the same


def test_a_table_is_free_of_codes_and_a_file_is_exact(root, canopy):
    query = "select sample, text from rollouts order by sample"
    code, out, _ = canopy("sql", query, "--store", root)
    assert code == 0
    assert not steers(out)
    assert "be\\u001b[2Jfore" in out
    code, out, _ = canopy("sql", query, "--store", root, "--format", "json")
    assert [row["text"] for row in json.loads(out)] == [f"be{text}fore" for text in STEERING.values()]
    done = subprocess.run(
        [sys.executable, "-m", "canopy_store.cli", "sql", query, "--store", root, "--format", "csv"],
        capture_output=True,
        check=True,
    )
    rows = list(csv.reader(io.StringIO(done.stdout.decode(), newline="")))
    assert [row[1] for row in rows[1:]] == [f"be{text}fore" for text in STEERING.values()]


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_no_format_steers_a_terminal(root, form):
    query = "select text from rollouts"
    line = [sys.executable, "-m", "canopy_store.cli", "sql", query, "--store", root, "--format", form]
    ours, theirs = pty.openpty()
    with subprocess.Popen(line, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # the other side is closed
                break
            shown += part
    os.close(ours)
    assert process.returncode == 0
    assert "\\u001b[2J" in shown.decode()
    assert not steers(shown.decode().replace("\r\n", "\n"))


def test_errors_and_names_of_files_do_not_steer(tmp_path, capfd):
    strange = tmp_path / "a\x1b]0;owned\x07\u202e.parquet"
    strange.write_bytes(b"x")
    for line in (
        ["import", strange, "--store", tmp_path / "s"],
        ["import", tmp_path / "no\x9b2J", "--store", tmp_path / "s"],
        ["sql", "select '\x1b[2J' as", "--store", tmp_path / "none\x1b[2J"],
        ["no\x1b[2Jcommand"],
        ["sql", "x", "--store", tmp_path / os.fsdecode(b"no\xff utf-8")],
    ):
        capfd.readouterr()
        assert main([os.fspath(part) for part in line]) in (1, 2)
        err = capfd.readouterr().err
        assert err.startswith("canopy: ")
        assert len(err.splitlines()) == 1
        assert not steers(err)


def test_texts_are_no_formulas_in_a_spreadsheet(root, canopy):
    query = (
        "select * from (values ('=1+1', -1.5, 'a=b'), ('+x', 2, '-'), ('-x', -3, null), ('@x', 4, ''), "
        "(chr(9) || 'x', 5, 'é'), (chr(13) || 'x', 6, '''')) as t(text, number, \"=other\")"
    )
    shown = ("sql", query, "--store", root, "--format", "csv")

    def rows(*more: str) -> list[list[str]]:
        code, out, err = canopy(*shown, *more)
        assert code == 0, err
        return list(csv.reader(io.StringIO(out, newline="")))

    numbers = ["-1.5", "2.0", "-3.0", "4.0", "5.0", "6.0"]
    exact, safe = rows(), rows("--spreadsheet")
    assert exact[0] == ["text", "number", "=other"]
    assert safe[0] == ["text", "number", "'=other"]
    assert [row[0] for row in exact[1:]] == ["=1+1", "+x", "-x", "@x", "\tx", "\rx"]
    assert [row[0] for row in safe[1:]] == ["'=1+1", "'+x", "'-x", "'@x", "'\tx", "'\rx"]
    assert [row[1] for row in safe[1:]] == [row[1] for row in exact[1:]] == numbers
    assert [row[2] for row in safe[1:]] == ["a=b", "'-", "", "", "é", "'"]
    code, _, err = canopy(*shown[:-1], "json", "--spreadsheet")
    assert (code, "--spreadsheet: not for --format json; it goes with --format csv" in err) == (2, True)


def test_every_command_that_prints_rows_prints_them_for_a_spreadsheet():
    for name, command in cli.commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        forms = [p for p in command.params if p.name == "form" and hasattr(p.type, "choices")]
        assert ("--spreadsheet" in options) == bool(forms), name
    assert {"sql", "status", "compare", "power", "regress", "verify"} <= {
        name for name, c in cli.commands.items() if any("--spreadsheet" in p.opts for p in c.params)
    }


def test_status_prints_them_too(root, canopy):
    code, out, _ = canopy("status", "--store", root, "--format", "csv", "--spreadsheet")
    assert code == 0
    assert out.startswith("run_id,")
