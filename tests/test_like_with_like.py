"""Comparisons of what can be compared: settings, caps, numbers of rollouts, seeds; and their words."""

from __future__ import annotations

import itertools

import numpy as np
import polars as pl
import pytest
from scipy import stats
from stores import refused, rollout_rows, write_parquet

import canopy_store
from canopy_store import ConflictError, DataError, UsageError, compare
from canopy_store.analysis.checkpoints import two_way
from canopy_store.analysis.comparable import store_panel
from canopy_store.analysis.intervals import Units, adjusted, change_of_z, summary, z_of_change
from canopy_store.analysis.likeness import differences, unrecorded
from canopy_store.analysis.pairing import variant_order
from canopy_store.analysis.rarefaction import at_common_m, rarefied_vendi
from canopy_store.analysis.words import marks, notes


def sampled(variant, prompts, samples, cap, *, stop=0.02, rate=1.5, seed=0, task="t", embed=0):
    """Rollouts that end at each step with probability ``stop``, cut at ``cap``; ``rate`` nats a step."""
    rng = np.random.default_rng([seed, samples, cap])
    levels = np.random.default_rng(99).normal(rate, 0.2, prompts)
    rows = []
    for p, i in itertools.product(range(prompts), range(samples)):
        ends = int(rng.geometric(stop))
        n = min(ends, cap)
        row = {
            "family": "f",
            "variant": variant,
            "task": task,
            "prompt_id": str(p),
            "sample": i,
            "entropy": np.abs(rng.normal(levels[p], 0.3, n)).tolist(),
            "finish_reason": "stop" if ends <= cap else "length",
            "temperature": 1.0,
        }
        rows.append({**row, "embedding": rng.normal(size=embed).tolist()} if embed else row)
    return rows


def imported(root, folder, rows, cap, **settings):
    file = write_parquet(folder / f"{rows[0]['variant']}-{rows[0]['task']}.parquet", rows)
    canopy_store.import_rollouts(root, file, max_new_tokens=cap, **settings)
    return root


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """One and the same model twice: 40 rollouts cut at 128, and 16 cut at 64."""
    folder = tmp_path_factory.mktemp("uneven")
    imported(folder / "s", folder, sampled("base", 16, 40, 128, embed=6), 128)
    return imported(folder / "s", folder, sampled("again", 16, 16, 64, embed=6), 64)


def test_other_caps_are_refused_with_the_command_that_goes(uneven, canopy):
    refused(
        canopy("compare", "--store", uneven),
        1,
        "f t: base and again differ in cap (128 and 64)",
        "add --allow cap",
        "canopy compare --horizon 64",
    )
    with pytest.raises(ConflictError, match="differ in cap"):
        canopy_store.regress(uneven, "interaction", baseline="base")
    refused(canopy("compare", "--store", uneven, "--horizon", 65), 2, "again.t was cut at 64 tokens")
    refused(canopy("compare", "--store", uneven, "--horizon", 0), 2, "--horizon 0")
    refused(canopy("compare", "--store", uneven, "--allow", "caps"), 2, "caps")
    with pytest.raises(UsageError, match="--allow caps: one of cap, temperature"):
        compare(uneven, allow=["caps"])


def test_one_model_at_a_common_cap_has_not_changed(uneven):
    wrong = compare(uneven, metrics=["ce_star"], allow=["cap"]).row(0, named=True)
    assert wrong["percent_delta"] < -15
    assert wrong["p"] < 0.01
    assert marks(wrong) == ["cut shares differ: 8% and 26%", "allowed: cap differs, 128 and 64"]
    assert wrong["horizon"] is None
    right = compare(uneven, metrics=["ce_star", "mean_length"], horizon=64).to_dicts()
    for row in right:
        assert row["p"] > 0.05
        assert (row["horizon"], row["allowed"]) == (64, None)
        assert (row["n_samples"], row["baseline_n_samples"], row["treated_n_samples"]) == (16, 40, 16)
    assert right[0]["baseline_cut"] == pytest.approx(0.98**64, abs=0.06)


