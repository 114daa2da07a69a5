"""Comparisons: the paper's own bootstrap, a slow one written out, and what is refused."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import reference
from scipy import stats
from stores import EXPECTED, import_golden, rollout_rows, write_parquet

import canopy_store
from canopy_store import compare, sql
from canopy_store.analysis import bootstrap
from canopy_store.analysis.comparable import comparable, view_rows
from canopy_store.analysis.comparison import estimate
from canopy_store.analysis.intervals import percent_change

NAMES = {
    "gen_ppl": "gen_ppl",
    "branching_factor": "branching_factor",
    "ce_star_max": "ce_star",
    "entropy_rate_vs_length.covariance": "cov_length_rate",
    "entropy_rate_vs_length.pearson": "rho_pearson",
    "entropy_rate_vs_length.spearman": "rho_spearman",
    "entropy_rate_vs_length.kendall": "rho_kendall",
}
PARTS = {"base": "baseline", "instruct": "treated", "delta": "delta", "percent_delta": "percent_delta"}

VIEWED = [
    name
    for name, measure in bootstrap.MEASURES.items()
    if measure.unit == "prompt"
    and name not in (*bootstrap.ESTIMATED, *bootstrap.MEANINGS, "accuracy", *bootstrap.AT_K)
]


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    root = tmp_path_factory.mktemp("golden") / "s"
    import_golden(root)
    return root


def test_every_golden_value_of_the_bootstrap(golden):
    frame = compare(golden, metrics=list(NAMES.values()), by="task", interval="percentile")
    assert len(frame) == len(EXPECTED["bootstrap"]) * len(NAMES)
    checked = 0
    for group in EXPECTED["bootstrap"]:
        for name, parts in group["metrics"].items():
            where = {"family": group["family"], "task": group["task"], "metric": NAMES[name]}
            (row,) = frame.filter(**where).to_dicts()
            for part, values in parts.items():
                for key, value in values.items():
                    found = row[PARTS[part] + ("" if key == "value" else f"_{key}")]
                    scale = 1e-5 * max(1, abs(value)) if key in ("value", "se") else 1e-3 * abs(value)
                    assert abs(found - value) <= scale, (where, part, key, value, found)
                    checked += 1
    assert checked == 4 * (3 * 4 * 4 + 4 * 3 * 4)  # correlations have no percent delta


def test_pooled_values_are_those_of_the_view(golden):
    """Pooling stands in SQL and in matrix form: both must say the same."""
    frame = compare(golden, metrics=VIEWED, by="task")
    pooled = canopy_store.read(golden, "model_metrics")
    for row in frame.iter_rows(named=True):
        for part, variant in (("baseline", "base"), ("treated", row["variant"])):
            (view,) = pooled.filter(family=row["family"], task=row["task"], variant=variant).to_dicts()
            expected = view[row["metric"]]
            assert (row[part] is None) == (expected is None)
            if expected is not None:
                assert row[part] == pytest.approx(expected, rel=1e-12, abs=1e-12), row["metric"]


def test_replicates_are_what_a_slow_bootstrap_gives(golden):
    """Prompts repeated as drawn, pooled by the reference, one replicate at a time."""
    names = [n for n in VIEWED if n != "surprisal_mean"]
    frame = compare(golden, metrics=names, replicates=40, by="task", seed=7, interval="percentile")
    rows = canopy_store.read(golden, "prompt_metrics").sort(
        pl.col("prompt_id").str.len_chars(), "prompt_id"
    )
    drawn = np.random.default_rng(7).integers(0, 12, (40, 12))
    chosen = {"family": "alpha", "task": "coding"}
    values = {}
    for variant in ("base", "instruct"):
        prompts = rows.filter(**chosen, variant=variant).to_dicts()
        pooled = [reference.pooled_metrics([prompts[i] for i in draw]) for draw in drawn]
        values[variant] = {n: np.array([p[n] for p in pooled], float) for n in names}
    for name in names:
        (row,) = frame.filter(**chosen, metric=name).to_dicts()
        delta = values["instruct"][name] - values["base"][name]
        for part, drawn_values in (("baseline", values["base"][name]), ("delta", delta)):
            assert row[f"{part}_se"] == pytest.approx(drawn_values.std(ddof=1), rel=1e-9)
            low, high = np.percentile(drawn_values, [2.5, 97.5])
            assert row[f"{part}_ci_low"] == pytest.approx(low, rel=1e-9)
            assert row[f"{part}_ci_high"] == pytest.approx(high, rel=1e-9)


@pytest.mark.parametrize(
    "name", [n for n in bootstrap.MEASURES if n.startswith(("rho", "cov", "margin"))]
)
def test_what_may_be_negative_has_no_percent_change(name):
    assert np.isnan(percent_change(name, np.array(0.2), np.array(0.4)))


def test_two_rollouts_have_a_covariance_of_their_own():
    """Of M = 2 the divisor is 1: drawn both, the sample's covariance; drawn one twice, none."""
    ones = np.array([1.0, 3.0])
    prompt = bootstrap.Rollouts(
        n_tokens=np.array([2, 4]), entropy_sum=ones, surprisal_sum=ones, entropy_rate=ones, cut=0 * ones
    )
    values = bootstrap.redraw(prompt, 40, np.random.default_rng(1))["cov_length_rate"]
    drawn = np.random.default_rng(1).integers(0, 2, (40, 2))
    assert set(values[drawn[:, 0] != drawn[:, 1]]) == {2.0}
    assert set(values[drawn[:, 0] == drawn[:, 1]]) == {0.0}


