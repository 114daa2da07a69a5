"""The regressions: against statsmodels and glmmTMB, on simulated truth, and where they refuse."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import special, stats
from stores import GOLDEN, import_golden

import canopy_store
from canopy_store.analysis.regression import Fit, fieller, natural_spline, read_panel, regress
from canopy_store.analysis.regression.beta import Laplace, log_density
from canopy_store.analysis.regression.residuals import quantile_residuals
from canopy_store.errors import DataError, FitError, StoreError, UsageError

EXPECTED = json.loads((GOLDEN / "regression_expected.json").read_text())
ETA = "R_bar:variant[instruct]"


@pytest.fixture(scope="module")
def panel() -> pl.DataFrame:
    return read_panel(GOLDEN / "panel.csv")


@pytest.fixture(scope="module")
def beta_fit(panel: pl.DataFrame) -> Fit:
    return regress(panel, "beta")


def term(fit: Fit, name: str, part: str = "conditional") -> dict[str, float]:
    return fit.coefficients.row(
        by_predicate=(pl.col("part") == part) & (pl.col("term") == name), named=True
    )


def agrees(found: dict[str, float], expected: dict[str, float]) -> None:
    names = {
        "estimate": "estimate",
        "se": "stderr",
        "p": "pvalue",
        "ci_low": "ci_low",
        "ci_high": "ci_high",
    }
    for ours, theirs in names.items():
        assert found[ours] == pytest.approx(expected[theirs], rel=1e-4, abs=1e-7), ours


def draw(
    *,
    kind: str = "beta",
    prompts: int = 80,
    families: int = 3,
    variants: tuple[str, ...] = ("base", "sft"),
    slopes: tuple[float, ...] = (0.3, 0.6),
    sd_prompt: float = 0.4,
    log_phi: float = 4.0,
    seed: int = 0,
) -> pl.DataFrame:
    """A panel of two tasks with known slopes: logit per sd of R_bar (beta), D per nat (linear)."""
    rng = np.random.default_rng(seed)
    shape = (prompts, families, len(variants))
    prompt, family, variant = (a.ravel() for a in np.indices(shape))
    r = rng.gamma(6, 0.2, prompt.size)
    n = rng.lognormal(5, 0.4, prompt.size)
    r_sc = (r - r.mean()) / r.std(ddof=1)
    u = rng.normal(0, 1, prompts)[prompt] * sd_prompt
    slope = np.array(slopes)[variant]
    if kind == "beta":
        mu = special.expit(-1 + slope * r_sc - 0.3 * variant + u + 0.2 * (family - families / 2))
        d = rng.beta(mu * np.exp(log_phi), (1 - mu) * np.exp(log_phi))
    else:
        d = 0.2 + slope * r - 0.05 * variant + 0.1 * u + 0.02 * family + rng.normal(0, 0.05, len(r))
    return pl.DataFrame(
        {
            "family": [f"f{f}" for f in family],
            "variant": [variants[v] for v in variant],
            "task": [("completion", "math")[p % 2] for p in prompt],
            "prompt_id": prompt.astype(str),
            "D": d,
            "R_bar": r,
            "N_bar": n,
        }
    )


# ------------------------------------------------------------------------------------ reference cases


def test_main_gives_the_reference(panel: pl.DataFrame) -> None:
    fit = regress(panel, "main")
    agrees(term(fit, "R_bar"), EXPECTED["main"]["beta"])
    agrees(term(fit, "N_bar"), EXPECTED["main"]["gamma"])
    assert fit.formula == "D ~ R_bar + N_bar + task + family*variant + (1|prompt)"
    assert fit.slopes["name"].to_list() == ["beta"]


def test_interaction_gives_the_reference(panel: pl.DataFrame) -> None:
    fit = regress(panel, "interaction")
    names = {"beta": "R_bar", "tau": "variant[instruct]", "eta": ETA, "gamma": "N_bar"}
    for theirs, ours in names.items():
        agrees(term(fit, ours), EXPECTED["interaction"][theirs])
    assert fit.tests["p"][0] == pytest.approx(EXPECTED["interaction"]["eta"]["pvalue"], rel=1e-3)


def test_quadratic_gives_the_reference(panel: pl.DataFrame) -> None:
    fit, expected = regress(panel, "quadratic"), EXPECTED["quadratic"]
    assert fit.nested is not None
    agrees(term(fit.nested, "R_c"), expected["linear_beta"])
    agrees(term(fit.nested, "R_c:variant[instruct]"), expected["linear_eta"])
    names = {"beta": "R_c", "eta": "R_c:variant[instruct]", "q": "R_c^2", "k": "R_c^2:variant[instruct]"}
    for theirs, ours in names.items():
        agrees(term(fit, ours), expected[f"quadratic_{theirs}"])
    test = fit.tests.row(-1, named=True)
    assert test["df"] == expected["lrt_df"]
    assert test["statistic"] == pytest.approx(expected["lrt_statistic"], abs=1e-4)
    assert test["p"] == pytest.approx(expected["lrt_pvalue"], abs=1e-4)


def test_beta_gives_the_reference(beta_fit: Fit) -> None:
    """Every term but the spline columns, whose basis differs; both bases are 0 at the lower knot, so the
    intercepts and the variant's main effect, which depend on the basis in general, agree as well."""
    compared = 0
    for part, theirs in (("conditional", "cond"), ("dispersion", "disp")):
        for name, expected in EXPECTED["beta_interaction"][theirs].items():
            if "ns(" in name:
                continue
            ours = name.replace("model_variantinstruct", "variant[instruct]").replace(
                "model_name", "family"
            )
            for level in ("coding", "math", "stories"):
                ours = ours.replace(f"task{level}", f"task[{level}]")
            ours = ours.replace("familyLlama", "family[Llama]").replace("familyQwen", "family[Qwen]")
            ours = ours.replace("variant[instruct]:R_sc", "R_sc:variant[instruct]")
            found = term(beta_fit, ours, part)
            assert found["estimate"] == pytest.approx(expected["estimate"], abs=1e-4), name
            assert found["se"] == pytest.approx(expected["stderr"], rel=1e-3), name
            compared += 1
    assert compared == 19
    reference = EXPECTED["beta_interaction"]["fit"]
    assert beta_fit.fit["loglik"] == pytest.approx(reference["loglik"], abs=1e-4)
    assert beta_fit.fit["sd(prompt)"] == pytest.approx(reference["sd_prompt"], abs=1e-4)
    assert beta_fit.fit["sd(family)"] == pytest.approx(reference["sd_family"], abs=1e-4)


