"""Controlled comparisons: each variant of a family against its baseline, prompt by prompt."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from canopy_store import sql
from canopy_store.analysis import bootstrap
from canopy_store.analysis.bootstrap import MEASURES, ROLLOUT_LEVEL, Array
from canopy_store.analysis.selections import only_runs, require_one_run
from canopy_store.errors import DataError, UsageError

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
LEVELS = ("task", "family", "all")
POOLED = "(all)"
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
    replicates: int = 2000,
    confidence: float = 0.95,
    margins: Mapping[str, float | str] | None = None,
    seed: int = 42,
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
    rows, treatments, kernels = _read(root, selection, embedder, runs, resample != "prompts")
    names = _metrics(metrics, rows, resample)
    margins = dict(margins or {})
    for name in margins:
        if name not in names:
            raise UsageError(f"--margin {name}: not among what is compared: {', '.join(names)}")
    cells, left_out = _cells(rows, baseline, names)

    @functools.cache
    def draw(prompts: int, key: Any) -> tuple[Array, Array]:
        drawn = np.tile(np.arange(prompts), (replicates, 1))
        if resample != "rollouts":
            drawn = bootstrap.draw_prompts(prompts, replicates, key)
        return drawn, bootstrap.counts_of(drawn)

    out = []
    for level in LEVELS if by is None else (by,):
        for (family, variant, task), group in _grouped(cells, level).items():
            values, replicate_values, used = _evaluate(group, names, draw, replicates, seed, kernels)
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
    return _adjusted(_without_repeats(pl.DataFrame(out, infer_schema_length=None)))


@dataclass(frozen=True)
class Side:
    """One variant's prompts of a cell, in order, and their sums (2, P, K): w f(x), then w."""

    run_id: str
    prompts: list[str]
    n_rollouts: int
    sums: Array


Cells = dict[tuple[str, str, str], tuple[Side, Side]]  # (family, variant, task): baseline, treated


def _check(by: str | None, resample: str, replicates: int, confidence: float) -> None:
    if by is not None and by not in LEVELS:
        raise UsageError(f"--by {by}: one of {', '.join(LEVELS)}")
    if resample not in ("prompts", "both", "rollouts"):
        raise UsageError(f"--resample {resample}: prompts, both or rollouts")
    if replicates < 2:
        raise UsageError(f"--replicates {replicates}: needs at least 2")
    if not 0 < confidence < 1:
        raise UsageError(f"--confidence {confidence}: needs more than 0 and less than 1")


def _read(
    root: str | Path, selection: str, embedder: str | None, runs: Sequence[str], rollouts: bool
) -> tuple[pl.DataFrame, dict[tuple[str, str], str], dict[tuple[str, str], bootstrap.Rollouts]]:
    """prompt_metrics of the selection, treatments, and for the second level each prompt's rollouts."""
    with sql.connect(root) as con:
        rows, embedder = _chosen(con, "prompt_metrics", root, selection, embedder, runs)
        treatments = {
            (family, variant): treatment
            for family, variant, treatment in con.sql(
                "select family, variant, treatment from models"
            ).fetchall()
        }
        kernels = _rollouts(con, rows, selection, embedder) if rollouts else {}
    return rows, treatments, kernels


def store_panel(
    root: str | Path, *, selection: str = "all", embedder: str | None = None, runs: Sequence[str] = ()
) -> pl.DataFrame:
    """The view ``panel`` of one selection and one embedder, one run a family, variant and task.

    Raises
    ------
    DataError, UsageError
        An empty store, a selection or embedder that is not there, several and none named.
    """
    with sql.connect(root) as con:
        return _chosen(con, "panel", root, selection, embedder, runs)[0]


def _chosen(
    con: sql.Connection,
    view: str,
    root: str | Path,
    selection: str,
    embedder: str | None,
    runs: Sequence[str],
) -> tuple[pl.DataFrame, str]:
    """A view's rows of one selection and embedder, one run a model and task; and the embedder."""
    every = con.sql(f"from {view}").pl()
    if every.is_empty():
        raise DataError(f"{root}: no complete run; see: canopy status --store {root}")
    if selection not in every["selection"]:
        found = ", ".join(sorted(every["selection"].unique()))
        raise DataError(f"--selection {selection}: not in the store; it has {found}")
    embedder = _one_embedder(every["embedder"], embedder)
    rows = only_runs(every.filter(selection=selection, embedder=embedder), runs)
    require_one_run(rows)
    return rows, embedder


def _one_embedder(found: pl.Series, wanted: str | None) -> str:
    """The embedder to use: the one wanted, or the only one there."""
    names = sorted(found.unique())
    if wanted is not None and wanted not in names:
        raise DataError(f"--embedder {wanted}: not in the store; it has {', '.join(names)}")
    real = [name for name in names if name != "none"]
    if wanted is None and len(real) > 1:
        raise UsageError(f"--embedder: the store has several: {', '.join(real)}")
    return wanted or (real or names)[0]


