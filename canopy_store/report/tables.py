"""The report's tables: every measure, the checks of what was logged, every run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from canopy_store.analysis.regression.reliability import ENOUGH
from canopy_store.analysis.words import CUT
from canopy_store.report.facts import Facts
from canopy_store.sql.columns import column_of

_SHORT = pl.col(pl.Float64).round(7).round_sig_figs(6)
_METRICS = (
    "run_id",
    "family",
    "variant",
    "task",
    "n_prompts",
    "n_rollouts",
    "max_new_tokens",
    "ce_star",
    "truncation_rate",
    "mean_length",
    "entropy_rate",
    "rho_pearson",
    "rho_pooled",
    "semantic_diversity",
    "diversity_number",
    "vendi_score",
    "gen_ppl",
    "branching_factor",
    "canopy_size_log10",
    "rho_spearman",
    "rho_kendall",
    "cov_length_rate",
    "surprisal_mean",
    "rho_length_diversity_pearson",
    "embedder",
    "selection",
)
_LOGGING = (
    "run_id",
    "family",
    "variant",
    "task",
    "selection",
    "n_rollouts",
    "mean_excess",
    "sd",
    "z",
    "p",
    "ok",
)
_RUNS = (
    "run_id",
    "family",
    "variant",
    "task",
    "complete",
    "shards",
    "rollouts",
    "tokens",
    "bytes",
    "embedders",
)
_DOCS = {  # columns of canopy status, which are no columns of the store
    "complete": "Whether every planned rollout is stored.",
    "shards": "Parquet files of the run's rollouts.",
    "rollouts": "Rollouts stored.",
    "tokens": "Tokens stored.",
    "bytes": "Size of the run's rollouts.",
    "embedders": "Embedders, with the share done where not all is.",
    # and of reliability
    "n_prompts": "Prompts.",
    "n_samples": "Rollouts a prompt.",
    "var_error": "Mean squared standard error of the entropy rate of a prompt, (nats per token)².",
    "var_between": "Variance of the entropy rate over prompts, (nats per token)².",
    "reliability": "1 - var_error / var_between.",
    "rollouts_needed": "Rollouts a prompt that would make the rates reliable.",
}
_STUDY = {
    "option_accuracy": (
        "Accuracies",
        "Every accuracy",
        "One row per scorer, task and split of items. The right option is the one with the largest "
        "log-probability (sum), the largest mean over its tokens (token) or characters (char), or the "
        "largest gain over a neutral prompt (pmi).",
    ),
    "perplexity": (
        "Losses",
        "Every loss on documents",
        "One row per scorer, corpus and split. bits_per_byte compares checkpoints of other tokenizers.",
    ),
}
CORRECTS = "canopy regress --store … --errors moments"


def tables(facts: Facts) -> list[dict[str, Any]]:
    """One entry a table: id, title, a sentence, columns with their meaning, rows or why none."""
    of_study = [_of_study(name, frame) for name, frame in facts.study.tables.items()]
    return of_study if facts.runs.is_empty() else [*_of_rollouts(facts), *of_study]


def _of_study(name: str, frame: pl.DataFrame) -> dict[str, Any]:
    short, title, how = _STUDY[name]
    return _table(name, short, title, how, frame.sort(pl.all()))


def _of_rollouts(facts: Facts) -> list[dict[str, Any]]:
    keys = ["family", "task", "variant", "run_id"]
    return [
        _table(
            "reliability",
            "Reliability",
            "How reliable the prompts' entropy rates are",
            "The share of the spread of entropy rates between prompts that is not the chance of which "
            f"rollouts were sampled. Below {ENOUGH:g} a regression that takes the rates as exact draws "
            f"its slopes towards zero; {CORRECTS} corrects them. rollouts_needed, a prompt, would reach "
            f"{ENOUGH:g}.",
            facts.reliability,
            below={"reliability": ENOUGH},
            missing="No variant has two prompts with two rollouts each.",
        ),
        _table(
            "metrics",
            "Measures",
            "Every measure",
            "One row per run, embedder and selection, pooled over prompts. ce_star is the entropy of "
            "the first max_new_tokens tokens (of a selection other than all, a subset's mean and no "
            f"entropy); truncation_rate is marked where more than {CUT:.0%} were cut there.",
            facts.metrics.select(_METRICS).sort([*keys, "embedder", "selection"]),
            above={"truncation_rate": CUT},
            missing="No run is complete yet.",
        ),
        _table(
            "logging",
            "Logging",
            "Were entropies and samples logged from one distribution?",
            "If the entropies came from another distribution than the one that was sampled, z would "
            "not look standard normal; ok means p ≥ 5.7e-7, which is |z| ≤ 5 over many rollouts. Runs "
            "without log-probabilities are not listed.",
            _logging(facts.logging),
            missing="No complete run stores log-probabilities, which the check needs.",
        ),
        _table(
            "stopping",
            "Stopping",
            "Do rollouts end as often as their logged probabilities say?",
            "Of each rollout, 1 if it ended by itself less the sum of its ending probabilities: mean 0 "
            "where end tokens and eos_logprob are right. Wrong end tokens show here and nowhere else.",
            _logging(facts.stopping),
            missing="No complete run stores both eos_logprob and how its rollouts ended.",
        ),
        _table(
            "runs",
            "Runs",
            "Runs",
            "Every run that was started; one that is not complete is left out of all measures.",
            facts.runs.sort(keys).select(_RUNS),
        ),
    ]


def _logging(frame: pl.DataFrame) -> pl.DataFrame:
    if frame.is_empty():
        return pl.DataFrame(schema=list(_LOGGING))
    return frame.sort("family", "task", "variant", "selection").select(_LOGGING)


def _table(
    identity: str,
    short: str,
    title: str,
    how: str,
    frame: pl.DataFrame,
    *,
    above: Mapping[str, float] | None = None,
    below: Mapping[str, float] | None = None,
    missing: str = "",
) -> dict[str, Any]:
    """The table as the page takes it; cells ``above`` or ``below`` a column's limit are marked there."""
    limits = {"above": above or {}, "below": below or {}}
    columns = [
        {
            "name": name,
            "doc": _doc(identity, name),
            "number": kind.is_numeric(),
            **{side: of[name] for side, of in limits.items() if name in of},
        }
        for name, kind in frame.schema.items()
    ]
    rounded = frame.with_columns(_SHORT)
    return {
        "id": identity,
        "short": short,
        "title": title,
        "how": how,
        "columns": columns,
        "rows": [list(row) for row in rounded.iter_rows()],
        "missing": missing,
    }


def _doc(table: str, name: str) -> str:
    """What a column means, with its unit: as the store documents it, if it is a column of the store."""
    if table in ("runs", "reliability") and name in _DOCS:
        return _DOCS[name]
    relations = {"metrics": "model_metrics", "logging": "logging_check", "stopping": "stop_check"}
    relation = "runs" if name == "max_new_tokens" else relations.get(table, table)
    column = column_of(relation, name)
    return f"{column.doc} {column.unit}".strip()
