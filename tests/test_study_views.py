"""The views of studies, each against a derivation of its own in plain Python."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from stores import (
    write_document_scores,
    write_documents,
    write_parquet,
    write_scores,
    write_work,
)

import canopy_store
from canopy_store import sql, store
from canopy_store.store import treatments


@pytest.fixture(autouse=True)
def _no_database(monkeypatch):
    """canopy.duckdb is none of these tests' business, and takes longer to write than all else."""
    monkeypatch.setattr(sql, "write_database", lambda root: None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return canopy_store.init(tmp_path / "s")


def rows_of(root: Path, view: str, *keys: str) -> dict[Any, dict[str, Any]]:
    """A view's rows by some of its columns, of which no two rows have the same."""
    rows = canopy_store.read(root, view).to_dicts()
    found = {tuple(row[key] for key in keys) if len(keys) > 1 else row[keys[0]]: row for row in rows}
    assert len(found) == len(rows)
    return found


def same(found: Any, expected: Any) -> None:
    if expected is None or isinstance(expected, str | bool | int):
        assert found == expected
    else:
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def model(root: Path, variant: str, **more: Any) -> str:
    return store.add_model(root, {"family": "f", "variant": variant, **more})


# ---------------------------------------------------------------- gain and forgetting


def read_by(root: Path, variant: str, nlls: dict[str, float], **more: Any) -> str:
    """A scorer under which each token of a corpus's one document has this -log-probability."""
    for corpus, nll in nlls.items():
        rows = {"d": (["ab"] * 4, [-nll] * 4)}
        name = write_document_scores(root, {"family": "f", "variant": variant, **more}, corpus, rows)
    return name


def corpora(root: Path, *names: str) -> None:
    for name in names:
        write_documents(root, name, [{"document_id": "d", "text": "ab" * 4}])


@pytest.mark.parametrize("seed", range(3))
def test_the_frontier_is_what_no_other_child_of_the_parent_beats(root, seed):
    rng = random.Random(seed)
    names = ["new", "old", "other"]
    corpora(root, *names)
    model(root, "base")
    start = dict.fromkeys(names, 4.0)
    read_by(root, "base", start)
    nlls = {}
    for n in range(9):  # few values, so that many are alike
        nlls[f"f.v{n}"] = {name: rng.choice([3.0, 3.5, 4.0, 4.5]) for name in names}
        model(root, f"v{n}", parent_id="f/base")
        read_by(root, f"v{n}", nlls[f"f.v{n}"])
    model(root, "grandchild", parent_id="f/v0")  # of another parent: beats none of these
    read_by(root, "grandchild", dict.fromkeys(names, 0.5))
    keys = ("scorer_id", "parent_scorer_id", "in_corpus", "out_corpus")
    found = rows_of(root, "gain_forgetting", *keys)
    assert len(found) == 10 * 6
    for near, far in ((a, b) for a in names for b in names if a != b):
        points = {k: (start[near] - v[near], v[far] - start[far]) for k, v in nlls.items()}
        for child, (gain, lost) in points.items():
            row = found[child, "f.base", near, far]
            beaten = any(
                g >= gain and loss <= lost and (g, loss) != (gain, lost) for g, loss in points.values()
            )
            assert (row["gain"], row["forgetting"]) == (gain, lost)
            same(row["gain_per_byte"], gain / 2)
            same(row["forgetting_per_byte"], lost / 2)
            assert (row["on_frontier"], row["n_children"]) == (not beaten, 9)
            assert (row["variant"], row["parent_variant"]) == (child.removeprefix("f."), "base")
        alone = found["f.grandchild", "f.v0", near, far]
        assert (alone["on_frontier"], alone["n_children"]) == (True, 1)
        assert math.copysign(1, alone["forgetting"]) == -1


def test_a_corpus_that_only_one_of_the_two_has_read_is_in_no_pair(root):
    corpora(root, "new", "old", "other")
    model(root, "base")
    model(root, "child", parent_id="f/base")
    read_by(root, "base", {"new": 4.0, "old": 4.0, "other": 1.0})
    read_by(root, "child", {"new": 3.0, "old": 4.0})
    assert set(rows_of(root, "gain_forgetting", "in_corpus", "out_corpus")) == {
        ("new", "old"),
        ("old", "new"),
    }
    read_by(root, "child", {"new": 2.0}, number_format="int8", scorer_id="f.child.int8")
    assert len(rows_of(root, "gain_forgetting", "in_corpus", "out_corpus")) == 2


def test_what_was_read_without_its_first_token_has_gained_and_forgotten_nothing_that_is_known(root):
    corpora(root, "new", "old")
    model(root, "base")
    model(root, "child", parent_id="f/base")
    words = ["ab"] * 4
    for corpus in ("new", "old"):
        scored = {"base": [-9.0, -1.0, -1.0, -1.0], "child": [-1.0, -1.0, -1.0]}
        for variant, own in scored.items():
            write_document_scores(root, {"family": "f", "variant": variant}, corpus, {"d": (words, own)})
    found = rows_of(root, "forgetting", "corpus")
    assert [(row["r"], row["transfer"]) for row in found.values()] == [(-1.0, None)] * 2
    point = rows_of(root, "gain_forgetting", "in_corpus")["new"]
    assert [point[name] for name in ("gain", "forgetting", "on_frontier")] == [None] * 3


def test_what_has_no_score_is_on_no_frontier_and_in_nobodys_way(root):
    corpora(root, "new", "old")
    model(root, "base")
    read_by(root, "base", {"new": math.inf, "old": 4.0})
    for variant, new in (("a", math.inf), ("b", 3.0)):
        model(root, variant, parent_id="f/base")
        read_by(root, variant, {"new": new, "old": 5.0})
    found = rows_of(root, "gain_forgetting", "variant", "in_corpus")
    assert [found["a", "new"][name] for name in ("gain", "gain_per_byte", "on_frontier")] == [None] * 3
    assert (found["b", "new"]["gain"], found["b", "new"]["on_frontier"]) == (math.inf, True)
    assert (found["a", "old"]["forgetting"], found["a", "old"]["on_frontier"]) == (None, None)


# ---------------------------------------------------------------- cost


def test_cost_is_of_all_shards_and_of_none_where_one_is_not_known(root):
    gpu = {"device": "cuda:0", "energy_method": "NVML"}
    cpu = {"device": "cpu", "energy_method": "RAPL, 1 packages"}
    jobs = {
        "measured": [{"tokens": 30, "seconds": 2.0, "energy_j": 6.0, **gpu}] * 2,
        "in part": [
            {"tokens": 30, "seconds": 2.0, "energy_j": 6.0, **gpu},
            {"tokens": 10, "seconds": 1.0, "device": "cuda:0"},
        ],
        "in two ways": [
            {"tokens": 30, "seconds": 2.0, "energy_j": 6.0, **gpu},
            {"tokens": 10, "seconds": 2.0, "energy_j": 1.0, **cpu},
        ],
        "resumed": [{"tokens": 30, "seconds": 2.0, "energy_j": 6.0, **gpu}, {}],
        "of no tokens": [{"seconds": 4.0, "energy_j": 1.0}],
        "of nothing": [{"tokens": 0, "seconds": 0.0, "energy_j": 0.0, **gpu}],
    }
    corpora(root, "old", "new")
    for name, shards in jobs.items():
        write_work(root, name, "old", shards)
    write_work(root, "measured", "new", jobs["measured"][:1])
    found = rows_of(root, "cost_per_token", "name", "run_id")
    assert {row["kind"] for row in found.values()} == {"document_scores"}
    columns = ("n_shards", "tokens", "seconds", "tokens_per_second", "energy_j", "joules_per_token")
    expected = {
        ("measured", "old"): (2, 60, 4.0, 15.0, 12.0, 0.2),
        ("measured", "new"): (1, 30, 2.0, 15.0, 6.0, 0.2),
        ("in part", "old"): (2, 40, 3.0, 40 / 3, None, None),
        ("in two ways", "old"): (2, 40, 4.0, 10.0, None, None),
        ("resumed", "old"): (2, None, None, None, None, None),
        ("of nothing", "old"): (1, 0, 0.0, None, 0.0, None),
        ("of no tokens", "old"): (1, None, 4.0, None, 1.0, None),
    }
    assert {key: tuple(row[name] for name in columns) for key, row in found.items()} == expected
    mixed = found["in two ways", "old"]
    assert (mixed["device"], mixed["energy_method"]) == ("cpu, cuda:0", "NVML, RAPL, 1 packages")
    assert found["of no tokens", "old"]["device"] is None


# ---------------------------------------------------------------- collapse

FULL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
WORDS = [
    "The",
    "the",
    "fox",
    "dog",
    "DOG",
    "naïve",
    "7",
    "runs,",
    "sleeps;",
    "over",
    "lazy",
    "—",
    "quick.",
]


def text_of(rng: random.Random, most: int = 9) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(0, most)))


