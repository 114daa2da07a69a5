"""Comparisons of items and documents: hand-worked, against numpy, with a known truth, and refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats
from stores import refused, write_documents

import canopy_store
from canopy_store import compare, power, store
from canopy_store.analysis.comparison import compare_prompts
from canopy_store.analysis.unit_rows import UNITS
from canopy_store.errors import DataError, UsageError
from canopy_store.store.catalog import commit_rows
from canopy_store.store.items import option_rows, store_items

Scores = dict[str, list[list[float]]]  # of an arm: the options' sums of each item


def scorer(root: Path, arm: str, **more: Any) -> str:
    variant = arm.split(".")[0]
    store.add_model(root, {"family": "f", "variant": variant})
    name = f"f.{arm}"
    row = {"scorer_id": name, "model_id": f"f/{variant}", "family": "f", "variant": variant}
    commit_rows(root, "scorers", [{**row, **more}])
    return name


def quiz(root: Path, items: list[dict[str, Any]], arms: Scores, **of_arms: dict[str, Any]) -> Path:
    """A store of two-option items, the first right, under arms that give these sums."""
    root = store.init(root)
    texts = [" yes", " no"]
    listed = [option_rows(str(n), texts, 0, prompts=["?", "?"], **item) for n, item in enumerate(items)]
    store_items(root, "t", listed)
    for arm, sums in arms.items():
        name = scorer(root, arm, **of_arms.get(arm, {}))
        scored = zip(listed, sums, strict=False)  # an arm may have fewer
        keys = {"scorer_id": name, "task": "t"}
        rows = [
            {**keys, "item_id": row["item_id"], "option": row["option"], "logprob_sum": value}
            for own, each in scored
            for row, value in zip(own, each, strict=True)
        ]
        commit_rows(root, "option_scores", rows)
    return root


def texts(root: Path, corpora: dict[str, dict[str, list[tuple[int, float]]]]) -> Path:
    """A store of documents, two a cluster: of each corpus and arm tokens and NLL of each."""
    root = store.init(root)
    arms = dict.fromkeys(arm for of_corpus in corpora.values() for arm in of_corpus)
    names = {arm: scorer(root, arm) for arm in arms}
    for corpus, of_corpus in corpora.items():
        number = len(next(iter(of_corpus.values())))
        of_all = {"text": "x" * 10, "n_bytes": 10}
        documents = [{"document_id": str(n), "cluster": str(n // 2), **of_all} for n in range(number)]
        write_documents(root, corpus, documents)
        for arm, scores in of_corpus.items():
            keys = {"scorer_id": names[arm], "corpus": corpus, "n_bytes": 10}
            rows = [
                {
                    **{**keys, "document_id": str(n), "n_tokens": tokens},
                    **{"logprob": [-nll / tokens] * tokens, "logprob_sum": -nll},
                    **{"entropy": [1.0] * tokens, "entropy_sum": float(tokens)},
                }
                for n, (tokens, nll) in enumerate(scores)
            ]
            commit_rows(root, "document_scores", rows)
    return root


RIGHT, WRONG = [-1.0, -2.0], [-2.0, -1.0]


def fact(number: int, split: str = "all") -> dict[str, Any]:
    return {"cluster": f"fact {number}", **({} if split == "all" else {"split": split})}


# ---------------------------------------------------------------- what it gives


def test_accuracies_are_paired_by_cluster_and_split(tmp_path):
    """Four facts in two wordings each; the tuned model learns forward alone."""
    items = [fact(n, split) for split in ("forward", "back") for n in range(4) for _ in range(2)]
    base = [RIGHT, WRONG] * 4 + [RIGHT, WRONG] * 4
    sft = [RIGHT] * 8 + [RIGHT, WRONG] * 4
    root = quiz(tmp_path / "S", items, {"base": base, "sft": sft})
    frame = compare(root, unit="item", by="task", metrics=["accuracy_sum", "margin"])
    rows = {(row["task"], row["metric"]): row for row in frame.to_dicts()}
    forward, back = rows["t:forward", "accuracy_sum"], rows["t:back", "accuracy_sum"]
    assert (forward["baseline"], forward["treated"], forward["delta"]) == (0.5, 1.0, 0.5)
    assert (forward["n_prompts"], forward["n_samples"], forward["unit"]) == (4, 2, "item")
    assert (back["delta"], back["delta_se"], back["p"]) == (0.0, 0.0, 1.0)
    assert rows["t:forward", "margin"]["delta"] == pytest.approx(1.0)
    # every cluster changes alike: nothing varies between them
    assert (forward["delta_se"], forward["p"]) == (0.0, 0.0)
    pooled = compare(root, unit="item", by="family", metrics=["accuracy_sum"]).row(0, named=True)
    assert (pooled["task"], pooled["delta"], pooled["n_tasks"]) == ("(all)", 0.25, 1)
    assert pooled["n_prompts"] == 4  # the facts, each of them in both parts
    only = compare(root, metrics=["accuracy_sum"], splits=["back"])
    assert only["task"].to_list() == ["t:back"]


def test_a_fact_that_is_asked_in_several_parts_counts_once_where_they_are_pooled(tmp_path):
    """Three wordings of each fact that change alike say no more of other facts than one wording."""
    parts, facts = ("forward", "back", "two-hop"), 7
    items = [fact(n, split) for split in parts for n in range(facts)]
    base = [[-1.0, -2.0] for _ in items]

    def tuned(seed: int) -> list[list[float]]:
        drawn = np.random.default_rng(seed).normal(0.5, 1, facts)
        return [[-1.0 + drawn[n], -2.0] for _ in parts for n in range(facts)]

    root = quiz(tmp_path / "S", items, {"base": base, "s-0": tuned(0), "s-1": tuned(1)})
    shown = ("delta", "delta_se", "delta_ci_low", "delta_ci_high", "p", "n_prompts", "n_left_out")
    for seeds in (None, {"s": "s-*"}):
        rows = compare(root, metrics=["margin"], seeds=seeds).sort("variant", "checkpoint").to_dicts()
        for pooled in (row for row in rows if row["task"] == "(all)"):
            same = ("variant", "checkpoint")
            (one,) = (
                row
                for row in rows
                if row["task"] == "t:back" and all(row[key] == pooled[key] for key in same)
            )
            assert [pooled[key] for key in shown] == pytest.approx([one[key] for key in shown])
            assert (pooled["n_prompts"], pooled["n_samples"]) == (facts, len(parts))
        assert len([row for row in rows if row["task"] == "(all)"]) == (3 if seeds else 2)
    plan, whole = (
        power(root, metric="margin", delta=0.5).filter(variant="s-0").row(0, named=True),
        compare(root, metrics=["margin"], by="family", variants=["s-0"]).row(0, named=True),
    )
    assert plan["pilot_prompts"] == whole["n_prompts"] == facts


def test_prompts_that_families_share_are_not_left_out_of_their_seeds():
    rng = np.random.default_rng(0)
    usual = {"task": "t", "n_rollouts": 4, "mean_length": 3.0, "truncation_rate": 0.0}
    usual |= {"selection": "all", "selection_rule": None}
    rows = [
        {
            **usual,
            **{"run_id": f"{family}.{name}", "family": family, "checkpoint": name, "prompt_id": str(p)},
            **{"variant": name.partition("-")[0], "ce_star": rng.normal()},
        }
        for family in "fg"
        for name in ("base", "s-0", "s-1")
        for p in range(6)
    ]
    models = pl.DataFrame(
        [
            {
                "family": "f",
                "variant": "base",
                "treatment": "base",
                "generation": 0,
                "hyperparameters": None,
            }
        ]
    )
    frame = compare_prompts(pl.DataFrame(rows), models, metrics=["ce_star"], replicates=50)
    row = frame.filter(level="all").row(0, named=True)
    assert (row["n_prompts"], row["n_left_out"], row["left_out_share"]) == (6, 0, 0.0)


def test_parts_without_a_cluster_in_common_are_drawn_by_themselves(tmp_path):
    items = [fact(n, "a") for n in range(4)] + [fact(n + 4, "b") for n in range(4)]
    sft = [[-1.0, -2.0]] * 4 + [[0.0, -2.0]] * 4  # all of b changes by 1, and nothing of a
    root = quiz(tmp_path / "S", items, {"base": [[-1.0, -2.0]] * 8, "sft": sft})
    row = compare(root, metrics=["margin"], by="family").row(0, named=True)
    assert (row["delta"], row["n_prompts"], row["n_tasks"]) == (0.5, 8, 2)
    assert row["delta_se"] == pytest.approx(0, abs=1e-12)


def test_a_part_and_a_task_of_one_name_are_not_made_one(tmp_path):
    root = quiz(
        tmp_path / "S", [fact(n, "a") for n in range(3)], {"base": [RIGHT] * 3, "sft": [WRONG] * 3}
    )
    listed = [option_rows(str(n), [" yes", " no"], 0, prompts=["?", "?"]) for n in range(3)]
    store_items(root, "t:a", listed)
    for variant in ("base", "sft"):
        keys = {"scorer_id": f"f.{variant}", "task": "t:a"}
        rows = [
            {**keys, "item_id": row["item_id"], "option": row["option"], "logprob_sum": -1.0}
            for item in listed
            for row in item
        ]
        commit_rows(root, "option_scores", rows)
    with pytest.raises(DataError, match=r"t:a is a part of t and of t:a.*--task"):
        compare(root, unit="item")
    row = compare(root, metrics=["accuracy_sum"], tasks=["t"]).row(0, named=True)
    assert (row["task"], row["delta"]) == ("t:a", -1.0)


def test_the_interval_is_the_cluster_bootstraps(tmp_path):
    """Against numpy: clusters of unlike sizes drawn with replacement, of a ratio of sums."""
    numbers = np.random.default_rng(3)
    sizes = numbers.integers(1, 5, 30)
    cluster = np.repeat(np.arange(30), sizes)
    right = {arm: numbers.random(len(cluster)) < p for arm, p in (("base", 0.4), ("sft", 0.7))}
    arms = {arm: [RIGHT if r else WRONG for r in own] for arm, own in right.items()}
    root = quiz(tmp_path / "S", [fact(int(n)) for n in cluster], arms)
    row = compare(root, metrics=["accuracy_sum"], replicates=4000).row(0, named=True)
    change = right["sft"].astype(float) - right["base"]
    assert row["delta"] == pytest.approx(change.mean())
    sums = np.bincount(cluster, change)
    draws = np.random.default_rng(0).integers(0, 30, (20_000, 30))
    replicates = sums[draws].sum(1) / sizes[draws].sum(1)
    assert row["delta_se"] == pytest.approx(replicates.std(ddof=1), rel=0.05)
    half = stats.t.ppf(0.975, 29) * row["delta_se"] * math.sqrt(30 / 29)
    assert row["delta_ci_high"] == pytest.approx(row["delta"] + half, rel=1e-6)
    one = canopy_store.read(root, "option_accuracy").filter(variant="sft").row(0, named=True)
    assert row["treated"] == pytest.approx(one["accuracy_sum"])
    assert row["treated_se"] == pytest.approx(one["accuracy_sum_se"], rel=0.1)


def test_a_context_is_an_arm_of_its_own(tmp_path):
    items = [fact(n) for n in range(6)]
    arms = {"base": [WRONG] * 6, "base.docs": [RIGHT] * 3 + [WRONG] * 3, "sft": [RIGHT] * 6}
    root = quiz(tmp_path / "S", items, arms, **{"base.docs": {"context_sha256": "a" * 64}})
    frame = compare(root, metrics=["accuracy_sum"])
    assert dict(frame.select("variant", "delta").iter_rows()) == {"base.docs": 0.5, "sft": 1.0}
    other = compare(root, metrics=["accuracy_sum"], baseline="base.docs", variants=["sft"])
    assert other.select("baseline_variant", "variant", "delta").row(0) == ("base.docs", "sft", 0.5)


def test_losses_are_pooled_over_tokens_and_bytes(tmp_path):
    base = [(10, 30.0), (5, 10.0), (10, 20.0), (20, 50.0)]
    sft = [(10, 20.0), (5, 10.0), (10, 20.0), (20, 30.0)]
    root = texts(tmp_path / "S", {"in": {"base": base, "sft": sft}})
    frame = compare(
        root, unit="document", metrics=["nll", "bits_per_byte", "perplexity", "expected_nll"]
    )
    rows = {row["metric"]: row for row in frame.to_dicts()}
    assert rows["nll"]["baseline"] == pytest.approx(110 / 45)
    assert rows["nll"]["treated"] == pytest.approx(80 / 45)
    assert rows["nll"]["percent_delta"] == pytest.approx(100 * (80 / 110 - 1))
    assert rows["bits_per_byte"]["delta"] == pytest.approx(-30 / 40 / math.log(2))
    assert rows["perplexity"]["treated"] == pytest.approx(math.exp(80 / 45))
    assert rows["expected_nll"]["delta"] == 0
    assert (rows["nll"]["n_prompts"], rows["nll"]["n_samples"]) == (2, 2)
    # one test on three scales: p is adjusted as if each stood alone, beside expected_nll
    assert rows["perplexity"]["p_holm"] == pytest.approx(min(1, 2 * rows["perplexity"]["p"]))


def test_training_seeds_are_checkpoints_of_one_arm(tmp_path):
    numbers = np.random.default_rng(5)
    items = [fact(n) for n in range(40)]
    arms: Scores = {"base": [RIGHT if r else WRONG for r in numbers.random(40) < 0.25]}
    for seed in range(3):
        arms[f"sft-{seed}"] = [RIGHT if r else WRONG for r in numbers.random(40) < 0.6 + 0.1 * seed]
    root = quiz(tmp_path / "S", items, arms)
    frame = compare(root, metrics=["accuracy_sum"], seeds={"sft": "sft-*"})
    whole = frame.filter(level="task").row(0, named=True)
    single = frame.filter(level="seed")
    assert (whole["variant"], whole["n_checkpoints"], len(single)) == ("sft", 3, 3)
    assert whole["delta"] == pytest.approx(single["delta"].mean())
    assert whole["delta_se"] > 0


def test_a_treatment_that_does_nothing_is_told_from_none_as_often_as_it_may_be():
    """Clusters of three items that stand or fall together: p is below 0.05 in about 5 of 100."""
    numbers = np.random.default_rng(11)
    models = pl.DataFrame(
        {name: [] for name in ("family", "variant", "treatment", "hyperparameters")},
        schema_overrides={"hyperparameters": pl.String, "family": pl.String, "variant": pl.String},
    )
    below, unknown = 0, ("mean_length", "truncation_rate")
    for _ in range(100):
        hardness = numbers.random(25)  # of a fact, for both arms
        rows = [
            {
                **{"run_id": arm, "family": "f", "variant": arm, "task": "t", "prompt_id": str(n)},
                **{"n_rollouts": 3, "n_units": 3, **dict.fromkeys(unknown)},
                "accuracy_sum": numbers.binomial(1, hardness[n]) * 2 / 3
                + numbers.binomial(1, hardness[n]) / 3,
                "selection": "all",
            }
            for arm in ("base", "sft")
            for n in range(25)
        ]
        frame = compare_prompts(
            pl.DataFrame(
                rows, schema_overrides={"mean_length": pl.Float64, "truncation_rate": pl.Float64}
            ),
            models,
            metrics=["accuracy_sum"],
            unit="item",
            replicates=200,
        )
        below += frame["p"][0] < 0.05
    assert 1 <= below <= 12


def test_power_of_items_counts_clusters(tmp_path):
    numbers = np.random.default_rng(2)
    items = [fact(n // 2) for n in range(60)]
    arms = {
        arm: [RIGHT if r else WRONG for r in numbers.random(60) < p]
        for arm, p in (("base", 0.5), ("sft", 0.6))
    }
    root = quiz(tmp_path / "S", items, arms)
    row = power(root, metric="accuracy_sum", delta=0.2).row(0, named=True)
    assert (row["n_samples"], row["pilot_prompts"]) == (2, 30)
    compared = compare(root, metrics=["accuracy_sum"]).row(0, named=True)
    sd = compared["delta_se"] * math.sqrt(30) * math.sqrt(30 / 29)
    assert row["sd_prompts"] == pytest.approx(sd)
    # the textbook's count by the normal distribution is a few less than Student's
    textbook = (sd * (stats.norm.isf(0.025) + stats.norm.ppf(0.8)) / 0.2) ** 2
    assert textbook < row["n_prompts"] < textbook + 5
    assert row["n_prompts_upper"] > row["n_prompts"]
    with pytest.raises(UsageError, match="--cost-prompt: of rollouts alone"):
        power(root, metric="accuracy_sum", delta=0.2, cost_prompt=3)


# ---------------------------------------------------------------- what it refuses


def test_what_cannot_be_compared_is_refused(tmp_path, canopy):
    items = [fact(n) for n in range(4)]
    root = quiz(
        tmp_path / "S",
        items,
        {"base": [WRONG] * 4, "sft": [RIGHT] * 4, "part": [RIGHT] * 2},
        sft={"template": "chat"},
        base={"template": "plain"},
    )
    refused(
        canopy("compare", "--store", root), 1, "no complete run", "items are compared with --unit item"
    )
    call = ("compare", "--store", root, "--unit", "item")
    refused(canopy(*call), 1, "different templates", "chat: sft; plain: base", "--allow template")
    call = (*call, "--allow", "template")
    refused(canopy(*call), 1, "part of f has scores of 2 of 4 items of t", "--variant")
    code, out, _ = canopy(*call, "--variant", "sft")
    assert code == 0
    assert "sft changes accuracy by +1" in out
    assert "over 4 items of t" in out
    refused(canopy(*call, "--split", "x"), 1, "--split x: not in the store; it has all")
    refused(canopy(*call, "--task", "x"), 1, "--task x: not in the store; it has t")
    refused(
        canopy(*call, "--baseline", "x"),
        1,
        "--baseline x: no such variant here; there is base, part, sft",
    )
    refused(canopy(*call, "--metric", "nll"), 2, "--unit item: nll is of documents")
    refused(canopy(*call, "--metric", "x"), 2, "--metric x: one of accuracy_sum")
    refused(canopy(*call, "--horizon", "8"), 2, "--horizon: of rollouts alone")
    refused(canopy(*call, "--by", "prompt"), 2, "--by prompt: of rollouts alone")
    refused(canopy("compare", "--store", root, "--unit", "document"), 1, "no document is scored")
    refused(canopy("compare", "--store", root, "--split", "a"), 2, "--split: of items and documents")
    with pytest.raises(UsageError, match=f"--unit word: one of {', '.join(UNITS)}"):
        compare(root, unit="word")
    with pytest.raises(UsageError, match="ce_star of prompts, margin of items"):
        compare(root, metrics=["ce_star", "margin"])


def test_losses_per_token_of_other_tokens_are_refused(tmp_path):
    root = texts(
        tmp_path / "S",
        {"in": {"base": [(10, 30.0), (5, 10.0)] * 3, "sft": [(10, 20.0), (6, 10.0)] * 3}},
    )
    with pytest.raises(DataError, match="nll: arms of f cut 1 of in into other tokens"):
        compare(root, metrics=["nll"])
    frame = compare(root, unit="document")
    assert frame["metric"].to_list() == ["bits_per_byte"]
    assert frame["delta"][0] == pytest.approx(-10 / 20 / math.log(2))


def test_a_value_that_is_not_known_is_left_out_and_counted(tmp_path):
    items = [fact(n // 2) for n in range(8)]
    root = quiz(tmp_path / "S", items, {"base": [WRONG] * 8, "sft": [RIGHT] * 8})
    # without neutral prompts there is no PMI, and without tokens no mean per token
    assert set(compare(root, unit="item")["metric"]) == {"accuracy_sum", "margin"}
    frame = compare(root, metrics=["accuracy_pmi"])
    assert frame.select("delta", "p", "n_left_out").row(0) == (None, None, 4)
