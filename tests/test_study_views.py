"""Views over studies, collapse, gain and forgetting, cost: against plain Python over the tables."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import duckdb
import polars as pl
import pytest
from tiny import save_tiny

import canopy_store
from canopy_store import sql, store
from canopy_store.store.catalog import commit_rows

TEXTS = {
    "a": "The quick brown fox jumps over 13 lazy dogs.\n\nIt is 7, and they sleep.",
    "b": "They sleep, and the quick brown fox jumps.",
    "c": "It is 7, and 13 lazy dogs sleep. It is 7, and they jump.",
    "d": "The quick dogs sleep.",
}


@pytest.fixture(scope="module")
def generations(tmp_path_factory) -> Path:
    """A base, a model trained on what it wrote, and one on what that wrote; all read one corpus."""
    from canopy_store.cli import main

    folder = tmp_path_factory.mktemp("generations")
    root = folder / "S"

    def canopy(*arguments: object) -> None:
        assert main([str(a) for a in arguments]) == 0, arguments

    prompts, corpus = folder / "p.jsonl", folder / "corpus.jsonl"
    prompts.write_text('{"text": "The quick"}\n{"text": "lazy dogs"}\n')
    lines = [
        {"document_id": k, "text": t, "split": "ab" if k in "ab" else "cd"} for k, t in TEXTS.items()
    ]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data: Path | None = None
    for number, variant in enumerate(("base", "gen1", "gen2")):
        model = save_tiny(folder / variant, number, window=64)
        named = ("--store", root, "--family", "tiny", "--variant", variant)
        if data is not None:
            canopy("ingest", "register", *named, "--model", model, "--data", data, "--treatment", "sft")
        sample = ("--task", "t", "--prompts", prompts, "--samples", 5, "--max-new-tokens", 9)
        parent = () if data is None else ("--parent", "tiny/base", "--treatment", "sft")
        canopy("ingest", "rollouts", *named, "--model", model, *parent, *sample)
        texts = ("--corpus", "c", "--documents", corpus)
        canopy("ingest", "documents", *named, "--model", model, *parent, *texts)
        data = folder / f"{variant}.jsonl"
        canopy("ingest", "generated", "--store", root, "--run", f"tiny.{variant}.t", "--out", data)
    score = ("ingest", "score", "--store", root, "--scorer", folder / "base", "--name", "tiny/base")
    canopy(*score, "--run", "tiny.gen1.t", "--run", "tiny.gen2.t")
    return root


def pairs(text: str) -> list[tuple[str, str]]:
    return list(pairwise(re.findall(r"\w+", text.lower())))


@pytest.mark.parametrize("split", ["ab", "cd"])
@pytest.mark.parametrize(("variant", "generation"), [("base", 0), ("gen1", 1), ("gen2", 2)])
def test_collapse_is_what_the_tables_give(generations, variant, generation, split):
    read = canopy_store.read
    rows = read(generations, "collapse").filter(variant=variant, split=split)
    assert len(rows) == 1
    row = rows.row(0, named=True)
    assert (row["generation"], row["first_model_id"]) == (generation, "tiny/base")
    losses = {
        r["variant"]: r["nll"] for r in read(generations, "perplexity").filter(split=split).to_dicts()
    }
    assert row["nll"] == losses[variant]
    assert row["nll_rise"] == pytest.approx(losses[variant] - losses["base"])

    rollouts = read(generations, "rollouts").filter(run_id=f"tiny.{variant}.t")
    written = Counter(pair for text in rollouts["text"] for pair in pairs(text))
    real = Counter(pair for name in split for pair in pairs(TEXTS[name]))
    rare = [pair for pair, times in real.items() if times <= 2]
    assert row["rare_pairs_kept"] == pytest.approx(sum(pair in written for pair in rare) / len(rare))
    unseen = sum(times for pair, times in written.items() if pair not in real)
    assert row["unseen_pairs"] == pytest.approx(unseen / written.total())

    scored = read(generations, "document_scores").filter(
        pl.col("scorer_id") == f"tiny.{variant}", pl.col("document_id").is_in(list(split))
    )
    tokens = [
        (token, -logprob)
        for own, logprobs, n in scored.select("tokens", "logprob", "n_tokens").iter_rows()
        for token, logprob in zip(own[-n:], logprobs, strict=True)
    ]
    times = Counter(token for token, _ in tokens)
    as_rare = {n: sum(t for t in times.values() if t <= n) for n in times.values()}
    tail = [nll for token, nll in tokens if as_rare[times[token]] <= 0.1 * len(tokens)]
    want = pytest.approx(sum(tail) / len(tail)) if tail else None
    assert row["tail_nll"] == want

    model = read(generations, "model_metrics").filter(variant=variant).row(0, named=True)
    for name in ("ce_star", "entropy_rate", "rho_pearson", "mean_length", "semantic_diversity"):
        assert row[name] == (None if model[name] is None else pytest.approx(model[name], rel=1e-12))
    if variant == "base":
        assert row["generated_perplexity"] is None
        return
    scores = read(generations, "scores").filter(run_id=f"tiny.{variant}.t")
    total = scores["surprisal_sum"].sum() / rollouts["n_tokens"].sum()
    assert row["generated_perplexity"] == pytest.approx(math.exp(total))


def test_a_corpus_without_texts_has_no_pairs(generations, tmp_path):
    root = tmp_path / "out"
    canopy_store.export(generations, root, license="cc0-1.0", text=False)
    rows = canopy_store.read(root, "collapse")
    assert len(rows) == 6
    for name in ("rare_pairs_kept", "unseen_pairs", "tail_nll"):
        assert rows[name].null_count() == 6
    assert rows["nll"].null_count() == 0


def test_gain_and_forgetting_and_what_is_on_the_frontier(tmp_path):
    """Four children of one parent; their losses on two corpora are set by hand."""
    root = store.init(tmp_path / "S")
    losses = {  # on what is learnt, on the rest
        "base": (5.0, 2.0),
        "far": (2.0, 3.0),
        "near": (4.0, 2.1),
        "worse": (4.0, 2.5),
        "equal": (4.0, 2.1),
        "grandchild": (1.0, 1.0),
    }
    for variant in losses:
        parent = {"base": None, "grandchild": "f/far"}.get(variant, "f/base")
        model = {"family": "f", "variant": variant, "parent_id": parent, "treatment": "sft"}
        store.add_model(root, {**model, "treatment": parent and "sft"})
        own = {"scorer_id": f"f.{variant}", "model_id": f"f/{variant}", "template": "plain"}
        commit_rows(root, "scorers", [{**own, "family": "f", "variant": variant}])
    for place, corpus in enumerate(("new", "old")):
        documents = {"document_id": "d", "text": "x" * 20, "split": "all", "cluster": "d", "n_bytes": 20}
        commit_rows(root, "documents", [{"corpus": corpus, **documents}])
        for variant, values in losses.items():
            score = {
                "n_tokens": 10,
                "n_bytes": 20,
                "logprob": [-values[place]] * 10,
                "entropy": [1.0] * 10,
            }
            score |= {"logprob_sum": -10 * values[place], "entropy_sum": 10.0}
            keys = {"scorer_id": f"f.{variant}", "corpus": corpus}
            commit_rows(root, "document_scores", [{**keys, "document_id": "d", **score}])
    frame = canopy_store.read(root, "gain_forgetting")
    assert len(frame) == 2 * 5  # both ways, and no pair with a grandparent
    rows = {row["variant"]: row for row in frame.filter(corpus="new").to_dicts()}
    assert rows["far"]["gain"] == pytest.approx(3)
    assert rows["far"]["forgotten"] == pytest.approx(1)
    assert rows["far"]["gain_per_byte"] == pytest.approx(3 * 10 / 20)
    assert rows["far"]["forgotten_per_byte"] == pytest.approx(1 * 10 / 20)
    assert rows["grandchild"]["parent_scorer_id"] == "f.far"
    assert rows["grandchild"]["gain"] == pytest.approx(1)
    assert {name: row["frontier"] for name, row in rows.items()} == {
        **{"far": True, "near": True, "equal": True, "worse": False},
        "grandchild": True,  # of another parent
    }
    other = {row["variant"]: row for row in frame.filter(corpus="old").to_dicts()}
    assert other["near"]["gain"] == pytest.approx(-0.1)
    assert other["near"]["forgotten"] == pytest.approx(-1)


def test_cost_is_of_whole_jobs():
    known = {"rows": 5, "tokens": 100, "seconds": 2.0, "energy_j": 30.0, "energy_method": "NVML, G"}
    jobs = {
        "whole": [{}, {"tokens": 300, "seconds": 3.0, "energy_j": 50.0, "device": "cpu"}],
        "part": [{}, {"energy_j": None, "energy_method": None}],
        "mixed": [{}, {"energy_method": "RAPL, 1 packages"}],
        "unknown": [{"tokens": None}, {}],
        "untimed": [{"seconds": 0.0}],
    }
    rows = [
        {"run_id": "r", "kind": "rollouts", "name": name, "shard": n, "device": "cuda", **known, **more}
        for name, shards in jobs.items()
        for n, more in enumerate(shards)
    ]
    with duckdb.connect() as con:
        con.register("work", pl.DataFrame(rows).to_arrow())
        shown = con.sql(sql.source("cost_per_token")).pl()
    found = {row["name"]: row for row in shown.to_dicts()}
    whole = found["whole"]
    assert (whole["n_shards"], whole["n_rows"], whole["n_tokens"], whole["seconds"]) == (2, 10, 400, 5.0)
    assert (whole["tokens_per_second"], whole["energy_j"], whole["joules_per_token"]) == (80, 80, 0.2)
    assert (whole["energy_method"], whole["device"]) == ("NVML, G", "cpu, cuda")
    assert found["part"]["energy_j"] is found["part"]["joules_per_token"] is None
    assert found["part"]["tokens_per_second"] == 50
    assert found["mixed"]["energy_j"] is None
    assert found["mixed"]["energy_method"] == "NVML, G, RAPL, 1 packages"
    assert found["unknown"]["n_tokens"] is found["unknown"]["joules_per_token"] is None
    assert found["unknown"]["energy_j"] == 60
    assert found["untimed"]["tokens_per_second"] is None
