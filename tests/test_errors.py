"""Errors in variables: the corrections against independent derivations, and what they refuse."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from stores import GOLDEN, import_golden

import canopy_store
from canopy_store.analysis.regression import as_object, regress, reliability, samples_for
from canopy_store.analysis.regression.calibration import calibrated
from canopy_store.analysis.regression.errors import by_moments
from canopy_store.analysis.regression.linear import linear_design, share_of
from canopy_store.analysis.regression.panel import PanelData, one_panel, panel_data
from canopy_store.analysis.regression.scores import Bootstrap, Equations, contrast, solve
from canopy_store.analysis.regression.splits import by_splits, halves_of
from canopy_store.analysis.seeds import as_variants
from canopy_store.errors import DataError, FitError, UsageError

ONE = ["task", "family"]  # factors of one level


def panel_of(rates: np.ndarray, lengths: np.ndarray, kernels: np.ndarray, variants: Any) -> pl.DataFrame:
    """The rows of the view ``panel`` from rollouts, (P, V, M) and 1 - cosine (P, V, M, M)."""
    P, V, M = rates.shape
    away = ~np.eye(M, dtype=bool)
    distance = (kernels * away).sum(-1) / (M - 1)
    rows = []
    for p, v in np.ndindex(P, V):
        r, n, d = rates[p, v], lengths[p, v], distance[p, v]
        over = np.cov(np.stack([r, n, d])) / M
        rows.append(
            {
                "family": "f",
                "variant": variants[v],
                "task": "t",
                "prompt_id": str(p),
                "D": d.mean(),
                "R_bar": r.mean(),
                "N_bar": n.mean(),
                "n_rollouts": M,
                "var_R": over[0, 0],
                "var_N": over[1, 1],
                "cov_RN": over[0, 1],
                "cov_RD": 2 * (M - 1) / (M - 2) * over[0, 2],
                "cov_ND": 2 * (M - 1) / (M - 2) * over[1, 2],
            }
        )
    return pl.DataFrame(rows)


def study(
    seed: int,
    *,
    prompts: int = 160,
    samples: int = 16,
    within: tuple[float, ...] = (0.8, 0.2),
    slopes: tuple[float, ...] | float = 0.2,
    correlation: float = 0.0,
    spread: float = 0.21,
) -> pl.DataFrame:
    """A panel whose R_bar, N_bar and D are means over rollouts; the slopes are of the true rates."""
    rng = np.random.default_rng(seed)
    shape = (prompts, len(within), samples)
    true = 1 + spread * rng.normal(size=shape[:2])
    length = 150 + 20 * rng.normal(size=shape[:2])
    wave = rng.normal(size=shape)
    rates = true[..., None] + np.array(within)[:, None] * wave
    lengths = length[..., None] + 30 * (0.5 * wave + rng.normal(size=shape))
    level = 0.2 + np.array(slopes) * true + 2e-4 * length
    level += 0.03 * rng.normal(size=(prompts, 1)) + 0.03 * rng.normal(size=shape[:2])
    own = 0.05 * (correlation * wave + np.sqrt(1 - correlation**2) * rng.normal(size=shape))
    vectors = rng.normal(0, 0.2, (*shape, 3))
    pairs = own[..., :, None] + own[..., None, :] - np.einsum("pvik,pvjk->pvij", vectors, vectors)
    names = ["base", "sft", "rl"][: len(within)]
    return panel_of(rates, lengths, level[..., None, None] + pairs, names)


def data_of(panel: pl.DataFrame, drop: Any = tuple(ONE)) -> PanelData:
    return panel_data(as_variants(one_panel(panel, "panel"), {}), "D", "base", None, drop)


def ratios(fit: Any) -> dict[str, float]:
    return fit.slopes.row(by_predicate=pl.col("name") == "ratio", named=True)


# --------------------------------------------------------------------------------- the two corrections


def test_moments_are_those_of_the_definition() -> None:
    """Unbalanced prompts, two families, three variants: every matrix written out in full."""
    rng = np.random.default_rng(3)
    panel = pl.concat(
        [
            study(seed, prompts=14, samples=6, within=(0.3, 0.2, 0.1)).with_columns(family=pl.lit(name))
            for seed, name in ((1, "f"), (2, "g"))
        ]
    )
    panel = panel.filter(pl.Series(rng.random(len(panel)) < 0.7))
    assert panel["prompt_id"].value_counts()["count"].n_unique() > 3
    data = data_of(panel, ["task"])
    found = by_moments(data, "interaction")

    n, prompt = len(panel), panel["prompt_id"].to_numpy()
    X = np.column_stack(list(linear_design(data, "interaction")[0].values()))
    share = dict(zip(data.levels["prompt"], share_of(data, X), strict=True))  # by task/prompt_id
    same = prompt[:, None] == prompt[None, :]
    T = np.eye(n) - same * np.array([share[f"t/{p}"] for p in prompt])[:, None]
    terms = list(linear_design(data, "interaction")[0])
    variant = panel["variant"].to_list()
    left, right = (T @ X).T @ (T @ X), (T @ X).T @ (T @ panel["D"].to_numpy())
    for i, row in enumerate(panel.iter_rows(named=True)):
        errors = {t: "R" for t in terms if t in ("R_bar", f"R_bar:variant[{variant[i]}]")}
        errors["N_bar"] = "N"
        weight = float(T[:, i] @ T[:, i])
        known = {"RR": "var_R", "NN": "var_N", "RN": "cov_RN", "NR": "cov_RN"}
        for a, kind in errors.items():
            right[terms.index(a)] -= weight * row[f"cov_{kind}D"]
            for b, other in errors.items():
                left[terms.index(a), terms.index(b)] -= weight * row[known[kind + other]]
    np.testing.assert_allclose(found.left.sum(axis=0), left, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.right.sum(axis=0), right, rtol=1e-9, atol=1e-9)
    root = solve(found)
    assert root is not None
    np.testing.assert_allclose(root.b, np.linalg.solve(left, right), rtol=1e-7)


def test_all_splits_together_are_the_moments() -> None:
    rng = np.random.default_rng(4)
    P, M = 7, 4
    rates, lengths = rng.normal(1, 0.3, (P, 2, M)), rng.uniform(50, 150, (P, 2, M))
    vectors = rng.normal(size=(P, 2, M, 3))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    kernels = vectors @ vectors.swapaxes(-1, -2)
    data = data_of(panel_of(rates, lengths, 1 - kernels, ["base", "sft"]))
    patterns = [p for p in itertools.product((0.0, 1.0), repeat=M) if sum(p) == M // 2]
    both = np.array(list(itertools.product(patterns, patterns)))  # every pair for a prompt's two rows
    halves = np.stack(
        [
            halves_of(rates[p, v], lengths[p, v], kernels[p, v], both[:, v])
            for p in range(P)
            for v in range(2)
        ]
    )
    split, moments = by_splits(data, "interaction", halves), by_moments(data, "interaction")
    np.testing.assert_allclose(split.left, moments.left, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(split.right, moments.right, rtol=1e-9, atol=1e-9)


def test_without_errors_the_correction_is_least_squares_with_sandwich_errors() -> None:
    panel = study(5).with_columns(pl.col("^(var|cov)_.*$") * 0)
    fit, plain = (regress(panel, "interaction", drop=ONE, errors=e) for e in ("moments", "none"))
    estimates = plain.coefficients.filter(part="conditional")
    assert fit.coefficients["estimate"].to_list() == pytest.approx(
        estimates["estimate"].to_list(), rel=1e-3
    )
    for column in ("se", "ci_low", "ci_high"):
        assert fit.slopes[column].to_list() == pytest.approx(plain.slopes[column].to_list(), rel=0.4)


def test_an_interval_holds_what_its_test_does_not_reject() -> None:
    """The restricted scores written out: at either end of the interval their t is at its quantile."""
    panel = study(6, within=(0.5, 0.5))
    equations = by_moments(data_of(panel), "interaction")
    root, bootstrap = solve(equations), Bootstrap(160, 400, 1)
    assert root is not None
    q = np.eye(5)[1]
    _, _, _, low, high = contrast(equations, root, q, bootstrap)
    G, h = equations.left.sum(axis=0), equations.right.sum(axis=0)
    for value, quantile in ((low, 0.975), (high, 0.025)):
        others = [0, 2, 3, 4]
        restricted = np.zeros(5)
        restricted[1] = value
        restricted[others] = np.linalg.solve(G[np.ix_(others, others)], h[others] - G[others, 1] * value)
        s = (equations.right - equations.left @ restricted) @ np.linalg.solve(G, q)
        freedom = 320 / 315 * 160 / 159
        t = s.sum() / np.sqrt(freedom * ((s - s.mean()) ** 2).sum())
        rng = np.random.default_rng(1)
        drawn = (s - s.mean())[rng.integers(0, 160, (400, 160))]
        t_drawn = drawn.sum(axis=1) / np.sqrt(160 * drawn.var(axis=1))
        assert t == pytest.approx(np.quantile(t_drawn, quantile), rel=1e-3)


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_a_ratio_that_measurement_made_is_taken_out(correlation: float) -> None:
    """The true ratio is 1, the base is noisier: the plain fit finds a ratio, the corrected one not."""
    found = {"none": [], "moments": []}
    for seed in range(20):
        panel = study(seed, samples=12, correlation=correlation)
        for way, rows in found.items():
            row = ratios(regress(panel, "interaction", drop=ONE, errors=way, replicates=200))
            rows.append((row["estimate"], row["ci_low"] <= 1 <= row["ci_high"]))
    plain, corrected = (np.array(found[way], float) for way in ("none", "moments"))
    assert abs(np.median(plain[:, 0]) - 1) > 0.25
    assert plain[:, 1].mean() < 0.7
    assert np.median(corrected[:, 0]) == pytest.approx(1, abs=0.12)
    assert corrected[:, 1].mean() > 0.8


def test_the_beta_models_ratio_that_measurement_made_is_taken_out() -> None:
    found = {"none": [], "moments": []}
    for seed in range(6):
        panel = study(seed, prompts=100, spread=0.3)
        for way, rows in found.items():
            row = ratios(regress(panel, "beta", drop=ONE, errors=way, precision="variant"))
            rows.append((row["estimate"], row["ci_low"] <= 1 <= row["ci_high"]))
    plain, corrected = (np.array(found[way], float) for way in ("none", "moments"))
    assert np.median(plain[:, 0]) > 1.25
    assert np.median(corrected[:, 0]) == pytest.approx(1, abs=0.15)
    assert corrected[:, 1].mean() > 0.8


def test_calibration_predicts_from_all_rows_of_a_prompt() -> None:
    """Two families, unbalanced: each prompt's matrices written out in full."""
    panel = pl.concat(
        [study(s, prompts=50, samples=8).with_columns(family=pl.lit(f)) for s, f in ((1, "f"), (2, "g"))]
    )
    panel = panel.filter(pl.Series(np.random.default_rng(0).random(len(panel)) < 0.8))
    data = data_of(panel, ["task"])
    found = calibrated(data)
    w = np.column_stack([data.r, data.n])
    cell = data.codes["checkpoint"]
    means = np.stack([w[cell == c].mean(axis=0) for c in cell])
    names = ("var_R", "cov_RN", "cov_RN", "var_N")
    error = [np.array([data.errors[e][cell == c].mean() for e in names]).reshape(2, 2) for c in range(4)]
    shared = [[data.errors[e][cell == c].mean() for e in ("cov_RD", "cov_ND")] for c in range(4)]
    at = {(p, c): i for i, (p, c) in enumerate(zip(data.codes["prompt"], cell, strict=True))}

    def moment(a: int, b: int) -> tuple[np.ndarray, int]:
        pairs = [(at[p, a], at[p, b]) for p in range(50) if (p, a) in at and (p, b) in at]
        return sum(np.outer((w - means)[i], (w - means)[j]) for i, j in pairs), len(pairs) - 1

    kind = [(f, v) for f, v, _ in data.checkpoints]
    true = np.zeros((4, 4, 2, 2))
    for a, b in itertools.product(range(4), repeat=2):
        same = kind[a][0] == kind[b][0]
        alike = [
            moment(c, d)
            for c, d in itertools.product(range(4), repeat=2)
            if (kind[c][1], kind[d][1]) == (kind[a][1], kind[b][1])
            and (kind[c][0] == kind[d][0]) == same
        ]
        true[a, b] = sum(m for m, _ in alike) / sum(n for _, n in alike) - (a == b) * error[a]
    for p in range(50):
        rows = np.flatnonzero(data.codes["prompt"] == p)
        T = np.block([[true[cell[i], cell[j]] for j in rows] for i in rows])
        E = np.block([[error[cell[i]] * (i == j) for j in rows] for i in rows])
        g = np.linalg.solve(T + E, (w - means)[rows].ravel())
        np.testing.assert_allclose(found.r[rows], means[rows, 0] + (T @ g)[::2], rtol=1e-5)
        np.testing.assert_allclose(found.n[rows], means[rows, 1] + (T @ g)[1::2], rtol=1e-5)
        less = [np.dot(shared[cell[i]], g.reshape(-1, 2)[k]) for k, i in enumerate(rows)]
        np.testing.assert_allclose(found.y[rows], data.y[rows] - less, rtol=1e-5)


