"""The views of a rollout's steps against numpy and scipy: forking tokens, density, differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from stores import rollout_rows, write_parquet, write_scores

import canopy_store

OWN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
LENGTHS = (1, 2, 4, 5, 6, 10, 11, 23)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store, its rollouts and what a scorer gives of them; many entropies are equal, some all 0."""
    folder = tmp_path_factory.mktemp("steps")
    rng = np.random.default_rng(3)
    rows = []
    for row in rollout_rows(lengths=LENGTHS, prompts=("p", "q", "zero")):
        n = len(row["entropy"])
        entropy = rng.choice([0.0, 0.5, 0.5, 1.25, 3.0], n) * (row["prompt_id"] != "zero")
        chars = rng.integers(0, 4, n)
        text = "".join(rng.choice(list("aé東𝔘 \n"), int(chars.sum())))
        rows.append(
            {
                **row,
                "entropy": entropy.tolist(),
                "logprob": (-rng.gamma(1, 1, n)).astype(np.float32).tolist(),
                "token_ids": rng.integers(0, 99, n).tolist(),
                "token_chars": chars.tolist(),
                "text": text,
            }
        )
    root = folder / "s"
    canopy_store.import_rollouts(root, write_parquet(folder / "in.parquet", rows), **OWN)
    scored = {
        (r["prompt_id"], r["sample"]): (-rng.gamma(1, 1, len(r["logprob"]))).astype(np.float32).tolist()
        for r in rows
    }
    scored["q", 3][1] = -math.inf
    write_scores(root, OWN, scored)
    write_scores(root, {**OWN, "temperature": 0.5}, scored)
    return root, {(r["prompt_id"], r["sample"]): r for r in rows}, scored


def by_rollout(root, view):
    return {(r["prompt_id"], r["sample"]): r for r in canopy_store.read(root, view).to_dicts()}


def test_the_top_fifth_of_steps_and_quantiles(made):
    root, rows, _ = made
    found = by_rollout(root, "forking_tokens")
    assert set(found) == set(rows)
    counts = []
    for key, row in rows.items():
        h = np.sort(row["entropy"])
        n = len(h)
        # the fewest steps that are a fifth or more
        k = next(k for k in range(1, n + 1) if 5 * k >= n)
        counts.append(k)
        assert found[key]["n_forking"] == k
        share = None if h.sum() == 0 else pytest.approx(h[n - k :].sum() / h.sum(), abs=1e-12)
        assert found[key]["forking_share"] == share
        assert found[key]["forking_entropy"] == h[n - k]
        for p in (50, 80, 95):
            assert found[key][f"entropy_p{p}"] == pytest.approx(np.quantile(h, p / 100), abs=1e-12)
    assert counts[: len(LENGTHS)] == [1, 1, 1, 1, 2, 2, 3, 5]


def test_variance_and_slope_of_surprisal(made):
    root, rows, _ = made
    found = by_rollout(root, "information_density")
    assert set(found) == set(rows)
    for key, row in rows.items():
        s = -np.array(row["logprob"], np.float64)
        one = found[key]
        assert one["surprisal_rate"] == pytest.approx(s.mean(), abs=1e-12)
        if len(s) == 1:
            assert (one["surprisal_variance"], one["surprisal_slope"]) == (None, None)
            continue
        assert one["surprisal_variance"] == pytest.approx(s.var(ddof=1), abs=1e-12)
        fit = stats.linregress(np.arange(len(s)), s)
        assert one["surprisal_slope"] == pytest.approx(fit.slope, abs=1e-12)


def test_two_models_token_by_token(made):
    root, rows, scored = made
    found = canopy_store.read(root, "token_differences").sort("position").to_dicts()
    assert len(found) == 2 * sum(len(row["logprob"]) for row in rows.values())
    steps = {}
    for step in found:
        key = step["prompt_id"], step["sample"], step["policy"]
        steps.setdefault(key, []).append(step)
    assert len(steps) == 2 * len(rows)
    for (prompt, sample, _), several in steps.items():
        row = rows[prompt, sample]
        assert [s["position"] for s in several] == list(range(1, len(row["logprob"]) + 1))
        assert [s["token_id"] for s in several] == row["token_ids"]
        assert [len(s["token"]) for s in several] == row["token_chars"]
        assert "".join(s["token"] for s in several) == row["text"]
        differences = np.array(scored[prompt, sample], np.float64) - np.array(row["logprob"], np.float64)
        assert [s["logprob_difference"] for s in several] == pytest.approx(
            differences.tolist(), abs=1e-6
        )
        for s in several:
            assert s["entropy_difference"] == s["scorer_token_entropy"] - s["token_entropy"]
    shown = by_rollout(root, "scored_rollouts")
    assert {key: len(r["scorer_entropy"]) for key, r in shown.items()} == {
        key: len(r["logprob"]) for key, r in rows.items()
    }
