"""Right and wrong: graders, pass@k and its like, curves over k, uncertainty against correctness."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from fractions import Fraction
from math import comb

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import refused, rollout_rows, write_parquet

import canopy_store
from canopy_store.analysis.grades import majority_at_k
from canopy_store.analysis.pass_at_k import overtaken_at
from canopy_store.analysis.uncertainty import (
    auroc,
    brier,
    ece,
    prediction_rejection,
    reliability_bins,
)
from canopy_store.errors import DataError, UsageError
from canopy_store.ingest.grade import ingest_grades
from canopy_store.ingest.graders import choice_letter, grader_of, last_number
from canopy_store.report.facts import gather


def graded_store(root, texts, reference="42", **more):
    """A store of one prompt with a rollout of each of these texts."""
    rows = rollout_rows(lengths=(1,) * len(texts), text=texts, **more)
    file = write_parquet(
        root.parent / f"{root.name}.parquet", [{**r, "reference": reference} for r in rows]
    )
    canopy_store.import_rollouts(root, file)
    return root


# ---------------------------------------------------------------- graders


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is B.", "B"),
        ("so (a) it is", "A"),
        (r"thus \boxed{C}", "C"),
        (r"\boxed{\text{(D)}}", "D"),
        ("Answer: **D**", "D"),
        ("Answer: (b)", "B"),
        ("**C**", "C"),
        ("B", "B"),
        ("B. Paris", "B"),
        ("The answer is A. No: the answer is B", "B"),
        ("A. Rome\nB. Paris", None),
        ("(A) or (B)", None),
        ("The answer is a number", None),
        ("the answer is not Berlin", None),
        ("I think that some option(s) matter", None),
        ("", None),
        ("answer" + " " * 50_000, None),
        ("\n" * 50_000, None),
    ],
)
def test_the_choice_that_is_stated_last(text, letter):
    assert choice_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "answer", "reference", "correct"),
    [
        ("so 1,234.50 dollars", "1234.5", "1234.5", True),
        ("$1,000,000", "1000000", "1e6", True),
        (r"\$1{,}000", "1000", "1000", True),
        ("x = -3", "-3", "-3", True),
        ("x = −3", "-3", "-3", True),
        ("from 3-5", "5", "-5", False),
        ("it is 25%", "25%", "0.25", True),
        ("it is 25%", "25%", "25", True),
        ("it is 0.25", "0.25", "25 %", True),
        ("it is 25%", "25%", "2500%", False),
        ("5kg, then", "5", "5", True),
        ("half, 1/2", "1/2", "0.50", True),
        ("3/0", "3", "3", True),
        ("007.10 m", "7.1", "#### 7.1", True),
        (".5", "0.5", "1/2", True),
        ("H2O", None, "2", False),
        ("none", None, "2", False),
        ("first 7 then 8", "8", "7", False),
        ("9" * 5000, "9" * 5000, "9" * 5000, True),
        ("100000000000000000001", "100000000000000000001", "100000000000000000000", False),
    ],
)
def test_the_last_number_by_its_value(text, answer, reference, correct):
    assert grader_of("number")(text, reference) == (answer, correct, float(correct))
    # the text of a number is a number of the same value
    if answer is not None:
        assert last_number(answer).value == last_number(text).value


@pytest.mark.parametrize(
    ("text", "reference", "correct"),
    [
        (r"so $\frac{1}{2}$", "0.5", True),
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", True),
        ("the answer is 7", "$7$", True),
        (r"$x = \sqrt{8}$", r"2\sqrt{2}", True),
        (r"$\{1, 2\}$", r"$\{2, 1\}$", True),
        ("$3$", "4", False),
        ("no idea", "4", False),
    ],
)
def test_mathematics_by_what_it_means(text, reference, correct):
    pytest.importorskip("math_verify")
    grade = grader_of("math")(text, reference)
    assert (grade.correct, grade.score) == (correct, float(correct))
    assert (grade.answer is None) == (text == "no idea")


def test_without_math_verify_the_line_says_what_to_install(tmp_path, canopy, monkeypatch):
    root = graded_store(tmp_path / "s", ["4"], "4")
    monkeypatch.setitem(sys.modules, "math_verify", None)
    grade = ("ingest", "grade", "--store", root, "--grader", "math")
    refused(canopy(*grade), 2, "math-verify", "pip install")
    assert not (root / "plans" / "grader=math.json").exists()


OWN = """
def close(text, reference):
    return text, 1 - min(1, abs(float(text) - float(reference)) / 10)