def test_measures_at_a_horizon_are_those_of_rollouts_cut_there(tmp_path):
    long = [*sampled("base", 6, 8, 128), *sampled("sft", 6, 8, 128, stop=0.05)]
    short = [
        {
            **row,
            "entropy": row["entropy"][:20],
            "finish_reason": "length" if len(row["entropy"]) > 20 else row["finish_reason"],
        }
        for row in long
    ]
    frames = []
    for name, rows, cap, horizon in (("long", long, 128, 20), ("short", short, 20, None)):
        file = write_parquet(tmp_path / f"{name}.parquet", rows)
        canopy_store.import_rollouts(tmp_path / name, file, max_new_tokens=cap)
        frames.append(compare(tmp_path / name, horizon=horizon))
        frames.append(compare(tmp_path / name, horizon=horizon, resample="rollouts", replicates=50))
    for one, other in zip(frames[:2], frames[2:], strict=True):
        assert one["metric"].to_list() == other["metric"].to_list()
        for name in ("baseline", "treated", "delta_ci_low", "p", "baseline_cut"):
            assert one[name].to_list() == pytest.approx(other[name].to_list(), rel=1e-9, nan_ok=True)


def test_a_cap_can_reverse_a_change_and_the_row_says_so(tmp_path):
    """Fewer nats for the whole rollout, more for the first 32 tokens."""
    rows = sampled("base", 20, 16, 2000, stop=0.01, rate=1.0)
    treated = sampled("sft", 20, 16, 2000, stop=0.025, rate=1.5)
    whole = imported(tmp_path / "whole", tmp_path, [*rows, *treated], 2000)
    (true,) = compare(whole, metrics=["ce_star"]).to_dicts()
    (cut,) = compare(whole, metrics=["ce_star"], horizon=32).to_dicts()
    assert true["delta"] < 0 < cut["delta"]
    assert max(true["p"], cut["p"]) < 0.01
    assert marks(true) == []
    assert marks(cut) == ["cut shares differ: 71% and 41%"]


BOTH = {
    "max_new_tokens": 64,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "rendering": "chat",
    "settings": '{"prompts_sha256": "a"}',
    "tokenizer_sha256": "t",
    "n_prompts": 3,
    "prompts": "1,2,3",
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.8}, {"temperature": "1 and 0.8"}),
        ({"top_k": 50}, {"top_k": "0 and 50"}),
        ({"top_p": 0.95}, {"top_p": "1 and 0.95"}),
        ({"max_new_tokens": 32}, {"cap": "64 and 32"}),
        ({"rendering": "plain"}, {"rendering": "chat and plain"}),
        ({"rendering": None, "temperature": None, "max_new_tokens": None}, {}),
        (
            {"settings": '{"prompts_sha256": "a", "system": "Be brief."}'},
            {"template": "system of the one is not the other's"},
        ),
        (
            {"settings": '{"prompts_sha256": "b"}'},
            {"template": "the same prompts became other tokens, or came in another order"},
        ),
        # other prompts, or another vocabulary, become other tokens whatever the template
        ({"settings": '{"prompts_sha256": "b"}', "prompts": "1,2,4"}, {}),
        ({"settings": '{"prompts_sha256": "b"}', "tokenizer_sha256": "u"}, {}),
        ({"temperature": 0.5, "top_k": 1}, {"temperature": "1 and 0.5", "top_k": "0 and 1"}),
    ],
)
def test_what_differs(change, expected):
    assert differences(BOTH, {**BOTH, **change}) == expected


def test_what_is_not_recorded_is_no_difference_and_is_said(tmp_path, canopy):
    for variant, settings in (("base", {}), ("sft", {"temperature": 0.7})):
        rows = [
            {key: value for key, value in row.items() if key != "temperature"}
            for row in sampled(variant, 5, 6, 64)
        ]
        imported(tmp_path / "s", tmp_path, rows, 64, **settings)
    (row,) = compare(tmp_path / "s", metrics=["ce_star"]).to_dicts()
    assert row["unrecorded"] == "temperature, top_k, top_p, rendering"
    _, out, _ = canopy("compare", "--store", tmp_path / "s")
    assert "not recorded, so not known to be alike on both sides: temperature, top_k" in out
    assert unrecorded(BOTH, BOTH) == []


