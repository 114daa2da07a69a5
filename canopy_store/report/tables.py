"""The report's tables: every measure, the checks of what was logged, every run."""

from __future__ import annotations

from typing import Any

import polars as pl

from canopy_store.report.facts import Facts
from canopy_store.sql.columns import column_of

_SHORT = pl.col(pl.Float64).round(7).round_sig_figs(6)
_METRICS = (
    "family",
    "variant",
    "task",
    "n_prompts",
    "n_rollouts",
    "ce_star",
    "mean_length",
    "entropy_rate",
    "rho_pearson",
    "semantic_diversity",
    "vendi_score",
    "gen_ppl",
    "branching_factor",
    "canopy_size_log10",
    "rho_spearman",
    "rho_kendall",
    "cov_length_rate",
    "truncation_rate",
    "surprisal_mean",
    "rho_length_diversity_pearson",
    "embedder",
    "selection",
    "run_id",
)
_LOGGING = (
    "family",
    "variant",
    "task",
    "selection",
    "n_rollouts",
    "mean_excess",
    "sd",
    "z",
    "ok",
    "run_id",
)
_RUNS = (
    "family",
    "variant",
    "task",
    "complete",
    "shards",
    "rollouts",
    "tokens",
    "bytes",
    "embedders",
    "run_id",
)
_DOCS = {  # columns of canopy status, which are no columns of the store
    "complete": "Whether every planned rollout is stored.",
    "shards": "Parquet files of the run's rollouts.",
    "rollouts": "Rollouts stored.",
    "tokens": "Tokens stored.",
    "bytes": "Size of the run's rollouts.",
    "embedders": "Embedders, with the share done where not all is.",
}


def tables(facts: Facts) -> list[dict[str, Any]]:
    """One entry a table: id, title, a sentence, columns with their meaning, rows."""
    keys = ["family", "task", "variant", "run_id"]
    return [
        _table(
            "metrics",
            "Measures",
            "Every measure",
            "One row per run, embedder and selection, pooled over prompts.",
            "model_metrics",
            facts.metrics.select(_METRICS).sort([*keys, "embedder", "selection"]),
        ),
        _table(
            "logging",
            "Logging",
            "Were entropies and samples logged from one distribution?",
            "If the entropies came from another distribution than the one that was sampled, z would "
            "not look standard normal; ok means |z| ≤ 5. Runs without log-probabilities are not listed.",
            "logging_check",
            _logging(facts),
        ),
        _table(
            "runs",
            "Runs",
            "Runs",
            "Every run that was started; one that is not complete is left out of all measures.",
            "runs",
            facts.runs.sort(keys).select(_RUNS),
        ),
    ]


def _logging(facts: Facts) -> pl.DataFrame:
    if facts.logging.is_empty():
        return pl.DataFrame(schema=list(_LOGGING))
    return facts.logging.sort("family", "task", "variant", "selection").select(_LOGGING)


def _table(
    identity: str, short: str, title: str, how: str, relation: str, frame: pl.DataFrame
) -> dict[str, Any]:
    columns = []
    for name, kind in frame.schema.items():
        if name in _DOCS:
            doc = _DOCS[name]
        else:
            column = column_of(relation, name)
            doc = f"{column.doc} {column.unit}".strip()
        columns.append({"name": name, "doc": doc, "number": kind.is_numeric()})
    rounded = frame.with_columns(_SHORT)
    return {
        "id": identity,
        "short": short,
        "title": title,
        "how": how,
        "columns": columns,
        "rows": [list(row) for row in rounded.iter_rows()],
    }
