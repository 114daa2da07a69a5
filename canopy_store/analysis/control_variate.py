"""CE* with the luck of stopping taken out: a control variate that needs nothing but what is stored.

Rollouts of one prompt differ most in where they end. At each step t a rollout ends by itself or not,
and 1{ends at t} - q_t has mean 0 whatever came before. So a multiple of it changes no expectation, as
long as the multiple does not know the outcome; the best one is the entropy that ending there forgoes.
That is estimated from the prompt's other rollouts: G_t^(-i), the mean entropy after t of those that go
on after t, shrunk with one pseudo-count towards its mean over all t.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from canopy_store import sql
from canopy_store.analysis.bootstrap import ESTIMATED, Array
from canopy_store.analysis.selections import only_runs
from canopy_store.errors import DataError
from canopy_store.sql.connection import Connection


def ce_star_cv(
    entropy: Array, stop_probability: Array, lengths: Array, stopped: Array, cap: int | None = None
) -> tuple[float, float]:
    """``mean_i [H_i + sum_t G_t^(-i) (1{i ends by itself at t} - q_t)]``, nats, and its standard error.

    Unbiased for what the mean of H_i estimates. NaN of fewer than two rollouts. The standard error is
    that of the jackknife over rollouts: each is left out everywhere, in every G as well.

    Parameters
    ----------
    entropy, stop_probability : (M, T), nats and q_t = exp(eos_logprob); 0 after a rollout's last step
    lengths : (M,) tokens
    stopped : (M,) whether the rollout ended by itself
    cap : max_new_tokens, where G is 0; None where it is not known
    """
    m, width = entropy.shape
    if m < 2:
        return np.nan, np.nan
    step = np.arange(1, width + 1)
    goes_on = (step < lengths[:, None]).astype(float)
    surprise = ((step == lengths[:, None]) & stopped[:, None]) - stop_probability
    if cap is not None:
        surprise = np.where(step == cap, 0.0, surprise)
    after = np.where(goes_on > 0, entropy[:, ::-1].cumsum(1)[:, ::-1] - entropy, 0.0)
    # over rollouts at each step, and over the steps of each rollout
    after_t, goes_on_t = after.sum(0), goes_on.sum(0)
    after_i, goes_on_i = after.sum(1), goes_on.sum(1)

    def mean_after(*without: Array) -> Array:
        """The mean entropy after a step, over all steps of all rollouts but some."""
        total = after_i.sum() - sum(after_i[i] for i in without)
        number = goes_on_i.sum() - sum(goes_on_i[i] for i in without)
        return np.where(number > 0, total / np.maximum(number, 1), 0.0)

    every = np.arange(m)
    shrunk_to = mean_after(every)[:, None]
    forgone = (after_t - after + shrunk_to) / (goes_on_t - goes_on + 1)
    h = entropy.sum(1)
    estimate = (h + (forgone * surprise).sum(1)).mean()

    # The same without rollout k. G of i is then a sum without both, over a number that depends on
    # whether k goes on: with it (1) or without (0), each once for all k. What clips is never used.
    numbers = (goes_on_t - goes_on + 1, np.maximum(goes_on_t - goes_on, 1))
    weights = [surprise / number for number in numbers]
    parts = []
    for weight in weights:
        of_others = (weight * (after_t - after)).sum(0) - after * weight.sum(0)
        of_itself = weight * (after_t - 2 * after)
        parts.append(of_others - of_itself)
    without_k = np.where(goes_on > 0, parts[1], parts[0]).sum(1)
    # the steps before k's last, then the rest: (i, k)
    until = lengths - 1
    before = [np.concatenate([np.zeros((m, 1)), w.cumsum(1)], 1) for w in weights]
    reached = before[1][:, until] + before[0][:, -1:] - before[0][:, until]
    shrunk = reached * mean_after(every[:, None], every[None, :])
    np.fill_diagonal(shrunk, 0.0)
    left_out = (h.sum() - h + without_k + shrunk.sum(0)) / (m - 1)
    return float(estimate), float(np.sqrt((m - 1) / m * ((left_out - left_out.mean()) ** 2).sum()))


def ce_star_estimates(
    root: str | Path, *, selection: str = "all", runs: Sequence[str] = (), horizon: int | None = None
) -> pl.DataFrame:
    """One row per prompt of a run: each estimate of CE*, in nats, with its standard error.

    ``ce_star`` and ``surprisal_mean`` are those of prompt_metrics, ``ce_star_cv`` is what the function
    of that name gives; it is NULL where a rollout has no eos_logprob or no finish_reason, and with one
    rollout. It is for 16 rollouts a prompt and more.

    Parameters
    ----------
    root : path of the store
    selection : the subset of rollouts
    runs : only these runs; by default all that are complete
    horizon : as if every rollout had been cut at its first ``horizon`` tokens

    Raises
    ------
    DataError
        No complete run, no such selection, no such run.
    """
    with sql.connect(root) as con:
        named = con.sql("select distinct run_id, selection from selected_rollouts").pl()
        if named.is_empty():
            raise DataError(f"{root}: no complete run; see: canopy status --store {root}")
        if selection not in named["selection"]:
            names = ", ".join(sorted(named["selection"].unique()))
            raise DataError(f"--selection {selection}: not in the store; it has {names}")
        chosen = only_runs(named.filter(selection=selection), runs)["run_id"].sort()
        return pl.concat(_of_run(con, run_id, selection, horizon) for run_id in chosen)


def with_estimates(
    con: Connection, prompts: pl.DataFrame, names: Sequence[str], horizon: int | None = None
) -> pl.DataFrame:
    """Rows of prompt_metrics, with the columns of `ce_star_estimates` that the measures named need."""
    added = [name for name in ESTIMATED if name in names]
    if not added:
        return prompts
    selection = prompts["selection"][0]
    run_ids = prompts["run_id"].unique().sort()
    estimates = pl.concat(_of_run(con, run_id, selection, horizon) for run_id in run_ids)
    keys = ["run_id", "prompt_id"]
    return prompts.join(estimates.select(*keys, *added), on=keys, how="left", maintain_order="left")


def _of_run(con: Connection, run_id: str, selection: str, horizon: int | None) -> pl.DataFrame:
    at = "" if horizon is None else f"_at({int(horizon)})"
    params = {"run": run_id, "selection": selection}
    frame = con.sql(
        "select family, variant, task, run_id, prompt_id, selection, count(*) as n_rollouts, "
        "avg(entropy_sum) as ce_star, stddev_samp(entropy_sum) / sqrt(count(*)) as ce_star_se, "
        "case when count(surprisal_sum) = count(*) then avg(surprisal_sum) end as surprisal_mean, "
        "case when count(surprisal_sum) = count(*) then stddev_samp(surprisal_sum) / sqrt(count(*)) "
        f"end as surprisal_se from selected_rollouts{at} "
        "where run_id = $run and selection = $selection group by all order by prompt_id",
        params=params,
    ).pl()
    steps = con.sql(
        "select r.prompt_id, list(r.n_tokens order by sample) as lengths, "
        "list(r.finish_reason = 'stop' order by sample) as stopped, "
        "flatten(list(r.entropy order by sample)) as entropy, "
        "flatten(list(r.eos_logprob order by sample)) as eos_logprob, "
        f"any_value(u.max_new_tokens) as cap from selected_rollouts{at} r join runs u using (run_id) "
        "where run_id = $run and selection = $selection group by all "
        "having count(r.entropy) = count(*) and count(r.eos_logprob) = count(*) "
        "and count(r.finish_reason) = count(*)",
        params=params,
    )
    found: dict[str, list[object]] = {"prompt_id": [], "ce_star_cv": [], "ce_star_cv_se": []}
    for prompt_id, lengths, stopped, entropy, eos, cap in steps.pl().iter_rows():
        n = np.array(lengths)
        here = np.arange(n.max()) < n[:, None]
        h, q = np.zeros(here.shape), np.zeros(here.shape)
        h[here], q[here] = entropy, np.exp(np.array(eos, float))
        caps = [c for c in (cap, horizon) if c is not None]
        value, se = ce_star_cv(h, q, n, np.array(stopped), min(caps, default=None))
        for name, x in zip(found, (prompt_id, value, se), strict=True):
            found[name].append(x)
    kinds = {"prompt_id": pl.String, "ce_star_cv": pl.Float64, "ce_star_cv_se": pl.Float64}
    estimates = pl.DataFrame(found, schema=kinds).with_columns(pl.col(pl.Float64).fill_nan(None))
    return frame.join(estimates, on="prompt_id", how="left", maintain_order="left")