def test_the_second_level_is_that_of_drawn_rollouts():
    """Columns of redrawn rollouts against the reference on the rollouts written out."""
    rng = np.random.default_rng(3)
    lengths, m = rng.integers(1, 6, 9), 9
    steps = [rng.choice([0.1, 0.5, 1.5], n) for n in lengths]
    vectors = rng.normal(size=(m, 3))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    sums = np.array([h.sum() for h in steps])
    prompt = bootstrap.Rollouts(
        n_tokens=lengths,
        entropy_sum=sums,
        surprisal_sum=sums,
        entropy_rate=sums / lengths,
        cut=(lengths == 5).astype(float),
        kernel=unit @ unit.T,
    )
    found = bootstrap.redraw(prompt, 30, np.random.default_rng(5))
    drawn = np.random.default_rng(5).integers(0, m, (30, m))
    for s, draw in enumerate(drawn):
        rows = [
            {
                "entropy": np.full(lengths[i], sums[i] / lengths[i]).tolist(),
                "finish_reason": "length" if lengths[i] == 5 else "stop",
            }
            for i in draw
        ]
        expected = reference.prompt_metrics(rows, None)
        for name in (
            "ce_star",
            "mean_length",
            "entropy_rate",
            "cov_length_rate",
            "var_length",
            "var_rate",
            "truncation_rate",
            "rho_pearson",
            "rho_spearman",
            "rho_kendall",
        ):
            value = np.nan if expected[name] is None else expected[name]
            assert found[name][s] == pytest.approx(value, abs=1e-6, nan_ok=True), name
        pairs = [
            1 - unit[draw[i]] @ unit[draw[j]] for i in range(m) for j in range(i) if draw[i] != draw[j]
        ]
        assert found["semantic_diversity"][s] == pytest.approx(np.mean(pairs), abs=1e-9)
        squares = [(1 - pair) ** 2 for pair in pairs]
        assert found["squared_similarity"][s] == pytest.approx(np.mean(squares), abs=1e-9)