def yes(text, reference):
    return text == reference
def half(text, reference):
    return 0.5
def odd(text, reference):
    return "right"
def wide(text, reference):
    return 7.5
def vector(text, reference):
    import numpy
    return numpy.ones(2)
def bare(text, reference):
    return 1, 1.0
"""


def test_a_function_of_ones_own(tmp_path, canopy, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_graders.py").write_text(OWN)
    root = graded_store(tmp_path / "s", ["42", "37", "9"])
    for name in ("close", "yes", "half"):
        function = ("--function", f"own_graders:{name}", "--name", name)
        assert canopy("ingest", "grade", "--store", root, "--grader", "python", *function)[0] == 0
    grades = canopy_store.read(root, "grades").sort("grader", "sample")
    assert grades.select("grader", "answer", "correct", "score").rows() == [
        *(("close", "42", True, 1.0), ("close", "37", False, 0.5), ("close", "9", False, 0.0)),
        *(("half", None, False, 0.5),) * 3,
        *(("yes", None, True, 1.0), ("yes", None, False, 0.0), ("yes", None, False, 0.0)),
    ]
    assert canopy_store.verify(root).is_empty()
    # another text of the function is another grader
    del sys.modules["own_graders"]
    (tmp_path / "own_graders.py").write_text(OWN.replace("0.5", "0.25"))
    again = ("ingest", "grade", "--store", root, "--grader", "python", "--function", "own_graders:half")
    refused(canopy(*again, "--name", "half"), 1, "function_source")
    monkeypatch.delitem(sys.modules, "own_graders")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--grader", "python"), 2, ["--function", "module:name"]),
        (("--grader", "python", "--function", "bad_graders"), 2, ["module:name"]),
        (("--grader", "python", "--function", "no_such_module:f"), 2, ["cannot be imported"]),
        (("--grader", "python", "--function", "bad_graders:none"), 2, ["no function none"]),
        (("--grader", "python", "--function", "bad_graders:close"), 1, ["sample 1", "ValueError"]),
        (("--grader", "python", "--function", "bad_graders:odd"), 1, ["sample 0", "'right'"]),
        (("--grader", "python", "--function", "bad_graders:wide"), 1, ["sample 0", "0 to 1"]),
        (("--grader", "python", "--function", "bad_graders:vector"), 1, ["sample 0", "array"]),
        (("--grader", "python", "--function", "bad_graders:bare"), 1, ["sample 0", "(1, 1.0)"]),
        (("--grader", "number", "--function", "bad_graders:yes"), 2, ["only with --grader python"]),
        (("--grader", "number", "--pattern", "x"), 2, ["only with --grader regex"]),
        (("--grader", "regex", "--pattern", "(?P<"), 2, ["not a regular expression"]),
        (("--grader", "choice"), 1, ["prompt p", "no choice letter"]),
    ],
)
def test_bad_calls_and_failing_graders_store_nothing(tmp_path, canopy, monkeypatch, options, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad_graders.py").write_text(OWN)
    root = graded_store(tmp_path / "s", ["42", "seven"])
    refused(canopy("ingest", "grade", "--store", root, *options), code, *said)
    assert canopy_store.read(root, "grades").is_empty()
    assert not list((root / "grades").rglob("*.parquet"))
    assert canopy_store.verify(root).filter(~pl.col("harmless")).is_empty()
    sys.modules.pop("bad_graders", None)


def test_a_reference_that_is_missing_or_unreadable_is_named(tmp_path, canopy):
    rows = rollout_rows(lengths=(1, 1), prompts=("p", "q"), text=["1", "2"])
    file = write_parquet(
        tmp_path / "r.parquet",
        [{**row, "reference": None if row["prompt_id"] == "q" else "1"} for row in rows],
    )
    canopy_store.import_rollouts(tmp_path / "s", file)
    for grader in ("exact", "choice", "number"):
        result = canopy("ingest", "grade", "--store", tmp_path / "s", "--grader", grader)
        refused(result, 1, "prompt", "reference")
    assert canopy_store.read(tmp_path / "s", "grades").is_empty()
    with pytest.raises(DataError, match="prompt p sample 0: its reference 'x' has no number"):
        ingest_grades(graded_store(tmp_path / "t", ["1"], "x"), "number")
    with pytest.raises(UsageError, match="--grader nothing: one of exact, regex"):
        ingest_grades(tmp_path / "t", "nothing")


# ---------------------------------------------------------------- k of n


def drawn(n, k):
    """Every set of k of n rollouts."""
    return list(itertools.combinations(range(n), k))


def majority_by_counting(answers, correct, k):
    """The chance that the commonest answer of k is right, from every draw; None has no vote."""
    total = Fraction(0)
    for places in drawn(len(answers), k):
        votes = Counter(answers[i] for i in places if answers[i] is not None)
        best = [answer for answer, count in votes.items() if count == max(votes.values())]
        right = sum(any(correct[i] for i in places if answers[i] == answer) for answer in best)
        total += Fraction(right, len(best)) if best else 0
    return total / len(drawn(len(answers), k))


@settings(max_examples=150, deadline=None)
@given(
    answers=st.lists(st.sampled_from([None, "a", "b", "c", "d", "e"]), min_size=1, max_size=9),
    right=st.sets(st.sampled_from("abcde")),
)
def test_majorities_are_those_of_every_draw(answers, right):
    correct = [answer in right for answer in answers]
    sizes = Counter(answer for answer in answers if answer is not None)
    ks = list(range(1, len(answers) + 2))
    found = majority_at_k(
        list(sizes.values()), [float(a in right) for a in sizes], answers.count(None), ks
    )
    expected = [float(majority_by_counting(answers, correct, k)) for k in ks[:-1]]
    assert found[:-1] == pytest.approx(expected, abs=1e-12)
    assert np.isnan(found[-1])


def test_majorities_of_many_rollouts():
    """One right answer against one wrong: a hypergeometric tail; a thousand rollouts do not overflow."""
    for right, wrong, k in [(600, 400, 256), (30, 34, 64), (3, 1000, 1), (700, 300, 128)]:
        ways = [comb(right, i) * comb(wrong, k - i) for i in range(k + 1)]
        ahead = sum(way for i, way in enumerate(ways) if 2 * i > k)
        tied = sum(way for i, way in enumerate(ways) if 2 * i == k)
        expected = float(Fraction(2 * ahead + tied, 2 * comb(right + wrong, k)))
        assert majority_at_k([right, wrong], [1, 0], 0, [k])[0] == pytest.approx(expected, rel=1e-9)
    # as many answers as rollouts: every one is as common, one is right
    assert majority_at_k([1] * 64, [1] + [0] * 63, 0, [1, 8, 64]) == pytest.approx([1 / 64] * 3)


def random_store(root, seed, variants=("base", "sft"), most=6, prompts=5):
    """A store of graded rollouts, prompts of 1 to ``most``; the rows as they were made."""
    rng = np.random.default_rng(seed)
    rows = []
    for variant in variants:
        for p in range(prompts):
            chance = rng.choice([0.0, 0.3, 0.7, 1.0])
            for i in range(int(rng.integers(1, most + 1))):
                answer = "r" if rng.random() < chance else rng.choice(["x", "y", None])
                steps = int(rng.integers(1, 4))
                rows.append(
                    {
                        **{"family": "f", "variant": variant, "task": "t", "prompt_id": f"p{p}"},
                        **{"sample": i, "answer": answer, "correct": bool(answer == "r")},
                        # what floats hold exactly, so that ties are ties
                        "entropy": rng.choice([0.125, 0.5, 0.875], steps).tolist(),
                        "logprob": (-rng.choice([0.125, 0.5, 0.875], steps)).tolist(),
                    }
                )
    canopy_store.import_rollouts(root, write_parquet(root.parent / f"{root.name}.parquet", rows))
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_the_views_are_the_shares_of_every_draw(tmp_path, seed):
    rows = random_store(tmp_path / "s", seed)
    by_prompt = {}
    for row in rows:
        by_prompt.setdefault((f"f.{row['variant']}.t", row["prompt_id"]), []).append(row["correct"])
    most = {}
    for (run_id, _), correct in by_prompt.items():
        most[run_id] = max(most.get(run_id, 0), len(correct))
    expected, pooled = {}, {}
    for (run_id, prompt), correct in by_prompt.items():
        ks = {2**i for i in range(8) if 2**i <= most[run_id]} | {most[run_id]}
        for k in ks:
            of = [[correct[i] for i in places] for places in drawn(len(correct), k)]
            values = (None, None)
            if of:
                values = tuple(float(np.mean([f(each) for each in of])) for f in (any, all))
            expected[run_id, prompt, k] = values
            pooled.setdefault((run_id, k), []).append(values)
    view = canopy_store.read(tmp_path / "s", "pass_at_k")
    keys = ["run_id", "prompt_id", "k", "pass_at_k", "pass_hat_k"]
    found = {row[:3]: row[3:] for row in view.select(keys).iter_rows()}
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, abs=1e-12) if values[0] is not None else values
        assert (found[key][0] is None) == (values[0] is None)
    for row in canopy_store.read(tmp_path / "s", "model_pass_at_k").to_dicts():
        values = pooled[row["run_id"], row["k"]]
        known = [v for v in values if v[0] is not None]
        assert (row["n_prompts"], row["n_counted"]) == (len(values), len(known))
        assert [row["pass_at_k"], row["pass_hat_k"]] == pytest.approx(np.mean(known, 0).tolist())
    graded = canopy_store.read(tmp_path / "s", "graded_prompts")
    for row in graded.to_dicts():
        correct = by_prompt[row["run_id"], row["prompt_id"]]
        assert (row["n_graded"], row["n_correct"]) == (len(correct), sum(correct))
        assert row["accuracy"] == pytest.approx(np.mean(correct))
    assert canopy_store.verify(tmp_path / "s").is_empty()


def test_the_cases_of_the_documentation(tmp_path):
    """docs/measures.md, 'Right and wrong': five rollouts, answers 7 7 8 8 9, of which 7 is right."""
    root = graded_store(tmp_path / "s", ["7", "7", "8", "8", "9"], "7")
    ingest_grades(root, "number")
    view = {row["k"]: row for row in canopy_store.read(root, "pass_at_k").to_dicts()}
    assert view.keys() == {1, 2, 4, 5}
    assert [view[k]["pass_at_k"] for k in (1, 2, 4)] == pytest.approx([0.4, 0.7, 1.0])
    assert [view[k]["pass_hat_k"] for k in (1, 2, 4)] == pytest.approx([0.4, 0.1, 0.0])
    assert majority_at_k([2, 2, 1], [1, 0, 0], 0, [1, 2, 4]) == pytest.approx([0.4, 0.4, 0.5])


def test_a_selection_has_its_own_accuracy(tmp_path):
    rows = rollout_rows(
        lengths=(1, 1, 1, 1), reward=[4.0, 3.0, 2.0, 1.0], correct=[True, True, False, None]
    )
    canopy_store.import_rollouts(tmp_path / "s", write_parquet(tmp_path / "r.parquet", rows))
    canopy_store.select_reward(tmp_path / "s", 0.5)
    view = canopy_store.read(tmp_path / "s", "graded_prompts").sort("selection")
    assert view.select("selection", "n_graded", "n_correct").rows() == [
        ("all", 3, 2),
        ("reward_top_50", 2, 2),
    ]
    assert canopy_store.read(tmp_path / "s", "model_pass_at_k").filter(selection="all")["k"].max() == 3


# ---------------------------------------------------------------- compared


def test_graded_measures_in_a_comparison_are_those_of_the_prompts(tmp_path):
    root = tmp_path / "s"
    rows = random_store(root, 7, most=8, prompts=9)
    metrics = ["accuracy", "pass_at_2", "pass_hat_2", "maj_at_2", "pass_at_1"]
    frame = canopy_store.compare(root, metrics=metrics, replicates=50)
    found = {row["metric"]: row for row in frame.to_dicts()}
    sides = {}
    for variant in ("base", "sft"):
        for p in {row["prompt_id"] for row in rows}:
            own = [row for row in rows if (row["variant"], row["prompt_id"]) == (variant, p)]
            sides[variant, p] = [row["answer"] for row in own], [row["correct"] for row in own]
    both = [p for p in {p for _, p in sides} if all(len(sides[v, p][0]) > 1 for v in ("base", "sft"))]
    for variant, column in (("base", "baseline"), ("sft", "treated")):
        of = [sides[variant, p] for p in both]
        pairs = [[[correct[i] for i in c] for c in drawn(len(correct), 2)] for _, correct in of]
        expected = {
            "pass_at_2": [np.mean([any(each) for each in pair]) for pair in pairs],
            "pass_hat_2": [np.mean([all(each) for each in pair]) for pair in pairs],
            "maj_at_2": [float(majority_by_counting(*each, 2)) for each in of],
        }
        for name, values in expected.items():
            assert found[name][column] == pytest.approx(np.mean(values), abs=1e-12)
            assert found[name]["n_prompts"] == len(both)
    for column in ("baseline", "treated", "delta", "delta_se"):
        assert found["accuracy"][column] == pytest.approx(found["pass_at_1"][column], abs=1e-12)
    assert "accuracy" in set(canopy_store.compare(root, replicates=20)["metric"])
    # rollouts drawn anew: the noise of accuracy is that of a share
    within = canopy_store.compare(root, metrics=["accuracy"], resample="rollouts", replicates=4000)
    spread = [
        np.mean(sides[v, p][1]) * (1 - np.mean(sides[v, p][1])) / len(sides[v, p][1]) for v, p in sides
    ]
    assert within["delta_se"][0] == pytest.approx(np.sqrt(sum(spread)) / 9, rel=0.06)
    panel = canopy_store.analysis.comparable.store_panel(root)
    assert panel["accuracy"].null_count() == 0
    assert "grader" not in panel.columns


def test_a_grader_is_named_where_there_are_several(tmp_path, canopy):
    root = tmp_path / "s"
    rows = [
        {**row, "text": text, "reference": "7"}
        for variant in ("base", "sft")
        for row, text in zip(
            rollout_rows(variant, lengths=(1, 2), prompts=("p", "q", "r")),
            ["7", "it is 7"] * 3,
            strict=True,
        )
    ]
    canopy_store.import_rollouts(root, write_parquet(tmp_path / "r.parquet", rows))
    compare = ("compare", "--store", root, "--metric", "accuracy")
    refused(canopy(*compare), 1, "no rollout is graded", "canopy ingest grade")
    refused(canopy("passk", "--store", root), 1, "no rollout is graded")
    refused(canopy("calibrate", "--store", root, "--column", "ce_star"), 1, "no rollout is graded")
    ingest_grades(root, "exact")
    ingest_grades(root, "number")
    for call in (
        compare,
        ("passk", "--store", root),
        ("calibrate", "--store", root, "--column", "n_tokens"),
    ):
        refused(canopy(*call), 2, "--grader", "exact, number")
        refused(canopy(*call, "--grader", "none"), 1, "--grader none", "exact, number")
        assert canopy(*call, "--grader", "number")[0] == 0
    refused(canopy(*compare, "--grader", "exact", "--horizon", 1), 2, "whole rollouts")
    refused(canopy("compare", "--store", root, "--metric", "pass_at_3"), 2, "pass_at_K")
    # without a name it is left out of what is compared by default
    assert "accuracy" not in set(canopy_store.compare(root, replicates=20)["metric"])
    power = ("power", "--store", root, "--metric", "accuracy", "--delta", 0.1)
    refused(canopy(*power), 2, "--grader")


def test_accuracy_in_a_plan_a_regression_and_the_report(tmp_path, canopy):
    root = tmp_path / "s"
    random_store(root, 11, most=8, prompts=14)
    plan = canopy_store.power(root, metric="accuracy", delta=0.2, samples=(4,), grader="imported")
    assert plan["n_prompts"][0] > 5
    fit = canopy_store.regress(root, "main", outcome="accuracy", drop=("task", "family"))
    assert fit.formula.startswith("accuracy ~ R_bar + N_bar")
    assert fit.fit["rows"] == 28
    facts = gather(root, baseline="base", selection="all", embedder=None, runs=(), seed=1, rollouts=0)
    compared = canopy_store.compare(root, metrics=["accuracy"], seed=1).row(0, named=True)
    shown = facts.changes.filter(metric="accuracy", level="task").row(0, named=True)
    assert (shown["delta"], shown["delta_se"]) == (compared["delta"], compared["delta_se"])
    regress = ("regress", "--store", root, "--model", "main", "--outcome", "accuracy", "--grader", "no")
    refused(canopy(*regress), 1, "--grader no")
    panel = canopy_store.read(root, "panel")
    with pytest.raises(UsageError, match="--grader: of a store"):
        canopy_store.regress(panel, "main", grader="imported")


# ---------------------------------------------------------------- curves over k


def curve_store(root, chances, n=16, prompts=12):
    """A store in which of each variant's prompts so many rollouts of n are right, in turn."""
    rows = [
        {**row, "correct": row["sample"] < right}
        for variant, rights in chances.items()
        for p in range(prompts)
        for right in [rights[p % len(rights)]]
        for row in rollout_rows(variant, lengths=(1,) * n, prompts=(f"p{p}",))
    ]
    canopy_store.import_rollouts(root, write_parquet(root.parent / "c.parquet", rows))
    return root


