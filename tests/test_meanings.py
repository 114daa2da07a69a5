"""Meaning: golden clusters and entropies, each measure against a derivation of its own, edge cases."""

from __future__ import annotations

import json
import math
import tempfile
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import GOLDEN, refused, write_parquet

import canopy_store
from canopy_store import store
from canopy_store.analysis.bootstrap import Rollouts, redraw
from canopy_store.errors import DataError, UsageError
from canopy_store.ingest.clusters import alike, ingest_clusters, subsample

EXPECTED = json.loads((GOLDEN / "clusters_expected.json").read_text())
CASES = EXPECTED["cases"]
VERDICTS = ("contradiction", "neutral", "entailment")
METHODS = ("components", "strict", "loose")


def judged_store(
    root: Path,
    prompts: dict[str, tuple[list[list[int | None]], list[float]]],
    variant: str = "base",
    lengths: tuple[int, ...] = (1, 2, 3),
) -> Path:
    """A store of prompts, each a matrix of verdicts (None: not asked) and its rollouts' logprobs.

    Clustered in every way, under the judge J.
    """
    rows = [
        {
            **{"family": "f", "variant": variant, "task": "t", "prompt_id": prompt, "sample": i},
            "logprob": [logprob / (n := lengths[(i + at) % len(lengths)])] * n,
            "entropy": [0.5 + 0.1 * ((i + at) % 4)] * n,
        }
        for at, (prompt, (_, logprobs)) in enumerate(prompts.items())
        for i, logprob in enumerate(logprobs)
    ]
    file = write_parquet(root.parent / f"{root.name}-{variant}.parquet", rows)
    (run,) = canopy_store.import_rollouts(root, file)
    judged = [
        (prompt, i, j, None if verdict < 0 else VERDICTS[verdict])
        for prompt, (matrix, _) in prompts.items()
        for i, line in enumerate(matrix)
        for j, verdict in enumerate(line)
        if i != j and verdict is not None
    ]
    columns = {
        "run_id": [run] * len(judged),
        **{
            name: [row[at] for row in judged]
            for at, name in enumerate(("prompt_id", "sample", "other_sample", "verdict"))
        },
        "probability": [None] * len(judged),
        "reply": [None] * len(judged),
        "status": ["failed" if row[3] is None else "ok" for row in judged],
    }
    keys = {"judge": "J", "run": run}
    path = store.shard_path(store.folder(root, "judgments", **keys), 0)
    said = {"judge": "J", "method": "nli", "subsample": 1000, "seed": 42}
    store.write_rows(path, "judgments", columns)
    store.plan(root, "judge", "J", said)
    store.commit(root, "judgments", keys, [path], said)
    for method in METHODS:
        ingest_clusters(root, "J", method)
    return root


def metrics(
    root: Path, method: str = "components", frame: pl.DataFrame | None = None
) -> dict[str, dict]:
    """Rows of meaning_metrics by prompt; ``frame``: the whole view, where it was read."""
    frame = canopy_store.read(root, "meaning_metrics") if frame is None else frame
    return {row["prompt_id"]: row for row in frame.filter(clustering=f"J.{method}").to_dicts()}


# ---------------------------------------------------------------- golden values


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> Path:
    prompts = {str(n): (c["implication"], c["sequence_logprob"]) for n, c in enumerate(CASES)}
    return judged_store(tmp_path_factory.mktemp("golden") / "s", prompts, lengths=(1,))


def near(expected: float):
    return pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_relaxed_semantic_entropy_is_the_published_one(golden, case):
    expected, row = CASES[case]["rse"], metrics(golden)[str(case)]
    assert set(expected) == {"entropy", "normalized", "n_clusters", "labels"}
    assert row["n_judged"] == CASES[case]["m"]
    assert row["labels"] == expected["labels"]
    assert row["n_meanings"] == expected["n_clusters"]
    assert row["rse"] == near(expected["entropy"])
    assert row["rse_norm"] == near(expected["normalized"])