def test_a_metric_does_not_depend_on_which_others_are_compared(golden):
    """To the last bit, so that whatever prints a comparison prints the same numbers."""
    adjusted = ("p_holm", "p_bh")  # over all that is shown
    together = compare(golden, metrics=VIEWED).drop(adjusted)
    for name in ("ce_star", "gen_ppl", "rho_pearson", "vendi_score"):
        alone = compare(golden, metrics=[name]).drop(adjusted)
        assert alone.equals(together.filter(metric=name)), name


def test_a_run_without_embeddings_is_compared_by_what_needs_none(tmp_path):
    rng = np.random.default_rng(0)
    for variant in ("base", "sft"):
        rows = rollout_rows(variant, lengths=(1, 2, 3, 4), prompts="abcd")
        if variant == "base":
            rows = [{**row, "embedding": rng.normal(size=3).tolist()} for row in rows]
        file = write_parquet(tmp_path / f"{variant}.parquet", rows)
        canopy_store.import_rollouts(tmp_path / "s", file, max_new_tokens=64)
    frame = compare(tmp_path / "s", metrics=["mean_length", "semantic_diversity"])
    length, diversity = frame.select("n_prompts", "n_left_out", "baseline", "treated").rows()
    assert length == (4, 0, 2.5, 2.5)
    assert diversity == (0, 4, None, None)
    assert compare(tmp_path / "s", metrics=["mean_length"], resample="both")["treated"][0] == 2.5


def test_a_model_by_itself_has_the_numbers_of_its_comparison(golden):
    with sql.connect(golden) as con:
        prompts, _ = comparable(view_rows(con, "prompt_metrics"), golden)
    alone = estimate(prompts, metrics=["ce_star", "rho_pearson"])
    compared = compare(golden, metrics=["ce_star", "rho_pearson"])
    assert set(compared["level"]) == {"task", "family", "all"}
    for row in compared.iter_rows(named=True):
        for part, variant in (("baseline", "base"), ("treated", row["variant"])):
            where = {key: row[key] for key in ("level", "family", "task", "metric")}
            (one,) = alone.filter(**where, variant=variant).to_dicts()
            for end in ("", "_se", "_ci_low", "_ci_high"):
                assert one[f"value{end}"] == row[part + end]
    assert len(alone) == 2 * len(compared)


@pytest.mark.parametrize(("gap", "defined"), [(1e-10, True), (1e-13, False)])
def test_a_redrawn_rate_is_constant_where_the_views_is(gap, defined):
    """The views' rule: 1e-12. Correlations of draws that vary by more are defined."""
    rates = np.array([0.5, 0.5 + gap, 0.5])
    rollout = bootstrap.Rollouts(
        n_tokens=np.arange(1, 4),
        entropy_sum=rates * np.arange(1, 4),
        surprisal_sum=np.zeros(3),
        entropy_rate=rates,
        cut=np.zeros(3),
    )
    found = bootstrap.redraw(rollout, 40, np.random.default_rng(0))
    drawn = np.random.default_rng(0).integers(0, 3, (40, 3))
    vary = np.array([len(set(draw)) > 1 and 1 in draw for draw in drawn])
    assert 0 < vary.sum() < 40
    for name in ("rho_pearson", "rho_spearman", "rho_kendall"):
        assert np.array_equal(np.isfinite(found[name]), vary & defined), name


def test_fixed_prompts_free_prompts_and_both(golden):
    names = ["ce_star", "entropy_rate", "semantic_diversity"]
    se = {
        how: compare(golden, metrics=names, by="all", resample=how, replicates=500)[
            "delta_se"
        ].to_numpy()
        for how in ("prompts", "both", "rollouts")
    }
    assert (se["rollouts"] < se["prompts"] * 1.15).all()
    assert se["both"] ** 2 == pytest.approx(se["prompts"] ** 2 + se["rollouts"] ** 2, rel=0.25)