def test_tasks_may_have_caps_of_their_own(tmp_path):
    for task, cap in (("x", 32), ("y", 64)):
        for variant in ("base", "sft"):
            imported(tmp_path / "s", tmp_path, sampled(variant, 5, 6, cap, task=task), cap)
    frame = compare(tmp_path / "s", metrics=["ce_star"])
    assert frame.select("task", "horizon").rows() == [("x", 32), ("y", 64), ("(all)", None)]
    assert frame["allowed"].null_count() == 3


# ---------------------------------------------------------------- numbers of rollouts


def test_a_rarefied_vendi_score_is_the_mean_over_every_subset():
    unit = np.random.default_rng(1).normal(size=(6, 3))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    logs = []
    for subset in itertools.combinations(range(6), 4):
        shares = np.linalg.eigvalsh(unit[list(subset)] @ unit[list(subset)].T / 4)
        shares = shares[shares > 1e-12]
        logs.append(-(shares * np.log(shares)).sum())
    assert rarefied_vendi(unit @ unit.T, 4, 4000) == pytest.approx(np.exp(np.mean(logs)), rel=0.01)
    assert rarefied_vendi(unit @ unit.T, 1) == pytest.approx(1)


def test_vendi_scores_are_compared_at_one_number_of_rollouts(uneven):
    """One model with 40 and with 16 rollouts: plain scores differ, since they grow with the number."""
    stored = canopy_store.read(uneven, "model_metrics").sort("variant")["vendi_score"].to_list()
    assert stored[1] > 1.05 * stored[0]  # again, base
    (row,) = compare(uneven, metrics=["vendi_score"], allow=["cap"]).to_dicts()
    assert row["rarefied_to"] == 16
    assert row["baseline"] == pytest.approx(row["treated"], rel=0.03)
    assert row["treated"] == pytest.approx(stored[0], rel=1e-12)
    assert row["p"] > 0.05
    assert "at 16 rollouts a prompt" in marks(row)


def test_the_panel_has_vendi_scores_at_one_number_of_rollouts(uneven):
    with pytest.raises(ConflictError, match="cap"):
        store_panel(uneven)
    panel = store_panel(uneven, allow=["cap"])
    scores = dict(panel.group_by("variant").agg(pl.col("vendi_score").mean()).iter_rows())
    shares = dict(panel.group_by("variant").agg(pl.col("vendi_share").mean()).iter_rows())
    assert scores["base"] == pytest.approx(scores["again"], rel=0.03)
    assert shares["base"] == pytest.approx(scores["base"] / 16)
    stored = canopy_store.read(uneven, "panel").columns
    assert panel.columns == stored


def test_a_vendi_score_without_embeddings_to_draw_from_is_null_and_says_why():
    rows = pl.DataFrame(
        {
            "family": "f",
            "task": "t",
            "prompt_id": ["p", "p", "q", "q"],
            "variant": ["base", "sft"] * 2,
            "run_id": ["b", "s"] * 2,
            "n_rollouts": [4, 2, 3, 3],
            "vendi_score": [2.0, 1.5, 2.5, 2.4],
        }
    )
    frame = at_common_m(rows, "base", lambda _: {})
    assert frame["vendi_score"].to_list() == [None, None, 2.5, 2.4]
    assert frame["rarefied_to"].to_list() == [None] * 4
    assert frame["vendi_reason"].drop_nulls().len() == 2
    alone = at_common_m(rows, "other", lambda _: {})
    assert alone["vendi_score"].to_list() == rows["vendi_score"].to_list()
    # a variant without a score of its own bounds no other's
    bare = rows.with_columns(vendi_score=pl.when(pl.col("variant") == "base").then("vendi_score"))
    assert at_common_m(bare, "base", lambda _: {})["vendi_score"].to_list() == [2.0, None, 2.5, None]


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize("name", ["ce_star", "rho_pearson", "rho_kendall", "vendi_score", "gen_ppl"])
def test_an_interval_leaves_out_0_exactly_where_p_is_small(name):
    rng = np.random.default_rng(3)
    agree = {True: 0, False: 0}
    for _ in range(300):
        prompts, confidence = int(rng.integers(3, 30)), float(rng.uniform(0.5, 0.99))
        centre = rng.uniform(0.3, 0.5, 2)
        drawn = centre[:, None] + rng.normal(0, rng.uniform(0.02, 0.2), (2, 200))
        row = summary(name, centre, drawn, Units(prompts, prompts - 2, confidence))
        outside = not row["delta_ci_low"] <= 0 <= row["delta_ci_high"]
        assert outside == (row["p"] < 1 - confidence)
        assert row["delta_ci_low"] <= row["delta"] <= row["delta_ci_high"]
        agree[outside] += 1
    assert min(agree.values()) > 15


