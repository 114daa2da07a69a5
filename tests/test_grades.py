"""Right and wrong: graders, pass@k and its like, curves over k, uncertainty against correctness."""

from __future__ import annotations

import sys

import polars as pl
import pytest
from stores import refused, rollout_rows, write_parquet

import canopy_store
from canopy_store.errors import DataError, UsageError
from canopy_store.ingest.grade import ingest_grades
from canopy_store.ingest.graders import choice_letter, grader_of, last_number


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
