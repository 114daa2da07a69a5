"""Controlled comparisons: each variant of a family against its baseline, prompt by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from canopy_store import sql
from canopy_store.analysis.bootstrap import ROLLOUT_LEVEL, Rollouts
from canopy_store.analysis.checkpoints import over_checkpoints
from canopy_store.analysis.comparable import view_rows
from canopy_store.analysis.control_variate import with_estimates
from canopy_store.analysis.grades import with_at_k
from canopy_store.analysis.intervals import INTERVALS, Units, adjusted, side, summary
from canopy_store.analysis.meanings import with_labels, with_meanings
from canopy_store.analysis.pairing import (
    LEVELS,
    Cells,
    drawing,
    evaluate,
    grouped,
    paired_cells,
    single_cells,
    variant_order,
    without_repeats,
)
from canopy_store.analysis.prompt_changes import prompt_changes
from canopy_store.analysis.prompt_rows import prompt_rows
from canopy_store.analysis.rarefaction import rollouts_of
from canopy_store.analysis.row_facts import RowFacts
from canopy_store.analysis.unit_rows import unit_of, unit_rows
from canopy_store.errors import UsageError

REPLICATES = 2000
CONFIDENCE = 0.95
SEED = 42
# branching_factor is entropy_rate on another scale: one test, not two
DEFAULT_METRICS = {
    "prompt": (
        "ce_star",
        "entropy_rate",
        "mean_length",
        "rho_pearson",
        "rho_spearman",
        "rho_kendall",
        "semantic_diversity",
        "vendi_score",
        "truncation_rate",
        "accuracy",
    ),
    "item": ("accuracy_sum", "accuracy_token", "accuracy_pmi", "margin"),
    "document": ("nll", "bits_per_byte"),
}
# what only rollouts have, and the value that leaves it out
_OF_ROLLOUTS: dict[str, Any] = {
    "selection": "all",
    "embedder": None,
    "grader": None,
    "runs": (),
    "horizon": None,
    "resample": "prompts",
    "clusters": None,
}
_TEXTS = ("treatment", "selection_rule", "without_baseline", "allowed", "unrecorded", "reason")
LARGEST = "prompt"  # --by prompt: the changes of single prompts


def compare(
    root: str | Path,
    *,
    baseline: str = "base",
    metrics: Sequence[str] = (),
    unit: str | None = None,
    by: str | None = None,
    selection: str = "all",
    embedder: str | None = None,
    grader: str | None = None,
    runs: Sequence[str] = (),
    families: Sequence[str] = (),
    tasks: Sequence[str] = (),
    splits: Sequence[str] = (),
    variants: Sequence[str] = (),
    seeds: Mapping[str, str] | None = None,
    allow: Sequence[str] = (),
    horizon: int | None = None,
    resample: str = "prompts",
    replicates: int = REPLICATES,
    confidence: float = CONFIDENCE,
    interval: str = "t",
    margins: Mapping[str, float | str] | None = None,
    seed: int = SEED,
    clusters: str | None = None,
) -> pl.DataFrame:
    """One row per family, task, variant and metric: baseline, treated, delta and percent delta.

    Each with its standard error, from the paired bootstrap: prompts are drawn with replacement, the
    same draw for both variants, with all their rollouts; and with its interval. Task ``(all)`` pools
    over tasks, drawing within each; family ``(all)`` over families too, which share the draw of a
    prompt. A prompt that one variant lacks, or of which one has no value of the metric (ρ where every
    rollout was cut at the same length), is left out for both and counted.

    Runs that were not sampled alike are refused, and a Vendi score, which grows with the number of
    rollouts, is taken at the fewest that a prompt has in any variant.

    Items and documents are compared in the same way: the arms, which are scorers, stand where variants
    do, and clusters where prompts do (`unit_rows`).

    Parameters
    ----------
    root : path of the store
    baseline : the variant every other is compared with, within its family
    metrics : columns of model_metrics, and those that need a ``grader``; by default the main ones that
        the store has. Of items accuracy_sum,
        accuracy_token, accuracy_char, accuracy_pmi, margin, margin_token, margin_pmi; of documents nll,
        expected_nll, bits_per_byte, perplexity
    unit : 'prompt' (its rollouts), 'item' or 'document'; by default that of the metrics, else 'prompt'
    by : 'task' (each family and task), 'family' (pooled over tasks), 'all'; by default all three; or
        'prompt', the changes of single prompts (`prompt_changes`)
    selection : the subset of rollouts compared
    embedder : needed where the store has several
    grader : of accuracy, pass_at_K, pass_hat_K and maj_at_K (K a power of two to 1024); needed for these
        where the store has several
    runs, families, tasks, variants : only these; of documents the tasks are corpora
    splits : only these parts of a task's items or of a corpus
    seeds : variants that are checkpoints of one, trained with several seeds: {"sft": "sft-*"}. The
        change is their mean; its variance has a part of seeds and one of prompts
    allow : settings that may differ: cap, temperature, top_k, top_p, min_p, typical_p,
        repetition_penalty, rendering, template
    horizon : every measure of the first so many tokens, at most the smallest cap
    resample : what is drawn. 'prompts'; 'both': rollouts within each drawn prompt too, for designs
        with few prompts (their noise then counts twice: conservative); 'rollouts': within the prompts
        there are, for statements about these prompts alone
    replicates : bootstrap replicates, B
    confidence : of the intervals
    interval : 't', by the same Student's t as p: they agree; or 'percentile', of the replicates
    margins : per metric the largest |delta| that counts as none, in its unit or as '5%' of the
        baseline; adds a test of equivalence (two one-sided tests)
    seed : of the bootstrap
    clusters : by meaning, for rse, rse_norm, semantic_entropy, n_meanings, …; needed where the store has
        several

    Returns
    -------
    level : 'task', 'family' or 'all', what the row pools; 'seed' for a single checkpoint of several
    family, task, baseline_variant, variant, treatment, selection, metric : what is compared; variants
        in the order of generation, training step and name
    checkpoint : of a row of level 'seed' the checkpoint's name
    n_checkpoints : of the variant, in this row
    selection_rule : 'reward' or 'lengths', the rule of the selection; NULL of 'all'
    n_prompts, n_tasks : that the row pools; parts of a task that share clusters are one task
    n_samples : rollouts a prompt, of the side that has fewer; ``baseline_n_samples`` and
        ``treated_n_samples`` of each, the median over prompts
    n_left_out, left_out_share : prompts left out, and their share of the rollouts of both sides
    unit : that the row is over. Of items and documents n_prompts counts clusters, n_samples the units in
        one; a task that has parts is followed by its part, as in facts:reversal
    baseline_cut, treated_cut : share of rollouts cut, over the prompts compared; NULL unknown
    horizon : tokens that the measures cover, the cap of both sides or that asked for; NULL where it is
        not known, or not one
    rarefied_to : rollouts a prompt (median) that Vendi scores were brought to; NULL where all have one M
    reason : why a value is NULL, where there is something to say
    allowed : the differences that ``allow`` let pass, in words
    unrecorded : settings that one side does not record
    without_baseline : variants of the store that no row compares, for want of a baseline
    baseline, treated, delta, percent_delta : values, each with ``_se``, ``_ci_low`` and ``_ci_high``
    interval, confidence : as given
    p : of delta = 0, by Student's t. Degrees of freedom are the prompts less one a task (the rollouts
        less two a prompt, where prompts are fixed), the standard error the bootstrap's, made unbiased:
        times sqrt(n / degrees of freedom); of a correlation on Fisher's z
    margin, p_equivalence, equivalent : the test of equivalence, at 0.05
    p_holm, p_bh : p adjusted over all rows of the frame but single seeds'; a measure that is another on
        another scale (branching_factor, canopy_size_log10) counts once with it

    Raises
    ------
    DataError
        No such baseline, no other variant, no prompt in common, several runs of one model and task.
    ConflictError
        Runs that were not sampled alike: names every difference, and what to add.
    UsageError
        An unknown metric or setting, a horizon above a cap, or several embedders and none named.
    """
    _check(by, resample, replicates, confidence, interval)
    unit = unit_of(metrics, unit)
    drawn: dict[str, Any] = {"replicates": replicates, "seed": seed}
    drawn |= {"confidence": confidence, "interval": interval}
    if unit != "prompt":
        given: dict[str, Any] = {"selection": selection, "embedder": embedder, "runs": runs}
        given |= {"horizon": horizon, "resample": resample, "grader": grader, "clusters": clusters}
        _require_none(unit, given, by)
        with sql.connect(root) as con:
            rows = unit_rows(
                con,
                root,
                unit,
                baseline=baseline,
                metrics=metrics,
                families=families,
                tasks=tasks,
                splits=splits,
                variants=variants,
                seeds=seeds,
                allow=allow,
            )
            models = view_rows(con, "models")
        return compare_prompts(
            rows, models, baseline=baseline, metrics=metrics, unit=unit, by=by, margins=margins, **drawn
        )
    if splits:
        raise UsageError("--split: of items and documents; rollouts have tasks alone")
    with sql.connect(root) as con:
        prompts, embedder = prompt_rows(
            con,
            root,
            baseline=baseline,
            selection=selection,
            embedder=embedder,
            runs=runs,
            families=families,
            tasks=tasks,
            variants=variants,
            seeds=seeds,
            allow=allow,
            horizon=horizon,
            grader=grader,
        )
        prompts = with_estimates(con, prompts, metrics, horizon)
        prompts = with_at_k(con, prompts, metrics)
        prompts, clusters = with_meanings(con, prompts, root, metrics, clusters, horizon)
        models = view_rows(con, "models")
        if by == LARGEST:
            texts = con.sql("select task, prompt_id, text from prompts").pl()
            names = _metrics(metrics, prompts, "prompts")
            pooled = [name for name in names if name not in prompts.columns]
            if pooled:
                raise UsageError(f"--by prompt: {', '.join(pooled)} is of all prompts together")
            return prompt_changes(prompts, models, names, baseline=baseline, texts=texts)
        kernels = {}
        if resample != "prompts":
            kernels = rollouts_of(con, prompts, selection, embedder, horizon)
            if clusters is not None:
                kernels = with_labels(con, kernels, clusters)
    return compare_prompts(
        prompts,
        models,
        baseline=baseline,
        metrics=metrics,
        by=by,
        resample=resample,
        margins=margins,
        kernels=kernels,
        **drawn,
    )


def compare_prompts(
    prompts: pl.DataFrame,
    models: pl.DataFrame,
    *,
    baseline: str = "base",
    metrics: Sequence[str] = (),
    unit: str = "prompt",
    by: str | None = None,
    resample: str = "prompts",
    replicates: int = REPLICATES,
    confidence: float = CONFIDENCE,
    interval: str = "t",
    margins: Mapping[str, float | str] | None = None,
    seed: int = SEED,
    kernels: Mapping[tuple[str, str], Rollouts] | None = None,
) -> pl.DataFrame:
    """What `compare` returns, from rows that are read already.

    Parameters
    ----------
    prompts : rows of ``prompt_metrics``, as `prompt_rows` gives them; or what `unit_rows` gives
    models : rows of ``models``, for the treatments
    kernels : rollouts by run and prompt, needed unless ``resample`` is 'prompts'

    The others, and errors, are those of `compare`.
    """
    names = _metrics(metrics, prompts, resample, unit)
    margins = dict(margins or {})
    for name in margins:
        if name not in names:
            raise UsageError(f"--margin {name}: not among what is compared: {', '.join(names)}")
    prompts, shared_names = _by_checkpoint(prompts, baseline)
    if len(shared_names) > len(set(shared_names.values())) and interval != "t":
        raise UsageError(f"--interval {interval}: several checkpoints of a variant have t alone")
    order = variant_order(models, prompts, baseline)
    cells, left_out = paired_cells(prompts, baseline, names, order)
    parts_of = {}
    if "of_task" in prompts.columns:
        parts_of = dict(prompts.select("task", "of_task").unique().iter_rows())
    facts = RowFacts(prompts, models, names, baseline, left_out, parts_of)
    draw = drawing(replicates, resample)
    out: list[dict[str, Any]] = []
    for level in LEVELS if by is None else (by,):
        for (family, variant, task), groups in _checkpoints(cells, level, shared_names).items():
            where = {"level": level, "family": family, "task": task, "variant": variant}
            for checkpoint, group in groups.items():
                values, drawn, used = evaluate(
                    group, names, draw, replicates, seed, kernels or {}, parts_of
                )
                # of several seeds a row is one's own, also where a task has no other
                single = [*shared_names.values()].count(variant) <= 1
                for k, name in enumerate(names):
                    counted = facts.of([group], k, used[:, k])
                    drawn_from, lost = counted["n_prompts"], counted["n_tasks"]
                    if resample == "rollouts":  # within the prompts of each side
                        drawn_from, lost = facts.rollouts(group, k)
                    units = Units(drawn_from, drawn_from - lost, confidence, interval)
                    out.append(
                        {
                            **where,
                            "metric": name,
                            "checkpoint": "" if single else checkpoint,
                            "n_checkpoints": 1,
                            **counted,
                            **summary(name, values[:, k], drawn[..., k], units, margins.get(name)),
                        }
                    )
            if len(groups) > 1:
                several = list(groups.values())
                rows, used = over_checkpoints(several, names, confidence, margins, parts_of)
                for k, (name, row) in enumerate(zip(names, rows, strict=True)):
                    counted = facts.of(several, k, used[:, k])
                    pooled = {"metric": name, "checkpoint": "", "n_checkpoints": len(several)}
                    out.append({**where, **pooled, **counted, **row})
    said = {"unit": unit, "interval": interval, "confidence": confidence}
    return _framed(pl.DataFrame([{**row, **said} for row in out], infer_schema_length=None))


def _framed(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows without repeats, single seeds named as such, p adjusted; columns in their order."""
    frame = without_repeats(frame)
    untold = [name for name, kind in frame.schema.items() if kind == pl.Null]
    frame = frame.with_columns(
        pl.col(name).cast(pl.String if name in _TEXTS else pl.Float64) for name in untold
    ).with_columns(pl.col("horizon", "rarefied_to").cast(pl.Int64))
    one_seed = pl.col("checkpoint") != ""
    frame = frame.with_columns(
        level=pl.when(one_seed).then(pl.lit("seed")).otherwise("level"),
        checkpoint=pl.when(one_seed).then("checkpoint"),
    )
    first = ("level", "family", "task", "baseline_variant", "variant", "checkpoint", "treatment")
    return adjusted(frame).select(*first, pl.exclude(first))