def test_the_interval_by_t_written_out():
    """delta ± t(P - tasks) · se · sqrt(P / (P - tasks)); ratios on the log, correlations on z."""
    drawn = np.random.default_rng(0).normal([[2.0], [3.0]], 0.2, (2, 400))
    units = Units(10, 8)
    width = 2.3060041352 * np.sqrt(10 / 8)  # t(8) at 97.5%
    row = summary("ce_star", np.array([2.0, 3.0]), drawn, units)
    se = (drawn[1] - drawn[0]).std(ddof=1)
    assert row["delta_ci_low"] == pytest.approx(1 - width * se, rel=1e-8)
    assert row["delta_ci_high"] == pytest.approx(1 + width * se, rel=1e-8)
    log_se = np.log(drawn[1] / drawn[0]).std(ddof=1)
    low = 100 * (np.exp(np.log(1.5) - width * log_se) - 1)
    assert row["percent_delta_ci_low"] == pytest.approx(low, rel=1e-8)
    r = np.tanh(drawn / 4)
    row = summary("rho_spearman", np.tanh([0.5, 0.75]), r, units)
    half = width * ((drawn[1] - drawn[0]) / 4).std(ddof=1)
    d = 0.25 + half
    assert row["delta_ci_high"] == pytest.approx(
        np.tanh(0.625 + d / 2) - np.tanh(0.625 - d / 2), rel=1e-8
    )
    assert row["treated_ci_high"] < 1


def test_the_way_from_z_to_a_change_and_back():
    for middle in (-1.2, 0.0, 0.7):
        for d in (0.0, 0.3, 2.0):
            assert z_of_change(float(change_of_z(d, middle)), middle) == pytest.approx(d, abs=1e-9)
    assert z_of_change(2.0, 0.0) == np.inf
    one, other = 0.2, 0.9
    z = np.arctanh([one, other])
    assert change_of_z(z[1] - z[0], z.mean()) == pytest.approx(other - one)


def test_percentiles_stay_on_request(uneven):
    options = {"metrics": ["ce_star"], "allow": ["cap"]}
    t, percentile = compare(uneven, **options), compare(uneven, interval="percentile", **options)
    assert t["delta_se"].to_list() == percentile["delta_se"].to_list()
    assert t["p"].to_list() == percentile["p"].to_list()
    assert (t["delta_ci_low"] < percentile["delta_ci_low"]).all()
    assert (t["interval"][0], percentile["interval"][0]) == ("t", "percentile")
    with pytest.raises(UsageError, match="--interval basic"):
        compare(uneven, interval="basic")


def test_a_measure_on_another_scale_is_no_second_test(uneven):
    options = {"allow": ["cap"], "by": "task"}
    alone = compare(uneven, metrics=["entropy_rate", "mean_length"], **options)
    both = compare(uneven, metrics=["entropy_rate", "mean_length", "branching_factor"], **options)
    assert both.filter(pl.col("metric") != "branching_factor")["p_holm"].equals(alone["p_holm"])
    assert "branching_factor" not in compare(uneven, **options)["metric"]
    frame = pl.DataFrame(
        {
            "metric": ["entropy_rate", "mean_length", "branching_factor"],
            "level": "task",
            "p": [0.02, 0.03, 0.01],
            "margin": None,
            "p_equivalence": None,
        }
    )
    assert adjusted(frame)["p_holm"].to_list() == pytest.approx([0.04, 0.04, 0.02])