def tokens_of(text: str) -> list[str]:
    return re.findall(r"\s*\S+", text)


def pairs_of(texts: list[str]) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for text in texts:
        words = re.findall(r"[^\W_]+", text.lower())
        found.update(pairwise(words))
    return found


def tail_of(documents: list[list[str]]) -> set[str]:
    """The rarest strings, added one number of occurrences after the other until a tenth is reached."""
    counts = Counter(token for tokens in documents for token in tokens)
    tail: set[str] = set()
    for number in sorted(set(counts.values())):
        if sum(counts[token] for token in tail) >= 0.1 * counts.total():
            break
        tail |= {token for token, n in counts.items() if n == number}
    return tail


def roll(root: Path, path: Path, variant: str, texts: list[str | None], task: str = "t", **policy: Any):
    """A run of one prompt with these texts, a step a token; its log-probabilities by its keys."""
    rng = random.Random(f"{variant}{task}")
    rows = []
    for sample, text in enumerate(texts):
        steps = max(len(tokens_of(text or "")), 1)
        rows.append(
            {
                **{"family": "f", "variant": variant, "task": task, "prompt_id": "p", "sample": sample},
                "text": text,
                "entropy": [rng.uniform(0, 2) for _ in range(steps)],
                "logprob": [-rng.uniform(0, 2) for _ in range(steps)],
            }
        )
    file = write_parquet(path / f"{variant}.{task}.parquet", rows)
    canopy_store.import_rollouts(root, file, **{**FULL, **policy})
    return {("p", row["sample"]): row["logprob"] for row in rows}


