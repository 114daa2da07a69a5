"""Training seeds: checkpoints of one variant, and what regressions say beyond their own checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats
from stores import GOLDEN

from canopy_store.analysis.regression import ALONE, Fit, regress, spread, sweep
from canopy_store.analysis.regression.checkpoints import across, unit_means
from canopy_store.analysis.regression.panel import PanelData
from canopy_store.analysis.seeds import as_variants
from canopy_store.errors import DataError, FitError, UsageError

ROWS = pl.DataFrame({"variant": ["base", "sft-1", "sft-2", "dpo_a", "dpo_b"], "x": range(5)})


# ------------------------------------------------------------------------------------------- patterns


def test_variants_that_match_are_checkpoints_of_the_name() -> None:
    rows = as_variants(ROWS, {"sft": "sft-*", "dpo": "dpo_a, dpo_b"}, baseline="base")
    assert rows["variant"].to_list() == ["base", "sft", "sft", "dpo", "dpo"]
    assert rows["checkpoint"].to_list() == ROWS["variant"].to_list()
    assert rows["x"].to_list() == list(range(5))


def test_a_variant_may_give_its_name_to_its_other_checkpoints() -> None:
    rows = as_variants(ROWS, {"sft-1": "sft-1,sft-2"}, baseline="base")
    assert rows["variant"].to_list() == ["base", "sft-1", "sft-1", "dpo_a", "dpo_b"]


def test_a_name_with_brackets_is_a_name() -> None:
    rows = pl.DataFrame({"variant": ["base", "sft[1]", "sft[2]", "sft1"]})
    named = as_variants(rows, {"sft": "sft[1],sft[2]"})
    assert named["variant"].to_list() == ["base", "sft", "sft", "sft1"]


def test_without_seeds_a_variant_is_its_own_checkpoint_unless_the_rows_say_more() -> None:
    assert as_variants(ROWS, {})["checkpoint"].to_list() == ROWS["variant"].to_list()
    tuned = pl.DataFrame({"variant": ["base", "sft", "sft"], "seed": [None, 1, 2]})
    assert as_variants(tuned, {})["checkpoint"].to_list() == ["base", "sft/1", "sft/2"]
    named = pl.DataFrame({"variant": ["base", "sft"], "checkpoint": [None, "step-9"]})
    assert as_variants(named, {})["checkpoint"].to_list() == ["base", "step-9"]


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        ({"sft": "rlhf-*"}, r"sft=rlhf-\*: no such variant; there is base, dpo_a"),
        ({"sft": "sft-*", "one": "*-1"}, "sft-1 is matched twice, by sft and one"),
        ({"tuned": "*"}, "takes in base, the baseline, together with dpo_a, dpo_b, sft-1, sft-2"),
        ({"base": "base,sft-1"}, "takes in base, the baseline, together with sft-1"),
        ({"dpo_a": "sft-*"}, "dpo_a is another variant"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(seeds: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        as_variants(ROWS, seeds, baseline="base")


def test_a_panel_that_names_its_checkpoints_takes_no_patterns() -> None:
    with pytest.raises(UsageError, match="have a column checkpoint"):
        as_variants(ROWS.with_columns(checkpoint=pl.col("variant")), {"sft": "sft-*"})


# ------------------------------------------------------------------- what is said beyond checkpoints


def of_checkpoints(
    checkpoints: list[tuple[str, str, str]], values: np.ndarray, cov: np.ndarray
) -> dict[tuple[str, str], dict[str, float]]:
    """The rows of `across` by over and name, of a panel that holds nothing else."""
    levels = {"variant": ["base", *sorted({v for _, v, _ in checkpoints} - {"base"})]}
    none = np.zeros(0)
    data = PanelData("D", none, none, none, levels, {}, 0, checkpoints, np.zeros(0, np.intp), {})
    table = across(data, values, cov, slopes=True)
    return {(row["over"], row["name"]): row for row in table.iter_rows(named=True)}


def families(count: int, seeds: int = 1) -> list[tuple[str, str, str]]:
    base = [(f"f{f}", "base", "base") for f in range(count)]
    return base + [(f"f{f}", "sft", f"sft-{s}") for f in range(count) for s in range(seeds)]


def test_families_without_a_common_error_are_a_paired_t_test() -> None:
    values = np.array([0.30, 0.25, 0.41, 0.55, 0.62, 0.60])
    found = of_checkpoints(families(3), values, 0.0001 * np.eye(6))
    expected = stats.ttest_rel(values[3:], values[:3])
    eta = found["families", "eta"]
    assert eta["p"] == pytest.approx(expected.pvalue, rel=1e-3)
    low, high = expected.confidence_interval()
    assert (eta["ci_low"], eta["ci_high"]) == pytest.approx((low, high), rel=1e-3)
    assert eta["units"] == 3
    assert found["families", "ratio"]["estimate"] == pytest.approx(values[3:].mean() / 0.32)


def test_seeds_against_a_baseline_without_error_are_a_one_sample_t_test() -> None:
    values = np.array([0.30, 0.55, 0.42, 0.60])
    cov = np.diag([1e-12, 1e-4, 1e-4, 1e-4])
    found = of_checkpoints(families(1, 3), values, cov)
    expected = stats.ttest_1samp(values[1:], 0.30)
    assert found["seeds", "eta"]["p"] == pytest.approx(expected.pvalue, rel=1e-3)
    assert ("families", "eta") not in found


def test_where_units_do_not_differ_what_they_share_is_the_error() -> None:
    """Three seeds with one slope, and a baseline that is known to 0.1: a z test."""
    cov = np.diag([0.01, 1e-12, 1e-12, 1e-12]) + 1e-10
    found = of_checkpoints(families(1, 3), np.array([0.3, 0.5, 0.5, 0.5]), cov)["seeds", "eta"]
    assert found["se"] == pytest.approx(0.1)
    assert found["p"] == pytest.approx(2 * stats.norm.sf(2.0), rel=1e-6)


def test_errors_that_families_share_are_counted_once_more() -> None:
    """All baselines err together: their scatter does not show it, the regression's covariance does."""
    cov = np.zeros((6, 6))
    cov[:3, :3] = 0.04
    values = np.array([0.30, 0.25, 0.41, 0.55, 0.62, 0.60])
    found = of_checkpoints(families(3), values, cov)["families", "eta"]
    own = np.var(values[3:] - values[:3], ddof=1) / 3
    assert found["se"] == pytest.approx(np.sqrt(own + 0.04))