def test_beta_is_quick(panel: pl.DataFrame) -> None:
    start = time.perf_counter()
    regress(panel, "beta")
    assert time.perf_counter() - start < 20


# ----------------------------------------------------------------------------------- the beta estimator


def small_problem(precision: float = 7.0) -> tuple[Laplace, np.ndarray]:
    rng = np.random.default_rng(3)
    prompt, family = (a.ravel() for a in np.indices((12, 3)))
    x = np.column_stack([np.ones(36), rng.normal(size=36)])
    theta = np.array([-0.8, 0.3, -0.2, np.log(precision), np.log(0.5), np.log(0.3)])
    y = rng.beta(2 / 7 * precision, 5 / 7 * precision, 36)
    return Laplace(y, x, x[:, ::-1].copy(), prompt, family), theta


def test_the_gradient_is_that_of_the_loglikelihood() -> None:
    laplace, theta = small_problem()
    gradient = laplace.value_and_gradient(theta)[1]
    for j in range(len(theta)):
        step = np.eye(len(theta))[j] * 1e-5
        rise = laplace.value_and_gradient(theta + step)[0] - laplace.value_and_gradient(theta - step)[0]
        assert gradient[j] == pytest.approx(rise / 2e-5, rel=1e-6, abs=1e-6)


def test_log_density_is_scipys() -> None:
    eta, zeta = np.array([-1.0, 0.5]), np.array([1.0, 3.0])
    mu, phi, y = special.expit(eta), np.exp(zeta), np.array([0.2, 0.7])
    assert log_density(y, eta, zeta) == pytest.approx(stats.beta.logpdf(y, mu * phi, (1 - mu) * phi))


