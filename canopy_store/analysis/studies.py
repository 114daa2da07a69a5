"""What a study found, arm by arm: accuracy, loss, gain and forgetting, training and generations.

An arm is a scorer, as in `unit_rows`; its values, changes and intervals are those of `compare`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import polars as pl

from canopy_store.analysis.comparable import view_rows
from canopy_store.analysis.comparison import compare_prompts, estimate
from canopy_store.analysis.intervals import Units
from canopy_store.analysis.pairing import no_baseline
from canopy_store.analysis.seeds import as_variants
from canopy_store.analysis.unit_rows import unit_rows
from canopy_store.analysis.words import unit as unit_of_metric
from canopy_store.errors import ConflictError, DataError
from canopy_store.sql.connection import Connection

_PLACE = ["family", "task", "variant"]
_SCORES = {"item": "option_scores", "document": "document_scores"}
_STEPS = 240  # points of a curve along training


@dataclass(frozen=True)
class Arms:
    """The arms of scored items or documents.

    Attributes
    ----------
    changes : what `compare` gives of them; no rows where nothing can be compared
    alone : what `estimate` gives of those that no row of ``changes`` has
    reason : why nothing is compared; None where something is, and where nothing is scored
    """

    changes: pl.DataFrame = field(default_factory=pl.DataFrame)
    alone: pl.DataFrame = field(default_factory=pl.DataFrame)
    reason: str | None = None

    def values(self, baseline: str, metric: str) -> pl.DataFrame:
        """Each arm's value of a metric on each task, as `values_of` gives it, once."""
        frame = values_of(self.changes, self.alone, baseline, metric)
        return frame.unique(_PLACE, keep="first", maintain_order=True) if len(frame) else frame


def arms(
    con: Connection,
    root: str | Path,
    unit: str,
    *,
    baseline: str,
    seeds: Mapping[str, str] | None = None,
    allow: Sequence[str] = (),
    seed: int,
) -> Arms:
    """The arms of every scored unit, 'item' or 'document', of a store."""
    if not con.sql(f"from {_SCORES[unit]} limit 1").fetchall():
        return Arms()
    models = view_rows(con, "models")
    try:
        rows = unit_rows(con, root, unit, baseline=baseline, seeds=seeds, allow=allow, paired=False)
    except (DataError, ConflictError) as error:
        return Arms(reason=str(error))
    reason = no_baseline(rows, baseline)
    changes = pl.DataFrame()
    if reason is None:
        changes = compare_prompts(rows, models, baseline=baseline, unit=unit, seed=seed)
    return Arms(changes, alone(rows, changes, baseline, seed, unit), reason)


def alone(
    rows: pl.DataFrame, changes: pl.DataFrame, baseline: str, seed: int, unit: str = "prompt"
) -> pl.DataFrame:
    """What `estimate` gives of the models that are in no comparison, each checkpoint by itself."""
    if len(changes):
        treated = changes.filter(level="task").select(_PLACE).unique()
        compared = pl.concat([treated, treated.with_columns(variant=pl.lit(baseline))])
        rows = rows.join(compared, on=_PLACE, how="anti", maintain_order="left")
    if "checkpoint" in rows.columns:
        rows = rows.with_columns(variant="checkpoint").drop("checkpoint")
    return estimate(rows, seed=seed, unit=unit) if len(rows) else pl.DataFrame()


def values_of(changes: pl.DataFrame, lone: pl.DataFrame, baseline: str, metric: str) -> pl.DataFrame:
    """A metric of each family, task and variant: n_prompts, value, ci_low, ci_high; several of a
    baseline that is compared over other prompts each time.

    Parameters
    ----------
    changes, lone : what `compare` gives, and `estimate` of those that are in no comparison
    """
    sides = [
        _side(changes, metric, "baseline", variant=pl.lit(baseline)),
        _side(changes, metric, "treated"),
        _side(lone, metric, "value"),
    ]
    frame = pl.concat([side for side in sides if len(side)] or [pl.DataFrame()], how="diagonal")
    return frame.drop_nulls("value") if len(frame) else frame


def _side(frame: pl.DataFrame, metric: str, part: str, **more: pl.Expr) -> pl.DataFrame:
    if frame.is_empty():
        return frame
    ends = {"ci_low": f"{part}_ci_low", "ci_high": f"{part}_ci_high"}
    rows = frame.filter(level="task", metric=metric).with_columns(**more)
    return rows.select(*_PLACE, "n_prompts", value=part, **ends)


