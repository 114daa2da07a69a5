"""Whether an uncertainty tells what is wrong: a column of a store against the grades of its rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from canopy_store import sql
from canopy_store.analysis.bootstrap import Array
from canopy_store.analysis.comparable import comparable, only, view_rows
from canopy_store.analysis.grades import one_grader
from canopy_store.errors import DataError, UsageError
from canopy_store.sql.columns import column_of

REPLICATES = 1000
BINS = 10
# How a column becomes a confidence, the chance to be right that it claims.
MAPS: dict[str, Callable[[Array], Array]] = {
    "complement": lambda u: 1 - u,  # an uncertainty from 0 to 1
    "exp": lambda u: np.exp(-u),  # nats: exp(-surprisal) is the probability of what was said
    "identity": lambda u: u,  # the column is a confidence: more is surer
}
_MEASURES = ("auroc", "brier", "ece", "prr")
# Of a rollout: columns of rollout_metrics, and these made of them.
_OF_ROLLOUTS = {
    "n_tokens": "m.n_tokens",
    "entropy_sum": "m.entropy_sum",
    "entropy_rate": "m.entropy_rate",
    "surprisal_sum": "m.surprisal_sum",
    "surprisal_rate": "m.surprisal_sum / m.n_tokens",
    "semantic_distance": "m.semantic_distance",
}


class Bins(NamedTuple):
    """Of each bin its rollouts, their mean confidence and the share of them that is right: (B,)."""

    n: Array
    confidence: Array
    accuracy: Array


def auroc(uncertainty: Array, correct: Array) -> float:
    """The chance that a wrong rollout is less certain than a right one, ties counted half.

    0.5 is no better than chance, 1 tells all wrong ones. NaN where all are right or all wrong.

    Parameters
    ----------
    uncertainty, correct : (n,); correct is 1 or 0
    """
    right = np.asarray(correct, bool)
    wrong = int((~right).sum())
    if not wrong or wrong == len(right):
        return np.nan
    _, place, counts = np.unique(uncertainty, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    ranks = (last - (counts - 1) / 2)[place]  # mid-ranks, from 1
    return float((ranks[~right].sum() - wrong * (wrong + 1) / 2) / (wrong * (len(right) - wrong)))


def brier(confidence: Array, correct: Array) -> float:
    """Mean of (confidence - correct)²: 0 is best, 0.25 is what a confidence of one half has."""
    return float(np.mean((np.asarray(confidence) - correct) ** 2))


def binned(confidence: Array, correct: Array, bins: int = BINS) -> Bins:
    """The rollouts in bins of equal width, (0, 1/B], …; 0 is in the first. NaN of an empty bin."""
    place = np.clip(np.ceil(np.asarray(confidence) * bins).astype(int) - 1, 0, bins - 1)
    n = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        return Bins(
            n,
            np.bincount(place, confidence, bins) / n,
            np.bincount(place, np.asarray(correct, float), bins) / n,
        )


def ece(confidence: Array, correct: Array, bins: int = BINS) -> float:
    """Expected calibration error: mean over rollouts of |accuracy - mean confidence| of their bin.

    Guo et al., "On Calibration of Modern Neural Networks" (2017), equation 3.
    """
    n, claimed, right = binned(confidence, correct, bins)
    return float(np.abs(np.where(n > 0, (right - claimed) * n, 0)).sum() / n.sum())


def prediction_rejection(uncertainty: Array, correct: Array) -> float:
    """PRR: what rejecting the least certain gains over rejecting by lot, as a share of the most.

    For r = 0 … n - 1 the r least certain rollouts are rejected, and the accuracy of the rest is averaged
    over r; of equally uncertain ones by lot, in expectation. The most is gained by an oracle, which
    rejects what is wrong first. 1 is as good as the oracle, 0 as a lot, below 0 worse. NaN where all are
    right or all wrong. Malinin and Gales, arXiv 2002.07650, section on rejection.
    """
    right = np.asarray(correct, float)
    mean = right.mean()
    if mean in (0, 1):
        return np.nan
    oracle = _retained(1 - right, right)
    return float((_retained(np.asarray(uncertainty), right) - mean) / (oracle - mean))


def _retained(uncertainty: Array, right: Array) -> float:
    """The mean over numbers kept, 1 … n, of the accuracy of so many of the most certain."""
    _, place = np.unique(uncertainty, return_inverse=True)
    of_ties = (np.bincount(place, right) / np.bincount(place))[place]  # what each of equals is worth
    kept = of_ties[np.argsort(place, kind="stable")].cumsum()
    return float((kept / np.arange(1, len(right) + 1)).mean())


def calibrate(
    root: str | Path,
    column: str,
    *,
    grader: str | None = None,
    map: str | None = None,
    bins: int = BINS,
    selection: str = "all",
    embedder: str | None = None,
    runs: Sequence[str] = (),
    families: Sequence[str] = (),
    tasks: Sequence[str] = (),
    variants: Sequence[str] = (),
    replicates: int = REPLICATES,
    confidence: float = 0.95,
    seed: int = 42,
) -> pl.DataFrame:
    """One row per run: how well a column tells right rollouts from wrong ones, and claims how many are.

    Each graded rollout counts once, with its own value or, where the column is of a prompt, with its
    prompt's. Intervals are percentiles of a bootstrap over prompts, with all their rollouts.

    Parameters
    ----------
    root : path of the store
    column : of a rollout: n_tokens, entropy_sum, entropy_rate, surprisal_sum, surprisal_rate (per
        token), semantic_distance; or, with ``prompt.`` before it or where no rollout has it, a number
        of prompt_metrics: ce_star, …. More is less certain, but with the map identity
    grader : whose grades; needed where the store has several
    map : how the column becomes a confidence for Brier and ECE: complement (1 - u), exp (exp(-u), for
        nats) or identity (the column is a confidence itself). By default complement of a column without
        unit whose values are all between 0 and 1, else none, and both are NULL
    bins : of ECE, of equal width
    selection, embedder, runs, families, tasks, variants : only these
    replicates, confidence, seed : of the bootstrap

    Returns
    -------
    family, task, variant, run_id, column, grader, map; n_prompts, n_rollouts (graded, with a value),
    n_left_out (graded, without one); accuracy; auroc, brier, ece and prr, each with ``_ci_low`` and
    ``_ci_high``; NULL where they are not defined, and reason says why.

    Raises
    ------
    DataError
        No grades, no such grader, selection, run, …; a column without values, or values outside of 0 to
        1 after the map.
    UsageError
        An unknown column or map, several graders or embedders and none named.
    """
    rows, map = _values(
        root,
        column,
        grader,
        map,
        bins,
        selection=selection,
        embedder=embedder,
        runs=runs,
        families=families,
        tasks=tasks,
        variants=variants,
    )
    if replicates < 2:
        raise UsageError(f"--replicates {replicates}: needs at least 2")
    if not 0 < confidence < 1:
        raise UsageError(f"--confidence {confidence}: needs more than 0 and less than 1")
    out = []
    for (family, task, variant, run_id), group in rows.group_by(
        ["family", "task", "variant", "run_id"], maintain_order=True
    ):
        known = group.filter(pl.col("value").is_not_null())
        row = {"family": family, "task": task, "variant": variant, "run_id": run_id, "column": column}
        row |= {"grader": group["grader"][0], "map": map, "n_prompts": known["prompt_id"].n_unique()}
        row |= {"n_rollouts": len(known), "n_left_out": len(group) - len(known)}
        out.append({**row, **_measured(known, map, bins, replicates, confidence, seed)})
    ends = [f"{name}{end}" for name in _MEASURES for end in ("", "_ci_low", "_ci_high")]
    kinds = {"map": pl.String, "accuracy": pl.Float64, **dict.fromkeys(ends, pl.Float64)}
    frame = pl.DataFrame(out, schema_overrides={**kinds, "reason": pl.String}, infer_schema_length=None)
    return frame.with_columns(pl.col(pl.Float64).fill_nan(None))


def reliability_bins(
    root: str | Path,
    column: str,
    *,
    grader: str | None = None,
    map: str | None = None,
    bins: int = BINS,
    **chosen: Any,
) -> pl.DataFrame:
    """One row per run and bin of `calibrate`, with its n, mean confidence and accuracy.

    family, task, variant, run_id, bin, low, high, n, confidence, accuracy; the last two NULL of an empty
    bin. Parameters and errors are those of `calibrate`.
    """
    rows, map = _values(root, column, grader, map, bins, **chosen)
    if map is None:
        raise UsageError(f"{column}: no confidence from 0 to 1; say how it becomes one with --map")
    parts = []
    keys = ["family", "task", "variant", "run_id"]
    for place, group in rows.drop_nulls("value").group_by(keys, maintain_order=True):
        found = binned(MAPS[map](group["value"].to_numpy()), group["correct"].to_numpy(), bins)
        at = np.arange(bins)
        parts.append(
            pl.DataFrame({"bin": at + 1, "low": at / bins, "high": (at + 1) / bins, **found._asdict()})
            .with_columns(pl.lit(value).alias(key) for key, value in zip(keys, place, strict=True))
            .with_columns(pl.col(pl.Float64).fill_nan(None))
        )
    return pl.concat(parts).select(*keys, pl.exclude(keys))


def _measured(
    rows: pl.DataFrame, map: str | None, bins: int, replicates: int, confidence: float, seed: int
) -> dict[str, Any]:
    """The measures of one run's rollouts, with their intervals."""
    if rows.is_empty():
        return {"reason": "no graded rollout has a value"}
    value, right = rows["value"].to_numpy(), rows["correct"].to_numpy().astype(float)
    claimed = None if map is None else MAPS[map](value)
    # rounded as in the views, so that the last bits of a sum part no equals
    unsure = np.round(-value if map == "identity" else value, 12)

    def measures(at: Array) -> list[float]:
        own = [np.nan, np.nan]
        if claimed is not None:
            own = [brier(claimed[at], right[at]), ece(claimed[at], right[at], bins)]
        return [auroc(unsure[at], right[at]), *own, prediction_rejection(unsure[at], right[at])]

    prompts = rows["prompt_id"].rank("dense").to_numpy().astype(int) - 1
    members = [np.flatnonzero(prompts == p) for p in range(prompts.max() + 1)]
    points = measures(np.arange(len(value)))
    drawn = np.full((replicates, len(points)), np.nan)
    if len(members) > 1:
        rng = np.random.default_rng(seed)
        for b in range(replicates):
            picked = rng.integers(0, len(members), len(members))
            drawn[b] = measures(np.concatenate([members[p] for p in picked]))
    tail = 50 * (1 - confidence)
    out: dict[str, Any] = {"accuracy": float(right.mean())}
    for name, point, replicate in zip(_MEASURES, points, drawn.T, strict=True):
        known = replicate[np.isfinite(replicate)]
        ends = (
            np.percentile(known, [tail, 100 - tail]) if len(known) > 0.9 * replicates else [np.nan] * 2
        )
        out |= {name: point, f"{name}_ci_low": float(ends[0]), f"{name}_ci_high": float(ends[1])}
    reasons = []
    if right.mean() in (0, 1):
        reasons.append(f"all rollouts are {'right' if right.mean() else 'wrong'}")
    if map is None:
        reasons.append("not between 0 and 1: --map says how it becomes a confidence")
    return {**out, "reason": "; ".join(reasons) or None}


