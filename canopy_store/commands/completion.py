"""What the shell completes: measures, and the names that the store of the same line has.

Names come from the paths of the commit records, which no more than a listing costs; tasks alone stand
inside of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from canopy_store import store
from canopy_store.analysis.bootstrap import MEASURES
from canopy_store.analysis.power import ROLLOUT_LEVEL

Offer = Callable[[click.Context], Iterable[str]]


def _root(context: click.Context) -> Path:
    """The store of the line that is being typed; --store has to stand before what is completed."""
    return store.require(context.params.get("root") or os.environ["CANOPY_STORE"])


def _keys(kind: str, key: str) -> Offer:
    """The values of one key of the records of a kind."""

    def offer(context: click.Context) -> Iterator[str]:
        root = _root(context)
        for path in store.record_paths(root, kind):
            for part in path.relative_to(root).with_suffix("").parts:
                name, _, value = part.partition("=")
                if name == key:
                    yield store.unquoted(value)

    return offer


def _tasks(context: click.Context) -> Iterator[str]:
    root = _root(context)
    for each in store.records(root, "rollouts"):
        yield str(each.settings.get("task", ""))
    for each in store.records(root, "items"):
        yield each.keys["task"]


def _checkpoints(context: click.Context) -> Iterator[str]:
    root = _root(context)
    for each in store.records(root, "models"):
        yield f"{each.keys['family']}/{each.keys['variant']}"


def _selections(context: click.Context) -> Iterator[str]:
    return iter(("all", *_keys("selections", "selection")(context)))


def _metrics(context: click.Context) -> Iterable[str]:
    return ROLLOUT_LEVEL if context.info_name == "power" else MEASURES


# By the name of the parameter, in every command that has one of this name.
_OFFERS: dict[str, Offer] = {
    "metrics": _metrics,
    "metric": _metrics,
    "margins": lambda context: (f"{name}=" for name in MEASURES),
    "run": _keys("rollouts", "run"),
    "runs": _keys("rollouts", "run"),
    "variant": _keys("models", "variant"),
    "variants": _keys("models", "variant"),
    "baseline": _keys("models", "variant"),
    "family": _keys("models", "family"),
    "families": _keys("models", "family"),
    "task": _tasks,
    "tasks": _tasks,
    "reference_task": _tasks,
    "parent": _checkpoints,
    "selection": _selections,
    "embedder": _keys("embeddings", "embedder"),
    "grader": _keys("grades", "grader"),
    "reward_model": _keys("rewards", "reward_model"),
    "judge": _keys("judgments", "judge"),
    "clusters": _keys("clusters", "clustering"),
    "corpora": _keys("documents", "corpus"),
    "corpus": _keys("documents", "corpus"),
}
# Where a file or a folder is meant, the shell's own completion goes on.
_PLACES = {
    "root": "dir",
    "out": "file",
    "figures": "dir",
    "prompts": "file",
    "documents": "file",
    "items": "file",
    "context": "file",
    "examples": "file",
    "data": "file",
    "panel": "file",
    "requests": "file",
    "model": "file",
    "scorer": "file",
    "source": "file",
    "sources": "dir",
    "folder": "dir",
}


def _offered(offer: Offer, context: click.Context, incomplete: str) -> list[CompletionItem]:
    """What an offer has for a beginning, each once; nothing where it fails: a Tab never prints."""
    try:
        names = dict.fromkeys(name for name in offer(context) if name.startswith(incomplete))
    except Exception:  # a damaged store is for other commands to tell of
        return []
    return [CompletionItem(name) for name in names if name.isprintable()]


def _place(kind: str, context: click.Context, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type=kind)]


def add_completions(command: click.Command, words: tuple[str, ...] = ()) -> None:
    """Gives every parameter of a command, and of those below it, what completes it."""
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            add_completions(child, (*words, name))
    for parameter in command.params:
        name = str(parameter.name)
        if words[-2:] == ("ingest", "embed") and name == "embedder":
            name = "model"  # a new one, by its place
        if isinstance(parameter.type, (click.Choice, click.types.BoolParamType)):
            continue
        if name in _OFFERS:
            parameter.shell_complete = partial(_offered, _OFFERS[name])  # type: ignore[method-assign]
        elif name in _PLACES:
            parameter.shell_complete = partial(_place, _PLACES[name])  # type: ignore[method-assign]