def test_the_laplace_loglikelihood_nears_the_integral_as_precision_grows() -> None:
    """With the family effect held at 0 each prompt's integral is one-dimensional."""
    gaps = []
    for precision in (10.0, 100.0, 1000.0):
        laplace, theta = small_problem(precision)
        theta[-1] = np.log(1e-6)
        value = laplace.value_and_gradient(theta)[0]
        eta, zeta = laplace.X @ theta[:2], laplace.W @ theta[2:4]
        for p, mode in enumerate(laplace.u):
            u = mode + np.linspace(-3, 3, 6001)
            at = laplace.prompt == p
            rows = log_density(laplace.y[at, None], eta[at, None] + u, zeta[at, None])  # (rows, u)
            joint = rows.sum(axis=0) + stats.norm.logpdf(u, 0, 0.5)
            value -= special.logsumexp(joint) + np.log(u[1] - u[0])
        gaps.append(abs(value))
    assert gaps[0] < 0.15
    assert gaps[1] < gaps[0] / 2
    assert gaps[2] < gaps[1] / 2


def test_the_spline_is_natural_and_of_full_rank() -> None:
    x = np.sort(np.random.default_rng(0).lognormal(size=200))
    basis = np.column_stack([np.ones(200), *natural_spline(x, 4, "s").values()])
    assert np.linalg.matrix_rank(basis) == 5
    line = basis @ np.linalg.lstsq(basis, x, rcond=None)[0]
    assert line == pytest.approx(x)  # a straight line is a natural spline


def test_beta_recovers_known_parameters() -> None:
    fit = regress(draw(prompts=300), "beta")
    for name, truth in (("R_sc", 0.3), ("R_sc:variant[sft]", 0.3), ("variant[sft]", None)):
        found = term(fit, name)
        if truth is not None:
            assert abs(found["estimate"] - truth) < 4 * found["se"]
            assert found["se"] < 0.05
    assert fit.fit["sd(prompt)"] == pytest.approx(0.4, abs=0.08)
    assert fit.fit["converged"]
    ratio = fit.slopes.row(by_predicate=pl.col("name") == "ratio", named=True)
    assert ratio["ci_low"] < 2 < ratio["ci_high"]
    assert fit.residuals["uniformity_p"] > 0.01
    assert fit.residuals["dispersion_p"] > 0.01
    assert fit.residuals["outliers_p"] > 0.01


def test_no_prompt_effect_is_reported_as_a_zero_sd() -> None:
    fit = regress(draw(sd_prompt=0.0, seed=1), "beta")
    assert fit.fit["zero_sd"] == ["sd(prompt)"]
    assert term(fit, "sd(prompt)", "random")["estimate"] == 0
    assert abs(term(fit, "R_sc")["estimate"] - 0.3) < 4 * term(fit, "R_sc")["se"]


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("model", ["main", "quadratic"])
def test_a_linear_fit_does_not_depend_on_the_unit(model: str, scale: float) -> None:
    """On panels without a prompt effect, where statsmodels alone stops short or fails."""
    frame = draw(kind="linear", sd_prompt=0.0, prompts=12, seed=2)
    plain, scaled = (regress(frame.with_columns(D=pl.col("D") * k), model) for k in (1.0, scale))
    name = "R_c" if model == "quadratic" else "R_bar"
    for column in ("estimate", "se"):
        assert term(scaled, name)[column] == pytest.approx(scale * term(plain, name)[column], rel=1e-5)
    terms = (plain.coefficients["part"] == "conditional").sum()
    rows = plain.fit["rows"] - (terms if model == "main" else 0)  # REML has the rows less the terms
    shift = -rows * np.log(scale)
    assert scaled.fit["loglik"] == pytest.approx(plain.fit["loglik"] + shift, abs=1e-5)
    assert scaled.fit["zero_sd"] == plain.fit["zero_sd"]


