"""The report of scored items and documents: the numbers of compare, arm by arm."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from scipy import stats
from stores import write_document_scores, write_documents

import canopy_store
from canopy_store import compare, sql, store
from canopy_store.report import facts, sections, write_report
from canopy_store.store.catalog import commit_rows
from canopy_store.store.items import option_rows, store_items


@pytest.fixture(autouse=True)
def _no_database(monkeypatch):
    """canopy.duckdb is none of these tests' business, and takes longer to write than all else."""
    monkeypatch.setattr(sql, "write_database", lambda root: None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six facts in two splits and two corpora, under a base and two checkpoints of a child."""
    root = canopy_store.init(tmp_path / "s")
    arms = {"base": 0, "sft-0": 4, "sft-1": 5}
    for variant in arms:
        parent = None if variant == "base" else "f/base"
        store.add_model(root, {"family": "f", "variant": variant, "parent_id": parent})
    for corpus, gain in (("new", 0.5), ("old", -0.25)):
        names = [f"d{n}" for n in range(4)]
        rows = [{"document_id": d, "text": "a 1" * 2, "cluster": d} for d in names]
        write_documents(root, corpus, rows)
        for variant, right in arms.items():
            better = gain * (right > 0)
            scores = {
                d: (["a", " 1", "a"], [-2 - n / 8 + better, -1.0, -2 + better * (1 + n / 8)])
                for n, d in enumerate(names)
            }
            write_document_scores(root, {"family": "f", "variant": variant}, corpus, scores)
    listed = [
        option_rows(f"{split}{n}", [" yes", " no"], 0, prompts=["?", "?"], cluster=f"{n}", split=split)
        for split in ("back", "forward")
        for n in range(6)
    ]
    store_items(root, "t", listed)
    for variant, right in arms.items():
        rows = [
            {"scorer_id": f"f.{variant}", "task": "t", "item_id": row["item_id"]}
            | {"option": row["option"], "logprob_sum": -1.0 - (row["option"] == (n % 6 < right))}
            for n, own in enumerate(listed)
            for row in own
        ]
        commit_rows(root, "option_scores", rows)
    return root


def charts(root: Path, **options) -> dict[str, dict]:
    given = {"baseline": "base", "selection": "all", "embedder": None, "runs": (), "seed": 42}
    gathered = facts.gather(root, **{**given, "rollouts": 0, **options})
    return {chart["id"]: chart for chart in sections.charts(gathered)}


def rows_of(chart: dict) -> list[dict]:
    return chart["spec"]["datasets"]["rows"]


def test_a_store_without_rollouts_has_a_page_of_what_it_has(root, tmp_path):
    page = write_report(root, tmp_path / "report.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script id="data" [^>]*>(.*?)</script>', page, re.DOTALL)[1])
    assert [c["id"] for c in data["charts"]] == ["accuracy", "loss", "token-types", "frontier"]
    assert [t["id"] for t in data["tables"]] == ["option_accuracy", "perplexity"]
    assert data["study"] == {"items": 12, "documents": 8}
    assert not data["rollouts"]
    assert data["variants"] == ["base", "sft-0", "sft-1"]
    assert "sft-0" in data["headline"]
    assert data["treated"] == ["sft-0", "sft-1"]


@pytest.mark.parametrize("seeds", [None, {"sft": "sft-*"}])
def test_accuracies_and_losses_are_those_of_compare_beside_chance(root, seeds):
    drawn = charts(root, seeds=seeds)
    for chart, metric, unit in (("accuracy", "accuracy_sum", "item"), ("loss", "nll", "document")):
        changes = compare(root, unit=unit, seeds=seeds).filter(level="task", metric=metric)
        found = {(row["task"], row["variant"]): row for row in rows_of(drawn[chart])}
        treated = {(row["task"], row["variant"]): row for row in changes.to_dicts()}
        assert {key for key in found if key[1] != "base"} == set(treated)
        for key, row in treated.items():
            for name, part in (("value", ""), ("ci_low", "_ci_low"), ("ci_high", "_ci_high")):
                assert found[key][name] == pytest.approx(row[f"treated{part}"], rel=1e-5)
            base = found[key[0], "base"]
            assert base["value"] == pytest.approx(row["baseline"], rel=1e-5)
            rule = 0.5 if unit == "item" else row["baseline"]
            assert found[key]["rule"] == pytest.approx(rule, rel=1e-5)


def test_the_frontier_gains_on_the_corpus_that_arms_gain_more_on(root):
    rows = rows_of(charts(root)["frontier"])
    assert {(row["gained"], row["forgotten"]) for row in rows} == {("new", "old")}
    changes = compare(root, unit="document").filter(level="task", metric="nll").to_dicts()
    delta = {(row["task"], row["variant"]): row for row in changes}
    for row in rows:
        gained, lost = delta["new", row["variant"]], delta["old", row["variant"]]
        assert row["gain"] == pytest.approx(-gained["delta"], rel=1e-5)
        assert row["gain_low"] == pytest.approx(-gained["delta_ci_high"], rel=1e-5)
        assert row["forgetting_high"] == pytest.approx(lost["delta_ci_high"], rel=1e-5)


def test_types_of_token_step_to_the_total_with_intervals_over_clusters(root):
    rows = [r for r in rows_of(charts(root)["token-types"]) if r["panel"] == "sft-0 · new"]
    steps = {row["token_type"]: row for row in rows}
    assert set(steps) == {"function word", "number", "total"}
    # per document the change of the function words, of three tokens in all
    changes = [-0.5 - 0.5 * (1 + n / 8) for n in range(4)]
    mean = sum(changes) / 12
    assert steps["function word"]["contribution"] == pytest.approx(mean, rel=1e-5)
    deviations = sum((change - 3 * mean) ** 2 for change in changes)
    half = stats.t.ppf(0.975, 3) * math.sqrt(4 / 3 * deviations) / 12
    assert steps["function word"]["low"] == pytest.approx(mean - half, rel=1e-4)
    assert steps["function word"]["high"] == pytest.approx(mean + half, rel=1e-4)
    assert steps["number"]["contribution"] == 0
    assert (steps["total"]["start"], steps["total"]["end"]) == (0, pytest.approx(mean, rel=1e-5))


def test_training_over_seeds_has_a_band(root):
    for variant, loss in (("sft-0", 1.0), ("sft-1", 2.0)):
        keys = {"model_id": f"f/{variant}", "family": "f", "variant": variant, "split": "train"}
        rows = [{**keys, "step": step, "loss": loss / step} for step in (1, 2)]
        commit_rows(root, "training", rows)
    single = rows_of(charts(root)["training"])
    assert [(r["variant"], r["at"], r["value"], r["low"]) for r in single] == [
        ("sft-0", 1, 1.0, None),
        ("sft-0", 2, 0.5, None),
        ("sft-1", 1, 2.0, None),
        ("sft-1", 2, 1.0, None),
    ]
    first, second = rows_of(charts(root, seeds={"sft": "sft-*"})["training"])
    half = stats.t.ppf(0.975, 1) * 0.5
    assert (first["value"], first["n_checkpoints"]) == (1.5, 2)
    assert first["low"] == pytest.approx(1.5 - half, rel=1e-4)
    assert second["high"] == pytest.approx(0.75 + half / 2, rel=1e-4)


def test_without_the_baseline_arms_are_shown_and_not_compared(root):
    drawn = charts(root, baseline="real")
    assert "Nothing is compared" in drawn["accuracy"]["shown"]
    assert {row["variant"] for row in rows_of(drawn["accuracy"])} == {"base", "sft-0", "sft-1"}
    assert "frontier" not in drawn
    assert "token-types" not in drawn


def test_an_arm_that_lacks_items_is_said_in_place_of_the_chart(root):
    store.add_model(root, {"family": "f", "variant": "dpo"})
    row = {"scorer_id": "f.dpo", "model_id": "f/dpo", "family": "f", "variant": "dpo"}
    commit_rows(root, "scorers", [row])
    keys = {"scorer_id": "f.dpo", "task": "t", "item_id": "back0"}
    commit_rows(root, "option_scores", [{**keys, "option": n, "logprob_sum": -1.0} for n in (0, 1)])
    drawn = charts(root)
    assert "dpo of f has scores of 1 of" in drawn["accuracy"]["missing"]
    assert "spec" in drawn["loss"]