def test_three_variants_have_a_ratio_each_and_one_joint_test() -> None:
    panel = study(7, within=(0.4, 0.2, 0.6), slopes=(0.2, 0.2, 0.4), samples=30)
    fit = regress(panel, "interaction", drop=ONE)
    assert fit.errors == "moments"
    rows = fit.slopes.filter(name="ratio")
    assert rows["variant"].to_list() == ["rl", "sft"]
    assert rows["ci_low"][0] > 1
    assert rows["ci_low"][1] < 1 < rows["ci_high"][1]
    assert fit.tests["df"][0] == 2
    assert fit.tests["p"][0] < 0.01
    same = regress(study(8, within=(0.4, 0.4, 0.4), slopes=(0.2, 0.2, 0.2)), "interaction", drop=ONE)
    assert same.tests["p"][0] > 0.01


# ------------------------------------------------------------------------------------------ reliability


def test_reliability_is_one_less_the_share_of_error() -> None:
    panel = study(9, samples=10)
    table = {row["variant"]: row for row in reliability(panel).to_dicts()}
    for variant, row in table.items():
        of = panel.filter(variant=variant)
        expected = 1 - np.mean(of["var_R"].to_numpy()) / np.var(of["R_bar"].to_numpy(), ddof=1)
        assert row["reliability"] == pytest.approx(expected, rel=1e-12)
        assert (row["n_prompts"], row["n_samples"]) == (160, 10)
    assert table["base"]["reliability"] < 0.6 < table["sft"]["reliability"]


