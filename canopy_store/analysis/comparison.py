"""Controlled comparisons: each variant of a family against its baseline, prompt by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from canopy_store import sql
from canopy_store.analysis import bootstrap
from canopy_store.analysis.bootstrap import MEASURES, ROLLOUT_LEVEL, Array, Rollouts
from canopy_store.analysis.comparable import comparable, view_rows
from canopy_store.analysis.control_variate import with_estimates
from canopy_store.analysis.pairing import (
    LEVELS,
    drawing,
    evaluate,
    grouped,
    paired_cells,
    single_cells,
    without_repeats,
)
from canopy_store.errors import UsageError

REPLICATES = 2000
CONFIDENCE = 0.95
SEED = 42
DEFAULT_METRICS = (
    "ce_star",
    "entropy_rate",
    "mean_length",
    "branching_factor",
    "rho_pearson",
    "rho_spearman",
    "rho_kendall",
    "semantic_diversity",
    "vendi_score",
    "truncation_rate",
)
_PARTS = ("baseline", "treated", "delta", "percent_delta")


def compare(
    root: str | Path,
    *,
    baseline: str = "base",
    metrics: Sequence[str] = (),
    by: str | None = None,
    selection: str = "all",
    embedder: str | None = None,
    runs: Sequence[str] = (),
    resample: str = "prompts",
    replicates: int = REPLICATES,
    confidence: float = CONFIDENCE,
    margins: Mapping[str, float | str] | None = None,
    seed: int = SEED,
) -> pl.DataFrame:
    """One row per family, task, variant and metric: baseline, treated, delta and percent delta.

    Each with its standard error and percentile interval from the paired bootstrap: prompts are drawn
    with replacement, the same draw for both variants, with all their rollouts. Task ``(all)`` pools
    over tasks, drawing within each; family ``(all)`` over families too, which share the draw of a
    prompt. A prompt that one variant lacks, or of which one has no value of the metric (ρ where every
    rollout was cut at the same length), is left out for both and counted in ``n_left_out``.

    Parameters
    ----------
    root : path of the store
    baseline : the variant every other is compared with, within its family
    metrics : columns of model_metrics; by default the main ones the store has
    by : 'task' (each family and task), 'family' (pooled over tasks), 'all'; by default all three
    selection : the subset of rollouts compared
    embedder : needed where the store has several
    runs : only these runs
    resample : what is drawn. 'prompts'; 'both': rollouts within each drawn prompt too, for designs
        with few prompts (their noise then counts twice: conservative); 'rollouts': within the prompts
        there are, for statements about these prompts alone
    replicates : bootstrap replicates, B
    confidence : of the intervals
    margins : per metric the largest |delta| that counts as none, in its unit or as '5%' of the
        baseline; adds a test of equivalence (two one-sided tests)
    seed : of the bootstrap

    Returns
    -------
    ``p`` is of delta = 0 by Student's t. Its degrees of freedom are the prompts less one a task (the
    rollouts less two a prompt, where prompts are fixed), and its standard error is the bootstrap's,
    made unbiased: times sqrt(n / degrees of freedom). ``p_holm`` and ``p_bh`` are adjusted over all
    rows of the frame.

    Raises
    ------
    DataError
        No such baseline, no other variant, no prompt in common, several runs of one model and task.
    UsageError
        An unknown metric, or several embedders and none named.
    """
    _check(by, resample, replicates, confidence)
    with sql.connect(root) as con:
        prompts, embedder = comparable(
            view_rows(con, "prompt_metrics"), root, selection=selection, embedder=embedder, runs=runs
        )
        prompts = with_estimates(con, prompts, metrics)
        models = view_rows(con, "models")
        kernels = _rollouts(con, prompts, selection, embedder) if resample != "prompts" else {}
    return compare_prompts(
        prompts,
        models,
        baseline=baseline,
        metrics=metrics,
        by=by,
        resample=resample,
        replicates=replicates,
        confidence=confidence,
        margins=margins,
        seed=seed,
        kernels=kernels,
    )


def compare_prompts(
    prompts: pl.DataFrame,
    models: pl.DataFrame,
    *,
    baseline: str = "base",
    metrics: Sequence[str] = (),
    by: str | None = None,
    resample: str = "prompts",
    replicates: int = REPLICATES,
    confidence: float = CONFIDENCE,
    margins: Mapping[str, float | str] | None = None,
    seed: int = SEED,
    kernels: Mapping[tuple[str, str], Rollouts] | None = None,
) -> pl.DataFrame:
    """What `compare` returns, from rows that are read already.

    Parameters
    ----------
    prompts : rows of ``prompt_metrics``, as `comparable` gives them
    models : rows of ``models``, for the treatments
    kernels : rollouts by run and prompt, needed unless ``resample`` is 'prompts'

    The others, and errors, are those of `compare`.
    """
    names = _metrics(metrics, prompts, resample)
    margins = dict(margins or {})
    for name in margins:
        if name not in names:
            raise UsageError(f"--margin {name}: not among what is compared: {', '.join(names)}")
    cells, left_out = paired_cells(prompts, baseline, names)
    treatments = {(row["family"], row["variant"]): row["treatment"] for row in models.to_dicts()}
    selection = prompts["selection"][0]
    draw = drawing(replicates, resample)
    out = []
    for level in LEVELS if by is None else (by,):
        for (family, variant, task), group in grouped(cells, level).items():
            values, replicate_values, used = evaluate(
                group, names, draw, replicates, seed, kernels or {}
            )
            sides = [side for cell in group.values() for side in cell]
            rollouts = sum(side.n_rollouts for side in sides)
            samples = round(rollouts / sum(len(side.prompts) for side in sides))
            for k, name in enumerate(names):
                units, tasks = int(used[:, k].sum()), int((used[:, k] > 0).sum())
                counted = {
                    "n_prompts": units,
                    "n_samples": samples,
                    "n_left_out": sum(left_out[key][k] for key in group),
                }
                fixed = resample == "rollouts"
                drawn_from = 2 * units * samples if fixed else units
                freedom = 2 * units * (samples - 1) if fixed else units - tasks
                summary = _summary(name, values[:, k], replicate_values[..., k], confidence)
                out.append(
                    {
                        "level": level,
                        "family": family,
                        "task": task,
                        "baseline_variant": baseline,
                        "variant": variant,
                        "treatment": treatments.get((family, variant)),
                        "selection": selection,
                        "metric": name,
                        **counted,
                        **summary,
                        **_tests(summary, drawn_from, freedom, margins.get(name)),
                    }
                )
    return _adjusted(without_repeats(pl.DataFrame(out, infer_schema_length=None)))


def estimate(
    prompts: pl.DataFrame,
    *,
    metrics: Sequence[str] = (),
    by: str | None = None,
    replicates: int = REPLICATES,
    confidence: float = CONFIDENCE,
    seed: int = SEED,
) -> pl.DataFrame:
    """One row per family, task, variant and metric: value, se and interval of each model by itself.

    Pooled and drawn as `compare` pools and draws, over all the prompts of the model: where two variants
    have the same prompts, these are the numbers of its columns baseline and treated.

    Parameters
    ----------
    prompts : rows of ``prompt_metrics``, as `comparable` gives them

    The others are those of `compare`.
    """
    _check(by, "prompts", replicates, confidence)
    names = _metrics(metrics, prompts, "prompts")
    cells, draw = single_cells(prompts, names), drawing(replicates)
    out = []
    for level in LEVELS if by is None else (by,):
        for (family, variant, task), group in grouped(cells, level).items():
            values, drawn, used = evaluate(group, names, draw, replicates, seed, {})
            for k, name in enumerate(names):
                where = {"level": level, "family": family, "task": task, "variant": variant}
                spread = _spread("value", values[0, k], drawn[0, :, k], confidence)
                out.append({**where, "metric": name, "n_prompts": int(used[:, k].sum()), **spread})
    return without_repeats(pl.DataFrame(out, infer_schema_length=None))


def _check(by: str | None, resample: str, replicates: int, confidence: float) -> None:
    if by is not None and by not in LEVELS:
        raise UsageError(f"--by {by}: one of {', '.join(LEVELS)}")
    if resample not in ("prompts", "both", "rollouts"):
        raise UsageError(f"--resample {resample}: prompts, both or rollouts")
    if replicates < 2:
        raise UsageError(f"--replicates {replicates}: needs at least 2")
    if not 0 < confidence < 1:
        raise UsageError(f"--confidence {confidence}: needs more than 0 and less than 1")


def _rollouts(
    con: sql.Connection, prompts: pl.DataFrame, selection: str, embedder: str
) -> dict[tuple[str, str], Rollouts]:
    """The rollouts of each run and prompt, with kernels where the run has embeddings by the embedder."""
    runs = prompts.select("run_id", "embedder").unique().sort("run_id")
    frame = con.sql(
        "with chosen as (select unnest($runs) as run_id, unnest($embedders) as embedder) "
        "select m.run_id, m.prompt_id, m.n_tokens, m.entropy_sum, m.surprisal_sum, m.entropy_rate, "
        "(m.finish_reason = 'length')::double as cut, e.embedding "
        "from rollout_metrics m join chosen using (run_id, embedder) "
        "left join embeddings e on e.run_id = m.run_id and e.prompt_id = m.prompt_id "
        "and e.sample = m.sample and e.embedder = m.embedder and e.embedder = $embedder "
        "where m.selection = $selection order by m.sample",
        params={
            "runs": runs["run_id"].to_list(),
            "embedders": runs["embedder"].to_list(),
            "embedder": embedder,
            "selection": selection,
        },
    ).pl()
    rollouts = {}
    for (run_id, prompt_id), group in frame.group_by(["run_id", "prompt_id"], maintain_order=True):
        columns = bootstrap.columns_of(group)
        kernel = None
        if not group["embedding"].null_count():
            unit = np.array(group["embedding"].to_list(), np.float64)
            unit /= np.linalg.norm(unit, axis=1, keepdims=True)
            kernel = unit @ unit.T
        rollouts[str(run_id), str(prompt_id)] = Rollouts(
            **{
                k: columns[k]
                for k in ("n_tokens", "entropy_sum", "surprisal_sum", "entropy_rate", "cut")
            },
            kernel=kernel,
        )
    return rollouts


def _metrics(metrics: Sequence[str], rows: pl.DataFrame, resample: str) -> list[str]:
    for name in metrics:
        if name not in MEASURES:
            raise UsageError(f"--metric {name}: one of {', '.join(MEASURES)}")
    names = list(dict.fromkeys(metrics))
    if not names:
        known = {name for name in rows.columns if rows[name].null_count() < len(rows)}
        names = [name for name in DEFAULT_METRICS if name in known]
    if resample != "prompts":
        cannot = [name for name in names if name not in ROLLOUT_LEVEL]
        if cannot and metrics:
            raise UsageError(f"--resample {resample}: not for {', '.join(cannot)}")
        names = [name for name in names if name in ROLLOUT_LEVEL]
    return names


def _summary(name: str, values: Array, replicates: Array, confidence: float) -> dict[str, float | None]:
    """Value, se and interval of baseline, treated, delta and percent delta; None where undefined."""

    def four(base: Array, treated: Array) -> list[Array]:
        with np.errstate(invalid="ignore", divide="ignore"):
            return [base, treated, treated - base, 100 * (treated - base) / base]

    row: dict[str, float | None] = {}
    for part, value, drawn in zip(_PARTS, four(*values), four(*replicates), strict=True):
        if part == "percent_delta" and not MEASURES[name].positive:
            value = np.asarray(np.nan)
        row |= _spread(part, value, drawn, confidence)
    return row


def _spread(part: str, value: Array, drawn: Array, confidence: float) -> dict[str, float | None]:
    """A value, the se of its replicates (B,) and their percentile interval, as columns of ``part``."""
    tail = 50 * (1 - confidence)
    known = drawn[np.isfinite(drawn)]
    low = high = se = np.nan
    # a spread over the few replicates that happen to be defined would be a wrong one
    if np.isfinite(value) and len(known) >= 0.9 * len(drawn):
        low, high = np.percentile(known, [tail, 100 - tail])
        se = known.std(ddof=1)
    columns = (("", value), ("_se", se), ("_ci_low", low), ("_ci_high", high))
    return {part + suffix: float(x) if np.isfinite(x) else None for suffix, x in columns}


def _tests(
    summary: Mapping[str, float | None], n: int, freedom: int, margin: float | str | None
) -> dict[str, float | bool | None]:
    """p of no difference, and of a difference beyond the margin."""
    from scipy import stats  # slow to import

    delta, se = summary["delta"], summary["delta_se"]
    tests: dict[str, float | bool | None] = {"p": None, "margin": None, "p_equivalence": None}
    known = delta is not None and se is not None and freedom > 0

    def tail(excess: float) -> float:
        """One-sided p of an excess over the null."""
        if se == 0:
            return 0.0 if excess > 0 else 1.0
        unbiased = se * (n / freedom) ** 0.5  # type: ignore[operator]
        return float(stats.t.sf(excess / unbiased, freedom))

    if known:
        tests["p"] = min(1.0, 2 * tail(abs(delta)))  # type: ignore[arg-type]
    if margin is not None:
        size = _margin(margin, summary["baseline"])
        tests["margin"] = size
        if known and size is not None:
            tests["p_equivalence"] = tail(size - abs(delta))  # type: ignore[arg-type]
    return tests


def _margin(margin: float | str, baseline: float | None) -> float | None:
    text = str(margin)
    try:
        if text.endswith("%"):
            return None if baseline is None else abs(float(text[:-1]) / 100 * baseline)
        return float(text)
    except ValueError:
        raise UsageError(f"--margin {margin}: needs a number, or a percentage like 5%") from None


def _adjusted(frame: pl.DataFrame) -> pl.DataFrame:
    """Adds p_holm and p_bh over every p there is, and ``equivalent`` at 0.05."""
    from statsmodels.stats.multitest import multipletests

    known = frame["p"].is_not_null()
    p = frame["p"].cast(pl.Float64).to_numpy().copy()
    for name, method in (("p_holm", "holm"), ("p_bh", "fdr_bh")):
        adjusted = np.full(len(frame), np.nan)
        if known.any():
            adjusted[known.to_numpy()] = multipletests(p[known.to_numpy()], method=method)[1]
        frame = frame.with_columns(pl.Series(name, adjusted).fill_nan(None))
    return frame.with_columns(
        pl.col("margin").cast(pl.Float64), pl.col("p_equivalence").cast(pl.Float64)
    ).with_columns((pl.col("p_equivalence") < 0.05).alias("equivalent"))