def perplexity(logprobs: dict[Any, list[float]]) -> float:
    """One prompt's: a mean over rollouts of their sums, over their mean length."""
    return math.exp(-sum(map(sum, logprobs.values())) / sum(map(len, logprobs.values())))


def data(root: Path, name: str, generator: str | None, **more: Any) -> str:
    method = "rollouts" if generator else "given"
    row = {"data_sha256": name, "name": name, "lines": 1, "method": method, "generator": generator}
    treatments.add_dataset(root, {**row, **more})
    return name


class Reading:
    """A corpus, and how each scorer reads it, all in plain Python."""

    def __init__(self, rng: random.Random, corpus: str, splits: tuple[str, ...]) -> None:
        self.corpus = corpus
        self.texts = [text_of(rng, 12) + " fox dog" for _ in range(12)]
        self.splits = [splits[n % len(splits)] for n in range(len(self.texts))]
        self.tokens = [tokens_of(text) for text in self.texts]
        self.tail = tail_of([tokens[1:] for tokens in self.tokens])
        self.logprobs: dict[str, list[list[float]]] = {}
        self.rng = rng

    def write(self, root: Path) -> None:
        given = zip(self.texts, self.splits, strict=True)
        rows = [{"document_id": f"d{n}", "text": t, "split": s} for n, (t, s) in enumerate(given)]
        write_documents(root, self.corpus, rows)

    def read_by(self, root: Path, variant: str) -> None:
        """The first token of a document is read and not scored."""
        steps = [[-self.rng.uniform(0, 5) for _ in tokens[1:]] for tokens in self.tokens]
        self.logprobs[variant] = steps
        rows = {f"d{n}": pair for n, pair in enumerate(zip(self.tokens, steps, strict=True))}
        write_document_scores(root, {"family": "f", "variant": variant}, self.corpus, rows)

    def nll(self, variant: str, split: str, tail: bool = False) -> float | None:
        if variant not in self.logprobs:
            return None
        values = [
            -logprob
            for tokens, steps, part in zip(self.tokens, self.logprobs[variant], self.splits, strict=True)
            for token, logprob in zip(tokens[1:], steps, strict=True)
            if part == split and (not tail or token in self.tail)
        ]
        return sum(values) / len(values) if values else None