@pytest.mark.parametrize(
    ("found", "samples", "wanted"), [(0.24, 16, 0.8), (0.5, 40, 0.9), (0.9, 16, 0.5)]
)
def test_samples_for_a_reliability(found: float, samples: int, wanted: float) -> None:
    needed = samples_for(found, samples, wanted)
    signal, noise = found, (1 - found) * samples  # variance of the truth, and of one rollout

    def at(m: int) -> float:
        return signal / (signal + noise / m)

    assert at(needed) >= wanted - 1e-12
    assert needed == 1 or at(needed - 1) < wanted


def test_no_number_of_samples_rescues_what_is_not_there() -> None:
    assert samples_for(0.0, 16, 0.8) is None
    with pytest.raises(UsageError, match="more than 0 and less than 1"):
        samples_for(0.5, 16, 1.0)


def test_variance_between_tasks_does_not_count_as_reliability_of_a_slope() -> None:
    """Tasks far apart make R_bar look reliable; the slope is estimated within them."""
    panel = pl.concat(
        [
            study(s, within=(0.8, 0.8), prompts=80).with_columns(
                task=pl.lit(t), R_bar=pl.col("R_bar") + shift
            )
            for s, t, shift in ((1, "a", 0.0), (2, "b", 5.0))
        ]
    )
    fit = regress(panel, "interaction", drop=["family"], errors="none")
    assert fit.reliability["reliability"].min() > 0.9
    assert fit.reliability["partial"].max() < 0.7
    assert "below 0.8" in fit.warnings[0]