@pytest.mark.parametrize(("count", "seeds", "over"), [(3, 1, "families"), (1, 3, "seeds")])
def test_the_level_holds_where_checkpoints_differ(count: int, seeds: int, over: str) -> None:
    """Slopes that differ by twice their errors: taken as given they reject in a third of panels."""
    rng = np.random.default_rng(4)
    checkpoints = families(count, seeds)
    tuned = np.array([v == "sft" for _, v, _ in checkpoints])
    cov = 0.01**2 * (np.eye(len(tuned)) + 0.2)
    weights = np.where(tuned, 1 / tuned.sum(), -1 / (~tuned).sum())
    rejected, naive = [], []
    for _ in range(400):
        own = 0.02 * rng.normal(size=len(tuned)) * tuned
        values = 0.3 + rng.multivariate_normal(np.zeros(len(tuned)), cov) + own
        (means,) = unit_means(checkpoints, "base", "sft", values, cov)
        assert means.over == over
        rejected.append(means.p(np.array([1.0, -1.0])) < 0.05)
        naive.append(abs(weights @ values) > stats.norm.ppf(0.975) * np.sqrt(weights @ cov @ weights))
    assert np.mean(naive) > 0.15
    assert 0.01 < np.mean(rejected) < 0.085


# ---------------------------------------------------------------------------------------- regressions


def draw(*, families: int = 1, seeds: int = 3, prompts: int = 60, eta: float = 0.1) -> pl.DataFrame:
    """A base model a family and tuned checkpoints sft-1, …, whose slopes differ around 0.1 + eta."""
    rng = np.random.default_rng(11)
    parts = []
    effect = rng.normal(0, 0.05, prompts)
    for family in range(families):
        for seed in range(seeds + 1):
            slope = 0.1 + (eta + rng.normal(0, 0.01)) * (seed > 0)
            r = rng.gamma(6, 0.2, prompts)
            parts.append(
                pl.DataFrame(
                    {
                        "family": f"f{family}",
                        "variant": f"sft-{seed}" if seed else "base",
                        "task": [("completion", "math")[p % 2] for p in range(prompts)],
                        "prompt_id": [str(p) for p in range(prompts)],
                        "D": 0.2 + slope * r + effect + rng.normal(0, 0.03, prompts),
                        "R_bar": r,
                        "N_bar": rng.lognormal(5, 0.4, prompts),
                    }
                )
            )
    return pl.concat(parts)


def one(fit: Fit, over: str, name: str) -> dict[str, float]:
    return fit.across.row(by_predicate=(pl.col("over") == over) & (pl.col("name") == name), named=True)


@pytest.mark.parametrize("model", ["interaction", "beta"])
def test_seeds_of_one_family_are_the_units(model: str) -> None:
    fit = regress(draw(), model, drop=["family"], seeds={"sft": "sft-*"})  # type: ignore[arg-type]
    assert fit.fit["holds_for"] == "seeds"
    assert one(fit, "seeds", "eta")["units"] == 3
    assert one(fit, "seeds", "eta")["p"] < 0.05
    if model == "interaction":
        found = one(fit, "seeds", "ratio")
        assert found["ci_low"] < 2 < found["ci_high"]
    assert fit.slopes["variant"].to_list() == ["base", "sft", "sft"]


