"""Every column of every view against tests/reference.py, on random stores and on degenerate ones."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import canopy_store
from canopy_store.sql.horizon import AT_HORIZON

RUN = ("family", "variant", "task", "run_id", "selection")
KEYS = {
    "rollout_metrics": (*RUN, "prompt_id", "sample", "embedder"),
    "prompt_metrics": (*RUN, "prompt_id", "embedder"),
    "model_metrics": (*RUN, "embedder"),
    "ce_star_decomposition": RUN,
    "entropy_trajectory": (*RUN, "position"),
    "eos_trajectory": (*RUN, "position"),
    "length_terciles": (*RUN, "prompt_id", "embedder", "tercile"),
    "model_length_terciles": (*RUN, "embedder", "tercile"),
    "panel": (*RUN, "prompt_id", "embedder"),
    "logging_check": RUN,
    "stop_check": RUN,
    "truncation": (*RUN, "prompt_id"),
    "embedding_spectra": ("run_id", "prompt_id", "embedder", "selection"),
}
ORDERS = (0, 0.1, 0.5, 1, 1.5, 2, 3.7, 20, math.inf)

# Unit vectors that floats hold exactly, so that equal distances are equal to the last bit and the
# ranks have ties.
EXACT = [
    [1.0, 0.0, 0.0, 0.0],
    [0.0, 1.0, 0.0, 0.0],
    [-1.0, 0.0, 0.0, 0.0],
    [0.5, 0.5, 0.5, 0.5],
    [0.5, -0.5, 0.5, -0.5],
    [0.5, 0.5, -0.5, -0.5],
]
FEW = [0.0, 0.1, 0.5, 0.5, 1.3, 2.7]

Run = dict[str, Any]  # family, variant, task, and prompts: {prompt_id: [rollout, …]}

# --- random stores ---------------------------------------------------------------------------------


@st.composite
def runs_of_a_store(draw: st.DrawFn) -> list[Run]:
    """Runs, without finish reasons that import has to fill in; hypothesis draws what is degenerate."""
    names = draw(
        st.lists(
            st.tuples(st.sampled_from("ab"), st.sampled_from(["base", "sft"]), st.sampled_from("st")),
            min_size=1,
            max_size=3,
            unique=True,
        )
    )
    runs = []
    for family, variant, task in names:
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        palette = draw(st.sampled_from(["few", "random", "uniform", "zero"]))
        vectors = draw(st.sampled_from([None, "exact", "random", "identical"]))
        logprob, eos, finish = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
        prompts = {}
        sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
        for number, size in enumerate(sizes):
            longest = draw(st.integers(1, 12))
            constant = draw(st.booleans())
            lengths = [longest if constant else int(rng.integers(1, longest + 1)) for _ in range(size)]
            # numbers need not be consecutive, and the file need not have them in order
            samples = sorted(rng.choice(20, size, replace=False).tolist())
            rollouts = []
            for sample, n in zip(samples, lengths, strict=True):
                rollout = {"sample": sample, "entropy": draw_entropies(rng, palette, n)}
                if logprob:
                    rollout["logprob"] = rng.choice([0.0, -0.1, -0.5, -1.3, -7.0], n).tolist()
                if eos:
                    choices = [-math.inf, 0.0, -1e-7, -0.1, -0.7, -5.0, -40.0]
                    rollout["eos_logprob"] = rng.choice(choices, n).tolist()
                if finish:
                    rollout["finish_reason"] = str(rng.choice(["stop", "length"]))
                rollouts.append(rollout)
            if vectors == "exact":
                for rollout in rollouts:
                    rollout["embedding"] = EXACT[rng.integers(len(EXACT))]
            elif vectors:
                # any length will do: the store makes them unit
                drawn = rng.normal(size=(1 if vectors == "identical" else size, 4)).tolist()
                for i, rollout in enumerate(rollouts):
                    rollout["embedding"] = drawn[i % len(drawn)]
            prompts[f"p{number}"] = rollouts
        runs.append({"family": family, "variant": variant, "task": task, "prompts": prompts})
    return runs


def draw_entropies(rng: np.random.Generator, palette: str, n: int) -> list[float]:
    if palette == "few":
        return rng.choice(FEW, n).tolist()
    if palette == "random":
        return rng.gamma(1.5, 0.7, n).tolist()
    return [0.7 if palette == "uniform" else 0.0] * n


@contextmanager
def imported(runs: list[Run], max_new_tokens: int | None = None) -> Iterator[Any]:
    """A connection to a store of the runs; fills in the finish reasons that import must find."""
    rows = []
    for run in runs:
        for prompt_id, rollouts in run["prompts"].items():
            for rollout in rollouts:
                key = {name: run[name] for name in ("family", "variant", "task")}
                rows.append({**key, "prompt_id": prompt_id, **rollout})
                if max_new_tokens and "finish_reason" not in rollout:
                    cut = len(rollout["entropy"]) >= max_new_tokens
                    rollout["finish_reason"] = "length" if cut else "stop"
    rows = [rows[i] for i in np.random.default_rng(len(rows)).permutation(len(rows))]
    doubles = pa.list_(pa.float64())
    kinds = {
        "family": pa.string(),
        "variant": pa.string(),
        "task": pa.string(),
        "prompt_id": pa.string(),
        "sample": pa.int64(),
        "entropy": doubles,
        "logprob": doubles,
        "eos_logprob": doubles,
        "embedding": doubles,
        "finish_reason": pa.string(),
    }
    used = [name for name in kinds if any(name in row for row in rows)]
    table = pa.table({n: pa.array([row.get(n) for row in rows], kinds[n]) for n in used})
    with tempfile.TemporaryDirectory() as folder:
        file, root = Path(folder) / "in.parquet", Path(folder) / "store"
        pq.write_table(table, file)
        canopy_store.import_rollouts(root, file, max_new_tokens=max_new_tokens)
        with canopy_store.open(root) as con:
            yield con


# --- what the views must hold ----------------------------------------------------------------------


def expected_rows(runs: list[Run], caps: dict[str, int | None]) -> dict[str, list[dict[str, Any]]]:
    """Every row of every view, from the reference; of a rollout that was cut nothing is embedded."""
    views: dict[str, list[dict[str, Any]]] = {view: [] for view in KEYS}
    for run in runs:
        key = {name: run[name] for name in ("family", "variant", "task")}
        key |= {"run_id": ".".join(key.values()), "selection": "all"}
        embedded = "embedding" in next(iter(run["prompts"].values()))[0]
        with_embedder = {**key, "embedder": "imported" if embedded else "none"}
        rollouts = [r for p in run["prompts"].values() for r in p]
        prompts, terciles = [], []
        for prompt_id, chosen in run["prompts"].items():
            prompt = {**with_embedder, "prompt_id": prompt_id}
            whole = embedded and not any(r.get("shortened") for r in chosen)
            unit = reference.unit_embeddings([r["embedding"] for r in chosen]) if whole else None
            distances = reference.semantic_distances(unit) if whole else [None] * len(chosen)
            for rollout, distance in zip(chosen, distances, strict=True):
                views["rollout_metrics"].append(
                    {
                        **prompt,
                        "sample": rollout["sample"],
                        "semantic_distance": distance,
                        **reference.rollout_metrics(rollout),
                    }
                )
            metrics = reference.prompt_metrics(chosen, unit)
            prompts.append(metrics)
            cut_at = {**key, "prompt_id": prompt_id, **reference.truncation(chosen, caps[key["run_id"]])}
            views["truncation"].append(cut_at)
            views["prompt_metrics"].append({**prompt, **metrics})
            views["panel"].append(
                {
                    **prompt,
                    "D": metrics["semantic_diversity"],
                    "R_bar": metrics["entropy_rate"],
                    "N_bar": metrics["mean_length"],
                    "vendi_score": metrics["vendi_score"],
                    "vendi_share": metrics["vendi_score"] and metrics["vendi_score"] / len(chosen),
                    "vendi_norm": (metrics["vendi_score"] - 1) / (len(chosen) - 1)
                    if metrics["vendi_score"] and len(chosen) > 1
                    else None,
                    **reference.error_covariances(chosen, unit),
                }
            )
            terciles.append(reference.length_terciles(chosen, unit))
            for tercile, values in terciles[-1].items():
                views["length_terciles"].append({**prompt, "tercile": tercile, **values})
            if embedded:
                views["embedding_spectra"].append(
                    {
                        **{name: prompt[name] for name in KEYS["embedding_spectra"]},
                        "n": len(chosen),
                        "samples": [r["sample"] for r in chosen],
                        "semantic_distances": distances,
                        "embedding_sum": unit.sum(axis=0).tolist() if whole else None,
                        "eigenvalues": reference.eigenvalues(unit).tolist() if whole else None,
                    }
                )
        views["model_metrics"].append({**with_embedder, **reference.pooled_metrics(prompts)})
        for tercile, values in reference.pooled_terciles(terciles).items():
            views["model_length_terciles"].append({**with_embedder, "tercile": tercile, **values})
        split = reference.decomposition(list(run["prompts"].values()))
        views["ce_star_decomposition"].append({**key, **split})
        for row in reference.entropy_trajectory(rollouts):
            views["entropy_trajectory"].append({**key, **row})
        if "eos_logprob" in rollouts[0]:
            for row in reference.eos_trajectory(rollouts):
                views["eos_trajectory"].append({**key, **row})
        if "logprob" in rollouts[0]:
            views["logging_check"].append({**key, **reference.logging_check(rollouts)})
        stopping = [r for r in rollouts if "eos_logprob" in r and "finish_reason" in r]
        if stopping:
            views["stop_check"].append({**key, **reference.stop_check(stopping)})
    reliabilities = reference.reliabilities(views["panel"])
    for row in views["panel"]:
        row["reliability"] = reliabilities[row["variant"], row["embedder"], row["selection"]]
    return views


def same(found: Any, expected: Any) -> bool:
    """Equal; numbers to 1e-9, relative above 1 and absolute below."""
    if isinstance(expected, list) and isinstance(found, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if found is None or expected is None or not isinstance(expected, float):
        return found == expected
    return abs(found - expected) <= 1e-9 * max(1.0, abs(expected))  # NaN is never the same


def significant(eigenvalues: list[float]) -> list[float]:
    """Without those that are zero but for rounding: how many of them are kept is free."""
    assert all(abs(v) < 1e-12 or v > 1e-12 for v in eigenvalues)
    return [v for v in eigenvalues if v > 1e-12]


def rows_of(con: Any, view: str, horizon: int | None = None) -> dict[tuple, dict[str, Any]]:
    relation = view if horizon is None else f"{view}_at({horizon})"
    found = con.sql(f"select * from {relation}").pl().to_dicts()
    table = {tuple(row[key] for key in KEYS[view]): row for row in found}
    assert len(table) == len(found), f"{view}: a key is there twice"
    return table


def check_every_view(con: Any, runs: list[Run], horizon: int | None = None) -> None:
    """Every view; at a horizon those that have one, against runs that were cut there."""
    wrong = []
    caps = {
        run_id: min((c for c in (cap, horizon) if c is not None), default=None)
        for run_id, cap in con.sql("select run_id, max_new_tokens from runs").fetchall()
    }
    for view, rows in expected_rows(runs, caps).items():
        if horizon is not None and view not in AT_HORIZON:
            continue
        found = rows_of(con, view, horizon)
        expected = {tuple(row[key] for key in KEYS[view]): row for row in rows}
        assert set(found) == set(expected), view
        for key, row in expected.items():
            # a column without a reference would go untested
            assert set(found[key]) == set(row), view
            if view == "embedding_spectra" and row["eigenvalues"] is not None:
                found[key]["eigenvalues"] = significant(found[key]["eigenvalues"])
            for name, value in row.items():
                if not same(found[key][name], value):
                    wrong.append(f"{view} {key} {name}: expected {value}, got {found[key][name]}")
    assert not wrong, "\n".join(wrong)


def check_no_nan(con: Any) -> None:
    columns: dict[str, list[str]] = {}
    for view, name in con.sql(
        "select table_name, column_name from duckdb_columns() where data_type = 'DOUBLE'"
    ).fetchall():
        columns.setdefault(view, []).append(name)
    assert set(columns) >= set(KEYS) - {"embedding_spectra"}
    for view, names in columns.items():
        counts = ", ".join(f'count(*) filter (isnan("{name}"))' for name in names)
        (found,) = con.sql(f'select {counts} from "{view}"').fetchall()
        assert dict.fromkeys(names, 0) == dict(zip(names, found, strict=True)), f"NaN in {view}"
    lists = con.sql(
        "select count(*) from embedding_spectra where len(list_filter("
        "eigenvalues || embedding_sum || semantic_distances, lambda v: isnan(v))) > 0"
    ).fetchall()
    assert lists == [(0,)]


def check_identities(con: Any) -> None:
    """What must hold between columns, whatever the data."""
    pooled = {row["run_id"]: row for row in rows_of(con, "model_metrics").values()}
    for row in rows_of(con, "ce_star_decomposition").values():
        assert same(row["length_rate_product"] + row["cov_within"] + row["cov_between"], row["ce_star"])
        assert same(row["ce_star"], pooled[row["run_id"]]["ce_star"])
        if row["stop_entropy"] is not None:
            assert same(row["stop_entropy"] + row["content_entropy"], row["ce_star"])
    for row in rows_of(con, "rollout_metrics").values():
        if row["stop_entropy_sum"] is not None:
            assert same(row["stop_entropy_sum"] + row["content_entropy_sum"], row["entropy_sum"])
    for row in (*rows_of(con, "prompt_metrics").values(), *pooled.values()):
        assert same(row["gen_ppl"], math.exp(row["ce_star"] / row["mean_length"]))
        assert same(row["branching_factor"], math.exp(row["entropy_rate"]))
        assert same(row["canopy_size_log10"] * math.log(10), row["ce_star"])
        for name in row:
            if name.startswith("rho") and row[name] is not None:
                assert abs(row[name]) <= 1 + 1e-12
        if row["vendi_score"] is not None:
            assert 1 - 1e-9 <= row["vendi_score"] <= row["n_rollouts"] + 1e-9
    # distances of the rollouts average to the prompt's diversity; entropies add up along the rollout
    for con_sum, view_sum in (
        (
            "select run_id, prompt_id, avg(semantic_distance) from rollout_metrics group by all",
            "select run_id, prompt_id, semantic_diversity from prompt_metrics",
        ),
        (
            "select run_id, sum(active * mean_entropy) from entropy_trajectory group by all",
            "select run_id, sum(entropy_sum) from rollout_metrics group by all",
        ),
        (
            "select run_id, sum(active * stop_entropy), sum(active * content_entropy) "
            "from eos_trajectory group by all",
            "select run_id, sum(stop_entropy_sum), sum(content_entropy_sum) from rollout_metrics "
            "group by all having count(stop_entropy_sum) > 0",
        ),
    ):
        left, right = (sorted(con.sql(q).fetchall(), key=str) for q in (con_sum, view_sum))
        assert len(left) == len(right)
        for a, b in zip(sorted(left), sorted(right), strict=True):
            assert same(list(a), list(b)), (con_sum, a, b)


def check_vendi_orders(con: Any, runs: list[Run]) -> None:
    for run in runs:
        run_id = f"{run['family']}.{run['variant']}.{run['task']}"
        for prompt_id, rollouts in run["prompts"].items():
            if "embedding" not in rollouts[0]:
                continue
            unit = reference.unit_embeddings([r["embedding"] for r in rollouts])
            scores = []
            for q in ORDERS:
                order = "'inf'::double" if q == math.inf else str(q)
                [(score,)] = con.execute(
                    f"select vendi_score(eigenvalues, {order}) from embedding_spectra "
                    "where run_id = ? and prompt_id = ?",
                    [run_id, prompt_id],
                ).fetchall()
                expected = reference.vendi_score(unit, q)
                assert same(score, expected), (run_id, prompt_id, q, expected, score)
                scores.append(score)
            # a higher order never counts more
            assert all(b <= a + 1e-9 for a, b in pairwise(scores)), scores


def check(con: Any, runs: list[Run]) -> None:
    check_every_view(con, runs)
    check_no_nan(con)
    check_identities(con)
    check_vendi_orders(con, runs)


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)
@given(runs=runs_of_a_store(), max_new_tokens=st.sampled_from([None, 1, 6]))
def test_every_view_of_a_random_store(runs, max_new_tokens):
    with imported(runs, max_new_tokens) as con:
        check(con, runs)


STEPS = ("entropy", "logprob", "eos_logprob")


def cut(runs: list[Run], horizon: int) -> list[Run]:
    """The runs as they would be had every rollout been cut at its first ``horizon`` tokens."""

    def shorter(rollout: dict[str, Any]) -> dict[str, Any]:
        if len(rollout["entropy"]) <= horizon:
            return rollout
        lists = {name: rollout[name][:horizon] for name in STEPS if name in rollout}
        return {**rollout, **lists, "finish_reason": "length", "shortened": True}

    return [
        {**run, "prompts": {p: [shorter(r) for r in chosen] for p, chosen in run["prompts"].items()}}
        for run in runs
    ]


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)
@given(runs=runs_of_a_store(), max_new_tokens=st.sampled_from([None, 12]))
def test_views_at_a_horizon_are_those_of_rollouts_cut_there(runs, max_new_tokens):
    with imported(runs, max_new_tokens) as con:
        for horizon in (1, 5, 12):
            check_every_view(con, cut(runs, horizon), horizon)


def test_a_store_of_shorter_rollouts_is_a_store_at_that_horizon():
    """Through import itself: what is cut before it is what the macros give after it."""
    rng = np.random.default_rng(8)
    runs = run_of(
        *(
            [
                rollout(
                    *rng.gamma(1.5, 0.7, n),
                    logprob=(-rng.gamma(1.5, 0.7, n)).tolist(),
                    eos_logprob=(-rng.gamma(3, 1, n)).tolist(),
                    finish_reason="stop",
                )
                for n in rng.integers(1, 12, 6)
            ]
            for _ in range(3)
        )
    )
    with imported(runs, 12) as whole, imported(cut(runs, 4), 4) as shorter:
        for view in set(AT_HORIZON) & set(KEYS):
            found, expected = rows_of(whole, view, 4), rows_of(shorter, view)
            assert found.keys() == expected.keys()
            for key, row in expected.items():
                assert {n: v for n, v in row.items() if not same(found[key][n], v)} == {}, (view, key)


@pytest.mark.parametrize("horizon", ["0", "-1", "null"])
def test_a_horizon_is_at_least_one_token(horizon):
    with imported(run_of([rollout(0.5)])) as con, pytest.raises(Exception, match="at least 1"):
        con.sql(f"from model_metrics_at({horizon})").fetchall()


# --- degenerate stores -----------------------------------------------------------------------------

RHOS = tuple(f"rho_{kind}" for kind in ("pearson", "spearman", "kendall"))
DIVERSITY_RHOS = tuple(name.replace("rho_", "rho_length_diversity_") for name in RHOS)


def run_of(*prompts: list[dict[str, Any]]) -> list[Run]:
    """One run; samples numbered in order."""
    numbered = {
        f"p{i}": [{"sample": k, **rollout} for k, rollout in enumerate(rollouts)]
        for i, rollouts in enumerate(prompts)
    }
    return [{"family": "a", "variant": "base", "task": "s", "prompts": numbered}]


def rollout(*entropy: float, **more: Any) -> dict[str, Any]:
    return {"entropy": list(entropy), **more}


def only(con: Any, view: str) -> dict[str, Any]:
    (row,) = rows_of(con, view).values()
    return row


def assert_null(row: dict[str, Any], *names: str) -> None:
    assert {name: row[name] for name in names} == dict.fromkeys(names)


def test_a_single_rollout_has_no_spread():
    runs = run_of([rollout(0.5, 1.5, logprob=[-1.0, 0.0], embedding=EXACT[3])])
    with imported(runs) as con:
        check(con, runs)
        for view in ("prompt_metrics", "model_metrics"):
            row = only(con, view)
            assert_null(row, *RHOS, *DIVERSITY_RHOS, "cov_length_rate", "cov_length_diversity")
            assert_null(row, "semantic_diversity", "truncation_rate")
            assert (row["ce_star"], row["surprisal_mean"]) == (2.0, 1.0)
            assert row["vendi_score"] == pytest.approx(1, abs=1e-12)
        assert_null(only(con, "rollout_metrics"), "semantic_distance")
        assert_null(only(con, "logging_check"), "sd", "z")
        split = only(con, "ce_star_decomposition")
        assert (split["cov_within"], split["cov_between"]) == (0, 0)
        assert only(con, "length_terciles")["tercile"] == "short"


def test_lengths_all_the_same_have_no_correlation():
    vectors = [EXACT[0], EXACT[1], EXACT[1], EXACT[3], EXACT[4]]
    prompt = [rollout(0.1 * i, 0.3, 0.7, embedding=v) for i, v in enumerate(vectors)]
    runs = run_of(prompt)
    with imported(runs, max_new_tokens=3) as con:
        check(con, runs)
        for view in ("prompt_metrics", "model_metrics"):
            row = only(con, view)
            assert_null(row, *RHOS, *DIVERSITY_RHOS)
            assert row["cov_length_rate"] == pytest.approx(0, abs=1e-15)
            assert row["truncation_rate"] == 1
            assert row["semantic_diversity"] > 0


def test_a_prompt_of_constant_length_drops_out_of_the_pooled_correlation_alone():
    varied = [rollout(*[h] * n) for h, n in ((0.1, 1), (0.5, 2), (0.3, 3), (1.3, 4), (0.7, 5))]
    constant = [rollout(0.1 * i, 0.2) for i in range(5)]
    runs = run_of(varied, constant)
    with imported(runs) as con:
        check(con, runs)
        alone = rows_of(con, "prompt_metrics")
        (varied_row,) = [row for row in alone.values() if row["prompt_id"] == "p0"]
        pooled = only(con, "model_metrics")
        for name in RHOS:
            assert pooled[name] == pytest.approx(varied_row[name], abs=1e-12)
        # a constant length has a covariance, 0, and its weight counts
        assert pooled["cov_length_rate"] == pytest.approx(varied_row["cov_length_rate"] / 2, abs=1e-12)


def test_three_rollouts_a_prompt_are_too_few_for_fisher():
    varied = [rollout(*[h] * n) for h, n in ((0.1, 1), (1.3, 2), (0.5, 3))]
    runs = run_of(varied, varied)
    with imported(runs) as con:
        check(con, runs)
        pooled = only(con, "model_metrics")
        assert_null(pooled, "rho_pearson", "rho_spearman")
        assert pooled["rho_kendall"] == pytest.approx(1 / 3, abs=1e-12)


def test_a_perfect_correlation_pools_to_the_clip():
    rising = [rollout(*[h] * n) for h, n in ((0.1, 1), (0.2, 2), (0.3, 3), (0.4, 4), (0.5, 5))]
    runs = run_of(rising)
    with imported(runs) as con:
        check(con, runs)
        pooled = only(con, "model_metrics")
        assert pooled["rho_spearman"] == pytest.approx(0.999999, abs=1e-12)
        assert pooled["rho_kendall"] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("vector", [EXACT[0], [0.3, -1.7, 0.9, 2.2]])
def test_identical_embeddings_are_one_rollout(vector):
    runs = run_of([rollout(*[0.1 * n] * n, embedding=vector) for n in range(1, 7)])
    with imported(runs) as con:
        check(con, runs)
        row = only(con, "prompt_metrics")
        assert_null(row, *DIVERSITY_RHOS)
        assert row["semantic_diversity"] == pytest.approx(0, abs=1e-12)
        assert row["cov_length_diversity"] == pytest.approx(0, abs=1e-12)
        assert row["vendi_score"] == pytest.approx(1, abs=1e-9)
        assert row["rho_spearman"] == pytest.approx(1, abs=1e-12)


def test_orthogonal_embeddings_are_as_many_as_there_are():
    axes = np.eye(4).tolist()
    runs = run_of([rollout(*[0.5] * (i + 1), embedding=axis) for i, axis in enumerate(axes)])
    with imported(runs) as con:
        check(con, runs)
        row = only(con, "prompt_metrics")
        assert row["semantic_diversity"] == pytest.approx(1, abs=1e-12)
        assert row["vendi_score"] == pytest.approx(4, abs=1e-9)
        assert_null(row, *DIVERSITY_RHOS)


def test_two_rollouts_are_equally_far_from_each_other():
    # not unit vectors: the two distances come out of different sums, and may differ by rounding
    prompt = [
        rollout(0.5, embedding=[0.3, -1.7, 0.9, 2.2]),
        rollout(0.5, 1.3, embedding=[1.1, 0.2, -0.4, 0.6]),
    ]
    runs = run_of(prompt)
    with imported(runs) as con:
        check(con, runs)
        row = only(con, "prompt_metrics")
        assert_null(row, *DIVERSITY_RHOS)
        assert row["cov_length_diversity"] == pytest.approx(0, abs=1e-12)
        assert row["rho_pearson"] == pytest.approx(1, abs=1e-12)
        assert [t["tercile"] for t in rows_of(con, "length_terciles").values()].count("long") == 0


def test_nothing_embedded_leaves_diversity_undefined():
    runs = run_of([rollout(*[0.1 * n] * n) for n in range(1, 7)])
    with imported(runs) as con:
        check(con, runs)
        for view in ("prompt_metrics", "model_metrics"):
            row = only(con, view)
            assert row["embedder"] == "none"
            assert_null(row, *DIVERSITY_RHOS, "cov_length_diversity", "semantic_diversity")
            assert_null(row, "vendi_score")
        assert_null(only(con, "panel"), "D", "vendi_score")


@pytest.mark.parametrize("h", [0.0, 0.1, 0.7, 3.3])
def test_a_uniform_entropy_has_a_constant_rate(h):
    # the mean of N times 0.1 need not be 0.1 to the last bit: still no correlation
    runs = run_of([rollout(*[h] * n) for n in range(1, 13)])
    with imported(runs) as con:
        check(con, runs)
        for view in ("prompt_metrics", "model_metrics"):
            row = only(con, view)
            assert_null(row, *RHOS)
            assert row["entropy_rate"] == pytest.approx(float(np.float32(h)), abs=1e-15)
            assert row["gen_ppl"] == pytest.approx(row["branching_factor"], rel=1e-12)


def test_an_end_that_is_certain_or_impossible_has_no_entropy():
    eos = [-math.inf, 0.0, -math.log(2)]
    runs = run_of([rollout(1.0, 0.0, 1.0, eos_logprob=eos, finish_reason="stop")])
    with imported(runs) as con:
        check(con, runs)
        rows = sorted(rows_of(con, "eos_trajectory").values(), key=lambda row: row["position"])
        assert [row["stop_probability"] for row in rows] == pytest.approx([0, 1, 0.5], abs=1e-7)
        assert [row["stop_entropy"] for row in rows] == pytest.approx([0, 0, math.log(2)], abs=1e-7)
        assert [row["stopped"] for row in rows] == [0, 0, 1]


def test_an_excess_without_spread_has_no_z():
    runs = run_of([rollout(0.5, 1.0, logprob=[-1.0, -0.5]) for _ in range(4)])
    with imported(runs) as con:
        check(con, runs)
        row = only(con, "logging_check")
        assert (row["mean_excess"], row["sd"]) == (0, 0)
        assert_null(row, "z")


def test_a_log_of_another_distribution_fails():
    surprisals = np.random.default_rng(0).exponential(2.0, 400).tolist()
    runs = run_of([rollout(1.0, logprob=[-s]) for s in surprisals])
    with imported(runs) as con:
        check_every_view(con, runs)
        row = only(con, "logging_check")
        assert row["z"] > 5
        assert row["ok"] is False