def _by_checkpoint(prompts: pl.DataFrame, baseline: str) -> tuple[pl.DataFrame, dict[str, str]]:
    """The rows with each checkpoint as a variant; and the variant that each is one of."""
    if "checkpoint" not in prompts.columns:
        return prompts, {}
    own = pl.when(pl.col("variant") == baseline).then("variant").otherwise("checkpoint")
    bases = prompts.filter(variant=baseline)["checkpoint"].unique().sort()
    if len(bases) > 1:
        raise UsageError(
            f"--seeds: {baseline} has {len(bases)} checkpoints, {', '.join(bases)}; a baseline has one"
        )
    names = dict(prompts.select(own.alias("checkpoint"), "variant").unique().iter_rows())
    return prompts.with_columns(variant=own), names


def _checkpoints(
    cells: Cells, level: str, names: Mapping[str, str]
) -> dict[tuple[str, str, str], dict[str, Cells]]:
    """The cells that each row pools, by checkpoint, under the family, variant and task of the row."""
    out: dict[tuple[str, str, str], dict[str, Cells]] = {}
    for (family, checkpoint, task), group in grouped(cells, level).items():
        variant = names.get(checkpoint, checkpoint)
        out.setdefault((family, variant, task), {})[checkpoint] = group
    return out


def estimate(
    prompts: pl.DataFrame,
    *,
    metrics: Sequence[str] = (),
    unit: str = "prompt",
    by: str | None = None,
    replicates: int = REPLICATES,
    confidence: float = CONFIDENCE,
    interval: str = "t",
    seed: int = SEED,
) -> pl.DataFrame:
    """One row per family, task, variant and metric: value, se and interval of each model by itself.

    Pooled and drawn as `compare` pools and draws, over all the prompts of the model: where two variants
    have the same prompts, these are the numbers of its columns baseline and treated.

    Parameters
    ----------
    prompts : rows of ``prompt_metrics``, as `prompt_rows` gives them; or what `unit_rows` gives

    The others are those of `compare`.
    """
    _check(by, "prompts", replicates, confidence, interval)
    names = _metrics(metrics, prompts, "prompts", unit)
    cells, draw = single_cells(prompts, names), drawing(replicates)
    out = []
    for level in LEVELS if by is None else (by,):
        for (family, variant, task), group in grouped(cells, level).items():
            values, drawn, used = evaluate(group, names, draw, replicates, seed, {})
            for k, name in enumerate(names):
                units = int(used[:, k].sum())
                free = Units(units, units - int((used[:, k] > 0).sum()), confidence, interval)
                where = {"level": level, "family": family, "task": task, "variant": variant}
                own = side("value", name, values[0, k], drawn[0, :, k], free)
                out.append({**where, "metric": name, "n_prompts": units, **own})
    return without_repeats(pl.DataFrame(out, infer_schema_length=None))