def simulated(tmp_path, seed, prompts, shift, variants=("base", "sft"), tasks=("t",)):
    """A store whose rollouts differ between variants by ``shift`` nats per token on average."""
    rng = np.random.default_rng(seed)
    rows = []
    for task in tasks:
        for p in range(prompts):
            level = rng.normal(1.5, 0.2)
            for number, variant in enumerate(variants):
                effect = number * shift + rng.normal(0, 0.05)
                for i in range(6):
                    n = int(rng.integers(2, 9))
                    h = abs(level + effect + rng.normal(0, 0.1))
                    rows.append(
                        {
                            "family": "f",
                            "variant": variant,
                            "task": task,
                            "prompt_id": str(p),
                            "sample": i,
                            "entropy": [h] * n,
                        }
                    )
    root = tmp_path / f"s{seed}"
    canopy_store.import_rollouts(root, write_parquet(tmp_path / "in.parquet", rows), max_new_tokens=64)
    return root


def test_several_variants_against_one_baseline_and_their_pooling(tmp_path):
    root = simulated(tmp_path, 1, 8, 0.2, ("base", "lora", "dpo"), ("x", "y"))
    frame = compare(root, metrics=["entropy_rate"])
    found = frame.select("level", "family", "task", "variant").rows()
    # one family: a row over all families would be the family's again
    assert found == [
        ("task", "f", "x", "dpo"),
        ("task", "f", "y", "dpo"),
        ("task", "f", "x", "lora"),
        ("task", "f", "y", "lora"),
        ("family", "f", "(all)", "dpo"),
        ("family", "f", "(all)", "lora"),
    ]
    lora = frame.filter(variant="lora", task="(all)")
    assert lora["delta"][0] == pytest.approx(0.2, abs=0.1)
    assert lora["n_prompts"][0] == 16
    assert frame["treatment"].to_list() == ["dpo", "dpo", "lora", "lora", "dpo", "lora"]
    # tasks are independent: the pooled se is that of a mean of two
    parts = frame.filter(variant="lora", level="task")["delta_se"].to_numpy()
    assert lora["delta_se"][0] == pytest.approx(np.sqrt((parts**2).sum()) / 2, rel=0.1)
    assert (frame["p_holm"] >= frame["p_bh"]).all()
    assert (frame["p_bh"] >= frame["p"]).all()


def test_no_effect_is_found_equivalent_and_an_effect_is_not(tmp_path):
    same = compare(
        simulated(tmp_path, 2, 30, 0.0), metrics=["entropy_rate"], margins={"entropy_rate": 0.1}
    )
    assert same["p"][0] > 0.05
    assert same["equivalent"][0]
    other = compare(
        simulated(tmp_path, 3, 30, 0.2), metrics=["entropy_rate"], margins={"entropy_rate": "5%"}
    )
    assert other["p_holm"][0] < 0.001
    assert not other["equivalent"][0]
    assert other["margin"][0] == pytest.approx(0.05 * other["baseline"][0])


def test_prompts_of_one_variant_only_are_left_out_and_counted(tmp_path, canopy):
    rows = rollout_rows(prompts=["1", "2", "3", "10"]) + rollout_rows(
        "sft", prompts=["2", "3", "4", "10"]
    )
    root = tmp_path / "s"
    canopy_store.import_rollouts(root, write_parquet(tmp_path / "in.parquet", rows), max_new_tokens=64)
    frame = compare(root, metrics=["ce_star"])
    assert frame.select("n_prompts", "n_left_out").rows() == [(3, 2)]
    code, out, _ = canopy("compare", "--store", root)
    assert code == 0
    assert "no value of them: CE* 2 prompts (25% of the rollouts)" in out