def test_where_the_baseline_overtakes(tmp_path, canopy):
    # sft solves half of the prompts nearly always and the others never; base solves each now and then
    root = curve_store(tmp_path / "s", {"base": [4], "sft": [15, 0], "better": [12]})
    frame = canopy_store.pass_at_k_curve(root, replicates=100)
    assert frame.filter(variant="sft")["k"].to_list() == [1, 2, 4, 8, 16]
    for row in frame.to_dicts():
        rights = {"base": [4], "sft": [15, 0], "better": [12]}
        for name, column in ((row["variant"], "treated"), ("base", "baseline")):
            expected = np.mean([1 - comb(16 - c, row["k"]) / comb(16, row["k"]) for c in rights[name]])
            assert row[column] == pytest.approx(expected, abs=1e-12)
    sft, better = (frame.filter(variant=name) for name in ("sft", "better"))
    assert sft["overtaken_at"].unique().to_list() == [4]
    assert better["overtaken_at"].to_list() == [None] * 5
    code, out, _ = canopy("passk", "--store", root, "--replicates", 50)
    assert code == 0
    assert "sft of f on t" in out
    assert "base overtakes at k = 4" in out
    assert "better of f on t: base does not overtake up to k = 16" in out
    refused(canopy("passk", "--store", root, "--variant", "none"), 1, "--variant none")
    with pytest.raises(UsageError, match="--measure best_of: one of pass_at"):
        canopy_store.pass_at_k_curve(root, measure="best_of")