def counts(con: Connection) -> dict[str, int]:
    """How many items and documents a store has; without those of which it has none."""
    number = con.sql(
        "select (select count(*) from (select distinct task, item_id from items)), "
        "(select count(*) from documents)"
    )
    return {name: n for name, n in zip(("items", "documents"), number.fetchall()[0], strict=True) if n}


def chances(con: Connection) -> pl.DataFrame:
    """What guessing gets on each task and split of items: task, chance."""
    frame = con.sql(
        "select task, split, sum(chance * n_items) / sum(n_items) as chance from option_accuracy "
        "group by all"
    ).pl()
    return frame.select(task_and_split("task"), "chance")


def task_and_split(task: str) -> pl.Expr:
    """A task with its split behind a colon where it has a name, as `unit_rows` names it."""
    whole = pl.col("split") == "all"
    return pl.when(whole).then(task).otherwise(pl.format("{}:{}", task, "split")).alias("task")


def loss_metric(documents: Arms) -> str:
    """The loss in which all arms can be compared: nll, or bits_per_byte where their tokens differ."""
    frame = documents.changes if len(documents.changes) else documents.alone
    value = "delta" if len(documents.changes) else "value"
    known = frame.filter(metric="nll").drop_nulls(value) if len(frame) else frame
    return "nll" if len(known) else "bits_per_byte"


def frontier(con: Connection, documents: Arms) -> pl.DataFrame:
    """Gain on one corpus against forgetting of another, of each arm, for every pair of two corpora.

    Of a pair the corpus on which the arms gain more, by their mean, is the one that gain is of.

    Returns
    -------
    family, variant; gained, forgotten, the two corpora with their splits; gain, the fall of the loss on
    the one, and forgetting, its rise on the other, each with ``_low`` and ``_high``
    """
    if documents.changes.is_empty():
        return pl.DataFrame()
    corpora = con.sql("select distinct corpus, split from documents").pl()
    corpora = corpora.select("corpus", task_and_split("corpus"))
    change = ["delta", "delta_ci_low", "delta_ci_high"]
    rows = documents.changes.filter(level="task", metric=loss_metric(documents)).drop_nulls("delta")
    rows = rows.select(*_PLACE, *change).join(corpora, on="task", maintain_order="left")
    pairs = rows.join(rows, on=["family", "variant"], suffix="_out")
    pairs = pairs.filter(pl.col("corpus") != pl.col("corpus_out"))
    # the other way round it is another pair: of both the one that gains more stays
    together = ["family", "task", "task_out"]
    mean = [pl.col(name).mean().over(together) for name in ("delta", "delta_out")]
    pairs = pairs.filter((mean[0] < mean[1]) | ((mean[0] == mean[1]) & (pl.col("task") < "task_out")))
    return pairs.select(
        "family",
        "variant",
        gained="task",
        forgotten="task_out",
        gain=-pl.col("delta"),
        gain_low=-pl.col("delta_ci_high"),
        gain_high=-pl.col("delta_ci_low"),
        forgetting="delta_out",
        forgetting_low="delta_ci_low_out",
        forgetting_high="delta_ci_high_out",
    ).sort("family", "gained", "forgotten", "variant")


def contributions(con: Connection, baseline: str) -> pl.DataFrame:
    """What each type of token contributes to an arm's change of loss, as steps from 0 to the total.

    Returns
    -------
    family, arm, task, token_type; contribution with ``low`` and ``high``; ``start`` and ``end``, where
    its step begins and ends; the last of each arm and task is ``total``
    """
    rows = con.sql("from token_type_contributions").pl()
    plain = con.sql("select scorer_id as baseline_id, variant as of from scorers").pl()
    rows = rows.join(plain, on="baseline_id", maintain_order="left").filter(of=baseline)
    if rows.is_empty():
        return rows
    half = pl.col("contribution_se") * _quantile(rows["n_clusters"])
    keys = ["family", "arm", "task"]
    rows = rows.with_columns(
        task_and_split("corpus"), arm=pl.col("scorer_id").str.strip_prefix(pl.col("family") + ".")
    ).sort(*keys, "baseline_id", "token_type")
    rows = rows.with_columns(end=pl.col("contribution").cum_sum().over(*keys, "baseline_id"))
    steps = rows.select(
        *keys,
        "baseline_id",
        "token_type",
        "contribution",
        low=pl.col("contribution") - half,
        high=pl.col("contribution") + half,
        start=pl.col("end") - pl.col("contribution"),
        end="end",
    )
    totals = steps.group_by(*keys, "baseline_id", maintain_order=True).agg(pl.col("contribution").sum())
    total = totals.with_columns(
        token_type=pl.lit("total"),
        low=pl.lit(None, pl.Float64),
        high=pl.lit(None, pl.Float64),
        start=pl.lit(0.0),
        end="contribution",
    )
    return pl.concat([steps, total.select(steps.columns)])