def _rollouts(
    con: sql.Connection, rows: pl.DataFrame, selection: str, embedder: str
) -> dict[tuple[str, str], bootstrap.Rollouts]:
    frame = con.sql(
        "select m.run_id, m.prompt_id, m.n_tokens, m.entropy_sum, m.surprisal_sum, m.entropy_rate, "
        "(m.finish_reason = 'length')::double as cut, e.embedding from rollout_metrics m "
        "left join embeddings e using (run_id, prompt_id, sample, embedder) "
        "where m.selection = ? and m.embedder = ? order by m.sample",
        params=[selection, embedder],
    ).pl()
    frame = frame.filter(pl.col("run_id").is_in(rows["run_id"].unique().to_list()))
    found = {}
    for (run_id, prompt_id), group in frame.group_by(["run_id", "prompt_id"], maintain_order=True):
        columns = bootstrap.columns_of(group)
        kernel = None
        if not group["embedding"].null_count():
            unit = np.array(group["embedding"].to_list(), np.float64)
            unit /= np.linalg.norm(unit, axis=1, keepdims=True)
            kernel = unit @ unit.T
        found[str(run_id), str(prompt_id)] = bootstrap.Rollouts(
            **{
                k: columns[k]
                for k in ("n_tokens", "entropy_sum", "surprisal_sum", "entropy_rate", "cut")
            },
            kernel=kernel,
        )
    return found


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


def _cells(
    rows: pl.DataFrame, baseline: str, names: list[str]
) -> tuple[Cells, dict[tuple[str, str, str], Array]]:
    """Per (family, variant, task): the prompts both variants have, and how many are left out (K,)."""
    variants = sorted(rows["variant"].unique())
    if baseline not in variants:
        raise DataError(f"--baseline {baseline}: no such variant; the store has {', '.join(variants)}")
    if len(variants) == 1:
        raise DataError(f"{baseline} is the only variant: there is nothing to compare it with")
    # prompts numbered by an importer keep the order of their numbers
    rows = rows.sort(pl.col("prompt_id").str.len_chars(), "prompt_id")
    sums = np.stack(bootstrap.weighted_values(bootstrap.columns_of(rows), names))  # (2, rows, K)
    sampled = rows["n_rollouts"].to_numpy()
    parts: dict[tuple[str, str, str], dict[str, int]] = {}
    for at, (*key, prompt) in enumerate(
        rows.select("family", "variant", "task", "prompt_id").iter_rows()
    ):
        parts.setdefault((key[0], key[1], key[2]), {})[prompt] = at
    run_ids = rows["run_id"].to_list()

    def sides(base: dict[str, int], treated: dict[str, int], common: list[str]) -> tuple[Side, Side]:
        places = [[part[prompt] for prompt in common] for part in (base, treated)]
        known = (sums[1, places[0]] > 0) & (sums[1, places[1]] > 0)  # (P, K)
        first, second = (
            Side(run_ids[at[0]], common, int(sampled[at].sum()), sums[:, at] * known) for at in places
        )
        return first, second

    cells: Cells = {}
    left_out = {}
    for family, variant, task in sorted(parts):
        base = parts.get((family, baseline, task))
        if variant == baseline or base is None:
            continue
        treated = parts[family, variant, task]
        common = [prompt for prompt in base if prompt in treated]
        if common:
            pair = sides(base, treated, common)
            apart = len(base) + len(treated) - 2 * len(common)
            left_out[family, variant, task] = apart + (pair[0].sums[1] == 0).sum(0)
            cells[family, variant, task] = pair
    if not cells:
        raise DataError(
            f"no prompt is in both {baseline} and another variant of its family: comparisons are "
            "paired by task and prompt_id, so sample both from the same prompts"
        )
    return cells, left_out


def _grouped(cells: Cells, level: str) -> dict[tuple[str, str, str], Cells]:
    """The cells that each row of a level pools."""
    groups: dict[tuple[str, str, str], Cells] = {}
    for (family, variant, task), cell in cells.items():
        where = {
            "task": (family, variant, task),
            "family": (family, variant, POOLED),
            "all": (POOLED, variant, POOLED),
        }[level]
        groups.setdefault(where, {})[family, variant, task] = cell
    return groups