def test_what_the_variants_share_of_a_prompt_does_not_count_as_reliability_of_a_slope() -> None:
    """Prompts far apart in R_bar and in D: a slope is estimated within them, where errors are large."""
    rng = np.random.default_rng(0)
    panel = study(4, prompts=300, within=(0.2, 0.2), slopes=0.0, spread=0.0)
    prompt, own = np.repeat(rng.normal(size=(2, 300)), 2, axis=1), rng.normal(size=600)
    true = 0.3 * prompt[0] + 0.05 * own  # the rows of a prompt are beside each other
    level = 0.3 * prompt[1] + true
    panel = panel.with_columns(R_bar=pl.col("R_bar") + true, D=pl.col("D") + level)
    fit = regress(panel, "interaction", drop=ONE, errors="none")
    assert fit.reliability["reliability"].min() > 0.9
    of_truth = fit.slopes.filter(pl.col("name") != "ratio")["estimate"]
    assert of_truth.max() < 0.75  # of 1
    assert fit.reliability["partial"].to_list() == pytest.approx(of_truth.to_list(), abs=0.1)
    assert "given the other terms" in fit.warnings[0]


def test_errors_that_lengths_share_count_in_the_reliability_of_a_slope() -> None:
    """Lengths follow true rates one way, and errors the other: adjusting for them adds to the error."""
    rng = np.random.default_rng(1)
    rows, M = 600, 16
    true = np.repeat(rng.normal(size=300), 2) * 0.1 + rng.normal(size=rows)
    error = np.sqrt(0.05) * rng.normal(size=rows)
    R, N = true + error, 100 + 3 * true - 6 * error + 0.3 * rng.normal(size=rows)
    panel = pl.DataFrame({"prompt": np.repeat(np.arange(300), 2).astype(str), "R_bar": R, "N_bar": N})
    variances = {"var_R": 0.05, "var_N": 36 * 0.05, "cov_RN": -6 * 0.05, "cov_RD": 0.0, "cov_ND": 0.0}
    panel = panel.with_columns(
        pl.lit("f").alias("family"),
        pl.lit("t").alias("task"),
        pl.Series("variant", ["base", "sft"] * 300),
        pl.Series("D", true + 0.1 * rng.normal(size=rows)),
        *(pl.lit(value).alias(name) for name, value in variances.items()),
        pl.lit(M).alias("n_rollouts"),
    )
    fit = regress(panel, "interaction", drop=ONE, errors="none")
    assert fit.reliability["reliability"].min() > 0.9
    found = fit.slopes.filter(pl.col("name") != "ratio")["estimate"]
    assert found.max() < 0.8
    assert fit.reliability["partial"].to_list() == pytest.approx(found.to_list(), abs=0.1)
    assert fit.warnings