@pytest.mark.parametrize(
    ("delta", "at"),
    [
        ([0.1, 0.0, -0.1], 4),
        ([0.1, -0.1, 0.1], None),
        ([-0.1, -0.2, -0.3], None),
        ([0.1, 0.2, 0.3], None),
        ([0.1, -0.2, -0.3], 2),
        ([-0.1, 0.1, -0.1], 4),
        ([0.0, 0.0, 0.0], None),
    ],
)
def test_a_crossing_is_one_from_ahead_to_behind(delta, at):
    assert overtaken_at(pl.Series([1, 2, 4]), pl.Series(delta)) == at


# ---------------------------------------------------------------- uncertainty


def some_rollouts(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 8))
    return rng.choice([0.0, 0.2, 0.5, 0.5, 0.9, 1.0], n), rng.integers(0, 2, n)


@pytest.mark.parametrize("seed", range(40))
def test_measures_of_uncertainty_by_their_definitions(seed):
    u, correct = some_rollouts(seed)
    wrong, right = u[correct == 0], u[correct == 1]
    if len(wrong) and len(right):
        pairs = [(w > r) + 0.5 * (w == r) for w in wrong for r in right]
        assert auroc(u, correct) == pytest.approx(np.mean(pairs))
    else:
        assert np.isnan(auroc(u, correct))
        assert np.isnan(prediction_rejection(u, correct))
    claimed = 1 - u
    assert brier(claimed, correct) == pytest.approx(sum((claimed - correct) ** 2) / len(u))
    error = 0.0
    for b in range(10):
        inside = [i for i, p in enumerate(claimed) if b / 10 < p <= (b + 1) / 10 or (b == 0 and p == 0)]
        if inside:
            error += abs(sum(correct[inside]) - sum(claimed[inside])) / len(u)
    assert ece(claimed, correct) == pytest.approx(error)