def test_what_is_refused(golden, tmp_path, canopy):
    def refused(root, *more):
        code, out, err = canopy("compare", "--store", root, *more)
        assert (out, err.count("\n")) == ("", 1)
        return code, err

    assert refused(golden, "--baseline", "sft") == (
        1,
        "canopy: --baseline sft: no such variant here; there is base, instruct\n",
    )
    for more, message in (
        (("--metric", "rho"), "--metric rho: one of ce_star"),
        (("--margin", "ce_star"), "NAME=SIZE"),
        (("--margin", "ce_star=much"), "needs a number"),
        (("--margin", "gen_ppl=1"), "not among what is compared"),
        (("--replicates", "1"), "at least 2"),
        (("--metric", "vendi_score", "--resample", "both"), "not for vendi_score"),
    ):
        code, err = refused(golden, *more)
        assert code == 2
        assert message in err
    code, err = refused(golden, "--selection", "best")
    assert (code, "it has all" in err) == (1, True)
    code, err = refused(golden, "--run", "nobody")
    assert (code, "no complete run of this name" in err) == (1, True)
    empty = tmp_path / "empty"
    canopy_store.init(empty)
    code, err = refused(empty)
    assert (code, "no complete run" in err) == (1, True)
    alone = tmp_path / "alone"
    canopy_store.import_rollouts(
        alone, write_parquet(tmp_path / "a.parquet", rollout_rows()), max_new_tokens=64
    )
    code, err = refused(alone)
    assert (code, "only variant" in err) == (1, True)
    apart = rollout_rows("sft", prompts=["q"])
    canopy_store.import_rollouts(alone, write_parquet(tmp_path / "b.parquet", apart), max_new_tokens=64)
    code, err = refused(alone)
    assert (code, "no prompt is in both" in err) == (1, True)
    twice = write_parquet(tmp_path / "c.parquet", rollout_rows("sft"))
    canopy_store.import_rollouts(alone, twice, max_new_tokens=64, run="again")
    code, err = refused(alone)
    assert (code, "f sft t has several runs, again, f.sft.t" in err) == (1, True)
    frame = compare(alone, runs=["f.base.t", "again"], metrics=["ce_star"])
    assert frame["delta"].to_list() == [0.0]
    assert frame["p"].to_list() == [None]  # a single prompt has no spread


def test_an_outcome_that_never_varies(tmp_path):
    root = tmp_path / "s"
    rows = rollout_rows(lengths=(2, 2, 2), prompts="abc") + rollout_rows("sft", (2, 2, 2), "abc")
    canopy_store.import_rollouts(root, write_parquet(tmp_path / "in.parquet", rows), max_new_tokens=64)
    frame = compare(root, metrics=["mean_length", "rho_pearson"])
    length, rho = frame.sort("metric").to_dicts()
    assert (length["delta"], length["delta_se"], length["p"]) == (0, 0, 1)
    assert (rho["delta"], rho["p"], rho["p_holm"]) == (None, None, None)


def test_a_prompt_without_the_value_in_one_variant_leaves_both(tmp_path):
    """Constant lengths have no ρ: their prompt must not stay in the other variant's mean."""
    rng = np.random.default_rng(0)
    rows = []
    for prompt in range(6):
        for variant in ("base", "sft"):
            for i in range(8):
                cut = prompt < 2 and variant == "base"
                n = 9 if cut else int(rng.integers(1, 9))
                rows.append(
                    {
                        "family": "f",
                        "variant": variant,
                        "task": "t",
                        "prompt_id": prompt,
                        "sample": i,
                        "entropy": rng.gamma(2, 0.5, n).tolist(),
                    }
                )
    root, apart = tmp_path / "s", tmp_path / "apart"
    canopy_store.import_rollouts(root, write_parquet(tmp_path / "in.parquet", rows), max_new_tokens=9)
    kept = [row for row in rows if row["prompt_id"] >= 2]
    canopy_store.import_rollouts(apart, write_parquet(tmp_path / "kept.parquet", kept), max_new_tokens=9)
    rho, length = compare(root, metrics=["rho_pearson", "mean_length"]).to_dicts()
    assert (rho["n_prompts"], rho["n_left_out"]) == (4, 2)
    assert (length["n_prompts"], length["n_left_out"]) == (6, 0)
    (expected,) = compare(apart, metrics=["rho_pearson"]).to_dicts()
    for part in ("baseline", "treated", "delta"):
        assert rho[part] == pytest.approx(expected[part], abs=1e-12)