def test_a_linear_fit_at_a_zero_sd_is_least_squares() -> None:
    fits = [regress(draw(kind="linear", sd_prompt=0.0, seed=s), "interaction") for s in range(6)]
    at_zero = [f for f in fits if f.fit["zero_sd"]]
    assert at_zero
    assert all(term(f, "sd(prompt)", "random")["estimate"] == 0 for f in at_zero)


# -------------------------------------------------------------------------------------- other panels


@pytest.mark.parametrize("model", ["interaction", "beta"])
def test_each_treated_variant_has_its_slopes(model: str) -> None:
    variants = ("base", "dpo", "sft")
    kind = "beta" if model == "beta" else "linear"
    fit = regress(draw(kind=kind, variants=variants, slopes=(0.2, 0.5, 0.3), prompts=120), model)
    rows = fit.slopes.select("variant", "name").rows()
    assert rows == [("base", "beta"), *((v, n) for v in ("dpo", "sft") for n in ("beta+eta", "ratio"))]
    for variant, truth in (("dpo", 0.5), ("sft", 0.3)):
        where = (pl.col("variant") == variant) & (pl.col("name") == "beta+eta")
        found = fit.slopes.row(by_predicate=where, named=True)
        assert abs(found["estimate"] - truth) < 4 * found["se"]
    assert fit.tests["df"].to_list() == [2]


def test_the_quadratic_test_has_a_term_for_every_variant() -> None:
    fit = regress(
        draw(kind="linear", variants=("base", "dpo", "sft"), slopes=(0.2, 0.5, 0.3)), "quadratic"
    )
    assert fit.tests["df"].to_list() == [2, 3]


def test_another_baseline_turns_eta_around(panel: pl.DataFrame) -> None:
    fit = regress(panel, "interaction", baseline="instruct")
    assert term(fit, "R_bar:variant[base]")["estimate"] == pytest.approx(
        -EXPECTED["interaction"]["eta"]["estimate"], abs=1e-6
    )


def test_a_reference_task_changes_no_slope(panel: pl.DataFrame, beta_fit: Fit) -> None:
    fit = regress(panel, "beta", reference_task="math")
    assert fit.fit["reference"]["task"] == "math"
    assert term(fit, "R_sc")["estimate"] == pytest.approx(term(beta_fit, "R_sc")["estimate"], abs=1e-5)


@pytest.mark.parametrize("model", ["main", "interaction", "quadratic", "beta"])
def test_one_task_or_one_family_must_be_dropped(panel: pl.DataFrame, model: str) -> None:
    few = panel.filter(pl.col("task") == "math", pl.col("family") == "Qwen")
    refused(few, model, r"one task only \(math\).*--drop task")
    refused(few, model, r"one family only \(Qwen\).*--drop family", drop=["task"])
    fit = regress(few, model, drop=["task", "family"])
    assert not fit.coefficients["term"].str.contains("task|family").any()
    assert any("task" in note for note in fit.fit["dropped"])
    assert any("family" in note for note in fit.fit["dropped"])
    assert "task" not in fit.formula
    assert "family" not in fit.formula


def test_vendi_score_as_the_outcome(panel: pl.DataFrame) -> None:
    twice = panel.with_columns(vendi_score=2 * pl.col("D"))
    fit = regress(twice, "interaction", outcome="vendi_score")
    assert term(fit, ETA)["estimate"] == pytest.approx(
        2 * EXPECTED["interaction"]["eta"]["estimate"], abs=1e-5
    )
    assert fit.formula.startswith("vendi_score ~")


def test_null_rows_are_counted_and_left_out(panel: pl.DataFrame) -> None:
    holes = panel.with_columns(D=pl.when(pl.int_range(pl.len()) < 6).then(None).otherwise("D"))
    fit = regress(holes, "main")
    assert (fit.fit["rows"], fit.fit["rows_left_out"]) == (954, 6)
    assert fit.quantile_residuals.shape == (954,)


