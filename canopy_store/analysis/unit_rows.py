"""What a comparison takes from items and documents: a row per cluster of units.

An arm is a scorer: a checkpoint, after a context or none, in a number format. It stands where a variant
does, and a cluster (of items about one fact, of documents from one source) where a prompt does, so that
pairing, bootstrap, training seeds and adjustment are those of rollouts. A cluster's value is a ratio of
sums over its units, weighted by what it is a ratio of: items, tokens or bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from canopy_store.analysis.bootstrap import AT_K, MEASURES
from canopy_store.analysis.comparable import only
from canopy_store.analysis.pairing import no_baseline
from canopy_store.analysis.seeds import as_variants
from canopy_store.errors import ConflictError, DataError, UsageError
from canopy_store.sql.connection import Connection

UNITS = ("prompt", "item", "document")
_PER_TOKEN = ("nll", "expected_nll", "perplexity")
_ITEMS = """
    select m.*, m.item_id as unit_id, c.template,
        1 as n_units, null::bigint as n_tokens, null::bigint as n_bytes,
        m.correct_sum as accuracy_sum, m.correct_token as accuracy_token,
        m.correct_char as accuracy_char, m.correct_pmi as accuracy_pmi
    from item_metrics m join scorers c using (scorer_id)
"""
_DOCUMENTS = """
    select m.*, m.document_id as unit_id, m.corpus as task, c.template, 1 as n_units
    from document_metrics m join scorers c using (scorer_id)
"""


def unit_of(metrics: Sequence[str], unit: str | None) -> str:
    """The unit that these metrics are of; prompt where none is named.

    Raises
    ------
    UsageError
        An unknown unit or metric, or metrics of several units.
    """
    if unit is not None and unit not in UNITS:
        raise UsageError(f"--unit {unit}: one of {', '.join(UNITS)}")
    for name in metrics:
        if name not in MEASURES:
            names = [n for n, m in MEASURES.items() if unit in (None, m.unit) and n not in AT_K]
            names += ["pass_at_K, pass_hat_K, maj_at_K (K = 1, 2, 4, … 1024)"] * (
                unit in (None, "prompt")
            )
            raise UsageError(f"--metric {name}: one of {', '.join(names)}")
    of = {MEASURES[name].unit: name for name in reversed(metrics)}  # the first of each unit
    if unit is not None and (others := [name for each, name in of.items() if each != unit]):
        raise UsageError(f"--unit {unit}: {others[0]} is of {MEASURES[others[0]].unit}s")
    if len(of) > 1:
        told = ", ".join(sorted(f"{name} of {each}s" for each, name in of.items()))
        raise UsageError(f"one comparison is of one unit, and these are of several: {told}")
    return unit or next(iter(of), "prompt")


def unit_rows(
    con: Connection,
    root: str | Path,
    unit: str,
    *,
    baseline: str = "base",
    metrics: Sequence[str] = (),
    families: Sequence[str] = (),
    tasks: Sequence[str] = (),
    splits: Sequence[str] = (),
    variants: Sequence[str] = (),
    seeds: Mapping[str, str] | None = None,
    allow: Sequence[str] = (),
    paired: bool = True,
) -> pl.DataFrame:
    """Rows for `compare_prompts`: one per family, arm, task and cluster of units.

    Parameters
    ----------
    root : path of the store, for messages
    unit : 'item' or 'document'
    baseline : an arm: a variant, or of a variant with several scorers a scorer's name less ``FAMILY.``
    tasks : of items; corpora of documents
    splits : only these parts of a task
    allow : 'template', where arms may differ in it
    paired : whether the baseline must be there, with another arm

    The others are those of `compare`.

    Returns
    -------
    family; variant, the arm; task, with the split behind a colon where it has a name; of_task, the task
    alone; prompt_id, the cluster; run_id, the scorer; n_rollouts, the units in it; the measures; and
    columns that `compare_prompts` asks for.

    Raises
    ------
    ConflictError
        Arms that read through different templates.
    DataError
        Nothing scored, no such family, task, split or arm, an arm that lacks units others have, or
        measures per token of arms whose tokens differ.
    """
    query, what = (_ITEMS, "options") if unit == "item" else (_DOCUMENTS, "documents")
    rows = con.sql(query).pl()
    if rows.is_empty():
        raise DataError(f"{root}: no {unit} is scored; see: canopy ingest {what} --help")
    # one scorer of a variant is the variant; of several each is an arm by its own name
    alone = pl.col("scorer_id").n_unique().over("family", "variant") == 1
    own = pl.col("scorer_id").str.strip_prefix(pl.col("family") + ".")
    rows = rows.with_columns(variant=pl.when(alone).then("variant").otherwise(own))
    rows = rows.with_columns(
        task=pl.when(pl.col("split") == "all")
        .then("task")
        .otherwise(pl.format("{}:{}", "task", "split")),
        of_task=pl.col("task"),
    )
    if seeds:
        rows = as_variants(rows, seeds, baseline=baseline)
    rows = only(
        rows,
        families=families,
        tasks=tasks,
        splits=splits,
        variants=variants,
        baseline=baseline,
        task="of_task",
    )
    if paired and (reason := no_baseline(rows, baseline)):
        raise DataError(reason)
    _require_own_names(rows)
    if "template" not in allow:
        _require_one_template(rows)
    if unit == "document":
        rows = _same_tokens(rows, metrics)
    _require_all(rows, unit)
    return _by_cluster(rows, [name for name, m in MEASURES.items() if m.unit == unit])


def _by_cluster(rows: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """The clusters of rows of units: their sizes, and each measure's ratio of sums."""
    keys = ["scorer_id", "family", "variant", "task", "of_task", "cluster"]
    keys += [name for name in ("checkpoint",) if name in rows.columns]
    weight = {"units": "n_units", "tokens": "n_tokens", "bytes": "n_bytes"}
    ratios = []
    for name in names:
        w, x = pl.col(weight[MEASURES[name].weight]), pl.col(MEASURES[name].column)
        # a unit that has no value leaves the cluster without one: what it is cannot be told
        unknown = (x.is_null() & (w > 0)).any()
        whole = pl.when(unknown).then(None).otherwise((x * w).sum() / w.sum())
        ratios.append(whole.alias(MEASURES[name].column))
    sizes = [pl.col(name).sum() for name in weight.values()]
    unique = {each.meta.output_name(): each for each in ratios}
    out = rows.group_by(keys, maintain_order=True).agg(*sizes, *unique.values())
    return out.rename({"scorer_id": "run_id", "cluster": "prompt_id"}).with_columns(
        n_rollouts=pl.col("n_units"),
        mean_length=pl.lit(None, pl.Float64),
        truncation_rate=pl.lit(None, pl.Float64),
        selection=pl.lit("all"),
        selection_rule=pl.lit(None, pl.String),
    )