def test_a_column_of_seeds_says_the_same_as_the_option() -> None:
    frame = draw()
    sft, seed = pl.col("variant").str.starts_with("sft"), pl.col("variant").str.slice(4)
    columns = {
        "variant": pl.when(sft).then(pl.lit("sft")).otherwise("variant"),
        "seed": pl.when(sft).then(seed.cast(pl.Int64, strict=False)),
    }
    told = regress(frame.with_columns(**columns), "interaction", drop=["family"])
    asked = regress(frame, "interaction", drop=["family"], seeds={"sft": "sft-*"})
    assert told.across.equals(asked.across)
    assert told.coefficients.equals(asked.coefficients)


def test_several_families_with_seeds_are_told_over_both() -> None:
    fit = regress(draw(families=3, seeds=2), "interaction", seeds={"sft": "sft-*"})
    assert fit.fit["holds_for"] == "families and seeds"
    assert (one(fit, "families", "eta")["units"], one(fit, "seeds", "eta")["units"]) == (3, 6)
    main = regress(draw(families=3, seeds=2), "main", seeds={"sft": "sft-*"})
    assert main.across["name"].to_list() == ["tau", "tau"]


def test_errors_are_taken_out_of_each_checkpoints_slope() -> None:
    """R_bar with as much error as spread: uncorrected the slopes are half of the truth."""
    frame = draw(prompts=400)
    noise = np.random.default_rng(3).normal(0, 0.5, len(frame))
    columns = {name: pl.lit(0.0) for name in ("var_N", "cov_RN", "cov_RD", "cov_ND")}
    noisy = frame.with_columns(
        R_bar=pl.col("R_bar") + noise, var_R=pl.lit(0.25), n_rollouts=pl.lit(16), **columns
    )
    options: dict[str, Any] = {"drop": ["family"], "seeds": {"sft": "sft-*"}, "replicates": 200}
    plain = regress(noisy, "interaction", errors="none", **options)
    right = regress(noisy, "interaction", errors="moments", **options)
    slope = one(right, "seeds", "beta+eta")
    assert one(plain, "seeds", "beta+eta")["estimate"] == pytest.approx(0.1, abs=0.02)
    assert slope["estimate"] == pytest.approx(0.2, abs=0.03)
    assert slope["ci_low"] < 0.2 < slope["ci_high"]


def test_one_checkpoint_a_variant_speaks_of_itself_alone(canopy, tmp_path: Path) -> None:
    file = tmp_path / "panel.csv"
    draw(seeds=1).write_csv(file)
    command = ("regress", "--model", "interaction", "--panel", file, "--drop", "family")
    code, out, _ = canopy(*command)
    assert code == 0
    assert f"{ALONE}: nothing is said of another family or training seed" in out
    draw(seeds=3).write_csv(file)
    code, out, _ = canopy(*command, "--seeds", "sft=sft-*")
    assert (code, "nothing is said" in out, "over other families or training seeds" in out) == (
        0,
        False,
        True,
    )


def test_fixed_checkpoints_leave_the_papers_tables_alone() -> None:
    random, fixed = (
        regress(draw(families=2, seeds=1), "interaction", checkpoints=kind)
        for kind in ("random", "fixed")
    )
    assert fixed.across.is_empty()
    assert len(random.across) == 4
    assert fixed.coefficients.equals(random.coefficients)
    assert fixed.slopes.equals(random.slopes)


# --------------------------------------------------------------------- the beta model with few prompts


@pytest.fixture(scope="module")
def few() -> pl.DataFrame:
    return draw(families=2, seeds=1, prompts=24, eta=0.0)


def test_the_precision_may_be_the_variants_alone(few: pl.DataFrame) -> None:
    fit = regress(few, "beta", precision="variant", checkpoints="fixed")
    terms = fit.coefficients.filter(part="dispersion")["term"].to_list()
    assert terms == ["(Intercept)", "variant[sft-1]"]
    assert fit.formula.endswith("log precision ~ variant")


def test_the_bootstrap_tells_an_eta_from_none(few: pl.DataFrame) -> None:
    fits: dict[str, Any] = {"precision": "variant", "checkpoints": "fixed", "seed": 1}
    steps: list[int] = []
    none = regress(few, "beta", **fits, bootstrap=9, advance=steps.append).tests.row(-1, named=True)
    assert "bootstrap of 9" in none["name"]
    assert none["p"] > 0.1
    assert len(steps) == 9
    large = few.with_columns(D=pl.col("D") + 0.1 * pl.col("R_bar") * (pl.col("variant") != "base"))
    assert regress(large, "beta", **fits, bootstrap=4).tests["p"][-1] == pytest.approx(1 / 5)