@pytest.mark.parametrize("seed", range(3))
def test_collapse_is_what_python_makes_of_the_same_texts(root, tmp_path, seed):
    rng = random.Random(seed)
    readings = [Reading(rng, "real", ("train", "test")), Reading(rng, "other", ("all",))]
    # each is trained from the same random weights: what ties them is who wrote the text
    model(root, "untrained")
    chain = ["real", "one", "two", "three"]
    for number, variant in enumerate(chain):
        writer = f"f/{chain[number - 1]}" if number else None
        more = {"generation": number} if number else {}
        text = data(root, f"text of {variant}", writer, **more)
        model(root, variant, parent_id="f/untrained", data_sha256=text)
    for reading in readings:
        reading.write(root)
    for variant in ("real", "one", "three"):  # two has read nothing
        readings[0].read_by(root, variant)
    readings[1].read_by(root, "one")  # generation 0 has not read this
    texts, logs = {}, {}
    for variant in chain:
        for task, temperature in (("t", 1.0), ("cold", 0.5)):
            texts[variant, task] = [text_of(rng) for _ in range(15)]
            written = texts[variant, task]
            logs[variant, task] = roll(root, tmp_path, variant, written, task, temperature=temperature)
    origin = {}
    for variant, task in (("one", "t"), ("two", "cold")):
        origin[variant, task] = {
            key: [-rng.uniform(0, 3) for _ in steps] for key, steps in logs[variant, task].items()
        }
        write_scores(root, FULL, origin[variant, task], f"f.{variant}.{task}", "f/real")
    cold = {**FULL, "temperature": 0.5}  # the perplexity is not that of a colder policy
    write_scores(root, cold, logs["three", "cold"], "f.three.cold", "f/real")
    found = rows_of(root, "collapse", "variant", "task", "corpus", "split")
    assert len(found) == len(chain) * 2 * 3
    pooled = rows_of(root, "model_metrics", "variant", "task")
    for (variant, task, corpus, split), row in found.items():
        (reading,) = [each for each in readings if each.corpus == corpus]
        assert (row["generation"], row["origin_id"]) == (chain.index(variant), "f/real")
        assert row["scorer_id"] == (f"f.{variant}" if variant in reading.logprobs else None)
        for column, tail in (("nll", False), ("tail_nll", True)):
            own, first = (reading.nll(each, split, tail) for each in (variant, "real"))
            same(row[column], own)
            same(row[f"{column}_rise"], None if None in (own, first) else own - first)
        real, made = pairs_of(reading.texts), pairs_of(texts[variant, task])
        rare = {pair for pair, n in real.items() if n <= 2}
        same(row["rare_kept"], len(rare & made.keys()) / len(rare))
        same(row["unseen"], sum(n for pair, n in made.items() if pair not in real) / made.total())
        scored = origin.get((variant, task))
        if (variant, task) == ("real", "t"):  # its own policy is the whole distribution
            scored = logs["real", "t"]
        same(row["origin_ppl"], perplexity(scored) if scored else None)
        for column in ("ce_star", "entropy_rate", "rho_pearson", "semantic_diversity", "embedder"):
            same(row[column], pooled[variant, task][column])
        assert row["temperature"] == (1.0 if task == "t" else 0.5)


def test_without_data_sets_generations_are_those_of_the_parents(root, tmp_path):
    write_documents(root, "real", [{"document_id": "d", "text": "a b"}])
    model(root, "base")
    model(root, "one", parent_id="f/base")
    model(root, "two", parent_id="f/one")
    model(root, "four", parent_id="f/three", generation=4)  # three is not stored
    model(root, "round", parent_id="f/trip")
    model(root, "trip", parent_id="f/round")
    for variant, nll in (("base", 1.0), ("one", 1.5), ("two", 2.5), ("four", 4.0), ("round", 3.0)):
        read_by(root, variant, {"real": nll})
        roll(root, tmp_path, variant, ["a b"])
    found = rows_of(root, "collapse", "variant")
    assert {
        variant: (row["generation"], row["origin_id"], row["nll"], row["nll_rise"])
        for variant, row in found.items()
    } == {
        "base": (0, "f/base", 1.0, 0.0),
        "one": (1, "f/base", 1.5, 0.5),
        "two": (2, "f/base", 2.5, 1.5),
        "four": (4, None, 4.0, None),
        "round": (1, None, 3.0, None),
    }


def test_a_data_set_that_names_no_writer_is_the_parents_where_it_was_generated(root, tmp_path):
    write_documents(root, "real", [{"document_id": "d", "text": "a b"}])
    model(root, "base")
    model(root, "given", parent_id="f/base", data_sha256=data(root, "real", None))
    model(root, "made", parent_id="f/given", data_sha256=data(root, "made", None, generation=1))
    model(root, "named", parent_id="f/base", data_sha256=data(root, "named", "f/given"))
    for variant in ("given", "made", "named"):
        read_by(root, variant, {"real": 1.0})
        roll(root, tmp_path, variant, ["a b"])
    found = rows_of(root, "collapse", "variant")
    assert {name: (row["generation"], row["origin_id"]) for name, row in found.items()} == {
        "given": (0, "f/given"),
        "made": (1, "f/given"),
        "named": (1, "f/given"),
    }


