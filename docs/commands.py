"""Writes docs/commands.md from the help of the command line itself: python docs/commands.py"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click

from canopy_store.cli import cli

INTRO = """# Commands

Made by `python docs/commands.py` from what `canopy COMMAND --help` says; a test compares the two.
Exit codes: 0, 1 for data that fails, 2 for a wrong call, 130 for Ctrl-C.
"""


def contexts(command: click.Command, parent: click.Context | None = None) -> Iterator[click.Context]:
    """A context for the command and for each one below it, groups before what is in them."""
    context = click.Context(command, parent, info_name=command.name if parent else "canopy")
    yield context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from contexts(command.commands[name], context)


def prose(text: str) -> Iterator[str]:
    """The help's paragraphs as Markdown: what is set line by line becomes a block of code."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        first, *lines = paragraph.splitlines()
        if first != "\b":
            yield paragraph
        elif lines[0].endswith(":") and all(line.startswith(" ") for line in lines[1:]):
            yield lines[0]
            yield "\n".join(["```sh", textwrap.dedent("\n".join(lines[1:])), "```"])
        else:
            yield "\n".join(["```", *lines, "```"])


def options(context: click.Context) -> str:
    """A table of the options, or nothing where there is none but --help."""
    rows = []
    for parameter in context.command.params:
        record = parameter.get_help_record(context)
        if isinstance(parameter, click.Option) and record:
            names, meaning = (" ".join(cell.replace("|", "\\|").split()) for cell in record)
            rows.append(f"| `{names}` | {meaning} |")
    return "\n".join(["| option | |", "|---|---|", *rows]) if rows else ""


def section(context: click.Context) -> str:
    """What the page says of one command."""
    command = context.command
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    parts = [f"## {context.command_path}", f"`{usage}`", *prose(command.help or ""), options(context)]
    return "\n\n".join(part for part in parts if part) + "\n"


def commands() -> str:
    """The page's text."""
    every = list(contexts(cli))
    contents = ["| command | |\n|---|---|"]
    for context in every[1:]:
        anchor = context.command_path.replace(" ", "-")
        short = context.command.get_short_help_str(limit=200)
        contents.append(f"| [`{context.command_path}`](#{anchor}) | {short} |")
    return "\n".join([INTRO, *contents, "", *map(section, every)])


if __name__ == "__main__":
    page = Path(__file__).with_suffix(".md")
    page.write_text(commands(), encoding="utf-8")
    print(page)