def _require_own_names(rows: pl.DataFrame) -> None:
    """Raises where a part of one task is called as another task is, or as its part."""
    names = rows.select("task", "of_task", "split").unique()
    shared = names.filter(pl.col("task").is_duplicated()).sort("task", "of_task")
    if len(shared):
        (name, *_), tasks = shared.row(0), shared.filter(task=shared["task"][0])["of_task"].to_list()
        raise DataError(
            f"{name} is a part of {tasks[0]} and of {tasks[1]}: their rows would be one; choose one of "
            "the two with --task"
        )


def _require_one_template(rows: pl.DataFrame) -> None:
    read = rows.filter(pl.col("template").is_not_null()).select("family", "template", "variant").unique()
    for (family,), own in read.group_by("family", maintain_order=True):
        if own["template"].n_unique() > 1:
            arms = own.group_by("template").agg(pl.col("variant").sort()).sort("template")
            told = "; ".join(f"{template}: {', '.join(names)}" for template, names in arms.iter_rows())
            raise ConflictError(
                f"{family}: arms read through different templates ({told}); add --allow template to "
                "compare them all the same, or name those to compare with --variant"
            )


def _require_all(rows: pl.DataFrame, unit: str) -> None:
    """Raises where an arm lacks a unit that another arm of its family has in the task."""
    units = rows.group_by("family", "task").agg(all=pl.col("unit_id").n_unique())
    own = rows.group_by("family", "task", "variant", "scorer_id").agg(own=pl.col("unit_id").n_unique())
    short = own.join(units, on=["family", "task"]).filter(pl.col("own") < pl.col("all"))
    if len(short):
        row = short.sort("family", "task", "variant").row(0, named=True)
        raise DataError(
            f"{row['variant']} of {row['family']} has scores of {row['own']} of {row['all']} {unit}s of "
            f"{row['task']}: arms are compared on the same {unit}s; score the rest, or name the arms to "
            "compare with --variant"
        )


def _same_tokens(rows: pl.DataFrame, metrics: Sequence[str]) -> pl.DataFrame:
    """The rows without measures per token where arms cut a document into other numbers of tokens."""
    place = ["family", "task", "unit_id"]
    apart = rows.group_by(place).agg(pl.col("n_tokens").n_unique()).filter(pl.col("n_tokens") > 1)
    if apart.is_empty():
        return rows
    asked = [name for name in metrics if name in _PER_TOKEN]
    if asked:
        where = apart.sort(place).row(0, named=True)
        raise DataError(
            f"{asked[0]}: arms of {where['family']} cut {where['unit_id']} of {where['task']} into "
            "other tokens, and a mean per token is then another thing; compare bits_per_byte"
        )
    return rows.with_columns(pl.lit(None, pl.Float64).alias(name) for name in _PER_TOKEN)
