"""Estimates of CE* against the double loop, and against the truth of a Markov chain."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from chain import chain_policy, closed_form
from stores import write_parquet

import canopy_store
from canopy_store.analysis.control_variate import ce_star_cv

POLICY = chain_policy(1.0, 0)
ENTROPY = -(POLICY * np.log(POLICY)).sum(1)


def walk(rng: np.random.Generator, rollouts: int, cap: int) -> tuple[np.ndarray, ...]:
    """Entropy and ending probability of each step (n, cap), 0 after the last; lengths; which stopped."""
    state, alive = np.ones(rollouts, int), np.ones(rollouts, bool)
    h, q = np.zeros((rollouts, cap)), np.zeros((rollouts, cap))
    lengths, edges = np.zeros(rollouts, int), POLICY.cumsum(1)
    for t in range(cap):
        h[alive, t], q[alive, t] = ENTROPY[state[alive]], POLICY[state[alive], 0]
        lengths += alive
        state = np.where(alive, (rng.random(rollouts)[:, None] > edges[state]).sum(1), state)
        alive &= state != 0
    return h, q, lengths, ~alive


def rows_of(h, q, lengths, stopped, **more) -> list[dict]:
    return [
        {
            "family": "f",
            "variant": "base",
            "task": "t",
            "prompt_id": "p",
            "sample": i,
            "entropy": h[i, :n].tolist(),
            "logprob": (-h[i, :n]).tolist(),
            "eos_logprob": np.log(np.maximum(q[i, :n], 1e-300)).tolist(),
            "finish_reason": "stop" if stopped[i] else "length",
            **more,
        }
        for i, n in enumerate(lengths)
    ]


def imported(tmp_path, rows, cap=None):
    root = tmp_path / "s"
    file = write_parquet(tmp_path / "in.parquet", rows)
    canopy_store.import_rollouts(root, file, max_new_tokens=cap)
    return root


CASES = {
    "a chain": (6, 12, None),
    "two rollouts": (2, 12, None),
    "all cut": (5, 4, "all cut"),
    "one length": (5, 4, "stopped"),
    "one token each": (4, 1, "stopped"),
    "no cap": (6, 12, "no cap"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_and_its_error_are_those_of_the_double_loop(case, tmp_path):
    m, width, kind = CASES[case]
    rng = np.random.default_rng(len(case))
    lengths = rng.integers(1, width + 1, m)
    if kind in ("all cut", "stopped"):
        lengths[:] = width
    stopped = {"all cut": np.zeros(m, bool), "stopped": np.ones(m, bool)}.get(kind, lengths < width)
    here = np.arange(width) < lengths[:, None]
    h, q = np.where(here, rng.gamma(1.5, 0.7, here.shape), 0), np.where(here, rng.random(here.shape), 0)
    rows = rows_of(h, q, lengths, stopped)
    cap = None if kind == "no cap" else width
    root = imported(tmp_path, rows, cap)
    (row,) = canopy_store.ce_star_estimates(root).to_dicts()
    value, se = reference.ce_star_cv(rows, cap)
    assert row["ce_star_cv"] == pytest.approx(value, abs=1e-9)
    assert row["ce_star_cv_se"] == pytest.approx(se, abs=1e-9)
    sums = [r["entropy_sum"] for r in map(reference.rollout_metrics, rows)]
    assert row["ce_star"] == pytest.approx(np.mean(sums), abs=1e-9)
    assert row["ce_star_se"] == pytest.approx(np.std(sums, ddof=1) / np.sqrt(m), abs=1e-9)
    # at a horizon it is the estimate of the rollouts that were cut there
    (at_3,) = canopy_store.ce_star_estimates(root, horizon=3).to_dicts()
    shorter = [
        {**r, "finish_reason": "length" if len(r["entropy"]) > 3 else r["finish_reason"]}
        | {name: r[name][:3] for name in ("entropy", "logprob", "eos_logprob")}
        for r in rows
    ]
    value, se = reference.ce_star_cv(shorter, min(3, cap or 3))
    assert at_3["ce_star_cv"] == pytest.approx(value, abs=1e-9)
    assert at_3["ce_star_cv_se"] == pytest.approx(se, abs=1e-9)


def test_what_has_no_estimate(tmp_path):
    alone = rows_of(np.ones((1, 2)), np.full((1, 2), 0.5), np.array([2]), np.array([True]))
    rows = [*alone, *({**alone[0], "prompt_id": "q", "sample": i} for i in range(3))]
    rows[-1]["finish_reason"] = None
    frame = canopy_store.ce_star_estimates(imported(tmp_path, rows))
    assert frame["n_rollouts"].to_list() == [1, 3]
    assert frame["ce_star_cv"].to_list() == frame["ce_star_cv_se"].to_list() == [None, None]
    assert frame["ce_star"].to_list() == [2.0, 2.0]
    with pytest.raises(canopy_store.DataError, match="--selection best"):
        canopy_store.ce_star_estimates(tmp_path / "s", selection="best")


def test_the_estimate_is_unbiased_and_less_noisy_on_a_chain():
    rng = np.random.default_rng(4)
    h, q, lengths, stopped = walk(rng, 2000 * 16, 400)
    assert stopped.all()
    truth = closed_form(POLICY, 1)["ce_star"]
    found = np.array(
        [
            ce_star_cv(h[i : i + 16], q[i : i + 16], lengths[i : i + 16], stopped[i : i + 16], 400)
            for i in range(0, len(h), 16)
        ]
    )
    plain = h.sum(1).reshape(-1, 16).mean(1)
    se = found[:, 0].std(ddof=1) / np.sqrt(len(found))
    assert abs(found[:, 0].mean() - truth) < 4 * se
    assert found[:, 0].var() < 0.5 * plain.var()
    # the jackknife says no less than there is, and with so few rollouts up to twice and more of it
    assert 1 < (found[:, 1] ** 2).mean() / found[:, 0].var() < 3


def test_a_comparison_takes_it(tmp_path, canopy):
    rng = np.random.default_rng(1)
    rows = []
    for prompt in "abcd":
        for variant in ("base", "sft"):
            walked = walk(rng, 16, 40)
            rows += rows_of(*walked, prompt_id=prompt, variant=variant)
    root = imported(tmp_path, rows, 40)
    frame = canopy_store.compare(root, metrics=["ce_star_cv", "ce_star"], by="task")
    estimates = canopy_store.ce_star_estimates(root)
    cv = frame.filter(metric="ce_star_cv").to_dicts()[0]
    for part, variant in (("baseline", "base"), ("treated", "sft")):
        mean = estimates.filter(variant=variant)["ce_star_cv"].mean()
        assert cv[part] == pytest.approx(mean, abs=1e-12)
    assert cv["baseline"] != frame.filter(metric="ce_star")["baseline"][0]
    assert canopy("compare", "--store", root, "--metric", "ce_star_cv")[0] == 0
    code, _, err = canopy("compare", "--store", root, "--metric", "ce_star_cv", "--resample", "both")
    assert (code, "not for ce_star_cv" in err) == (2, True)