def _check(by: str | None, resample: str, replicates: int, confidence: float, interval: str) -> None:
    if by is not None and by not in (*LEVELS, LARGEST):
        raise UsageError(f"--by {by}: one of {', '.join((*LEVELS, LARGEST))}")
    if resample not in ("prompts", "both", "rollouts"):
        raise UsageError(f"--resample {resample}: prompts, both or rollouts")
    if replicates < 2:
        raise UsageError(f"--replicates {replicates}: needs at least 2")
    if not 0 < confidence < 1:
        raise UsageError(f"--confidence {confidence}: needs more than 0 and less than 1")
    if interval not in INTERVALS:
        raise UsageError(f"--interval {interval}: {' or '.join(INTERVALS)}")


def _require_none(unit: str, given: Mapping[str, Any], by: str | None) -> None:
    """Raises where an option is given that only rollouts have."""
    if by == LARGEST:
        raise UsageError(f"--by {by}: of rollouts alone; single {unit}s are in canopy sql")
    for name, value in given.items():
        if value != _OF_ROLLOUTS[name]:
            option = {"runs": "run"}.get(name, name)
            raise UsageError(f"--{option}: of rollouts alone; a comparison of {unit}s has none")


def _metrics(
    metrics: Sequence[str], rows: pl.DataFrame, resample: str, unit: str = "prompt"
) -> list[str]:
    unit_of(metrics, unit)
    names = list(dict.fromkeys(metrics))
    if not names:
        known = {name for name in rows.columns if rows[name].null_count() < len(rows)}
        names = [name for name in DEFAULT_METRICS[unit] if name in known]
    if resample != "prompts":
        cannot = [name for name in names if name not in ROLLOUT_LEVEL]
        if cannot and metrics:
            raise UsageError(f"--resample {resample}: not for {', '.join(cannot)}")
        names = [name for name in names if name in ROLLOUT_LEVEL]
    return names