def _values(
    root: str | Path,
    column: str,
    grader: str | None,
    map: str | None,
    bins: int,
    *,
    selection: str = "all",
    embedder: str | None = None,
    runs: Sequence[str] = (),
    families: Sequence[str] = (),
    tasks: Sequence[str] = (),
    variants: Sequence[str] = (),
) -> tuple[pl.DataFrame, str | None]:
    """A row a graded rollout: its run and prompt, whether it is correct, the column's value; the map."""
    if map is not None and map not in MAPS:
        raise UsageError(f"--map {map}: one of {', '.join(MAPS)}")
    if bins < 1:
        raise UsageError(f"--bins {bins}: needs 1 or more")
    with sql.connect(root) as con:
        prompts, embedder = comparable(
            view_rows(con, "prompt_metrics"), root, selection=selection, embedder=embedder, runs=runs
        )
        prompts = only(
            prompts, families=families, tasks=tasks, variants=variants, baseline=next(iter(variants), "")
        )
        grader = one_grader(con, column, grader)
        name = column.removeprefix("prompt.")
        of_prompt = name != column or name not in _OF_ROLLOUTS
        numbers = [c for c, kind in prompts.schema.items() if kind.is_numeric()]
        if of_prompt and name not in numbers:
            of_rollouts = ", ".join(_OF_ROLLOUTS)
            raise UsageError(
                f"--column {column}: of a rollout {of_rollouts}; of a prompt {', '.join(numbers)}"
            )
        chosen = prompts.select("family", "task", "variant", "run_id", "prompt_id", "embedder")
        value = "null" if of_prompt else _OF_ROLLOUTS[name]
        rows = con.sql(
            f"select g.run_id, g.prompt_id, g.sample, g.correct, m.embedder, ({value})::double as value "
            "from grades g join rollout_metrics m using (run_id, prompt_id, sample) "
            "where g.grader = $grader and g.correct is not null and m.selection = $selection",
            params={"grader": grader, "selection": selection},
        ).pl()
    keys = ["run_id", "prompt_id", "embedder"]
    rows = rows.join(chosen, on=keys).with_columns(grader=pl.lit(grader))
    if of_prompt:
        own = prompts.select(*keys, pl.col(name).cast(pl.Float64).alias("value"))
        rows = rows.drop("value").join(own, on=keys)
    rows = rows.sort("family", "task", "variant", "prompt_id", "sample")
    values = rows["value"].drop_nulls().to_numpy()
    if not len(values):
        raise DataError(f"--column {column}: no rollout that {grader} has graded has a value of it")
    if map is None:
        unit = _unit(name, of_prompt)
        share = not unit and bool(((values >= 0) & (values <= 1)).all())
        return rows, "complement" if share else None
    claimed = MAPS[map](values)
    if not ((claimed >= 0) & (claimed <= 1)).all():
        worst = values[np.argmax(np.abs(claimed - 0.5))]
        raise DataError(
            f"--map {map}: {column} is {worst:.6g} somewhere, which is then no confidence from 0 to 1"
        )
    return rows, map


def _unit(name: str, of_prompt: bool) -> str:
    if name == "surprisal_rate":
        return "nats per token"
    return column_of("prompt_metrics" if of_prompt else "rollout_metrics", name).unit