@pytest.mark.parametrize("method", ["strict", "loose"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_semantic_entropy_is_the_published_one(golden, case, method):
    expected, row = CASES[case][f"greedy_{method}"], metrics(golden, method)[str(case)]
    assert set(expected) == {"ids", "class_logprob", "semantic_entropy", "discrete_entropy"}
    assert row["labels"] == expected["ids"]
    classes = canopy_store.read(golden, "meanings").filter(prompt_id=str(case), clustering=f"J.{method}")
    assert classes.sort("cluster")["class_logprob"].to_list() == near(expected["class_logprob"])
    assert row["semantic_entropy"] == near(expected["semantic_entropy"])
    assert row["discrete_semantic_entropy"] == near(expected["discrete_entropy"])


@pytest.mark.parametrize("drawn", EXPECTED["subsample"], ids=lambda d: f"{d['n_rollouts']}-{d['seed']}")
def test_the_judged_rollouts_are_the_published_ones(drawn):
    seed = drawn["seed"] + drawn["prompt_index"]
    assert subsample(drawn["n_rollouts"], drawn["n_judged"], seed) == drawn["indices"]


def test_the_permutation_is_torch_s():
    import torch

    for n, seed in ((25, 0), (40, 7), (1000, 2**40 + 3)):
        generator = torch.Generator().manual_seed(seed)
        drawn = sorted(torch.randperm(n, generator=generator)[:24].tolist())
        assert subsample(n, 24, seed) == drawn


def test_clusters_of_the_golden_store_are_sound(golden):
    wrong = canopy_store.verify(golden, deep=True)  # its made-up entropies are nobody's
    assert set(wrong["what"].str.slice(0, 13)) <= {"logging_check"}


# ---------------------------------------------------------------- against a derivation of its own


@st.composite
def prompts_with_verdicts(draw: st.DrawFn) -> tuple[list[list[int | None]], list[float]]:
    m = draw(st.integers(1, 12))
    verdict = st.sampled_from([2, 2, 1, 0, -1, None])
    matrix = [[2 if i == j else draw(verdict) for j in range(m)] for i in range(m)]
    logprob = st.floats(-900, 0, width=32)
    return matrix, draw(st.lists(logprob, min_size=m, max_size=m))


def of_pair(matrix, i: int, j: int, method: str) -> bool:
    """Whether i and j mean the same, by the words of the definition."""
    said = [0 if matrix[a][b] in (None, -1) else matrix[a][b] for a, b in ((i, j), (j, i))]
    if method == "loose":
        return 0 not in said and said != [1, 1]
    return said == [2, 2]


def by_merging(matrix, m: int) -> list[int]:
    """Components, by merging sets until none share a pair."""
    sets = [{i} for i in range(m)]
    for i, j in combinations(range(m), 2):
        if of_pair(matrix, i, j, "components"):
            one, other = (next(s for s in sets if each in s) for each in (i, j))
            if one is not other:
                one |= other
                sets.remove(other)
    sets.sort(key=min)
    return [next(at for at, s in enumerate(sets) if i in s) for i in range(m)]


def by_last_first_member(matrix, m: int, method: str) -> list[int]:
    """Greedy clusters from the back: i's first member is the last before it that is like it."""
    firsts: list[int] = []
    labels = []
    for i in range(m):
        like = [at for at, first in enumerate(firsts) if of_pair(matrix, first, i, method)]
        if not like:
            firsts.append(i)
        labels.append(like[-1] if like else len(firsts) - 1)
    return labels


def derived(matrix, logprobs: list[float], method: str) -> dict:
    m = len(logprobs)
    labels = by_merging(matrix, m) if method == "components" else by_last_first_member(matrix, m, method)
    weights = np.exp(np.array(logprobs, np.longdouble))
    if weights.sum() == 0:  # beyond the range of this derivation
        weights = np.exp(np.array(logprobs, np.longdouble) - max(logprobs))
    classes = [float(weights[np.equal(labels, c)].sum() / weights.sum()) for c in sorted(set(labels))]
    counts = [labels.count(c) / m for c in sorted(set(labels))]
    seen: set[int] = set()
    scores = [label not in seen and not seen.add(label) for label in labels[:10]]
    patience = [0.8**i for i in range(10)]
    return {
        "labels": labels,
        "n_judged": m,
        "n_meanings": len(set(labels)),
        "rse": sum(math.log(m / labels.count(label)) for label in labels) / m,
        "rse_norm": None if m < 2 else -sum(p * math.log(p) for p in counts) / math.log(m),
        "semantic_entropy": -sum(p * math.log(p) for p in classes if p),
        "discrete_semantic_entropy": -sum(p * math.log(p) for p in counts),
        "distinct_10": None if m < 10 else float(max(rank(labels[:10])) + 1),
        "utility_10": None if m < 10 else float(np.average(scores, weights=patience)),
        "n_intransitive": sum(
            labels[i] == labels[j] and not of_pair(matrix, i, j, method)
            for i, j in combinations(range(m), 2)
        ),
    }


def rank(labels: list[int]) -> list[int]:
    """Labels numbered anew in the order in which they come."""
    order = list(dict.fromkeys(labels))
    return [order.index(label) for label in labels]


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(prompts_with_verdicts(), min_size=1, max_size=12))
def test_every_measure_is_what_its_definition_says(prompts):
    with tempfile.TemporaryDirectory() as folder:
        root = judged_store(Path(folder) / "s", {str(n): each for n, each in enumerate(prompts)})
        measured = canopy_store.read(root, "meaning_metrics")
        for method in METHODS:
            rows = metrics(root, method, measured)
            for n, (matrix, logprobs) in enumerate(prompts):
                expected = derived(matrix, logprobs, method)
                row = {name: rows[str(n)][name] for name in expected}
                for name, value in expected.items():
                    if isinstance(value, float):
                        assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
                    else:
                        assert row[name] == value, name
        classes = canopy_store.read(root, "meanings")
        of_prompt = classes.group_by("prompt_id", "clustering").agg(
            pl.col("share").sum(), pl.col("class_logprob").exp().sum()
        )
        assert of_prompt["share"].to_list() == pytest.approx([1.0] * len(of_prompt))
        assert of_prompt["class_logprob"].to_list() == pytest.approx([1.0] * len(of_prompt))


# ---------------------------------------------------------------- worked by hand, and degenerate


def test_the_case_worked_by_hand(tmp_path):
    """docs/measures.md, 'Meaning'."""
    yes, no = 2, 0
    matrix = [[2, yes, no, yes], [yes, 2, no, no], [no, no, 2, no], [yes, no, no, 2]]
    logprobs = [math.log(p) for p in (0.4, 0.1, 0.3, 0.2)]
    root = judged_store(tmp_path / "s", {"p": (matrix, logprobs)})
    row = metrics(root)["p"]
    assert row["labels"] == [0, 0, 1, 0]
    assert row["rse"] == pytest.approx(0.5623, abs=5e-5)
    assert row["rse_norm"] == pytest.approx(0.4056, abs=5e-5)
    assert row["semantic_entropy"] == pytest.approx(0.6109, abs=5e-5)
    assert row["n_intransitive"] == 1
    text = (Path(__file__).parent.parent / "docs" / "measures.md").read_text()
    assert all(number in text for number in ("0.5623", "0.4056", "0.6109"))


def test_a_later_first_member_takes_a_rollout_over():
    same = np.array([[2, 0, 2], [0, 2, 2], [2, 2, 2]])
    from canopy_store.ingest.clusters import clustered

    assert clustered(same, "strict") == ([0, 1, 1], [0, 0, 0])  # the first met it first
    assert clustered(same, "components") == ([0, 0, 0], [1, 1, 0])
    neutral = np.array([[2, 1], [2, 2]])
    assert clustered(neutral, "loose")[0] == [0, 0]
    assert clustered(neutral, "strict")[0] == [0, 1]
    assert alike(np.array([[2, 1], [1, 2]]), "loose").tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("m", [1, 2, 10])
@pytest.mark.parametrize("verdict", [2, 0, -1])
def test_one_cluster_or_all_apart(tmp_path, m, verdict):
    matrix = [[2 if i == j else verdict for j in range(m)] for i in range(m)]
    row = metrics(judged_store(tmp_path / "s", {"p": (matrix, [-1.0] * m)}))["p"]
    apart = m if verdict != 2 else 1
    assert row["n_meanings"] == apart
    assert row["rse"] == pytest.approx(math.log(apart))
    assert row["rse_norm"] == (None if m == 1 else pytest.approx(float(apart > 1)))
    assert row["semantic_entropy"] == pytest.approx(math.log(apart), abs=1e-9)
    assert row["distinct_10"] == (None if m < 10 else apart)
    least = 1 / sum(0.8**i for i in range(10))
    assert row["utility_10"] == (None if m < 10 else pytest.approx(1 if apart > 1 else least))


def test_without_logprobs_there_is_no_semantic_entropy(tmp_path):
    root = tmp_path / "s"
    rows = [
        {**{"family": "f", "variant": "base", "task": "t", "prompt_id": "p", "sample": i}, "answer": a}
        | {"entropy": [0.5]}
        for i, a in enumerate("aab")
    ]
    canopy_store.import_rollouts(root, write_parquet(tmp_path / "r.parquet", rows), grader="G")
    from canopy_store.ingest.judge import ingest_judgments

    ingest_judgments(root, "J", "grades", grader="G")
    ingest_clusters(root, "J")
    row = metrics(root)["p"]
    assert row["semantic_entropy"] is None
    assert row["rse"] == pytest.approx(-2 / 3 * math.log(2 / 3) - 1 / 3 * math.log(1 / 3))


def test_any_k(tmp_path):
    matrix = [[2 if i % 2 == j % 2 else 0 for j in range(6)] for i in range(6)]
    root = judged_store(tmp_path / "s", {"p": (matrix, [-1.0] * 6)})
    with canopy_store.open(root) as con:
        told = con.sql(
            "select distinct_k(labels, 1), distinct_k(labels, 3), distinct_k(labels, 7), "
            "utility_k(labels, 3) from meaning_metrics where clustering = 'J.strict'"
        ).fetchall()
    assert told == [(1, 2, None, pytest.approx((1 + 0.8) / (1 + 0.8 + 0.64)))]


# ---------------------------------------------------------------- compared, planned, regressed


def random_prompts(seed: int, prompts: int, m: int, alike: float):
    rng = np.random.default_rng(seed)
    made = {}
    for n in range(prompts):
        same = rng.random((m, m)) < alike
        matrix = np.where(same | same.T | np.eye(m, dtype=bool), 2, 0)
        made[f"p{n}"] = (matrix.tolist(), (-rng.exponential(3, m)).tolist())
    return made


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """Base and sft of a dozen prompts; of the last, sft has fewer rollouts."""
    root = tmp_path_factory.mktemp("pair") / "s"
    judged_store(root, random_prompts(1, 12, 10, 0.15))
    fewer = {**random_prompts(2, 11, 10, 0.5), "p11": random_prompts(3, 1, 9, 0.5)["p0"]}
    return judged_store(root, fewer, variant="sft")


MEASURED = ("rse", "rse_norm", "semantic_entropy", "n_meanings", "utility_10", "n_intransitive")


@pytest.mark.parametrize("method", METHODS)
def test_measures_of_meaning_are_compared_like_any_other(pair, method):
    name = f"J.{method}"
    frame = canopy_store.compare(pair, metrics=MEASURED, clusters=name, by="task")
    wide = canopy_store.read(pair, "meaning_metrics").filter(clustering=name)
    for row in frame.to_dicts():
        sides = [
            wide.filter(variant=variant).sort("prompt_id").select("prompt_id", row["metric"])
            for variant in ("base", "sft")
        ]
        both = (
            sides[0].join(sides[1], on="prompt_id", suffix="_sft").filter(pl.col("prompt_id") != "p11")
        )
        base, sft = (both[c].cast(pl.Float64).to_numpy() for c in both.columns[1:])
        assert row["n_prompts"] == 11  # of the last, not as many rollouts were judged
        assert row["n_left_out"] == 1
        assert row["baseline"] == pytest.approx(base.mean())
        assert row["delta"] == pytest.approx((sft - base).mean())
        assert row["n_samples"] == 10
        if method == "components" and row["metric"] == "rse":
            assert row["delta"] < 0


def test_clusters_need_a_name_where_there_are_several(pair, canopy):
    call = ("compare", "--store", pair, "--metric", "rse")
    refused(canopy(*call), 2, "--clusters", "J.components, J.loose, J.strict")
    refused(canopy(*call, "--clusters", "K"), 1, "--clusters K")
    refused(canopy(*call, "--clusters", "J.loose", "--horizon", 1), 2, "--horizon")
    refused(canopy("compare", "--store", pair, "--clusters", "J.loose"), 2, "--clusters J.loose")
    assert canopy(*call, "--clusters", "J.loose")[0] == 0


def test_a_study_of_meaning_is_planned(pair):
    plan = canopy_store.power(pair, metric="rse", delta=0.2, samples=[10, 20], clusters="J.components")
    small, large = plan.sort("n_samples").to_dicts()
    assert small["pilot_samples"] == pytest.approx(10)
    assert small["n_prompts"] >= large["n_prompts"]
    assert small["sd_rollouts"] > 0
    with pytest.raises(UsageError, match="utility_10"):
        canopy_store.power(pair, metric="utility_10", delta=0.2, clusters="J.components")


def test_redrawn_rollouts_have_their_measures_recomputed():
    rng = np.random.default_rng(0)
    m, draws = 6, 50
    labels, logprobs = np.array([0, 0, 1, 2, 2, 2]), -rng.exponential(400, m)
    ones = np.ones(m)
    rollouts = Rollouts(ones, ones, ones, ones, 0 * ones, labels=labels, logprobs=logprobs)
    redrawn = redraw(rollouts, draws, np.random.default_rng(1))
    # the same stream: first what every measure draws, then what those of meaning draw
    stream = np.random.default_rng(1)
    stream.integers(0, m, (draws, m))
    for at, drawn in enumerate(stream.integers(0, m, (draws, m))):
        of = labels[drawn]
        counts = np.array([np.mean(of == c) for c in set(of.tolist())])
        weights = np.exp(logprobs[drawn] - logprobs[drawn].max())
        classes = np.array([weights[of == c].sum() for c in set(of.tolist())]) / weights.sum()
        classes = classes[classes > 0]
        assert redrawn["rse"][at] == pytest.approx(-(counts * np.log(counts)).sum())
        assert redrawn["rse_norm"][at] == pytest.approx(redrawn["rse"][at] / math.log(m))
        expected = -(classes * np.log(classes)).sum()
        assert redrawn["semantic_entropy"][at] == pytest.approx(expected, abs=1e-9)
        assert redrawn["n_meanings"][at] == len(counts)


def test_meaning_is_regressed_on_entropy_rate(pair):
    fit = canopy_store.regress(
        pair, "main", outcome="rse_norm", clusters="J.components", drop=("task", "family")
    )
    assert fit.fit["rows"] == 22
    assert "rse_norm" in fit.formula
    with pytest.raises(UsageError, match="--clusters"):
        canopy_store.regress(pair, "main", outcome="rse_norm", drop=("task", "family"))


def test_a_store_without_clusters_says_so(tmp_path):
    rows = [
        {"family": "f", "variant": v, "task": "t", "prompt_id": "p", "sample": 0, "entropy": [1.0]}
        for v in ("base", "sft")
    ]
    canopy_store.import_rollouts(tmp_path / "s", write_parquet(tmp_path / "r.parquet", rows))
    with pytest.raises(DataError, match="canopy ingest judge"):
        canopy_store.compare(tmp_path / "s", metrics=["rse"])