# ---------------------------------------------------------------- what is shown


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Two tasks, a base and three variants; prompts with texts; some of them always cut."""
    folder = tmp_path_factory.mktemp("many")
    for task, variant in itertools.product(("x", "y"), ("base", "sft-10", "sft-9", "dpo")):
        rows = sampled(variant, 6, 8, 48, stop=0.05, rate=1.5 + 0.1 * len(variant), task=task)
        for row in rows:
            row["prompt"] = f"what is {row['prompt_id']}?" * 9
            if variant == "base" and row["prompt_id"] == "0":
                row |= {"entropy": (row["entropy"] * 48)[:48], "finish_reason": "length"}
        imported(folder / "s", folder, rows, 48)
    return folder / "s"


def test_filters_and_the_order_of_variants(many):
    frame = compare(many, metrics=["ce_star"])
    assert list(dict.fromkeys(frame["variant"])) == ["dpo", "sft-9", "sft-10"]
    one = compare(many, metrics=["ce_star"], tasks=["x"], variants=["dpo"])
    assert one.select("level", "task", "variant").rows() == [("task", "x", "dpo")]
    two = compare(many, metrics=["ce_star"], families=["f"], variants=["dpo"])
    assert two["level"].to_list() == ["task", "task", "family"]
    with pytest.raises(DataError, match="--task z: not in the store; it has x, y"):
        compare(many, tasks=["z"])
    with pytest.raises(DataError, match="--variant lora"):
        compare(many, variants=["lora"])


def test_variants_come_by_generation_then_step_then_name():
    models = pl.DataFrame(
        {
            "variant": ["dpo", "b-200", "a-1000", "base", "sft"],
            "generation": [2, 1, 1, 0, 1],
            "hyperparameters": [None, '{"steps": 200}', '{"steps": 1000}', None, '{"step": 50}'],
        }
    )
    assert variant_order(models, models, "base") == ["base", "sft", "b-200", "a-1000", "dpo"]


def test_variants_of_one_generation_come_by_letters_and_numbers():
    names = ["step-2", "grpo", "sft-10", "step-10", "base", "sft", "dpo", "sft-9"]
    models = pl.DataFrame({"variant": names, "generation": 1, "hyperparameters": [None] * 8})
    ordered = ["base", "dpo", "grpo", "sft", "sft-9", "sft-10", "step-2", "step-10"]
    assert variant_order(models, models, "base") == ordered


def test_what_is_left_out_is_said_with_its_share(many, canopy):
    frame = compare(many, tasks=["x"], variants=["dpo"], metrics=["ce_star", "rho_pearson"])
    ce_star, rho = frame.to_dicts()
    assert (ce_star["n_left_out"], ce_star["left_out_share"]) == (0, 0)
    assert (rho["n_left_out"], rho["n_prompts"]) == (1, 5)
    assert rho["left_out_share"] == pytest.approx(1 / 6)
    _, out, _ = canopy("compare", "--store", many, "--task", "x", "--variant", "dpo")
    assert "no value of them: ρ 1 prompt (17% of the rollouts)" in out


def test_changes_by_prompt_are_ranked(many, canopy):
    frame = compare(many, by="prompt", metrics=["mean_length", "rho_pearson"])
    rows = canopy_store.read(many, "prompt_metrics")
    own = frame.filter(variant="dpo", metric="mean_length")
    assert own["rank"].to_list() == list(range(1, 13))
    assert own["delta"].abs().is_sorted(descending=True)
    first = own.row(0, named=True)
    where = {"task": first["task"], "prompt_id": first["prompt_id"]}
    base, treated = (rows.filter(**where, variant=v)["mean_length"][0] for v in ("base", "dpo"))
    assert first["delta"] == pytest.approx(treated - base)
    assert first["percent_delta"] == pytest.approx(100 * (treated - base) / base)
    assert first["text"].startswith(f"what is {first['prompt_id']}?")
    # NULL, of a prompt that is always cut, comes last
    rho = frame.filter(variant="dpo", metric="rho_pearson")
    assert rho["delta"].is_null().to_list() == [False] * 10 + [True] * 2
    assert rho["percent_delta"].null_count() == 12
    code, out, _ = canopy("compare", "--store", many, "--by", "prompt", "--metric", "mean_length")
    assert code == 0
    assert "dpo, mean length, tokens: the largest changes of 12 prompts" in out
    assert out.count("│ x    ┆") + out.count("│ y    ┆") == 30  # ten a variant


@pytest.mark.parametrize("width", [80, 100, 400])
def test_the_table_fits_the_terminal(many, canopy, monkeypatch, width):
    for module in ("shared", "compared"):
        monkeypatch.setattr(f"canopy_store.commands.{module}.terminal_width", lambda: width)
    for more in ((), ("--by", "prompt", "--metric", "ce_star")):
        _, out, _ = canopy("compare", "--store", many, *more)
        tables = [line for line in out.splitlines() if line[:1] in "│┌└╞"]
        assert max(map(len, tables)) <= width
        assert any("CE* (first 48 tokens)" in line for line in out.splitlines())
    _, out, _ = canopy("sql", "from model_metrics", "--store", many)
    tables = [line for line in out.splitlines() if line[:1] in "│┌└╞"]
    assert max(map(len, tables)) <= width
    assert "semantic_diversity" in out  # whole, not in pieces


def test_the_first_line_is_in_words(many, canopy):
    _, out, _ = canopy("compare", "--store", many, "--variant", "dpo")
    first, *rest = out.splitlines()
    assert first.startswith("dpo")
    assert "CE*" in first
    assert "over 12 prompts of 2 tasks" in first
    assert any("each variant is one checkpoint" in line for line in rest)
    _, out, _ = canopy("compare", "--store", many, "--variant", "dpo", "--by", "task")
    assert out.startswith("dpo: of 2 changes of CE* (first 48 tokens) ")


def test_a_selection_says_what_it_is(tmp_path, canopy):
    rows = [*rollout_rows(prompts="abcd"), *rollout_rows("sft", (2, 2, 3, 4, 5), "abcd")]
    file = write_parquet(tmp_path / "in.parquet", rows)
    canopy_store.import_rollouts(tmp_path / "s", file, max_new_tokens=64)
    (name,) = canopy_store.select_lengths(tmp_path / "s", name="mine")
    frame = compare(tmp_path / "s", selection=name, metrics=["ce_star", "entropy_rate"])
    ce_star, rate = frame.to_dicts()
    assert "subset mean, not an entropy" in marks(ce_star)
    assert marks(rate) == ["conditions on length, an outcome"]
    assert any(
        "the selection matches lengths, which the treatment changes too" in n for n in notes(frame)
    )


# ---------------------------------------------------------------- seeds


def test_the_variance_of_a_two_way_table():
    """Its expectation is the variance of the mean over seeds and prompts that are both drawn."""
    rng = np.random.default_rng(0)
    means, variances = [], []
    for _ in range(2000):
        table = rng.normal(0, 0.5, (4, 1)) + rng.normal(0, 1, (1, 12)) + rng.normal(0, 0.7, (4, 12))
        means.append(table.mean())
        variances.append(two_way(table, np.zeros(12))[0] ** 2)
    true = 0.25 / 4 + 1 / 12 + 0.49 / 48
    assert np.var(means) == pytest.approx(true, rel=0.1)
    assert np.mean(variances) == pytest.approx(true, rel=0.1)
    constant = np.tile(rng.normal(size=10), (3, 1))  # no seed differs: the prompts' own variance
    se, freedom = two_way(constant, np.repeat([0, 1], 5))
    squares = sum(constant[0, part].var() * 5 for part in (slice(5), slice(5, 10)))
    assert se == pytest.approx(np.sqrt(squares / 8 / 10))
    assert freedom == pytest.approx(8)
    assert np.isnan(two_way(constant[:1], np.zeros(10))[0])


def test_seeds_are_checkpoints_of_one_variant(tmp_path, canopy):
    """Seeds that differ by more than prompts do: a change that each of them shows need not be one."""
    for number, (variant, rate) in enumerate(
        (("base", 1.5), ("sft-1", 1.5), ("sft-2", 1.75), ("sft-3", 2.0), ("dpo", 1.6))
    ):
        rows = sampled(variant, 12, 8, 256, rate=rate, seed=number, stop=0.05)
        imported(tmp_path / "s", tmp_path, rows, 256)
    names = ["entropy_rate", "rho_pearson", "gen_ppl"]
    frame = compare(tmp_path / "s", metrics=names, seeds={"sft": "sft-*"})
    rate = frame.filter(metric="entropy_rate")
    assert rate.select("level", "variant", "checkpoint", "n_checkpoints").rows() == [
        ("task", "dpo", None, 1),
        ("seed", "sft", "sft-1", 1),
        ("seed", "sft", "sft-2", 1),
        ("seed", "sft", "sft-3", 1),
        ("task", "sft", None, 3),
    ]
    alone = compare(tmp_path / "s", metrics=names)
    seeds, pooled = rate.filter(level="seed"), rate.filter(level="task", variant="sft")
    by_itself = dict(alone.filter(metric="entropy_rate").select("variant", "delta").iter_rows())
    assert dict(seeds.select("checkpoint", "delta").iter_rows()) == {
        name: by_itself[name] for name in ("sft-1", "sft-2", "sft-3")
    }
    assert pooled["delta"][0] == pytest.approx(seeds["delta"].mean())
    # the seeds' spread of 0.25 makes most of the standard error: 0.25 / sqrt(3)
    assert pooled["delta_se"][0] == pytest.approx(0.25 / np.sqrt(3), rel=0.15)
    assert pooled["p"][0] > 0.1
    assert seeds["p"].null_count() == 0
    assert seeds["p_holm"].null_count() == 3
    for name in names:
        row = frame.filter(metric=name, level="task", variant="sft").row(0, named=True)
        assert row["delta_ci_low"] < row["delta"] < row["delta_ci_high"]
        assert row["treated"] - row["baseline"] == pytest.approx(row["delta"])
    code, out, _ = canopy("compare", "--store", tmp_path / "s", "--seeds", "sft=sft-*")
    assert code == 0
    assert "sft-2" in out
    assert "each variant is one checkpoint" not in out
    with pytest.raises(UsageError, match="a baseline has one"):
        compare(tmp_path / "s", baseline="sft", seeds={"sft": "sft-*"})
    with pytest.raises(UsageError, match="--interval percentile"):
        compare(tmp_path / "s", interval="percentile", seeds={"sft": "sft-*"})


@pytest.mark.parametrize("lacks", ["sft-0", "sft-1"])
def test_a_checkpoint_that_lacks_a_task_is_in_no_row_over_it(tmp_path, lacks):
    rng = np.random.default_rng(4)
    rows = [
        row | {"entropy": rng.random(len(row["entropy"])).tolist()}
        for variant in ("base", "sft-0", "sft-1")
        for task in ("a", "b")
        if (variant, task) != (lacks, "b")
        for row in rollout_rows(variant, prompts=[f"p{i}" for i in range(6)], task=task)
    ]
    source = write_parquet(tmp_path / "r.parquet", rows)
    canopy_store.import_rollouts(tmp_path / "s", source, max_new_tokens=8)
    frame = compare(tmp_path / "s", metrics=["ce_star"], seeds={"sft": "sft-*"})
    other = {"sft-0": "sft-1", "sft-1": "sft-0"}[lacks]
    found = frame.select("level", "task", "checkpoint", "n_checkpoints").rows()
    assert set(found) == {
        ("seed", "a", "sft-0", 1),
        ("seed", "a", "sft-1", 1),
        ("task", "a", None, 2),
        ("seed", "b", other, 1),
        ("seed", "(all)", other, 1),
    }


def test_over_one_value_each_seeds_are_what_one_is(tmp_path):
    """Three copies of one checkpoint: the pooled row is that of one, by the jackknife."""
    for variant in ("base", "sft-1", "sft-2", "sft-3"):
        rows = sampled(
            variant, 15, 8, 256, rate=1.8 if variant != "base" else 1.5, seed=variant != "base"
        )
        imported(tmp_path / "s", tmp_path, rows, 256)
    names = ["ce_star", "entropy_rate", "gen_ppl", "rho_pearson"]
    frame = compare(tmp_path / "s", metrics=names, seeds={"sft": "sft-*"}, replicates=4000)
    for name in names:
        rows = frame.filter(metric=name)
        one, pooled = rows.filter(checkpoint="sft-1").row(0, named=True), rows.row(-1, named=True)
        for part in ("baseline", "treated", "delta"):
            assert pooled[part] == pytest.approx(one[part], rel=1e-9)
        # the se of replicates is the biased one; the jackknife is wider where weights are random
        rel = 0.15 if name == "gen_ppl" else 0.04
        assert pooled["delta_se"] == pytest.approx(one["delta_se"] * np.sqrt(15 / 14), rel=rel)
        assert pooled["delta_ci_low"] == pytest.approx(one["delta_ci_low"], rel=rel)


@pytest.fixture(scope="module")
def negative(tmp_path_factory):
    """Rollouts that outlive their chance to end: CE* by control variate is below 0. And their seeds."""
    folder = tmp_path_factory.mktemp("negative")
    for variant, q in (("base", 0.6), ("sft-1", 0.5), ("sft-2", 0.55)):
        ends = {"lengths": (8, 1, 9, 10), "prompts": tuple("abcdef"), "finish_reason": ["stop"] * 4}
        rows = rollout_rows(variant, **ends)
        steps = {"entropy": 0.1, "eos_logprob": float(np.log(q))}
        rows = [{**row, **{k: [x] * len(row["entropy"]) for k, x in steps.items()}} for row in rows]
        imported(folder / "s", folder, rows, 128)
    return folder / "s"


@pytest.mark.parametrize("seeds", [None, {"sft": "sft-*"}])
def test_a_baseline_below_0_has_no_percent_change(negative, seeds):
    for row in compare(negative, metrics=["ce_star_cv"], seeds=seeds).to_dicts():
        assert row["baseline"] < 0 < row["delta"]
        assert [row[f"percent_delta{end}"] for end in ("", "_se", "_ci_low", "_ci_high")] == [None] * 4


def test_families_that_share_prompts_lose_a_degree_of_freedom_a_mean(tmp_path):
    """Rollouts drawn within prompts: the pooled error is that of the families' mean."""
    rng = np.random.default_rng(3)
    rows = []
    for family, variant in itertools.product("fg", ("base", "sft")):
        lengths = [tuple(rng.integers(1, 40, 3)) for _ in range(12)]
        for p, own in enumerate(lengths):
            rows += [{**r, "family": family} for r in rollout_rows(variant, own, (str(p),))]
    imported(tmp_path / "s", tmp_path, rows, 64)
    frame = compare(tmp_path / "s", metrics=["mean_length"], resample="rollouts", replicates=4000)
    pooled = frame.row(by_predicate=pl.col("level") == "all", named=True)
    lengths = pl.DataFrame(rows).with_columns(n=pl.col("entropy").list.len())
    of_means = lengths.group_by("family", "variant", "prompt_id").agg(pl.col("n").var() / 3)["n"]
    se = np.sqrt(of_means.sum()) / 24  # a mean over two families of 12 prompts
    half = (pooled["delta_ci_high"] - pooled["delta_ci_low"]) / 2
    assert half == pytest.approx(stats.t.ppf(0.975, 96) * se, rel=0.05)


def test_a_cap_that_is_not_recorded_shows_in_what_was_cut(tmp_path):
    imported(tmp_path / "s", tmp_path, sampled("base", 4, 8, 128), 128)
    imported(tmp_path / "s", tmp_path, sampled("sft", 4, 8, 40), None)
    with pytest.raises(ConflictError, match=r"cap \(128 and 40\).*--horizon 40"):
        compare(tmp_path / "s")
    with pytest.raises(UsageError, match=r"run f\.sft\.t was cut at 40 tokens; at most --horizon 40"):
        compare(tmp_path / "s", horizon=100)
    frame = compare(tmp_path / "s", horizon=40, metrics=["ce_star"])
    assert frame["horizon"].to_list() == [40]