# ---------------------------------------------------------------- p, and when there is an interval


def two_variants(root, tmp_path, sums, lengths=None):
    """A store of two variants of a family: CE* sums (prompts, rollouts) of each, by variant."""
    for variant, per_prompt in sums.items():
        rows = [
            {
                **dict(zip(("family", "variant", "task"), ("f", variant, "t"), strict=True)),
                "prompt_id": f"p{p}",
                "sample": i,
                "entropy": [value / n] * n,
            }
            for p, values in enumerate(per_prompt)
            for i, value in enumerate(values)
            for n in [1 if lengths is None else lengths[variant][i]]
        ]
        file = write_parquet(tmp_path / f"{variant}.parquet", rows)
        canopy_store.import_rollouts(root, file, max_new_tokens=64)
    return root


def test_p_is_that_of_the_t_test_over_prompts(tmp_path):
    """A bootstrap's spread is that of the drawn prompts; p makes it unbiased, which few prompts show."""
    rng = np.random.default_rng(4)
    sums = {"base": rng.gamma(4, 1, (4, 6)), "sft": rng.gamma(4, 1, (4, 6)) + 0.8}
    root = two_variants(tmp_path / "s", tmp_path, sums)
    (row,) = compare(root, metrics=["ce_star"], by="task", replicates=20_000).to_dicts()
    exact = stats.ttest_rel(sums["sft"].mean(1), sums["base"].mean(1))
    assert stats.t.isf(row["p"] / 2, 3) == pytest.approx(abs(exact.statistic), rel=0.02)
    # with the prompts fixed, the rollouts of each are what varies
    (row,) = compare(
        root, metrics=["ce_star"], by="task", replicates=20_000, resample="rollouts"
    ).to_dicts()
    spread = np.sqrt(sum(s.var(1, ddof=1).sum() / 6 for s in sums.values())) / 4
    statistic = abs((sums["sft"] - sums["base"]).mean()) / spread
    assert stats.t.isf(row["p"] / 2, 2 * 4 * 5) == pytest.approx(statistic, rel=0.02)


def test_replicates_of_which_many_have_no_value_give_no_spread(tmp_path):
    """A drawn prompt without two lengths has no rho: what is left is no sample of the others."""
    names = ["rho_pearson", "rho_kendall"]
    for lengths, known in (((1, 1, 1, 2), False), ((1, 2, 3, 4, 5, 6, 7, 8), True)):
        where = tmp_path / str(known)
        where.mkdir()
        sums = np.random.default_rng(5).gamma(4, 1, (1, len(lengths)))
        both = dict.fromkeys(("base", "sft"), lengths)
        root = two_variants(where / "s", where, {"base": sums, "sft": sums[:, ::-1]}, both)
        frame = compare(root, metrics=names, by="task", resample="rollouts", replicates=400)
        assert frame["delta"].null_count() == 0
        for part in ("baseline", "treated", "delta"):
            for column in (f"{part}_se", f"{part}_ci_low", f"{part}_ci_high"):
                assert frame[column].is_not_null().to_list() == [known] * 2, column
        assert frame["p"].is_not_null().to_list() == [known] * 2


def test_three_rollouts_a_prompt_are_too_few_for_fisher(tmp_path):
    """Its z has the variance 1 / (n - 3): such prompts weigh nothing, as in the view."""
    sums = {v: np.random.default_rng(i).gamma(4, 1, (4, 3)) for i, v in enumerate(("base", "sft"))}
    lengths = dict.fromkeys(sums, (1, 2, 3))
    root = two_variants(tmp_path / "s", tmp_path, sums, lengths)
    names = ["rho_pearson", "rho_spearman", "rho_kendall"]
    frame = compare(root, metrics=names, by="task", replicates=50)
    assert frame["delta"].is_null().to_list() == [True, True, False]