def test_only_corpora_of_the_lineage_are_shown_and_runs_without_any_are_not(root, tmp_path):
    corpora(root, "mine", "theirs")
    for variant, corpus in (("a", "mine"), ("b", "theirs"), ("c", None)):
        model(root, variant)
        roll(root, tmp_path, variant, ["ab"])
        if corpus:
            read_by(root, variant, {corpus: 1.0})
    assert set(rows_of(root, "collapse", "variant", "corpus")) == {("a", "mine"), ("b", "theirs")}


def test_a_checkpoint_has_one_scorer_and_rises_are_between_like_ones(root, tmp_path):
    corpora(root, "real")
    model(root, "base")
    read_by(root, "base", {"real": 1.0})
    for variant in ("plain", "chat", "other", "rough"):
        model(root, variant, parent_id="f/base")
        roll(root, tmp_path, variant, ["ab"])
    read_by(root, "plain", {"real": 3.0}, scorer_id="a first name")
    read_by(root, "plain", {"real": 2.0})
    read_by(root, "plain", {"real": 4.0}, scorer_id="f.plain.int8", number_format="int8")
    read_by(root, "rough", {"real": 4.0}, scorer_id="f.rough.int8", number_format="int8")
    read_by(root, "chat", {"real": 2.0}, scorer_id="f.chat.chat", template="chat")
    read_by(root, "other", {"real": 5.0}, scorer_id="a", context_sha256="c")
    found = rows_of(root, "collapse", "variant")
    columns = ("scorer_id", "nll", "nll_rise", "tail_nll", "tail_nll_rise", "n_tail_tokens")
    assert {name: tuple(row[c] for c in columns) for name, row in found.items()} == {
        "plain": ("f.plain", 2.0, 1.0, 2.0, 1.0, 4),
        "chat": ("f.chat.chat", 2.0, None, 2.0, None, 4),
        "other": (None,) * 6,
        "rough": (None,) * 6,
    }


def test_what_texts_that_were_left_out_would_tell_is_null(root, tmp_path):
    write_documents(root, "whole", [{"document_id": "d", "text": "a b c"}])
    write_documents(root, "bare", [{"document_id": "d", "text": "a b"}, {"document_id": "e"}])
    write_documents(root, "short", [{"document_id": "d", "text": "a"}])
    model(root, "base")
    scorer = {"family": "f", "variant": "base"}
    for corpus, tokens in (("whole", ["a", "b"]), ("short", None)):
        write_document_scores(root, scorer, corpus, {"d": (tokens, [-1.0, -2.0])})
    both = {"d": (["a", "b"], [-1.0, -2.0]), "e": (None, [-1.0])}
    write_document_scores(root, scorer, "bare", both)
    roll(root, tmp_path, "base", ["A, b", "x"])
    roll(root, tmp_path, "base", ["a b", None], "left out")
    roll(root, tmp_path, "base", ["a", "b c d"], "words")
    roll(root, tmp_path, "base", ["a"], "word")
    found = rows_of(root, "collapse", "task", "corpus")
    shares = {key: (row["rare_kept"], row["unseen"]) for key, row in found.items()}
    assert shares == {
        ("t", "whole"): (0.5, 0.0),
        ("words", "whole"): (0.5, 0.5),
        ("word", "whole"): (0.0, None),
        ("t", "short"): (None, 1.0),
        ("words", "short"): (None, 1.0),
        ("word", "short"): (None, None),
        ("left out", "whole"): (None, None),
        ("left out", "short"): (None, None),
        **{(task, "bare"): (None, None) for task in ("t", "words", "word", "left out")},
    }
    tails = {corpus: row["tail_nll"] for (_, corpus), row in found.items()}
    assert tails == {"whole": 1.5, "short": None, "bare": None}
    assert found["t", "bare"]["nll"] == pytest.approx(4 / 3)


def test_a_perplexity_is_of_a_whole_run(root, tmp_path):
    corpora(root, "real")
    model(root, "base")
    read_by(root, "base", {"real": 1.0})
    model(root, "child", parent_id="f/base")
    steps = roll(root, tmp_path, "child", ["a b", "c d"])
    other = roll(root, tmp_path, "child", ["a b", "c d"], "outside")
    write_scores(root, FULL, {("p", 0): steps["p", 0]}, "f.child.t", "f/base")
    write_scores(root, FULL, {**other, ("p", 1): [-1.0, -math.inf]}, "f.child.outside", "f/base")
    found = rows_of(root, "collapse", "task")
    assert [found[task]["origin_ppl"] for task in ("t", "outside")] == [None, None]
    write_scores(root, FULL, steps, "f.child.t", "f/base")
    assert rows_of(root, "collapse", "task")["t"]["origin_ppl"] == pytest.approx(perplexity(steps))