def test_fieller_is_the_delta_interval_when_beta_is_sharp_and_infinite_when_it_is_not() -> None:
    cov = np.array([[1e-4, 2e-5], [2e-5, 1e-4]])
    low, high = fieller(2.0, 1.0, cov)
    gradient = np.array([1.0, -2.0])
    assert (high - low) / 2 == pytest.approx(
        stats.norm.ppf(0.975) * np.sqrt(gradient @ cov @ gradient), rel=0.01
    )
    assert fieller(2.0, 0.01, cov) == (-np.inf, np.inf)
    # its ends are where the test of num - ratio den is at its quantile, whatever that is
    wide = np.array([[0.09, 0.02], [0.02, 0.04]])
    for end in fieller(2.0, 1.0, wide, 3.0):
        excess = abs(2.0 - end) / np.sqrt(wide[0, 0] - 2 * end * wide[0, 1] + end**2 * wide[1, 1])
        assert excess == pytest.approx(3.0)


# -------------------------------------------------------------------------------- residual diagnostics


def test_residuals_pass_a_right_linear_model_and_flag_skewed_errors() -> None:
    right = draw(kind="linear", seed=2)
    assert regress(right, "interaction").residuals["uniformity_p"] > 0.01
    skewed = np.random.default_rng(0).exponential(0.3, len(right))
    wrong = regress(right.with_columns(D=pl.col("D") + skewed), "interaction")
    assert wrong.residuals["uniformity_p"] < 0.02


def test_residuals_flag_a_wrong_beta_model() -> None:
    right = draw(seed=4)
    rng = np.random.default_rng(1)
    odd = rng.random(len(right)) < 0.1  # a tenth of the rows come from elsewhere
    wrong = right.with_columns(
        D=np.where(odd, rng.uniform(0.85, 0.99, len(right)), right["D"].to_numpy())
    )
    fit = regress(wrong, "beta")
    assert fit.residuals["uniformity_p"] < 0.02


@pytest.mark.parametrize(("spread", "wide"), [(1.0, False), (1.5, True), (0.6, True)])
def test_residuals_flag_too_much_and_too_little_spread(spread: float, wide: bool) -> None:
    """The spread is fitted, so a fit cannot show this: the simulations here come from a known law."""
    y = np.random.default_rng(5).normal(0, spread, 400)
    found, _ = quantile_residuals(y, lambda rng: rng.normal(0, 1, 400), 0)
    assert (found["dispersion_p"] < 0.02) == wide
    assert found["dispersion_ratio"] == pytest.approx(spread**2, rel=0.2)
    if spread > 1:
        assert found["outliers_p"] < 0.02


def test_the_p_value_of_a_right_model_is_not_small_too_often() -> None:
    """Rows of a prompt are dependent; tables for independent rows would reject far more often."""
    p = [
        regress(draw(kind="linear", sd_prompt=1.5, prompts=40, seed=s), "main").residuals
        for s in range(12)
    ]
    assert sum(r["uniformity_p"] < 0.05 for r in p) <= 2


def test_residuals_are_the_same_for_the_same_seed(panel: pl.DataFrame) -> None:
    first, again = (regress(panel, "main", seed=7).quantile_residuals for _ in range(2))
    assert np.array_equal(first, again)
    assert stats.kstest(first, "uniform").statistic < 0.1


# ------------------------------------------------------------------------------------------- refusals


