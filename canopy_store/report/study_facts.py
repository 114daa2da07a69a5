"""A study's records as the report sees them: scored items and documents, training, generations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from canopy_store.analysis import studies as found
from canopy_store.analysis.comparable import view_rows
from canopy_store.analysis.pairing import variant_order
from canopy_store.analysis.studies import Arms
from canopy_store.analysis.words import headline
from canopy_store.sql.connection import Connection

_NO_NAMES = pl.DataFrame(schema={"family": pl.String, "variant": pl.String})


@dataclass(frozen=True)
class Study:
    """A store's items, documents, training and generations as the report sees them.

    Attributes
    ----------
    items, documents : the arms, their changes from the baseline and what they are by themselves
    chances, frontier, contributions, training, generations : as `canopy_store.analysis.studies` gives
    counts : items, documents and texts of them
    variants : every arm, the baseline first
    tables : rows of the views that the page lists, by their names
    """

    baseline: str = "base"
    items: Arms = field(default_factory=Arms)
    documents: Arms = field(default_factory=Arms)
    chances: pl.DataFrame = field(default_factory=pl.DataFrame)
    frontier: pl.DataFrame = field(default_factory=pl.DataFrame)
    contributions: pl.DataFrame = field(default_factory=pl.DataFrame)
    training: pl.DataFrame = field(default_factory=pl.DataFrame)
    generations: pl.DataFrame = field(default_factory=pl.DataFrame)
    counts: Mapping[str, int] = field(default_factory=dict)
    variants: Sequence[str] = ()
    families: Sequence[str] = ()
    tables: Mapping[str, pl.DataFrame] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether the store has nothing of it."""
        return not self.counts and self.training.is_empty()

    @property
    def treated(self) -> list[str]:
        """The arms that are compared with the baseline."""
        frames = [arms.changes for arms in (self.items, self.documents) if len(arms.changes)]
        compared = {name for frame in frames for name in frame["variant"]}
        return [name for name in self.variants if name in compared]

    def headline(self) -> str:
        """What was found of items, else of documents, in plain words; '' where nothing is compared."""
        for arms in (self.items, self.documents):
            if len(arms.changes):
                return headline(arms.changes)
        return ""


def gather_study(
    con: Connection,
    root: str | Path,
    *,
    baseline: str,
    seeds: Mapping[str, str] | None,
    allow: Sequence[str],
    seed: int,
    rollouts: pl.DataFrame,
) -> Study:
    """The study of a store; ``rollouts`` are values of CE*, as `values_of` gives them."""
    number = found.counts(con)
    training = found.training_curves(con, seeds)
    if not number:
        return Study(baseline, training=training, variants=_names(training))
    given: dict[str, Any] = {"baseline": baseline, "allow": allow, "seed": seed}
    items = found.arms(con, root, "item", seeds=seeds, **given)
    documents = found.arms(con, root, "document", seeds=seeds, **given)
    singly = found.arms(con, root, "document", **given) if seeds else documents
    contributions = found.contributions(con, baseline)
    generations = found.generations(con, singly, rollouts, baseline)
    every = [items.changes, items.alone, documents.changes, documents.alone, training, rollouts]
    named = pl.concat([f.select("family", "variant") for f in every if len(f)] or [_NO_NAMES])
    compared = any(len(arms.changes) for arms in (items, documents))
    order = variant_order(view_rows(con, "models"), named, baseline)
    order = [*([baseline] if compared and baseline not in order else []), *order]
    for frame, column in ((contributions, "arm"), (generations, "lineage")):
        if len(frame):
            order += [name for name in frame[column].unique().sort() if name not in order]
    views = {name: view_rows(con, name) for name in ("option_accuracy", "perplexity")}
    return Study(
        baseline,
        items,
        documents,
        found.chances(con),
        found.frontier(con, documents),
        contributions,
        training,
        generations,
        number,
        order,
        named["family"].unique().sort().to_list(),
        {name: frame for name, frame in views.items() if len(frame)},
    )


def _names(frame: pl.DataFrame) -> list[str]:
    return frame["variant"].unique().sort().to_list() if len(frame) else []
