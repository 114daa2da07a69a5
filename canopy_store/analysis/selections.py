"""Selections: named subsets of a store's rollouts, which every view carries beside 'all'."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from canopy_store import sql, store
from canopy_store.errors import DataError, UsageError
from canopy_store.store.embeddings import add_spectra

_KEYS = ("run_id", "prompt_id", "sample")


def select_reward(
    root: str | Path, keep: float, *, reward_model: str | None = None, name: str | None = None
) -> str:
    """The name of the selection of each prompt's best rollouts: the ceil(keep · M) highest rewards.

    Ties keep the lower sample number. Runs without any reward are left out; called again, it adds
    the runs that came since.

    Parameters
    ----------
    root : path of the store
    keep : share of a prompt's M rollouts kept, above 0 and at most 1; the paper's is 0.7
    reward_model : needed where the store has the rewards of several
    name : by default reward_top_70 for 0.7

    Raises
    ------
    DataError
        No rewards, or a run that has them for some of its rollouts only.
    ConflictError
        The name is stored with another rule.
    """
    if not 0 < keep <= 1:
        raise UsageError(f"--keep {keep}: needs more than 0 and at most 1")
    root = store.require(root)
    with sql.connect(root, relations=()) as con:
        models = [
            row[0] for row in con.sql("select distinct reward_model from rewards order by 1").fetchall()
        ]
        if not models:
            raise DataError(
                f"{root}: no rewards; score the rollouts first: canopy ingest reward --store {root} …"
            )
        if reward_model is None and len(models) > 1:
            raise UsageError(f"--reward-model: the store has several: {', '.join(models)}")
        reward_model = reward_model or models[0]
        if reward_model not in models:
            raise DataError(
                f"--reward-model {reward_model}: not in the store; it has {', '.join(models)}"
            )
        rewards = con.sql(
            "select run_id, prompt_id, sample, reward from rollouts "
            "left join (from rewards where reward_model = ?) using (run_id, prompt_id, sample)",
            params=[reward_model],
        ).pl()
    known = rewards.group_by("run_id").agg(
        pl.col("reward").is_not_null().sum().alias("known"), pl.len().alias("all")
    )
    for row in known.sort("run_id").iter_rows(named=True):
        if 0 < row["known"] < row["all"]:
            raise DataError(
                f"run {row['run_id']}: {row['known']} of {row['all']} rollouts have a reward by "
                f"{reward_model}; score the rest first"
            )
    places = rewards.drop_nulls("reward").sort("run_id", "prompt_id", -pl.col("reward"), "sample")
    per_prompt = ("run_id", "prompt_id")
    # 0.7 · 40 is 28.000000000000004: rounding must not keep one more
    kept = (pl.len().over(per_prompt) * keep - 1e-9).ceil()
    chosen = places.filter(pl.int_range(pl.len()).over(per_prompt) < kept)
    name = name or f"reward_top_{keep * 100:.10g}"
    return _keep(root, name, {"rule": "reward", "keep": keep, "reward_model": reward_model}, chosen)


def select_lengths(
    root: str | Path,
    *,
    baseline: str = "base",
    caliper: float = 0.1,
    name: str | None = None,
    runs: tuple[str, ...] = (),
) -> list[str]:
    """The names of the selections of matched lengths, one for each other variant.

    Within a family, task and prompt, rollouts of the two variants are paired one to one so that the
    longer is at most ``caliper`` (a share: 0.1 is 10%) longer than the shorter; as many pairs as can
    be. What finds no partner is left out, so the two length distributions are alike.

    Raises
    ------
    DataError
        No variant besides the baseline, or nothing that can be matched.
    ConflictError
        The name is stored with another caliper or baseline.
    """
    if not caliper >= 0:
        raise UsageError(f"--caliper {caliper}: needs 0 or more")
    root = store.require(root)
    with sql.connect(root, relations=()) as con:
        rows = con.sql(
            "select family, variant, task, run_id, prompt_id, sample, n_tokens from rollouts"
        ).pl()
    rows = only_runs(rows, runs)
    require_one_run(rows)
    treated = sorted(v for v in rows["variant"].unique() if v != baseline)
    if baseline not in rows["variant"] or not treated:
        found = ", ".join(sorted(rows["variant"].unique())) or "none"
        raise DataError(f"matched lengths need {baseline!r} and another variant; the store has {found}")
    if name is not None and len(treated) > 1:
        raise UsageError(f"--name: there are {len(treated)} variants, each with a selection of its own")
    names = []
    for variant in treated:
        pairs = rows.filter(pl.col("variant").is_in([baseline, variant]))
        chosen = [
            _match(group.filter(variant=baseline), group.filter(variant=variant), caliper)
            for _, group in pairs.group_by(["family", "task", "prompt_id"], maintain_order=True)
        ]
        matched = pl.concat(chosen)
        if matched.is_empty():
            raise DataError(
                f"{baseline} and {variant}: no two rollouts of a prompt match in length; raise --caliper"
            )
        rule: dict[str, Any] = {"rule": "lengths", "baseline": baseline, "variant": variant}
        rule |= {"caliper": caliper, **({"runs": sorted(runs)} if runs else {})}  # whose pairs they are
        names.append(_keep(root, name or f"lengths_matched_{variant}", rule, matched))
    return names


def only_runs(rows: pl.DataFrame, runs: Iterable[str]) -> pl.DataFrame:
    """The rows of the runs named, all where none is; raises DataError for a name not there."""
    wanted = list(runs)
    for run_id in wanted:
        if run_id not in rows["run_id"]:
            raise DataError(f"--run {run_id}: no complete run of this name; see: canopy status")
    return rows.filter(pl.col("run_id").is_in(wanted)) if wanted else rows


def require_one_run(rows: pl.DataFrame) -> None:
    """Raises DataError where a family, variant and task have several runs: which one is meant?"""
    several = (
        rows.group_by("family", "variant", "task")
        .agg(pl.col("run_id").unique().sort())
        .filter(pl.col("run_id").list.len() > 1)
        .sort("family", "variant", "task")
    )
    for row in several.iter_rows(named=True):
        raise DataError(
            f"{row['family']} {row['variant']} {row['task']} has several runs, "
            f"{', '.join(row['run_id'])}: name the ones to compare with --run"
        )


def _match(left: pl.DataFrame, right: pl.DataFrame, caliper: float) -> pl.DataFrame:
    """The rows of both that pair up, in ascending length: taking the first that fits is optimal."""
    left, right = left.sort("n_tokens", "sample"), right.sort("n_tokens", "sample")
    a, b = np.log(left["n_tokens"].to_numpy()), np.log(right["n_tokens"].to_numpy())
    widest = math.log1p(caliper) + 1e-12
    i = j = 0
    pairs: list[tuple[int, int]] = []
    while i < len(a) and j < len(b):
        if abs(a[i] - b[j]) <= widest:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif a[i] < b[j]:
            i += 1
        else:
            j += 1
    return pl.concat([left[[i for i, _ in pairs]], right[[j for _, j in pairs]]])


def _keep(root: Path, name: str, rule: Mapping[str, Any], chosen: pl.DataFrame) -> str:
    """Stores the chosen rollouts under ``name``, a run at once, and the spectra they need.

    Called again it finishes what a break left, and does anew what has changed.
    """
    store.check_name("--name", name)
    if name == "all":
        raise UsageError("--name all: that is every rollout; give another name")
    root = store.writable(root)
    store.plan(root, "selection", name, dict(rule))
    for (run_id,), rows in chosen.group_by(["run_id"], maintain_order=True):
        with store.holding(root, str(run_id)):
            with store.selecting(root, str(run_id)):  # an embedder may be adding its spectra
                _keep_run(root, name, str(run_id), rows.sort("prompt_id", "sample"), rule)
            add_spectra(root, str(run_id))
    sql.write_database(root)
    return name


def _keep_run(root: Path, name: str, run_id: str, rows: pl.DataFrame, rule: Mapping[str, Any]) -> None:
    """Commits a run's chosen rollouts, unless these very ones are."""
    keys = {"selection": name, "run": run_id}
    old = store.record(root, "selections", **keys)
    if old is not None:
        files = [root / name for name in old.of("selections")]
        if all(map(store.exists, files)):
            stored = pl.concat(pl.DataFrame(store.read_rows(each, list(_KEYS))) for each in files)
            if stored.equals(rows.select(_KEYS)):
                return
        for stale in store.records(root, "embedding_spectra", **keys):
            store.remove_record(root, stale)
    path = store.shard_path(store.folder(root, "selections", **keys), store.fresh_number(old))
    store.write_rows(path, "selections", {key: rows[key].to_arrow() for key in _KEYS})
    store.commit(root, "selections", keys, [path], rule)
    if old is not None:
        store.remove_unnamed(root, old.files)
