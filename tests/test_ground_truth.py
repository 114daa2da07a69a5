"""Ingest against a closed form: a chain whose H(N, Y), E[N] and length entropy are known exactly."""

import itertools

import numpy as np
import pytest
from chain import PROMPTS_TO_A, chain_policy, closed_form
from stores import write_prompts

import canopy_store

SAMPLES = 2000


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (1.5, 6)])
def test_twenty_thousand_rollouts_match_the_closed_form(tmp_path, chain, canopy, temperature, top_k):
    prompts = write_prompts(tmp_path / "p.jsonl", *PROMPTS_TO_A)
    code, _, err = canopy(
        "ingest",
        "rollouts",
        "--store",
        tmp_path / "s",
        "--model",
        chain,
        "--family",
        "chain",
        "--variant",
        "base",
        "--task",
        "walk",
        "--prompts",
        prompts,
        "--samples",
        SAMPLES,
        "--max-new-tokens",
        500,
        "--batch-size",
        SAMPLES,
        "--temperature",
        temperature,
        "--top-k",
        top_k,
        "--seed",
        11,
    )
    assert code == 0, err
    truth = closed_form(chain_policy(temperature, top_k), start=1)
    rollouts = canopy_store.read(tmp_path / "s", "rollouts")
    assert len(rollouts) == 20_000
    assert (rollouts["finish_reason"] == "stop").all()
    for column, name in (
        ("entropy_sum", "ce_star"),
        ("surprisal_sum", "ce_star"),
        ("n_tokens", "mean_length"),
        ("stop_entropy_sum", "stop_entropy"),
    ):
        values = rollouts[column].to_numpy().astype(float)
        error = values.std(ddof=1) / np.sqrt(len(values))
        assert abs(values.mean() - truth[name]) < 4 * error, column
    # the plug-in entropy of the lengths, with Miller and Madow's correction of its bias
    counts = np.unique(rollouts["n_tokens"].to_numpy(), return_counts=True)[1]
    p = counts / counts.sum()
    plug_in = -(p * np.log(p)).sum() + (len(p) - 1) / (2 * len(rollouts))
    error = np.sqrt((p * np.log(p) ** 2).sum() - (p * np.log(p)).sum() ** 2) / np.sqrt(len(rollouts))
    assert abs(plug_in - truth["length_entropy"]) < 4 * error + 1e-3
    check = canopy_store.read(tmp_path / "s", "logging_check").row(0, named=True)
    assert check["ok"]
    assert abs(check["z"]) < 4
    pooled = canopy_store.read(tmp_path / "s", "model_metrics").row(0, named=True)
    assert pooled["ce_star"] == pytest.approx(rollouts["entropy_sum"].mean(), rel=1e-12)
    assert pooled["truncation_rate"] == 0


@pytest.mark.parametrize("width", [1, 3, 32, 500])
def test_every_width_matches_the_closed_form(chain, width):
    from canopy_store.ingest.draw import Job, Sampling, uniforms
    from canopy_store.ingest.models import load_model
    from canopy_store.ingest.sample import sample_prompts

    model, _, _ = load_model(str(chain), "cpu", "float32")
    n = 150 if width == 1 else 500
    jobs = [
        Job([state, 1], range(n), lambda s, p=state: uniforms("w", 3, str(p), s, 500))
        for state in (2, 5)
    ]
    rollouts = [
        r for found in sample_prompts(model, jobs, Sampling(1, 0, 1, 500, (0,), 0, width)) for r in found
    ]
    assert len(rollouts) == 2 * n
    truth = closed_form(chain_policy(1.0, 0), start=1)
    stop = [np.exp(r.eos_logprob.astype(float)) for r in rollouts]
    for values, name in (
        ([r.entropy.sum() for r in rollouts], "ce_star"),
        ([-r.logprob.sum() for r in rollouts], "ce_star"),
        ([len(r.token_ids) for r in rollouts], "mean_length"),
        ([-(q * np.log(q) + (1 - q) * np.log1p(-q)).sum() for q in stop], "stop_entropy"),
    ):
        error = np.std(values, ddof=1) / np.sqrt(len(values))
        assert abs(np.mean(values) - truth[name]) < 4 * error, name


def test_a_wrong_log_is_found_out(tmp_path, chain, canopy):
    """logging_check must fail a record logged at another temperature than was sampled."""
    prompts = write_prompts(tmp_path / "p.jsonl", *PROMPTS_TO_A[:2])
    for name, temperature in (("right", 1.0), ("hot", 1.5)):
        assert (
            canopy(
                "ingest",
                "rollouts",
                "--store",
                tmp_path / name,
                "--model",
                chain,
                "--family",
                "chain",
                "--variant",
                "base",
                "--task",
                "walk",
                "--prompts",
                prompts,
                "--samples",
                500,
                "--max-new-tokens",
                200,
                "--batch-size",
                500,
                "--temperature",
                temperature,
            )[0]
            == 0
        )
    right = canopy_store.read(tmp_path / "right", "rollouts")
    # entropies of the right run beside surprisals of tokens drawn from a hotter policy
    policy = chain_policy(1.0, 0)
    hot = canopy_store.read(tmp_path / "hot", "rollouts")
    rows = []
    for row in hot.iter_rows(named=True):
        path = [1, *row["token_ids"]]
        rows.append(
            {
                "family": "chain",
                "variant": "wrong",
                "task": "walk",
                "prompt_id": row["prompt_id"],
                "sample": row["sample"],
                "logprob": [float(np.log(policy[a, b])) for a, b in itertools.pairwise(path)],
                "entropy": [float(-(policy[a] * np.log(policy[a])).sum()) for a in path[:-1]],
            }
        )
    import polars as pl

    pl.DataFrame(rows).write_parquet(tmp_path / "wrong.parquet")
    canopy_store.import_rollouts(tmp_path / "wrong", tmp_path / "wrong.parquet")
    assert not canopy_store.read(tmp_path / "wrong", "logging_check")["ok"][0]
    assert canopy_store.read(tmp_path / "right", "logging_check")["ok"][0]
    assert len(right) == 1000
