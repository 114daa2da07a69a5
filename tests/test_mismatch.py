"""Two logs of the same tokens: every measure against its formula, and a wrong log found."""

from __future__ import annotations

import math

import numpy as np
import pytest
from stores import ingest_arguments, rollout_rows, write_parquet, write_prompts, write_scores

import canopy_store
from canopy_store.cli import main
from canopy_store.ingest.score import ingest_scores

POLICY = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
NAMES = ("mean_log_ratio", "k1", "k3", "chi2", "ess_share", "share_out_of_band", "max_abs_log_ratio")


def by_hand(ratios: list[float]) -> dict[str, float | None]:
    """The measures of log ratios, in float64; None of none."""
    d = np.array([r for r in ratios if r > -math.inf])
    if not len(d):
        return dict.fromkeys(NAMES)
    with np.errstate(over="ignore"):
        w, scaled = np.exp(d), np.exp(d - d.max())
        return {
            "mean_log_ratio": d.mean(),
            "k1": -d.mean(),
            "k3": (w - 1 - d).mean(),
            "chi2": (w**2 - 1).mean(),
            "ess_share": scaled.sum() ** 2 / (scaled**2).sum() / len(d),
            "share_out_of_band": (abs(d) > 0.2).mean(),
            "max_abs_log_ratio": abs(d).max(),
        }


def store_of(tmp_path, logged: dict, scored: dict, policy=POLICY, **scores):
    lengths = {key: len(steps) for key, steps in logged.items()}
    rows = [
        {**rollout_rows(lengths=(n,), prompts=(p,))[0], "sample": s, "logprob": logged[p, s]}
        for (p, s), n in lengths.items()
    ]
    canopy_store.import_rollouts(tmp_path / "s", write_parquet(tmp_path / "in.parquet", rows), **POLICY)
    write_scores(tmp_path / "s", policy, scored, **scores)
    return tmp_path / "s"


def check(root, logged: dict, scored: dict) -> None:
    """Both views of the one run and scorer, against the formulas."""
    f32 = {key: np.float32(steps).astype(float) for key, steps in logged.items()}
    ratios = {key: (np.float32(scored[key]).astype(float) - f32[key]).tolist() for key in logged}
    (row,) = canopy_store.read(root, "logprob_mismatch").to_dicts()
    tokens = [d for key in sorted(ratios) for d in ratios[key]]
    assert (row["n_rollouts"], row["n_tokens"]) == (len(logged), len(tokens))
    assert row["n_outside"] == sum(d == -math.inf for d in tokens)
    whole = by_hand([sum(steps) for steps in ratios.values()])
    expected = by_hand(tokens) | {f"rollout_{name}": whole[name] for name in NAMES[:5]}
    for name, value in expected.items():
        assert row[name] == (value if value is None else pytest.approx(value, rel=1e-9, abs=1e-9)), name
    positions = canopy_store.read(root, "logprob_mismatch_by_position").sort("position").to_dicts()
    assert [p["position"] for p in positions] == [*range(1, max(map(len, ratios.values())) + 1)]
    for place in positions:
        here = [
            steps[place["position"] - 1] for steps in ratios.values() if len(steps) >= place["position"]
        ]
        want = by_hand(here)
        assert (place["active"], place["n_outside"]) == (len(here), here.count(-math.inf))
        for name in (*NAMES[:4], *NAMES[5:]):
            value = want[name]
            assert place[name] == (value if value is None else pytest.approx(value, rel=1e-9, abs=1e-9))


@pytest.mark.parametrize("seed", range(4))
def test_mismatches_of_random_logs(tmp_path, seed):
    rng = np.random.default_rng(seed)
    keys = [(p, s) for p in "pqr" for s in range(int(rng.integers(1, 5)))]
    logged = {key: (-rng.gamma(1, 1, rng.integers(1, 6))).tolist() for key in keys}
    scale = [0.0, 0.05, 0.5, 2.0][seed]
    scored = {k: np.minimum(x + rng.normal(0, scale, len(x)), 0).tolist() for k, x in logged.items()}
    if seed > 1:
        scored["p", 0][-1] = -math.inf
    check(store_of(tmp_path, logged, scored), logged, scored)


@pytest.mark.parametrize(
    ("logged", "scored"),
    [
        ([-1.0], [-1.0]),  # one token: no mismatch, all of the sample
        ([-1.0], [-math.inf]),  # nothing that the scorer could give
        ([-900.0, -0.5], [-0.25, -0.5]),  # a weight too large for a number
        ([0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_degenerate_mismatches(tmp_path, logged, scored):
    logged, scored = {("p", 0): logged}, {("p", 0): scored}
    check(store_of(tmp_path, logged, scored), logged, scored)


def test_a_run_that_logged_nothing_has_no_mismatch_with_what_completes_it(tmp_path):
    rows = [{**row, "n_tokens": 2} for row in rollout_rows(lengths=(2, 2))]
    rows = [{key: value for key, value in row.items() if key != "entropy"} for row in rows]
    canopy_store.import_rollouts(tmp_path / "s", write_parquet(tmp_path / "in.parquet", rows), **POLICY)
    write_scores(tmp_path / "s", POLICY, {("p", 0): [-0.5, -0.5], ("p", 1): [-0.5, -1.0]})
    assert canopy_store.read(tmp_path / "s", "rollout_metrics")["surprisal_sum"].null_count() == 0
    for view in ("logged_twice", "logprob_mismatch", "logprob_mismatch_by_position"):
        assert canopy_store.read(tmp_path / "s", view).is_empty()


def test_sampled_at_another_temperature_and_logged_plain_is_found(tmp_path, chain):
    """Of one policy there is no mismatch beyond rounding; the plain model is another, which is found."""
    prompts = write_prompts(tmp_path / "p.jsonl", "b a", "c d")
    root = tmp_path / "s"
    more = {"samples": 30, "max-new-tokens": 20, "temperature": 0.8}
    assert main(ingest_arguments(root, chain, prompts, **more)) == 0
    ingest_scores(root, str(chain))
    ingest_scores(root, str(chain), policy="full")
    frame = canopy_store.read(root, "logprob_mismatch")
    (own,) = frame.filter("same_policy").to_dicts()
    (plain,) = frame.filter(~frame["same_policy"]).to_dicts()
    assert own["same_model"]
    assert own["max_abs_log_ratio"] < 1e-5
    assert own["ess_share"] == pytest.approx(1, abs=1e-9)
    assert own["share_out_of_band"] == 0
    assert plain["share_out_of_band"] > 0.05
    assert 0.005 < plain["k3"] < 0.2
    assert plain["ess_share"] < 0.99
    assert plain["rollout_k1"] > 5 * plain["k1"]