# ---------------------------------------------------------------------------- defaults and refusals


def test_the_default_corrects_where_it_can() -> None:
    panel = study(10, samples=40)
    assert regress(panel, "main", drop=ONE).errors == "moments"
    assert regress(panel, "quadratic", drop=ONE).errors == "none"
    bare = panel.drop("var_R", "var_N", "cov_RN", "cov_RD", "cov_ND", "n_rollouts")
    fit = regress(bare, "interaction", drop=ONE)
    assert fit.errors == "none"
    assert "no columns of their errors" in fit.warnings[0]
    assert fit.slopes.equals(regress(panel, "interaction", drop=ONE, errors="none").slopes)
    with pytest.raises(DataError, match=r'no column var_R, .*canopy sql "from panel"'):
        regress(bare, "interaction", drop=ONE, errors="moments")


def test_a_precise_panel_has_no_warning() -> None:
    panel = study(11, within=(0.1, 0.1))
    assert regress(panel, "interaction", drop=ONE, errors="none").warnings == ()
    noisy = regress(study(11), "interaction", drop=ONE, errors="none").warnings
    assert "base 0." in noisy[0]
    assert "canopy regress --model interaction --panel FILE --drop task --drop family" in noisy[0]


def test_a_model_without_correction_warns_and_refuses() -> None:
    panel = study(12)
    with pytest.raises(UsageError, match="not for the model quadratic"):
        regress(panel, "quadratic", drop=ONE, errors="moments")
    warning = regress(panel, "quadratic", drop=ONE).warnings[0]
    assert "The model quadratic has no correction" in warning
    assert "--model interaction" in warning