def training_curves(con: Connection, seeds: Mapping[str, str] | None = None) -> pl.DataFrame:
    """The loss along training, of several seeds their mean, thinned to some hundred points a curve.

    Returns
    -------
    family, variant, split, step, loss in nats per token, n_checkpoints; ``low`` and ``high`` the 95%
    interval over checkpoints by Student's t, NULL of one
    """
    rows = con.sql("select family, variant, split, step, loss from training where loss is not null").pl()
    if rows.is_empty():
        return rows
    if seeds:
        there = rows["variant"].unique().to_list()
        rows = as_variants(rows, _present(seeds, there))
    of = ["family", "variant", "split"]
    rows = rows.group_by(*of, "step").agg(
        pl.col("loss").mean(), n_checkpoints=pl.len(), sd=pl.col("loss").std()
    )
    rows = rows.sort(*of, "step")
    number, at = pl.len().over(of), pl.int_range(pl.len()).over(of)
    # the first, the last and points that lie evenly between them
    every = (number / _STEPS).ceil().cast(pl.Int64)
    rows = rows.filter((at % every == 0) | (at == number - 1))
    half = pl.col("sd") / pl.col("n_checkpoints").sqrt() * _quantile(rows["n_checkpoints"])
    return rows.with_columns(low=pl.col("loss") - half, high=pl.col("loss") + half).drop("sd")


def _quantile(counts: pl.Series) -> pl.Expr:
    """Student's t at 97.5% with as many degrees of freedom as these counts less one; NULL of one."""
    free = {n: Units(n - 1, n - 1).width() for n in counts.unique().to_list() if n > 1}
    return pl.col(counts.name).replace_strict(free, default=None, return_dtype=pl.Float64)


def _present(seeds: Mapping[str, str], variants: Sequence[str]) -> dict[str, str]:
    """The seeds of which some checkpoint is among these variants: a base has no training."""

    def matches(pattern: str) -> bool:
        return any(fnmatchcase(v, part.strip()) for part in pattern.split(",") for v in variants)

    return {name: pattern for name, pattern in seeds.items() if matches(pattern)}


def generations(con: Connection, documents: Arms, rollouts: pl.DataFrame, baseline: str) -> pl.DataFrame:
    """How losses and CE* move over generations of models that are trained on what models wrote.

    Parameters
    ----------
    documents : the arms of documents, each checkpoint by itself
    rollouts : values of ce_star, as `values_of` gives them

    Returns
    -------
    family; measure, what is measured and on what; lineage, the last generation's variant; generation;
    variant; value, ci_low, ci_high; unit. A generation of which several come is in the lineage of each
    """
    rows = con.sql("select distinct family, variant, model_id, generation, writer_id from collapse").pl()
    if rows.is_empty() or rows["generation"].n_unique() < 2:
        return pl.DataFrame()
    by_id = {row["model_id"]: row for row in rows.to_dicts()}
    last = set(by_id) - {row["writer_id"] for row in by_id.values()}
    chains = []
    for model_id in sorted(last):
        at, seen = by_id.get(model_id), set()
        while at is not None and at["model_id"] not in seen:
            seen.add(at["model_id"])
            own = {key: at[key] for key in ("family", "variant", "generation")}
            chains.append({**own, "lineage": by_id[model_id]["variant"]})
            at = by_id.get(at["writer_id"])
    metric = loss_metric(documents)
    losses = documents.values(baseline, metric)
    parts = [(losses, "loss on {}", unit_of_metric(metric)), (rollouts, "CE* on {}", "nats")]
    measured = [
        frame.select(
            "family",
            "variant",
            "value",
            "ci_low",
            "ci_high",
            measure=pl.format(name, "task"),
            unit=pl.lit(of),
        )
        for frame, name, of in parts
        if len(frame)
    ]
    if not measured:
        return pl.DataFrame()
    places = pl.DataFrame(chains)
    frame = places.join(pl.concat(measured), on=["family", "variant"], maintain_order="left")
    return frame.sort("family", "measure", "lineage", "generation")