def refused(frame: pl.DataFrame, model: str, words: str, **options: str) -> None:
    with pytest.raises(FitError, match=words) as error:
        regress(frame, model, **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 1


def test_a_missing_baseline_names_what_is_there(panel: pl.DataFrame) -> None:
    refused(panel, "main", r"baseline variant 'raw'; there is base, instruct", baseline="raw")


def test_one_variant_is_refused(panel: pl.DataFrame) -> None:
    refused(panel.filter(pl.col("variant") == "base"), "main", "base is the only variant")


def test_a_missing_reference_task_is_refused(panel: pl.DataFrame) -> None:
    refused(panel, "main", "no rows of the task 'poems'", reference_task="poems")


def test_too_few_prompts_are_refused(panel: pl.DataFrame) -> None:
    refused(panel.filter(pl.col("prompt").is_in(["math/0", "math/1"])), "main", "too few prompts: 2")


def test_a_constant_outcome_is_refused(panel: pl.DataFrame) -> None:
    refused(panel.with_columns(D=pl.lit(0.25)), "beta", "D is constant")


def test_a_column_that_varies_by_rounding_alone_is_constant(panel: pl.DataFrame) -> None:
    """The rule of the views, whatever the column's size."""
    refused(panel.with_columns(D=1e-3 + 1e-13 * pl.col("D")), "main", "D is constant")


def test_a_constant_rate_is_refused(panel: pl.DataFrame) -> None:
    refused(panel.with_columns(R_bar=pl.lit(0.1)), "interaction", "R_bar is constant")


def test_no_value_at_all_is_refused(panel: pl.DataFrame) -> None:
    none = panel.with_columns(vendi_score=pl.lit(None, pl.Float64))
    refused(none, "main", "no rows of the baseline variant 'base'; there is none", outcome="vendi_score")


@pytest.mark.parametrize("model", ["main", "interaction", "quadratic", "beta"])
def test_a_singular_design_names_its_term(panel: pl.DataFrame, model: str) -> None:
    """Each family's variant of its own task: task and variant are one thing."""
    keep = (pl.col("task") == "math") & (pl.col("variant") == "base")
    keep |= (pl.col("task") == "stories") & (pl.col("variant") == "instruct")
    refused(
        panel.filter(keep), model, r"the term (task|variant)\[\w+\]\S* is a combination of the others"
    )


def test_a_spline_of_few_lengths_is_refused(panel: pl.DataFrame) -> None:
    coarse = panel.with_columns(N_bar=pl.when(pl.col("N_bar") > 150).then(256.0).otherwise(128.0))
    refused(coarse, "beta", "two knots coincide")


def test_an_outcome_beyond_one_is_refused(panel: pl.DataFrame) -> None:
    refused(panel.with_columns(D=10 * pl.col("D")), "beta", "between 0 and 1.*vendi_share")


def test_a_second_embedder_is_refused(panel: pl.DataFrame) -> None:
    refused(pl.concat([panel, panel]), "main", "more than one row of .*one embedder and one selection")


def test_one_row_a_prompt_is_refused(panel: pl.DataFrame) -> None:
    lone = panel.unique(subset="prompt", keep="any", maintain_order=True).with_row_index()
    variant = pl.when(pl.col("index") % 2 == 0).then(pl.lit("base")).otherwise(pl.lit("instruct"))
    refused(lone.with_columns(variant=variant).drop("index"), "main", "every prompt has one row")


def test_an_exact_outcome_is_refused(panel: pl.DataFrame) -> None:
    refused(panel.with_columns(D=0.1 + 0.2 * pl.col("R_bar")), "interaction", "exactly")


def test_a_beta_model_without_noise_is_refused(panel: pl.DataFrame) -> None:
    """The precision grows without end: no maximum, and no number."""
    exact = 1 / (1 + (1 - 0.3 * (pl.col("R_bar") - 1)).exp())
    refused(
        panel.with_columns(D=exact),
        "beta",
        "log precision grows without bound in .* rows: .*without noise",
    )


def test_an_unknown_model_or_outcome_is_a_wrong_call(panel: pl.DataFrame) -> None:
    with pytest.raises(UsageError, match="no model 'cubic'; there is main"):
        regress(panel, "cubic")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--outcome vendi_score: the panel has D"):
        regress(panel, "beta", outcome="vendi_score")
    with pytest.raises(UsageError, match="--drop prompt: one of task, family"):
        regress(panel, "beta", drop=["prompt"])


def test_another_share_stands_in_for_diversity(panel: pl.DataFrame, beta_fit: Fit) -> None:
    fit = regress(panel.with_columns(vendi_share=pl.col("D").abs()), "beta", outcome="vendi_share")
    assert term(fit, "R_sc")["estimate"] == pytest.approx(term(beta_fit, "R_sc")["estimate"], abs=1e-9)
    assert fit.formula.startswith("vendi_share ~")


def test_the_precision_of_the_paper_s_vendi_model(panel: pl.DataFrame, beta_fit: Fit) -> None:
    """1/N_bar by variant, four terms each, in place of three; the rest is the full model's."""
    fit = regress(
        panel.with_columns(vendi_norm=pl.col("D").abs()),
        "beta",
        outcome="vendi_norm",
        precision="crossed",
    )
    right = "variant*task + ns(invN_sc, 4)*variant + R_sc*variant + family"
    assert fit.formula.endswith(right)
    terms = fit.coefficients.filter(part="dispersion")["term"].to_list()
    variants = panel["variant"].n_unique()
    assert sum("ns(invN_sc, 4)" in name for name in terms) == 4 * variants
    assert sum("ns(invN_sc, 3)" in name for name in terms) == 0
    full = beta_fit.coefficients.filter(part="dispersion")["term"].to_list()
    others = [name for name in full if "ns(" not in name]
    assert [name for name in terms if "ns(" not in name] == others


# --------------------------------------------------------------------------------------------- reading


def test_the_views_columns_are_read(panel: pl.DataFrame, tmp_path: Path) -> None:
    view = panel.with_columns(
        prompt_id=pl.col("prompt").str.split("/").list.get(1),
        embedder=pl.lit("a"),
        selection=pl.lit("all"),
    ).drop("prompt")
    both = pl.concat([view, view.with_columns(embedder=pl.lit("b"), D=pl.col("D") / 2)])
    for name in ("panel.csv", "panel.parquet"):
        both.write_csv(tmp_path / name) if name.endswith("csv") else both.write_parquet(tmp_path / name)
        with pytest.raises(DataError, match="several values of embedder, name one of a, b"):
            read_panel(tmp_path / name)
        assert read_panel(tmp_path / name, embedder="a").equals(panel)
        with pytest.raises(DataError, match="no embedder 'c'; there is a, b"):
            read_panel(tmp_path / name, embedder="c")


def test_a_file_that_is_no_panel_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("task,D\nmath,0.1\n")
    with pytest.raises(DataError, match=r"p\.csv: no column family, variant, prompt, R_bar, N_bar"):
        read_panel(tmp_path / "p.csv")
    with pytest.raises(StoreError, match=r"none\.csv: cannot be read"):
        read_panel(tmp_path / "none.csv")


# ----------------------------------------------------------------------------------- the command line


def test_the_command_prints_what_people_expect(canopy) -> None:
    code, out, err = canopy("regress", "--model", "interaction", "--panel", GOLDEN / "panel.csv")
    assert (code, err) == (0, "")
    for text in ("D ~ R_bar*variant", "R_bar:variant[instruct]", "beta+eta", "ratio", "uniformity_p"):
        assert text in out
    code, out, _ = canopy(
        "regress", "--model", "main", "--panel", GOLDEN / "panel.csv", "--format", "csv"
    )
    table = pl.read_csv(out.encode())
    assert table.columns == ["part", "term", "estimate", "se", "z", "p", "ci_low", "ci_high"]


def test_the_command_on_a_store(canopy, tmp_path: Path) -> None:
    root = tmp_path / "s"
    import_golden(root)
    code, out, err = canopy("regress", "--model", "interaction", "--store", root, "--errors", "none")
    assert (code, err) == (0, "")
    assert "rows 96" in out
    code, out, err = canopy("regress", "--model", "main", "--store", root, "--outcome", "vendi_share")
    assert (code, "vendi_share ~" in out) == (0, True)
    canopy_store.select_reward(root, 0.7)
    code, selected, _ = canopy(
        "regress",
        "--model",
        "interaction",
        "--store",
        root,
        "--selection",
        "reward_top_70",
        "--errors",
        "none",
    )
    assert code == 0
    assert selected != out


def test_several_runs_are_refused_until_one_is_named(canopy, tmp_path: Path) -> None:
    root = tmp_path / "s"
    command = ("regress", "--model", "interaction", "--store", root, "--errors", "none")
    canopy_store.import_rollouts(root, GOLDEN / "rollouts.parquet", max_new_tokens=64)
    runs = canopy_store.read(root, "runs")["run_id"].to_list()
    alone = canopy(*command, "--format", "csv")
    rollouts = pl.read_parquet(GOLDEN / "rollouts.parquet")
    key = rollouts.select("family", "variant", "task").row(0, named=True)
    other = rollouts.filter(**key).with_columns(pl.col("entropy").list.eval(pl.element() * 2))
    other.write_parquet(tmp_path / "again.parquet")
    canopy_store.import_rollouts(root, tmp_path / "again.parquet", run="again", max_new_tokens=64)
    code, out, err = canopy(*command)
    assert (code, out) == (1, "")
    assert "has several runs, again, " in err
    assert "--run" in err
    named = [part for run in runs for part in ("--run", run)]
    assert canopy(*command, "--format", "csv", *named) == alone
    assert alone[0] == 0
    first = ".".join(key.values())
    others = [*(run for run in runs if run != first), "again"]
    assert not canopy_store.regress(root, "interaction", runs=others, errors="none").coefficients.equals(
        canopy_store.regress(root, "interaction", runs=runs, errors="none").coefficients
    )
    code, _, err = canopy(*command, "--run", "nobody")
    assert (code, "--run nobody: no complete run of this name" in err) == (1, True)


def test_a_panel_of_several_runs_is_chosen_from_by_run(canopy, tmp_path: Path) -> None:
    root, file = tmp_path / "s", tmp_path / "panel.csv"
    canopy_store.import_rollouts(root, GOLDEN / "rollouts.parquet", max_new_tokens=64)
    view = canopy_store.read(root, "panel")
    first = pl.col("run_id") == view["run_id"][0]
    again = view.filter(first).with_columns(run_id=pl.lit("again"), D=pl.col("D") / 2)
    both = pl.concat([view, again])
    both.write_csv(file)
    runs = view["run_id"].unique().to_list()
    expected = regress(view, "main", errors="none").coefficients
    assert regress(both, "main", runs=runs, errors="none").coefficients.equals(expected)
    assert regress(read_panel(file, runs=runs), "main", errors="none").coefficients[
        "estimate"
    ].to_list() == (pytest.approx(expected["estimate"].to_list(), rel=1e-9))
    for read in (lambda: regress(both, "main"), lambda: read_panel(file)):
        with pytest.raises(DataError, match=r"has several runs, again, .*--run"):
            read()
    assert canopy("regress", "--model", "main", "--panel", file)[0] == 1
    named = [part for run in runs for part in ("--run", run)]
    assert canopy("regress", "--model", "main", "--errors", "none", "--panel", file, *named)[0] == 0
    with pytest.raises(DataError, match="no column run_id"):
        regress(view.drop("run_id"), "main", runs=runs)


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ((), 2, "either --store DIR or --panel FILE"),
        (("--store", "EMPTY"), 1, "no complete run"),
        (("--store", "EMPTY", "--panel", "x.csv"), 2, "either --store DIR or --panel FILE"),
        (("--panel", "x.csv"), 1, "x.csv"),
        (("--panel", "PANEL", "--baseline", "sft"), 1, "no rows of the baseline variant 'sft'"),
        (("--panel", "ALPHA"), 1, "one family only (Qwen)"),
        (("--panel", "PANEL", "--outcome", "reward"), 2, "the panel has D"),
    ],
)
def test_bad_calls_are_one_line(canopy, tmp_path: Path, panel, more, code, words) -> None:
    canopy_store.init(tmp_path / "empty")
    panel.filter(family="Qwen").write_csv(tmp_path / "one.csv")
    places = {"EMPTY": tmp_path / "empty", "PANEL": GOLDEN / "panel.csv", "ALPHA": tmp_path / "one.csv"}
    found, out, err = canopy("regress", "--model", "main", *(places.get(m, m) for m in more))
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert words in err