def test_the_beta_model_is_corrected_on_request() -> None:
    fit = regress(study(12, prompts=60), "beta", drop=ONE, precision="variant")
    assert fit.errors == "none"
    assert "Corrected: canopy regress --model beta" in fit.warnings[0]
    with pytest.raises(UsageError, match="beta, which has --errors moments"):
        regress(study(12), "beta", drop=ONE, errors="split")
    with pytest.raises(UsageError, match="--bootstrap: with --errors none"):
        regress(study(12), "beta", drop=ONE, errors="moments", bootstrap=9)
    with pytest.raises(FitError, match=r"of R_bar in base .* rollouts a prompt would do"):
        regress(study(14, within=(4.0, 0.2), samples=8), "beta", drop=ONE, errors="moments")


def test_errors_of_other_outcomes_are_not_known() -> None:
    panel = study(13).with_columns(vendi_score=pl.col("D") * 5)
    with pytest.raises(UsageError, match="errors of vendi_score are not known"):
        regress(panel, "main", drop=ONE, outcome="vendi_score", errors="moments")
    assert regress(panel, "main", drop=ONE, outcome="vendi_score").errors == "none"
    with pytest.raises(UsageError, match=r"the panel has D, vendi_score$"):
        regress(panel, "main", drop=ONE, outcome="var_R")
    with pytest.raises(UsageError, match="--store DIR"):
        regress(panel, "main", drop=ONE, errors="split")
    with pytest.raises(UsageError, match="--errors simex: one of none, moments, split"):
        regress(panel, "main", drop=ONE, errors="simex")  # type: ignore[arg-type]


def test_what_errors_have_swamped_is_refused_with_the_samples_that_would_do() -> None:
    panel = study(14, within=(4.0, 0.2), samples=8)
    with pytest.raises(
        FitError, match=r"of R_bar in base .* (about|at least) \d+ rollouts a prompt"
    ) as e:
        regress(panel, "interaction", drop=ONE)
    assert "--errors none" in str(e.value)
    assert "\n" not in str(e.value)
    assert regress(panel, "interaction", drop=ONE, errors="none").slopes.height == 3


def test_rows_whose_errors_are_not_known_are_left_out() -> None:
    panel = study(15, samples=40)
    holes = panel.with_columns(cov_RD=pl.when(pl.int_range(pl.len()) < 6).then(None).otherwise("cov_RD"))
    fit = regress(holes, "interaction", drop=ONE)
    assert (fit.fit["rows"], fit.fit["rows_left_out"]) == (314, 6)


