"""What the documentation shows runs, and what it lists is what the code has."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from canopy_store import sql
from canopy_store.cli import cli
from canopy_store.schema import TABLES

ROOT = Path(__file__).parent.parent


def test_the_data_dictionary_is_the_schema():
    page = runpy.run_path(str(ROOT / "docs" / "dictionary.py"))["dictionary"]()
    assert (ROOT / "docs" / "dictionary.md").read_text(encoding="utf-8") == page, "run: make docs"


def test_the_command_reference_is_the_help():
    page = runpy.run_path(str(ROOT / "docs" / "commands.py"))["commands"]()
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == page, "run: make docs"


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str]]:
    """The words and the help of every command that is no group."""
    if not isinstance(command, click.Group):
        return [(path, command.help or "")]
    return [leaf for name, child in command.commands.items() for leaf in leaves(child, (*path, name))]


COMMANDS = leaves(cli)


@pytest.mark.parametrize(("words", "text"), COMMANDS, ids=[" ".join(words) for words, _ in COMMANDS])
def test_every_command_has_an_example_and_help_that_fits_a_terminal(words, text, canopy):
    _, _, examples = text.partition("Example")
    assert f"canopy {' '.join(words)}" in examples
    printed = canopy(*words, "--help")[1]
    assert "\b" not in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_the_help_of_sql_lists_every_table_and_view(canopy):
    printed = canopy("sql", "--help")[1]
    views, tables = re.search(r"Views:(.*)Tables:(.*)Macros:", printed, re.DOTALL).groups()
    assert views.replace(",", " ").split() == list(sql.VIEWS)
    assert tables.replace(",", " ").split() == list(TABLES)


def test_every_example_of_the_readme_runs(tmp_path, chain):
    shutil.copytree(chain, tmp_path / "my-model")
    pages = (ROOT / "README.md", ROOT / "docs" / "format.md")
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    blocks = re.findall(r"```(sh|python)\n(.*?)```", text, re.DOTALL)
    assert len(blocks) > 8
    script = ["set -euo pipefail"]
    for language, text in blocks:
        if text.startswith("make "):
            continue
        script.append(text if language == "sh" else f"python - <<'PYTHON'\n{text}\nPYTHON")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mine.base.walks" in done.stdout
    assert "incomplete" not in done.stdout
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert (tmp_path / "panel.csv").read_text().startswith("task,prompt_id,family,variant")


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?m)(?:^|`)make ([a-z-]+)", (ROOT / "README.md").read_text())):
        assert f"\n{target}:" in makefile, target