def test_the_bootstrap_is_the_same_for_the_same_seed(few: pl.DataFrame) -> None:
    from canopy_store.analysis.regression.beta_model import beta_problem
    from canopy_store.analysis.regression.eta_bootstrap import bootstrap_eta
    from canopy_store.analysis.regression.panel import one_panel, panel_data

    data = panel_data(as_variants(one_panel(few, "panel"), {}), "D", "base", None, ())
    problem = beta_problem(data, "variant")
    one_drawn, two = bootstrap_eta(problem, 1, 5), bootstrap_eta(problem, 2, 5)
    assert np.array_equal(one_drawn.drawn, two.drawn[:1])
    assert not np.array_equal(one_drawn.drawn, bootstrap_eta(problem, 1, 6).drawn)
    assert one_drawn.statistic == two.statistic


# --------------------------------------------------------------------------------------------- sweeps


def test_a_sweep_repeats_the_fit_and_shows_the_spread(canopy, tmp_path: Path) -> None:
    frame = draw(families=2, seeds=1)
    steeper = pl.col("D") + 0.1 * pl.col("R_bar") * (pl.col("variant") != "base")
    embedders = {"a": pl.col("D"), "b": steeper, "c": pl.lit(0.5)}
    panel = pl.concat(frame.with_columns(D=d, embedder=pl.lit(name)) for name, d in embedders.items())
    rows = sweep(panel, "embedder", "interaction")
    assert rows["value"].to_list() == ["a", "b", "c"]
    assert rows["refused"].to_list() == [None, None, "D is constant: nothing to regress"]
    alone = regress(frame, "interaction").slopes.filter(name="ratio").row(0, named=True)
    assert rows["ratio"][0] == alone["estimate"]
    assert rows["ratio_ci_low"][0] == alone["ci_low"]
    gain = 0.1 / rows["beta"][0]  # what 0.1 more in the tuned slope adds to the ratio
    assert rows["ratio"][1] == pytest.approx(rows["ratio"][0] + gain, rel=0.05)
    (least, median, most), fits = spread(rows).select(pl.exclude("variant", "fits")).row(0), 2
    assert (least, most) == (rows["ratio"].min(), rows["ratio"].max())
    assert median == pytest.approx((least + most) / 2)
    assert spread(rows)["fits"].to_list() == [fits]
    panel.write_csv(tmp_path / "panel.csv")
    command = ("regress", "--model", "interaction", "--panel", tmp_path / "panel.csv")
    code, out, _ = canopy(*command, "--sweep", "embedder")
    assert code == 0
    assert "c: D is constant" in out
    assert "ratio of sft-1, fits by embedder 2: " in out


@pytest.mark.parametrize("form", ["table", "json", "csv", "parquet"])
def test_a_sweep_of_uncorrected_fits_warns(canopy, tmp_path: Path, form: str) -> None:
    noisy = draw(families=2, seeds=1).with_columns(var_R=pl.lit(1e3), n_rollouts=pl.lit(8))
    file = tmp_path / "panel.csv"
    pl.concat(noisy.with_columns(embedder=pl.lit(name)) for name in "ab").write_csv(file)
    command = ("regress", "--model", "quadratic", "--panel", file, "--sweep", "embedder")
    code, out, err = canopy(*command, "--format", form)
    assert code == 0
    if form != "json":
        assert (out if form == "table" else err).count("reliability is below 0.8") == 2
    if form in ("json", "csv"):
        assert out.count("reliability is below 0.8") == 2


def test_a_sweep_over_nothing_or_of_nothing_is_refused() -> None:
    frame = draw(families=2, seeds=1)
    with pytest.raises(DataError, match="the panel has no column embedder"):
        sweep(frame, "embedder", "interaction")
    named = frame.with_columns(embedder=pl.lit("a"))
    with pytest.raises(FitError, match="D is constant"):
        sweep(named.with_columns(D=pl.lit(0.5)), "embedder", "interaction")
    with pytest.raises(UsageError, match="main has no ratio"):
        sweep(named, "embedder", "main")
    with pytest.raises(UsageError, match="leave --embedder out"):
        sweep(named, "embedder", "interaction", embedder="a")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--precision", "variant"), "--precision: for --model beta"),
        (("--bootstrap", "9"), "--bootstrap: for --model beta"),
        (("--seeds", "instruct"), "--seeds instruct: needs NAME=PATTERN"),
        (("--seeds", "sft=x-*"), "no such variant; there is base, instruct"),
        (("--seeds", "a=instruct", "--seeds", "a=base"), "--seeds a: given twice"),
    ],
)
def test_bad_calls_are_one_line(canopy, more: tuple[str, ...], words: str) -> None:
    panel = GOLDEN / "panel.csv"
    code, out, err = canopy("regress", "--model", "interaction", "--panel", panel, *more)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
