"""The plain words of a comparison: first line, verdicts and marks."""

from __future__ import annotations

import polars as pl
import pytest

from canopy_store.analysis.words import headline, marks, verdict

ROW = {
    "level": "family",
    "family": "smollm2",
    "task": "(all)",
    "baseline_variant": "base",
    "variant": "sft",
    "selection": "all",
    "selection_rule": None,
    "metric": "ce_star",
    "n_prompts": 16,
    "n_tasks": 4,
    "baseline": 136.8,
    "treated": 72.9,
    "delta": -63.9,
    "delta_ci_low": -72.0,
    "delta_ci_high": -56.0,
    "percent_delta": -46.7,
    "percent_delta_ci_low": -53.2,
    "percent_delta_ci_high": -40.1,
    "p": 1e-8,
    "p_holm": 1e-7,
    "margin": None,
    "equivalent": None,
    "confidence": 0.95,
    "baseline_cut": 0.01,
    "treated_cut": 0.02,
    "horizon": 96,
    "rarefied_to": None,
    "allowed": None,
    "reason": None,
}
RHO = {
    "metric": "rho_pearson",
    "delta": 0.286,
    "percent_delta": None,
    "percent_delta_ci_low": None,
    "percent_delta_ci_high": None,
    "p_holm": 0.2,
}


def test_the_first_line():
    frame = pl.DataFrame([ROW, {**ROW, **RHO}], infer_schema_length=None)
    assert headline(frame) == (
        "sft changes CE* (first 96 tokens) by -63.9 nats, -46.7% [-53, -40], over 16 prompts of 4 "
        "tasks; ρ rises by 0.29, not distinguishable from 0 after Holm."
    )
    apart = pl.DataFrame([{**ROW, "baseline_cut": 0.83, "treated_cut": 0.09, "p_holm": 0.3}])
    assert "no change of CE* (first 96 tokens) can be told after Holm: -63.9 nats" in headline(apart)
    assert "Cut shares differ (83% and 9%)" in headline(apart)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "falls"),
        ({"delta": 3.0}, "rises"),
        ({"p_holm": 0.06}, "no change can be told"),
        ({"p_holm": 0.06, "confidence": 0.9}, "falls"),
        ({"p_holm": 0.6, "margin": 2.0, "equivalent": True}, "equivalent within ±2"),
        ({"p": None, "p_holm": None}, "too few prompts to tell"),
        ({"delta": None, "p": None, "p_holm": None}, "not defined"),
        ({"treated_cut": 0.12, "baseline_cut": 0.1}, "falls (12% cut)"),
    ],
)
def test_a_verdict(change, expected):
    assert verdict({**ROW, **change}) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"baseline_cut": None, "treated_cut": 0.5}, ["50% cut"]),
        ({"baseline_cut": 0.83, "treated_cut": 0.09}, ["cut shares differ: 83% and 9%"]),
        ({"baseline_cut": 0.83, "treated_cut": 0.09, "metric": "truncation_rate"}, []),
        ({"selection": "reward_top_70"}, ["subset mean, not an entropy"]),
        ({"selection": "reward_top_70", "metric": "entropy_rate"}, []),
        (
            {"selection": "mine", "selection_rule": "lengths", "metric": "entropy_rate"},
            ["conditions on length, an outcome"],
        ),
        (
            {"metric": "vendi_score", "rarefied_to": 16, "allowed": "temperature differs 1 and 0.8"},
            ["at 16 rollouts a prompt", "allowed: temperature differs 1 and 0.8"],
        ),
    ],
)
def test_marks(change, expected):
    assert marks({**ROW, **change}) == expected
