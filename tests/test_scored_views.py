"""The views over scores that are written by hand, against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from stores import rollout_rows, write_parquet, write_scores

import canopy_store

OWN = {"temperature": 1.0, "top_k": 50, "top_p": 0.9}


@pytest.mark.parametrize(
    "other", [{"temperature": 0.7}, {"top_k": 20}, {"top_k": 0}, {"top_p": 1.0}, {"top_p": None}]
)
def test_scores_under_another_policy_complete_no_run(tmp_path, other):
    rows = [{**row, "n_tokens": 2} for row in rollout_rows(lengths=(2, 2), prompts=("p", "q"))]
    rows = [{key: value for key, value in row.items() if key != "entropy"} for row in rows]
    root = tmp_path / "s"
    canopy_store.import_rollouts(root, write_parquet(tmp_path / "in.parquet", rows), **OWN)
    logprobs = {(row["prompt_id"], row["sample"]): [-0.25, -0.5] for row in rows}
    write_scores(root, {**OWN, **other}, logprobs)
    assert canopy_store.read(root, "prompt_metrics")["ce_star"].null_count() == 2
    assert not canopy_store.read(root, "scored_rollouts")["same_policy"].any()
    write_scores(root, OWN, logprobs)
    assert canopy_store.read(root, "prompt_metrics")["ce_star"].to_list() == [1.0, 1.0]
    assert canopy_store.read(root, "rollout_metrics")["surprisal_sum"].to_list() == [0.75] * 4
    assert canopy_store.read(root, "scored_rollouts")["same_policy"].sum() == 4


def test_divergences_and_their_errors_are_those_of_the_prompts_that_have_them(tmp_path):
    """Pooled over four prompts: of one all is outside the scorer's support, of another one rollout."""
    rng = np.random.default_rng(6)
    rows = rollout_rows(lengths=(2, 3, 4), prompts=("p", "q", "r", "s"))
    rows = [{**row, "logprob": (-rng.gamma(1, 1, len(row["entropy"]))).tolist()} for row in rows]
    root = tmp_path / "s"
    canopy_store.import_rollouts(root, write_parquet(tmp_path / "in.parquet", rows), **OWN)
    policy = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    logprobs = {
        (row["prompt_id"], row["sample"]): [
            -math.inf if row["prompt_id"] == "s" else -x for x in rng.gamma(1, 1, len(row["logprob"]))
        ]
        for row in rows
    }
    logprobs["r", 0] = [-math.inf] * 2
    write_scores(root, policy, logprobs)
    crossed = np.array([-sum(steps) for steps in logprobs.values()]).reshape(4, 3)[:3]
    crossed[2, 0] = math.nan
    ratios = crossed - np.array([-sum(row["logprob"]) for row in rows]).reshape(4, 3)[:3]
    (row,) = canopy_store.read(root, "kl_divergence").to_dicts()
    assert (row["n_prompts"], row["n_rollouts"], row["n_outside"]) == (4, 12, 4)
    for name, values in (("cross_entropy", crossed), ("kl", ratios)):
        per_prompt = np.nanstd(values, axis=1, ddof=1) / np.sqrt([3, 3, 2])
        assert row[name] == pytest.approx(np.nanmean(values, axis=1).mean(), abs=1e-6)
        assert row[f"{name}_se"] == pytest.approx(math.sqrt((per_prompt**2).sum()) / 3, abs=1e-6)
    means = np.nanmean(ratios, axis=1)
    assert row["kl_se_prompts"] == pytest.approx(means.std(ddof=1) / math.sqrt(3), abs=1e-6)