@pytest.mark.parametrize("seed", range(25))
def test_prediction_rejection_over_every_order_of_ties(seed):
    u, correct = some_rollouts(seed)
    if len(u) > 6 or correct.min() == correct.max():
        u, correct = u[:6], np.array([1, 0, 1, 1, 0, 0])[: min(6, len(u))]

    def area(order):
        return np.mean([correct[list(order[: kept + 1])].mean() for kept in range(len(order))])

    orders = list(itertools.permutations(range(len(u))))
    mine = np.mean([area(o) for o in orders if list(u[list(o)]) == sorted(u)])
    lot, best = np.mean([area(o) for o in orders]), max(area(o) for o in orders)
    assert prediction_rejection(u, correct) == pytest.approx((mine - lot) / (best - lot))


def test_calibration_of_a_store(tmp_path, canopy):
    root = tmp_path / "s"
    rows = pl.DataFrame(random_store(root, 3, prompts=8))
    rates = rows["logprob"].list.mean() * -1
    rows = rows.with_columns(rate=rates, h=pl.col("entropy").list.sum())
    rows = rows.with_columns(ce_star=pl.col("h").mean().over("variant", "prompt_id"))
    for column, of, map in (("surprisal_rate", "rate", "exp"), ("ce_star", "ce_star", None)):
        frame = canopy_store.calibrate(root, column, map=map, replicates=30)
        for row in frame.to_dicts():
            own = rows.filter(variant=row["variant"])
            u, correct = own[of].to_numpy().round(6), own["correct"].to_numpy()
            assert row["n_rollouts"] == len(own)
            assert row["accuracy"] == pytest.approx(correct.mean())
            assert row["auroc"] == pytest.approx(auroc(u, correct))
            assert row["prr"] == pytest.approx(prediction_rejection(u, correct))
            assert row["auroc_ci_low"] <= row["auroc"] <= row["auroc_ci_high"]
            if map is None:
                assert (row["brier"], row["ece"], row["map"]) == (None, None, None)
                assert "--map" in row["reason"]
            else:
                assert row["brier"] == pytest.approx(brier(np.exp(-u), correct), abs=1e-6)
    bins = reliability_bins(root, "surprisal_rate", map="exp")
    assert bins.group_by("run_id").agg(pl.col("n").sum())["n"].sum() == len(rows)
    weighted = bins.with_columns(gap=(pl.col("accuracy") - pl.col("confidence")).abs() * pl.col("n"))
    total = weighted.group_by("run_id").agg(pl.col("gap").sum() / pl.col("n").sum())
    frame = canopy_store.calibrate(root, "surprisal_rate", map="exp", replicates=2)
    assert dict(total.rows()) == pytest.approx(dict(frame.select("run_id", "ece").rows()))
    call = ("calibrate", "--store", root, "--column")
    refused(canopy(*call, "nonsense"), 2, "--column nonsense", "surprisal_rate")
    refused(canopy(*call, "ce_star", "--map", "complement"), 1, "no confidence from 0 to 1")
    refused(canopy(*call, "ce_star", "--table", "bins"), 2, "--map")
    refused(canopy(*call, "semantic_diversity"), 1, "has a value of it")
    assert canopy(*call, "surprisal_rate", "--map", "exp", "--table", "bins")[0] == 0


@pytest.mark.parametrize(("right", "said"), [(True, "all rollouts are right"), (False, "are wrong")])
def test_nothing_is_told_where_all_are_alike(tmp_path, right, said):
    rows = rollout_rows(lengths=(1, 2), prompts=("p", "q"), correct=[right, right])
    canopy_store.import_rollouts(tmp_path / "s", write_parquet(tmp_path / "r.parquet", rows))
    row = canopy_store.calibrate(tmp_path / "s", "n_tokens", replicates=5).row(0, named=True)
    assert (row["auroc"], row["prr"], row["accuracy"]) == (None, None, float(right))
    assert said in row["reason"]
    view = canopy_store.read(tmp_path / "s", "model_pass_at_k")
    assert view["pass_at_k"].to_list() == [float(right)] * 2
