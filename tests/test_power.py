"""Plans of studies: the parts of a pilot's variance, the noncentral t, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from scipy import stats
from stores import refused, write_parquet

import canopy_store
from canopy_store import DataError, UsageError
from canopy_store.analysis.power import Aim, Pilot, best_samples, power_of, prompts_for

BETWEEN, WITHIN = 0.05, 0.1  # of a variant's rates: what a prompt adds, and a rollout, nats per token
SAMPLES = 12


def pilot_store(folder, prompts, tasks=("t",), seed=4):
    """Lengths and rates of a rollout are independent: every prompt's correlation is 0 but for noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for task in tasks:
        for p in range(prompts):
            level = rng.normal(1.5, 0.2)
            for variant in ("base", "sft"):
                own = level + rng.normal(0, BETWEEN)
                for i in range(SAMPLES):
                    n = int(np.clip(round(rng.normal(14, 4)), 2, 26))
                    where = {"family": "f", "variant": variant, "task": task, "prompt_id": str(p)}
                    rows.append(where | {"sample": i, "entropy": [own + rng.normal(0, WITHIN)] * n})
    root = folder / "s"
    canopy_store.import_rollouts(root, write_parquet(folder / "in.parquet", rows), max_new_tokens=64)
    return root


@pytest.fixture(scope="module")
def pilot(tmp_path_factory):
    return pilot_store(tmp_path_factory.mktemp("pilot"), 120)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two tasks of four prompts."""
    return pilot_store(tmp_path_factory.mktemp("small"), 4, ("a", "b"))


def monte_carlo(prompts, variance, delta, tasks=1, tests=40_000):
    """How often a t-test of so many normal differences finds the change."""
    rng = np.random.default_rng(prompts)
    mean = rng.normal(delta, np.sqrt(variance / prompts), tests)
    freedom = prompts - tasks
    se = np.sqrt(variance * rng.chisquare(freedom, tests) / freedom / prompts)
    return (abs(mean / se) > stats.t.isf(0.025, freedom)).mean()


def test_the_power_is_that_of_the_t_test():
    for prompts, variance, delta, tasks in ((5, 1, 1.5, 1), (12, 2, 1, 3), (40, 0.5, 0.3, 2)):
        found = power_of(prompts, variance, Aim(delta), tasks)
        assert found == pytest.approx(monte_carlo(prompts, variance, delta, tasks), abs=0.01)
    assert prompts_for(1.0, Aim(0.5)) == 34  # as any table of the paired t-test has it
    assert power_of(34, 1.0, Aim(0.5)) == pytest.approx(0.808, abs=1e-3)
    assert power_of(33, 1.0, Aim(0.5)) < 0.8
    assert power_of(8, 1e-9, Aim(5)) == 1
    assert prompts_for(1e-9, Aim(5.0)) == 5


def test_the_pilot_is_taken_apart(pilot):
    """Two parts of the variance, known in the simulation, come back; fewer samples need more prompts."""
    frame = canopy_store.power(pilot, metric="entropy_rate", delta=0.05, samples=(2, 6, 24))
    assert frame["sd_prompts"][0] == pytest.approx(BETWEEN * np.sqrt(2), rel=0.2)
    assert frame["sd_rollouts"][0] == pytest.approx(WITHIN * np.sqrt(2), rel=0.1)
    needed = frame["n_prompts"].to_list()
    assert needed == sorted(needed, reverse=True)
    variance = frame["sd_prompts"][0] ** 2 + frame["sd_rollouts"][0] ** 2 / 24
    assert monte_carlo(needed[2], variance, 0.05) == pytest.approx(frame["power"][2], abs=0.01)
    assert monte_carlo(needed[2] - 1, variance, 0.05) < 0.81
    assert frame.filter("cheapest")["n_rollouts"][0] == min(frame["n_rollouts"])


def test_a_correlation_loses_three_rollouts_of_a_prompt(pilot):
    """Its noise is 1/(M - 3), by Fisher: known here, for the correlations differ by noise alone."""
    frame = canopy_store.power(pilot, metric="rho_pearson", delta=0.2, samples=(5, 63))
    few, many = (prompts_for(2 / (m - 3), Aim(0.2)) for m in (5, 63))
    assert frame["n_prompts"].to_list() == [pytest.approx(few, rel=0.2), pytest.approx(many, abs=4)]
    noise = frame["sd_rollouts"][0] ** 2
    assert noise == pytest.approx(2, rel=0.15)  # of either side 1: the M - 3 of the pilot is taken out
    variances = [frame["sd_prompts"][0] ** 2 + noise / (m - 3) for m in (5, 63)]
    assert frame["n_prompts"].to_list() == [prompts_for(v, Aim(0.2)) for v in variances]


def test_the_upper_limit_is_the_chi_squares(small):
    """Eight prompts of two tasks: six degrees of freedom, for the plan and for its upper limit."""
    frame = canopy_store.power(small, metric="entropy_rate", delta=0.06, samples=(SAMPLES,))
    row = frame.row(0, named=True)
    estimate = row["sd_prompts"] ** 2 + row["sd_rollouts"] ** 2 / SAMPLES
    both = canopy_store.compare(small, metrics=["entropy_rate"], by="family")
    assert estimate == pytest.approx(8 * both["delta_se"][0] ** 2 * 8 / 6)
    upper = estimate * 6 / stats.chi2.ppf(0.2, 6)
    assert row["n_prompts"] == prompts_for(estimate, Aim(0.06), 2)
    assert row["n_prompts_upper"] == prompts_for(upper, Aim(0.06), 2)
    assert row["power_if_upper"] == pytest.approx(power_of(row["n_prompts"], upper, Aim(0.06), 2))
    assert row["power_if_upper"] < 0.8 <= min(row["power"], row["power_upper"])
    assert row["pilot_prompts"] == 8


def test_no_plan_has_fewer_than_five_prompts(small):
    frame = canopy_store.power(small, metric="entropy_rate", delta=3)
    assert set(frame["n_prompts"]) == {5}
    assert prompts_for(1e-6, Aim(1.0), tasks=7, fewest=Pilot(20, 7, 8, 1, 1).fewest) == 9


@pytest.mark.parametrize(("lost", "delta"), [(0, 0.2), (3, 0.2), (0, 2.5)])
def test_the_best_number_of_samples_costs_least(lost, delta):
    """Against every number of samples there is: no cheaper plan but by the rounding of prompts."""
    of, ratio, aim = Pilot(20, 1, 16, 0.09 + 2 / (16 - lost), 2.0, lost), 50.0, Aim(delta)
    numbers = range(lost + 1, 400)
    costs = {m: prompts_for(of.variance(m), aim) * (ratio + m) for m in numbers}
    best = best_samples(of, aim, ratio)
    assert costs[best] <= min(costs.values()) * (1 + 1 / prompts_for(of.variance(best), aim))
    if delta == 0.2 and not lost:
        assert best == round(np.sqrt(2 / 0.09 * 50))


def test_few_prompts_are_not_best_where_prompts_hardly_differ():
    """The formula alone takes 1182 samples of the five prompts that a plan must have."""
    of, ratio, aim = Pilot(20, 1, 16, 1.0, 16.0), 50.0, Aim(0.2)
    costs = {m: prompts_for(of.variance(m), aim) * (ratio + m) for m in (287, 1182)}
    best = best_samples(of, aim, ratio)
    cost = prompts_for(of.variance(best), aim) * (ratio + best)
    assert cost <= 1.05 * costs[287] < 0.85 * costs[1182]


def test_costs_name_the_best_row(pilot):
    options = {"metric": "entropy_rate", "delta": 0.02}
    frame = canopy_store.power(pilot, **options, cost_prompt=30, cost_rollout=2)
    row = frame.filter("optimal").row(0, named=True)
    parts = (row["sd_rollouts"] / row["sd_prompts"]) ** 2
    assert row["n_samples"] == round(np.sqrt(parts * 30 / 2))
    assert row["cost"] == row["n_prompts"] * (30 + 2 * row["n_samples"])
    assert row["cost"] <= frame["cost"].min() * 1.02
    assert not canopy_store.power(pilot, **options)["optimal"].any()


def test_what_the_prompts_that_there_are_detect(pilot):
    found = canopy_store.power(pilot, metric="entropy_rate", prompts=30, samples=(8,)).row(0, named=True)
    variance = found["sd_prompts"] ** 2 + found["sd_rollouts"] ** 2 / 8
    assert power_of(30, variance, Aim(found["delta"])) == pytest.approx(0.8)
    assert found["delta_upper"] > found["delta"]
    planned = canopy_store.power(pilot, metric="entropy_rate", delta=found["delta"], samples=(8,))
    assert planned["n_prompts"][0] in (30, 31)


def test_the_samples_that_a_regression_needs(pilot, canopy):
    """Reliability written out; at the number of samples that is told it is what was asked for."""
    frame = canopy_store.power_of_regression(pilot, 0.995)
    rates = canopy_store.read(pilot, "rollout_metrics")
    for row in frame.iter_rows(named=True):
        each = rates.filter(variant=row["variant"]).group_by("prompt_id")
        each = each.agg(pl.col("entropy_rate").mean().alias("mean"), pl.col("entropy_rate").var())
        error, between = (
            each["entropy_rate"].mean(),
            each["mean"].var() - each["entropy_rate"].mean() / SAMPLES,
        )
        assert row["reliability"] == pytest.approx(between / (between + error / SAMPLES))
        needed = row["samples_wanted"]
        reached = [between / (between + error / m) for m in (needed - 1, needed)]
        assert reached[0] < 0.995 <= reached[1]
    line = ("power", "--store", pilot, "--reliability")
    code, out, _ = canopy(*line, 0.995, "--format", "json")
    assert code == 0
    assert pl.DataFrame(json.loads(out)).equals(frame)
    assert canopy(*line, 0.9)[0] == 0
    refused(canopy(*line, 1.5), 2, "--reliability 1.5")


def test_what_power_refuses(pilot, tmp_path):
    def call(error, match, **options):
        with pytest.raises(error, match=match):
            canopy_store.power(pilot, **{"metric": "entropy_rate", "delta": 0.1, **options})

    call(UsageError, "--delta 0", delta=0)
    call(UsageError, "either --delta", delta=None)
    call(UsageError, "either --delta", prompts=20)
    call(UsageError, "at least 5", delta=None, prompts=4)
    call(UsageError, "more than 3", metric="rho_pearson", samples=[3])
    call(UsageError, "--cost-prompt", cost_prompt=-1)
    call(UsageError, "more than --alpha", power=0.01)
    call(UsageError, "--metric vendi_score", metric="vendi_score")
    call(DataError, "no such variant", baseline="none")
    with pytest.raises(DataError, match="too few prompts"):
        canopy_store.power(pilot_store(tmp_path, 1), metric="entropy_rate", delta=0.1)


def test_the_command_says_the_plan_in_words(pilot, canopy):
    line = ("power", "--store", pilot, "--metric", "entropy_rate", "--samples", 8)
    code, out, _ = canopy(*line, "--delta", 0.05)
    assert code == 0
    frame = canopy_store.power(pilot, metric="entropy_rate", delta=0.05, samples=(8,))
    assert out.startswith(f"sft: {frame['n_prompts'][0]} prompts of 8 samples detect a change of 0.05")
    code, out, _ = canopy(*line, "--delta", 0.05, "--format", "json")
    assert pl.DataFrame(json.loads(out)).equals(frame)
    refused(canopy("power", "--store", pilot), 2, "--metric", "--reliability")