def _evaluate(
    group: Cells,
    names: list[str],
    draw: Callable[[int, Any], tuple[Array, Array]],
    size: int,
    seed: int,
    kernels: Mapping[tuple[str, str], bootstrap.Rollouts],
) -> tuple[Array, Array, Array]:
    """Point estimates (2, K), replicates (2, B, K), baseline then treated; prompts used (tasks, K)."""
    point = np.zeros((2, 2, len(names)))  # (top or bottom, side, K)
    used = []
    tasks = list(dict.fromkeys(task for _, _, task in group))
    replicates = np.zeros((2, 2, size, len(names)))
    for number, task in enumerate(tasks):
        cells = [cell for key, cell in group.items() if key[2] == task]
        prompts = list(dict.fromkeys(p for base, _ in cells for p in base.prompts))
        place = {p: i for i, p in enumerate(prompts)}
        # tasks are drawn independently; one task alone is drawn from the seed itself
        drawn, counts = draw(len(prompts), seed if len(tasks) == 1 else (seed, number))
        sums = np.zeros((2, 2, len(prompts), len(names)))  # (top or bottom, side, P, K)
        for cell in cells:
            for which, side in enumerate(cell):
                at = [place[p] for p in side.prompts]
                sums[:, which, at] += side.sums
                if kernels:
                    found = [kernels.get((side.run_id, p)) for p in prompts]
                    known = np.zeros((len(prompts), len(names)))
                    known[at] = side.sums[1] > 0
                    drawn_sums = _second_level(found, drawn, names, [seed, number, which])
                    replicates[:, which] += (drawn_sums * known[drawn]).sum(2)
        point += sums.sum(2)
        used.append((sums[1] > 0).any(0).sum(0))
        if not kernels:
            replicates += counts @ sums  # (2, 2, B, K)
    return (
        bootstrap.pooled(point[0], point[1], names),
        bootstrap.pooled(replicates[0], replicates[1], names),
        np.array(used),
    )


def _second_level(
    found: list[bootstrap.Rollouts | None], drawn: Array, names: list[str], seed: list[int]
) -> Array:
    """w f(x) and w (2, B, P, K) of every drawn slot, its rollouts drawn anew."""
    present = [rollouts for rollouts in found if rollouts is not None]
    place = np.cumsum([rollouts is not None for rollouts in found]) - 1
    here = np.array([rollouts is not None for rollouts in found])
    slots = np.where(here[drawn], place[drawn], -1)
    columns = bootstrap.redraw_slots(present, slots, np.random.default_rng(seed))
    return np.stack(bootstrap.weighted_values(columns, names))


def _summary(name: str, values: Array, replicates: Array, confidence: float) -> dict[str, float | None]:
    """Value, se and interval of baseline, treated, delta and percent delta; None where undefined."""
    tail = 50 * (1 - confidence)

    def four(base: Array, treated: Array) -> list[Array]:
        with np.errstate(invalid="ignore", divide="ignore"):
            return [base, treated, treated - base, 100 * (treated - base) / base]

    row: dict[str, float | None] = {}
    for part, value, drawn in zip(_PARTS, four(*values), four(*replicates), strict=True):
        if part == "percent_delta" and not MEASURES[name].positive:
            value = np.asarray(np.nan)
        known = drawn[np.isfinite(drawn)]
        low = high = se = np.nan
        # a spread over the few replicates that happen to be defined would be a wrong one
        if np.isfinite(value) and len(known) >= 0.9 * len(drawn):
            low, high = np.percentile(known, [tail, 100 - tail])
            se = known.std(ddof=1)
        for suffix, number in (("", value), ("_se", se), ("_ci_low", low), ("_ci_high", high)):
            row[part + suffix] = float(number) if np.isfinite(number) else None
    return row


def _tests(
    summary: Mapping[str, float | None], n: int, freedom: int, margin: float | str | None
) -> dict[str, float | bool | None]:
    """p of no difference, and of a difference beyond the margin."""
    from scipy import stats  # slow to import

    delta, se = summary["delta"], summary["delta_se"]
    found: dict[str, float | bool | None] = {"p": None, "margin": None, "p_equivalence": None}
    known = delta is not None and se is not None and freedom > 0

    def tail(excess: float) -> float:
        """One-sided p of an excess over the null."""
        if se == 0:
            return 0.0 if excess > 0 else 1.0
        unbiased = se * (n / freedom) ** 0.5  # type: ignore[operator]
        return float(stats.t.sf(excess / unbiased, freedom))

    if known:
        found["p"] = min(1.0, 2 * tail(abs(delta)))  # type: ignore[arg-type]
    if margin is not None:
        size = _margin(margin, summary["baseline"])
        found["margin"] = size
        if known and size is not None:
            found["p_equivalence"] = tail(size - abs(delta))  # type: ignore[arg-type]
    return found


def _margin(margin: float | str, baseline: float | None) -> float | None:
    text = str(margin)
    try:
        if text.endswith("%"):
            return None if baseline is None else abs(float(text[:-1]) / 100 * baseline)
        return float(text)
    except ValueError:
        raise UsageError(f"--margin {margin}: needs a number, or a percentage like 5%") from None


def _without_repeats(frame: pl.DataFrame) -> pl.DataFrame:
    """Leaves out a pooled row that pools one cell only: it would be counted twice among the tests."""
    keys = ("variant", "metric")
    families = frame.filter(level="task").group_by(*keys, "family").len()
    single = families.filter(pl.col("len") == 1).select(*keys, "family", level=pl.lit("family"))
    frame = frame.join(single, on=[*keys, "family", "level"], how="anti")
    alone = families.group_by(keys).len().filter(pl.col("len") == 1).select(*keys, level=pl.lit("all"))
    return frame.join(alone, on=[*keys, "level"], how="anti")


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