def test_lengths_that_are_nothing_but_error_are_left_out() -> None:
    """Every prompt has the same true length: the slopes are those of a model without it."""
    panel = study(16, within=(0.3, 0.3))
    rng = np.random.default_rng(0)
    lengths = pl.Series(150 + 7 * rng.normal(size=len(panel)))
    flat = panel.with_columns(N_bar=lengths, var_N=60.0, cov_RN=0.0, cov_ND=0.0)
    fit = regress(flat, "interaction", drop=ONE)
    assert fit.warnings[0].startswith("N_bar is left out")
    assert fit.formula == "D ~ R_bar*variant + (1|prompt)"
    assert "N_bar" not in fit.coefficients["term"].to_list()
    assert ratios(fit)["ci_low"] < 1 < ratios(fit)["ci_high"]


def test_equations_without_a_root() -> None:
    left = np.array([[[1.0, 0.0], [0.0, -0.1]]])
    assert solve(Equations(["a", "b"], left, np.ones((1, 2)), np.eye(2), 4)) is None


# ------------------------------------------------------------------------------------- stores, commands


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants whose rates differ much between prompts, and diversity with them."""
    rng = np.random.default_rng(1)
    rows = []
    for prompt in range(24):
        for variant in ("base", "sft"):
            rate, long = rng.uniform(0.5, 2.5), rng.integers(5, 40)
            for _ in range(12):
                vector = np.array([1.0, 0, 0, 0]) + (0.2 + 0.25 * rate) * rng.normal(size=4) / 2
                entropy = np.maximum(
                    rng.normal(rate + 0.2 * rng.normal(), 0.3, rng.integers(long, long + 9)), 0
                )
                keys = {"family": "f", "variant": variant, "task": "t", "prompt_id": f"p{prompt}"}
                rows.append({**keys, "entropy": entropy.tolist(), "embedding": vector.tolist()})
    folder = tmp_path_factory.mktemp("errors")
    frame = pl.DataFrame(rows)
    frame = frame.with_columns(sample=pl.int_range(pl.len()).over("variant", "prompt_id"))
    frame.write_parquet(folder / "rollouts.parquet")
    canopy_store.import_rollouts(folder / "store", folder / "rollouts.parquet", max_new_tokens=64)
    return folder / "store"


def test_split_of_a_store_is_moments_with_noise(store: Path) -> None:
    moments = regress(store, "interaction", drop=ONE)
    split = regress(store, "interaction", drop=ONE, errors="split", splits=100)
    assert (moments.errors, split.errors) == ("moments", "split")
    se = moments.slopes["se"].to_numpy()
    away = (split.slopes["estimate"] - moments.slopes["estimate"]).to_numpy() / se
    assert 0 < np.abs(away).max() < 0.3
    again = regress(store, "interaction", drop=ONE, errors="split", splits=100)
    assert again.slopes.equals(split.slopes)
    other = regress(store, "interaction", drop=ONE, errors="split", splits=100, seed=1)
    assert not other.slopes.equals(split.slopes)


def test_the_panel_of_a_store_as_a_file_gives_the_same(canopy, store: Path, tmp_path: Path) -> None:
    file = tmp_path / "panel.csv"
    canopy_store.read(store, "panel").sort("prompt_id", "variant").write_csv(file)
    command = ("regress", "--model", "interaction", "--drop", "task", "--drop", "family")
    options = ("--format", "csv", "--table", "slopes")
    of_store, of_file = (
        canopy(*command, *where, *options) for where in (("--store", store), ("--panel", file))
    )
    assert of_store[0] == 0
    assert of_store[2].startswith("canopy: 24 prompts: intervals and p of a corrected fit were checked")
    assert of_store[2].count("\n") == 1  # and no other warning
    a, b = (pl.read_csv(out[1].encode()) for out in (of_store, of_file))
    assert a["name"].to_list() == ["beta", "beta+eta", "ratio"]
    assert a["estimate"].to_list() == pytest.approx(b["estimate"].to_list(), rel=1e-6)


def test_json_is_one_object(canopy, store: Path) -> None:
    command = ("regress", "--model", "interaction", "--drop", "task", "--drop", "family")
    code, out, err = canopy(*command, "--store", store, "--format", "json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [row["name"] for row in found["slopes"]] == ["beta", "beta+eta", "ratio"]
    assert {"coefficients", "slopes", "tests", "reliability", "fit"} < set(found)
    assert found["errors"] == "moments"
    assert {row["variant"] for row in found["reliability"]} == {"base", "sft"}
    assert found["fit"]["rows"] == 48
    fit = regress(store, "interaction", drop=ONE)
    assert found["slopes"] == fit.slopes.to_dicts()
    assert as_object(regress(store, "quadratic", drop=ONE))["nested"]["model"] == "quadratic"
    code, out, _ = canopy(*command, "--store", store, "--format", "csv", "--table", "reliability")
    assert out.startswith("variant,n_prompts,n_samples,")
    code, _, err = canopy(*command, "--store", store, "--table", "slopes")
    assert (code, "--format csv or parquet" in err) == (2, True)


def test_an_unreliable_store_is_refused_and_its_plain_fit_warns_everywhere(
    canopy, tmp_path: Path
) -> None:
    root = tmp_path / "s"
    import_golden(root)
    command = ("regress", "--model", "interaction", "--store", root)
    code, out, err = canopy(*command)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "rollouts a prompt would do" in err
    plain = (*command, "--errors", "none")
    code, out, err = canopy(*plain)
    assert (code, err) == (0, "")
    assert "warning: R_bar is taken as exact, but its reliability is below 0.8: base 0.06" in out
    assert f"--store {root} --errors moments" in out
    assert out.index("warning:") < out.index("tests")
    assert json.loads(canopy(*plain, "--format", "json")[1])["warnings"][0].startswith("R_bar is taken")
    code, out, err = canopy(*plain, "--format", "csv")
    assert out.startswith("part,term,")
    assert "below 0.8" in err


def test_a_golden_panel_says_that_its_errors_are_not_known(canopy) -> None:
    code, out, _ = canopy("regress", "--model", "main", "--panel", GOLDEN / "panel.csv")
    assert code == 0
    assert "how reliable R_bar is cannot be told" in out


def test_a_variant_whose_errors_are_not_known_is_not_left_out_in_silence() -> None:
    """Of two rollouts cov_RD is not known: 2 (M - 1) / (M - 2) is infinite."""
    panel = study(16, within=(0.2, 0.2, 0.2), samples=40)
    two = pl.col("variant") == "rl"
    for nothing in (None, float("nan"), float("inf")):
        unknown = panel.with_columns(cov_RD=pl.when(two).then(nothing).otherwise("cov_RD"))
        with pytest.raises(FitError, match=r"no row of rl has all of var_R.*--errors none"):
            regress(unknown, "interaction", drop=ONE)
        every = panel.with_columns(cov_RD=pl.lit(nothing, pl.Float64))
        assert regress(every, "interaction", drop=ONE).errors == "none"
        with pytest.raises(DataError, match="3 rollouts a prompt"):
            regress(every, "interaction", drop=ONE, errors="moments")


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("n_rollouts", 0.0, "n_rollouts is 0; "),
        ("n_rollouts", float("nan"), "n_rollouts is nan; "),
        ("n_rollouts", None, "n_rollouts is missing; "),
        ("var_R", -0.1, "var_R is -0.1; "),
        ("var_N", float("inf"), "var_N is inf; "),
    ],
)
@pytest.mark.parametrize("errors", [None, "none"])
def test_errors_that_no_rollouts_have_are_refused(
    column: str, value: Any, words: str, errors: Any
) -> None:
    third = pl.int_range(pl.len()) == 2
    panel = study(17, prompts=20).with_columns(
        pl.when(third).then(value).otherwise(column).alias(column)
    )
    with pytest.raises(DataError, match=f"row 3 of the panel: {words}"):
        regress(panel, "interaction", drop=ONE, errors=errors)
